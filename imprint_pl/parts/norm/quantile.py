"""NORM_post `quantile`: turns the values of a proxy into quantiles of a reference distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.parts.norm.base import Norm


class Quantile(Norm):
    """quantile: gives the weights of each proxy the distribution of a reference (NORM_post only).

    The i-th smallest weight of a proxy becomes the quantile (i + ½) / d, i = 0..d−1, of the
    reference, linearly interpolated. The reference is the weights of the backbone's original
    classifier or, without one, the pooled weights of all proxies; the order of the classes does not
    matter.

    Args:
        as_published: Use the normalised proxies of the classes before as the reference, and leave
            the first class unchanged, as the paper's code does.

    Source: Hosoda et al. 2024; Westerhoff et al. 2025, Section 3.3.

    >>> Quantile()(torch.tensor([[1.0, 3.0], [10.0, 5.0]]))
    tensor([[2.5000, 6.2500],
            [6.2500, 2.5000]])
    """

    name = "quantile"

    def __init__(self, as_published: bool = False) -> None:
        super().__init__()
        self.as_published = as_published

    def forward(self, x: Tensor) -> Tensor:
        """`(P, d)` → `(P, d)`, with all rows as the reference."""
        return _with_values(x, quantiles(x))

    def of_proxies(
        self, weights: Tensor, classes: Tensor, classifier: Tensor | None = None
    ) -> Tensor:
        if not self.as_published:
            if classifier is None or classifier.shape[-1] != weights.shape[1]:
                return self(weights)
            ascending = classifier if classifier.ndim == 1 else quantiles(classifier.to(weights))
            return _with_values(weights, ascending.to(weights))
        done = weights.clone()
        for c in classes.unique().tolist()[1:]:
            rows = classes == c
            done[rows] = _with_values(weights[rows], quantiles(done[classes < c]))
        return done


def quantiles(reference: Tensor) -> Tensor:
    """Return `(d,)`, the quantiles (i + ½) / d, i = 0..d−1, of all values of `(·, d)`."""
    d = reference.shape[1]
    values = reference.double().flatten().sort().values
    # torch.quantile takes at most 16 million values.
    position = (torch.arange(d, device=values.device, dtype=values.dtype) + 0.5) / d
    position = position * (len(values) - 1)
    below = position.long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], position - below).to(reference.dtype)


def _with_values(x: Tensor, ascending: Tensor) -> Tensor:
    """Replace the i-th smallest value of each row of `x (P, d)` by `ascending[i]`."""
    order = x.argsort(dim=1, stable=True)
    return torch.zeros_like(x).scatter(1, order, ascending.expand_as(x))
