"""Ridge regression on the clusters of each class: k proxies a class, fitted against each other."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.numerics.kmeans import check_settings
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.gen.base import Generator, Proxies
from imprint_pl.parts.gen.kls import pseudo_classes
from imprint_pl.parts.gen.ridge import checked_lam, fit, solve


class KRidge(Generator):
    """kridge: the k-means clusters of each class become pseudo-classes of `ridge`.

    It is `kls` with ridge regression instead of least squares. A sample belongs to the nearest
    centroid of its own class; a centroid without samples is dropped. With k = 1 it is `ridge`.

    Args:
        k: clusters a class; a class with fewer samples has each sample as a cluster.
        lam: λ, "gcv" or "holdout", see `Ridge`. Not "loo": the rows that are left out would have to
            be clustered anew each time.
        intercept: see `Ridge`.
        engine: what clusters, see `imprint_pl.numerics.kmeans.kmeans_classes`.

    Raises:
        ImprintError: `k < 1`, an unknown engine, and what `Ridge` raises.

    Source: after Westerhoff et al. 2025 ("k-LS").
    """

    name = "kridge"

    def __init__(
        self, k: int = 5, lam: float | str = "gcv", intercept: bool = True, engine: str = "auto"
    ) -> None:
        check_settings(k, engine)
        self.k = k
        self.lam = checked_lam(lam, ("gcv", "holdout"))
        self.intercept = intercept
        self.engine = engine

    @property
    def clusters(self) -> bool:
        """Whether a sweep may give it clusters of all samples. With "holdout" it may not, since λ
        is chosen with clusters of the samples that are not held out."""
        return self.lam != "holdout"

    def __call__(
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, progress: bool = False
    ) -> Proxies:
        """Embeddings `x (N, d)`, labels `y (N,)` in 0..C−1 → at most `k C` proxies, and λ."""
        cluster, classes = pseudo_classes(
            x, y, num_classes, self.k, engine=self.engine, seed=seed, progress=progress
        )
        return fit(x, cluster, classes, self.lam, self.intercept, seed)

    def of_clusters(self, moments: Moments, classes: Tensor) -> Proxies:
        """Make the proxies from the `Moments` of the clusters, with a pooled Gram matrix, and the
        clusters' classes `(P,)`."""
        return solve(moments, self.lam, self.intercept, classes)
