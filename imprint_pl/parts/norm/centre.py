"""NORM `centre`: subtracts the mean of the training embeddings."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.norm.learned import Learned


class Centre(Learned):
    """centre: subtracts the mean of all training embeddings, z ↦ z − μ_G."""

    name = "centre"
    fixed = True
    constants = ("mean",)
    mean: Tensor

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Centre:
        self._set(x, mean=Moments.of(x, y, num_classes, gram="none").global_mean)
        return self

    def apply_fitted(self, x: Tensor) -> Tensor:
        return x - self.mean
