"""Sums, factorisations, k-means, draws and checks of values, which do not depend on proxies."""
