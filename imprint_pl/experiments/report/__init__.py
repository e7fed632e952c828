"""Turns a table of results into tables, figures and a page for people to read.

`python -m imprint_pl report RESULTS` calls `write_report`. It reads results and knows nothing
about training.
"""

from imprint_pl.errors import needs

with needs("sweep", "report"):
    from imprint_pl.experiments.report.write import write_report

__all__ = ["write_report"]
