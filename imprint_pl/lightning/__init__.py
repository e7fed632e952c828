"""Imprinting with a Lightning Trainer: in our module, or in yours (callback, attach, extend)."""
