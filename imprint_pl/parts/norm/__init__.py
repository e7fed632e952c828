"""NORM: what is done to embeddings and proxies. A file a method; `table.py` has them by name."""
