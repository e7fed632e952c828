"""Sums, factorisations, k-means, draws, and which values are allowed. Knows no proxies."""
