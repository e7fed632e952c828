"""k-means within each class: k proxies a class, one for each of its modes."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.gen.base import PerClass
from imprint_pl.kmeans import kmeans


class KMeans(PerClass):
    """kmeans: the proxies of a class are the centroids of its embeddings.

    Args:
        k: proxies a class. 20 is the paper's best; a class with fewer samples keeps its samples.

    Source: Westerhoff et al. 2025, Section 3.2.
    """

    name = "kmeans"

    def __init__(self, k: int = 20) -> None:
        if k < 1:
            raise ImprintError(f"k={k}: a class needs at least one proxy; give k ≥ 1")
        self.k = k

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """`(n, d)` → `(min(n, k), d)`."""
        return kmeans(x, self.k, seed=seed)
