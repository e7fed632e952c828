"""Experiments with many recipes on many tasks: sweeps, reports and comparisons of backbones."""

# Memory of a sweep for each process, besides the embeddings.
CHUNK_BYTES = 1 << 30
