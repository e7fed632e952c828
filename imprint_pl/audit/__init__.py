"""Audits a data set: finds labels that are likely wrong, duplicates and unusual images.

`find.py` looks for them in a data set and its embeddings; `page.py` and `write.py` show the
findings. Nothing is moved or deleted.
"""

from imprint_pl.audit.find import Audit, audit
from imprint_pl.audit.labels import LabelScores, label_scores

__all__ = ["Audit", "LabelScores", "audit", "label_scores"]
