"""Stores for the training embeddings: all rows, a sample or sums; for an epoch or permanently."""
