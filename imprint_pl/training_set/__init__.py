"""What is kept of the training embeddings: rows, a sample or sums; for an epoch or for ever."""
