"""The paper: embeddings and labels to a head. `imprinting.py` comes first."""
