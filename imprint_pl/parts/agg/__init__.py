"""AGG: from proxies to class scores. A file a method; `table.py` has them by name."""
