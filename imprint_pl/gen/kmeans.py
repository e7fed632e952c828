"""k-means within each class: k proxies a class, one for each of its modes."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.gen.base import PerClass, Proxies
from imprint_pl.kmeans import check_settings, kmeans, kmeans_classes


class KMeans(PerClass):
    """kmeans: the proxies of a class are the centroids of its embeddings.

    Args:
        k: proxies a class. 20 is the paper's best; a class with fewer samples keeps its samples.
        engine: what clusters: `auto` (faiss on a GPU that faiss can use, otherwise torch), `faiss`,
            `torch` (all classes at once) or `exact` (torch until nothing moves); see
            `imprint_pl.kmeans.kmeans_classes`.

    Raises:
        ImprintError: `k < 1` or an unknown engine.

    Source: Westerhoff et al. 2025, Section 3.2.
    """

    name = "kmeans"

    def __init__(self, k: int = 20, engine: str = "auto") -> None:
        check_settings(k, engine)
        self.k = k
        self.engine = engine

    def __call__(
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, progress: bool = False
    ) -> Proxies:
        """Embeddings `x (N, d)`, labels `y (N,)` in 0..C−1 → `Proxies`."""
        order = torch.argsort(y, stable=True)
        members = order.split(torch.bincount(y, minlength=num_classes).tolist())
        weights = kmeans_classes(
            [x[rows] for rows in members], self.k, seed=seed, engine=self.engine, progress=progress
        )
        sizes = torch.tensor([len(of_class) for of_class in weights], device=x.device)
        classes = torch.arange(num_classes, device=x.device).repeat_interleave(sizes)
        stacked = torch.cat(weights)
        return Proxies(stacked, stacked.new_zeros(len(stacked)), classes)

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """`(n, d)` → `(min(n, k), d)`."""
        return kmeans(x, self.k, seed=seed, engine=self.engine)
