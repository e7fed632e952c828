"""NORM `power`: signed powers."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.parts.norm.base import Norm


class Power(Norm):
    """power: the signed square root of each feature, sign(z) √|z|.

    Evens out features that few large values rule.

    Source: Perronnin et al. 2010, "Improving the Fisher Kernel for Large-Scale Image
    Classification".

    >>> import torch
    >>> Power()(torch.tensor([4.0, -9.0, 0.0]))
    tensor([ 2., -3.,  0.])
    """

    name = "power"

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        # The root of 1 where x is 0: that of 0 has an infinite slope, which fine-tuning would
        # hand on as NaN.
        return x.sign() * x.abs().where(x != 0, 1.0).sqrt()
