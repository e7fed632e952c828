"""Compares backbones on the same images by a sweep, to find the best one for a user's images.

`candidates.py` finds backbones and measures their speed on this machine. `run.py` compares them on
a part of the images, and then the best few on all images. `choice.py` recommends one, and `page.py`
writes the page.
"""

from imprint_pl.errors import needs

with needs("sweep", "compare"):
    import pandas  # noqa: F401, here, so that a missing one is named before the work
    import pyarrow  # noqa: F401

    from imprint_pl.experiments.compare.candidates import found_backbones
    from imprint_pl.experiments.compare.run import Comparison, Question, compare

__all__ = ["Comparison", "Question", "compare", "found_backbones"]
