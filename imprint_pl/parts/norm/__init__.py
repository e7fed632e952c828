"""NORM: normalisations of embeddings and proxies, one file each; `table.py` has them by name."""
