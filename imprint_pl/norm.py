"""NORM: normalisation of embeddings before GEN (NORM_pre), of proxies (NORM_post) and of embeddings
at inference (NORM_inf). Each is a small module on the last dimension.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class NoNorm(nn.Module):
    """none: leaves its input as it is."""

    name = "none"

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        return x


class L2(nn.Module):
    """l2: scales each row to unit Euclidean length; a row of zeros stays zero.

    >>> import torch
    >>> L2()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    name = "l2"

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        return F.normalize(x, dim=-1)


NORMS = {part.name: part for part in (NoNorm, L2)}
