"""Many recipes on many tasks: sweeps, and what their results say."""

# Memory of a sweep besides the embeddings, a process.
CHUNK_BYTES = 1 << 30
