"""k-medoids within each class: like k-means, but the centres are samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprint_pl.errors import ImprintError, needs
from imprint_pl.numerics.draws import sample
from imprint_pl.numerics.moments import sum_dtype
from imprint_pl.numerics.values import check_count
from imprint_pl.parts.gen.base import PerClass

# Most samples of a class: their matrix of distances takes 1.6 GB in float32.
MAX_SAMPLES = 20_000
MAX_ITERATIONS = 100
# The matrix is computed in float64, in blocks of rows of this size.
BLOCK_BYTES = 64 << 20


class Medoids:
    """The distances between all samples of a class, for any k and seed.

    Args:
        x: `(n, d)`.
        smallest, largest: bounds of the k for which `choose` will be called.
    """

    def __init__(self, x: Tensor, smallest: int, largest: int) -> None:
        n = self.n = len(x)
        if largest > 1 and n > max(smallest, MAX_SAMPLES):
            raise ImprintError(
                f"gen='kmedoids', k={largest}: a class has {n:,} samples, whose distances would "
                f"take {4 * n * n / 1e9:.1f} GB; at most {MAX_SAMPLES:,} are allowed: draw fewer "
                f"with shots={MAX_SAMPLES}, or choose gen='kmeans'"
            )
        # No distances are needed where every k keeps all samples, and no matrix for k = 1.
        needed = largest == 1 or n > smallest
        size = n if needed and largest > 1 else 0
        self.matrix, done = np.empty((size, size), np.float32), 0
        sums: list[Tensor] = []
        for rows in _distances(x) if needed else []:
            sums.append(rows.sum(1))
            if size:
                self.matrix[done : done + len(rows)] = rows.cpu().numpy()
            done += len(rows)
        np.fill_diagonal(self.matrix, 0)
        self.centre = int(torch.cat(sums).argmin()) if sums else 0

    def choose(self, k: int, seed: int) -> Tensor:
        """The positions of the medoids, `(min(n, k),)`, on the CPU."""
        if self.n <= k:
            return torch.arange(self.n)
        if k == 1:
            return torch.tensor([self.centre])
        package = _import_kmedoids()
        start = sample(self.n, k, seed).numpy()
        start = package.alternating(self.matrix, start, max_iter=MAX_ITERATIONS).medoids
        # One thread and a fixed order of samples give the same result on every machine.
        found = package.fasterpam(self.matrix, start, max_iter=MAX_ITERATIONS, n_cpu=1).medoids
        return torch.from_numpy(found.astype(np.int64))


class KMedoids(PerClass):
    """kmedoids: the k samples of a class with the least sum of distances to the nearest of them.

    They minimise Σ_i min_p ‖z_i − w_p‖ (Euclidean, not squared) over k samples w_p of the class:
    exactly for k = 1, otherwise up to a local optimum. The alternating method (assign, take the
    medoid of each cluster, repeat) starts from k random samples; then FasterPAM swaps samples while
    that helps. The result is never worse than that of the alternating method alone, and about 1 to
    4 % better on real embeddings.

    Args:
        k: proxies a class; a class with fewer samples gives all of them.

    Raises:
        ImprintError: `k < 1`; a class of more than 20,000 samples with k > 1, since the matrix of
            all distances, 4 n² bytes, is held in memory; the package `kmedoids` is missing.

    Source: Westerhoff et al. 2025 ("k-medoids"); Schubert & Rousseeuw 2021, "Fast and Eager
    k-Medoids Clustering" (FasterPAM).

    >>> x = torch.tensor([[0.0], [1.0], [2.0], [30.0], [31.0], [33.0]])
    >>> KMedoids(2).of_class(x, seed=0).flatten().sort().values
    tensor([ 1., 31.])
    """

    name = "kmedoids"
    per_class = True
    selection = Medoids
    shared = True

    def __init__(self, k: int = 20) -> None:
        check_count("k", k)
        self.k = k

    @property
    def fixed(self) -> bool:
        """Whether the seed changes nothing: with k = 1 all samples are tried."""
        return self.k == 1

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """`(n, d)` → `(min(n, k), d)`."""
        return x[Medoids(x, self.k, self.k).choose(self.k, seed).to(x.device)]


def _distances(x: Tensor) -> Iterator[Tensor]:
    """Yield the Euclidean distances between all samples, in blocks of rows `(·, n)`, float64."""
    # Subtract the mean, so that embeddings far from the origin lose no precision.
    x = x.to(sum_dtype(x.device))
    x = x - x.mean(0)
    squares = x.square().sum(1)
    step = max(1, BLOCK_BYTES // (8 * len(x)))
    for rows, norms in zip(x.split(step), squares.split(step), strict=True):
        far = torch.addmm(norms[:, None] + squares, rows, x.T, alpha=-2)
        yield far.clamp_(min=0).sqrt_()


def _import_kmedoids() -> Any:
    with needs("kmedoids", "gen='kmedoids'", "or choose gen='kmeans'"):
        import kmedoids  # imported here since most recipes do not need it
    return kmedoids
