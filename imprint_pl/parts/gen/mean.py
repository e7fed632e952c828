"""The class mean: one proxy a class, from sums alone."""

from __future__ import annotations

import torch

from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.gen.base import Generator, Proxies


class Mean(Generator):
    """mean: the proxy of a class is the mean of its embeddings.

    Source: Qi et al. 2018, "Low-Shot Learning with Imprinted Weights".
    """

    name = "mean"
    from_moments = True
    per_class = True

    def __call__(self, moments: Moments) -> Proxies:
        """`Moments` of C classes → C proxies in float32."""
        weights = moments.means.float()
        classes = torch.arange(len(weights), device=weights.device)
        return Proxies(weights, weights.new_zeros(len(weights)), classes)
