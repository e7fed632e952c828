"""The paper's method: turns embeddings and labels into a head. Start reading at `imprinting.py`."""
