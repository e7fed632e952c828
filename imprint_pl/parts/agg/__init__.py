"""AGG: turns proxies into class scores, one file for each method; `table.py` has them by name."""
