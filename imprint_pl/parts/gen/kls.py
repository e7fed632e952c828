"""Least squares on the clusters of each class: k proxies a class, fitted against each other."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.numerics.draws import rows_by_class
from imprint_pl.numerics.kmeans import check_settings
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.passes import CHUNK
from imprint_pl.parts.gen.base import Generator, Proxies, by_groups
from imprint_pl.parts.gen.kmeans import KMeans
from imprint_pl.parts.gen.ls import check_lam, solve


class KLeastSquares(Generator):
    """kls: the k-means clusters of each class become pseudo-classes of `ls`.

    The proxies are those of `LeastSquares` with the pseudo-classes instead of the classes: the
    columns of M are their means, and C is their number. A sample belongs to the nearest centroid of
    its own class; a centroid without samples is dropped. With k = 1 the result is that of `ls`.

    Args:
        k: clusters a class; a class with fewer samples has each sample as a cluster.
        lam: λ ≥ 0, see `LeastSquares`.
        engine: what clusters, see `imprint_pl.numerics.kmeans.kmeans_classes`.

    Raises:
        ImprintError: `k < 1`, an unknown engine, a `lam` that is negative, not finite or too small.

    Source: Westerhoff et al. 2025 ("k-LS").
    """

    name = "kls"
    clusters = True

    def __init__(self, k: int = 20, lam: float = 1e-4, engine: str = "auto") -> None:
        check_settings(k, engine)
        check_lam(lam)
        self.k = k
        self.lam = float(lam)
        self.engine = engine

    @property
    def fixed(self) -> bool:
        """Whether the seed changes nothing: the only cluster of k = 1 is the class mean."""
        return self.k == 1

    def __call__(
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, progress: bool = False
    ) -> Proxies:
        """Embeddings `x (N, d)`, labels `y (N,)` in 0..C−1 → at most `k C` proxies."""
        cluster, classes = pseudo_classes(
            x, y, num_classes, self.k, engine=self.engine, seed=seed, progress=progress
        )
        return self.of_clusters(Moments.of(x, cluster, len(classes)), classes)

    def of_clusters(self, moments: Moments, classes: Tensor) -> Proxies:
        """Make the proxies from the `Moments` of the clusters, with a pooled Gram matrix, and the
        clusters' classes `(P,)`."""
        weights = solve(moments, self.lam)
        return Proxies(weights, weights.new_zeros(len(weights)), classes)


def pseudo_classes(
    x: Tensor, y: Tensor, num_classes: int, k: int, *, engine: str, seed: int, progress: bool
) -> tuple[Tensor, Tensor]:
    """Cluster each class by k-means; the clusters of all classes are numbered consecutively.

    Returns:
        The cluster of each sample `(N,)` and the class of each cluster `(P,)`; none is empty.
    """
    members = rows_by_class(y, num_classes)
    centroids = by_groups(KMeans(k, engine).of_classes, x, members, seed, progress)
    cluster = torch.empty_like(y)
    classes: list[int] = []
    for c, (rows, of_class) in enumerate(zip(members, centroids, strict=True)):
        if len(rows):
            own, used = clusters_of(x[rows], of_class)
            cluster[rows] = len(classes) + own
            classes += [c] * used
    return cluster, torch.tensor(classes, device=x.device)


def clusters_of(x: Tensor, centroids: Tensor) -> tuple[Tensor, int]:
    """Return the cluster of each sample of a class `(n,)` and the number of clusters; empty
    clusters get no number."""
    used, own = torch.unique(_nearest(x, centroids), return_inverse=True)
    return own, len(used)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest of `(k, d)` for each of `(n, d)`; a tie goes to the first."""
    # Subtract the centroids' mean, so that embeddings far from the origin lose no precision.
    centre = centroids.mean(0)
    centroids = centroids - centre
    return torch.cat(
        [torch.cdist(rows.float() - centre, centroids).argmin(1) for rows in x.split(CHUNK)]
    )
