"""NORM `random_projection`: a fixed random layer with a ReLU (RanPAC)."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.parts.norm.learned import Learned, check_projection_dim


class RandomProjection(Learned):
    """random_projection: z ↦ relu(z R), R `(d, p)` of independent draws from N(0, 1/d).

    A fixed random layer, after which linear methods see products of features.

    Args:
        projection_dim: p. It does not depend on the number of training samples: this many features
            are best even with one image for each class.

    Attributes:
        capped: Whether p is at most half the training samples (but at least 1), as in earlier
            versions; used for the states that they wrote.

    Source: McDonnell et al. 2023, "RanPAC: Random Projections and Pre-trained Models for Continual
    Learning".
    """

    name = "random_projection"
    maps = True
    constants = ("projection",)
    projection: Tensor

    def __init__(self, projection_dim: int = 5000) -> None:
        check_projection_dim(projection_dim)
        super().__init__()
        self.projection_dim = projection_dim
        self.capped = False

    def features(self, dim: int, samples: int) -> int:
        return (
            max(1, min(self.projection_dim, samples // 2)) if self.capped else self.projection_dim
        )

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> RandomProjection:
        return self.draw(x, len(x), seed)

    def draw(self, like: Tensor, samples: int, seed: int = 0) -> RandomProjection:
        """Fit without data: `fit` only needs d, as in `like (…, d)`, and the number of samples."""
        d = like.shape[-1]
        p = self.features(d, samples)
        generator = torch.Generator().manual_seed(seed)
        self._set(like, projection=torch.randn(d, p, generator=generator) / d**0.5)
        return self

    def apply_fitted(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.projection)
