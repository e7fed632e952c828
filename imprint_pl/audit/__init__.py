"""Is the data clean? Labels that are likely wrong, duplicates, unusual images, and a page of them.

`find.py` looks for them in a data set and its embeddings; `page.py` and `write.py` show what was
found. Nothing is moved or deleted.
"""

from imprint_pl.audit.find import Audit, audit
from imprint_pl.audit.labels import LabelScores, label_scores

__all__ = ["Audit", "LabelScores", "audit", "label_scores"]
