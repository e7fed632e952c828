"""From a table of results to what people look at: tables, figures, a page.

`python -m imprint_pl report RESULTS` calls `write_report`. It reads results and knows nothing
about training.
"""

from imprint_pl.errors import needs

with needs("sweep", "report"):
    from imprint_pl.experiments.report.write import write_report

__all__ = ["write_report"]
