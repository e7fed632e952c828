"""NORM `l2`: unit length."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from imprint_pl.numerics.values import SMALLEST_LENGTH
from imprint_pl.parts.norm.base import Norm


class L2(Norm):
    """l2: scales each row to unit Euclidean length; a row of zeros stays zero.

    >>> import torch
    >>> L2()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    name = "l2"
    row_by_row = True

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        return functional.normalize(x, dim=-1, eps=SMALLEST_LENGTH)

    def row_scale(self, x: Tensor) -> Tensor:
        """Rows `(n, d)` → 1 / length, `(n,)`."""
        return 1 / x.norm(dim=1).clamp_min(SMALLEST_LENGTH)
