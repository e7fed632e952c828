"""k-means within each class: k proxies a class, one for each of its modes."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.numerics.kmeans import check_settings, kmeans_classes
from imprint_pl.parts.gen.base import PerClass


class KMeans(PerClass):
    """kmeans: the proxies of a class are the centroids of its embeddings.

    Args:
        k: proxies a class. 20 is the paper's best; a class with fewer samples keeps its samples.
        engine: what clusters: `auto` (faiss on a GPU that faiss can use, otherwise torch), `faiss`,
            `torch` (all classes at once) or `exact` (torch until nothing moves); see
            `imprint_pl.numerics.kmeans.kmeans_classes`.

    Raises:
        ImprintError: `k < 1` or an unknown engine.

    Source: Westerhoff et al. 2025, Section 3.2.
    """

    name = "kmeans"
    per_class = True
    clusters = True
    shared = True

    def __init__(self, k: int = 20, engine: str = "auto") -> None:
        check_settings(k, engine)
        self.k = k
        self.engine = engine

    @property
    def fixed(self) -> bool:
        """Whether the seed changes nothing: the only cluster of k = 1 is the class mean."""
        return self.k == 1

    def of_classes(self, xs: list[Tensor], seed: int, progress: bool) -> list[Tensor]:
        """Each class's embeddings `(n, d)` → `(min(n, k), d)`; all at once where the engine can."""
        return kmeans_classes(xs, self.k, seed=seed, engine=self.engine, progress=progress)
