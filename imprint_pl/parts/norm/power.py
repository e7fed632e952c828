"""NORM `power`: signed powers."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.parts.norm.base import Norm


class Power(Norm):
    """power: the signed square root of each feature, sign(z) √|z|.

    Evens out features that are dominated by a few large values.

    Source: Perronnin et al. 2010, "Improving the Fisher Kernel for Large-Scale Image
    Classification".

    >>> import torch
    >>> Power()(torch.tensor([4.0, -9.0, 0.0]))
    tensor([ 2., -3.,  0.])
    """

    name = "power"
    row_by_row = True

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        # Take the root of 1 where x is 0: the root of 0 has an infinite slope, which would become
        # NaN in fine-tuning.
        return x.sign() * x.abs().where(x != 0, 1.0).sqrt()
