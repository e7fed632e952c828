"""The base of the NORMs that learn from the training embeddings: `centre`, `whiten`, `nystrom`,
`random_projection` and `join`.

Each is a shift or a map, fitted once and kept in the head as constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.constants import Constants
from imprint_pl.numerics.values import is_count
from imprint_pl.parts.norm.base import Norm

# A Gram matrix of more features would take terabytes.
MOST_FEATURES = 2**20


class Learned(Norm, Constants):
    """A NORM with fitted state: constants, empty until `fit` or a state dict sets them.

    A subclass names its `constants`; the first size of the first one is the input dimension.
    """

    learns = True

    def __init__(self) -> None:
        super().__init__()
        for name in self.constants:
            setattr(self, name, torch.zeros(0))

    def clear(self) -> None:
        for name in self.constants:
            setattr(self, name, getattr(self, name).new_zeros(0))

    @property
    def input_dim(self) -> int | None:  # type: ignore[override]
        first = getattr(self, self.constants[0])
        return first.shape[0] if first.numel() else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., p)`.

        Raises:
            ImprintError: If it has not been fitted.
        """
        if self.input_dim is None:
            raise ImprintError(
                f"{self.name} has not been fitted: imprint the head, or load a checkpoint"
            )
        return self.apply_fitted(x)

    def apply_fitted(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., p)`, with the constants in place."""
        raise NotImplementedError

    def _set(self, like: Tensor, **values: Tensor) -> None:
        # Leave inference mode, since a head must stay trainable through its norm.
        with torch.inference_mode(False):
            for name, value in values.items():
                setattr(self, name, value.detach().to(like.device, torch.float32).clone())


def check_projection_dim(projection_dim: int) -> None:
    """Raise an `ImprintError` unless a value is a whole number from 1 to `MOST_FEATURES`."""
    if not is_count(projection_dim) or projection_dim > MOST_FEATURES:
        raise ImprintError(
            f"projection_dim={projection_dim!r}: give at least one dimension, a whole number, and "
            f"at most {MOST_FEATURES:,}"
        )
