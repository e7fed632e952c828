"""Every sample is a proxy: nearest neighbours among all training samples."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.parts.gen.base import PerClass


class All(PerClass):
    """all: the proxies of a class are all its samples.

    With AGG `mnn` this is the m-nearest-neighbours classifier. The head grows with the training
    set.

    Source: Westerhoff et al. 2025, Section 3.2.
    """

    name = "all"
    per_class = True
    fixed = True
    every_sample = True

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """`(n, d)` → `(n, d)`; nothing is random."""
        return x
