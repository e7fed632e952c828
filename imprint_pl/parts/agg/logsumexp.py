"""AGG `logsumexp`: all proxies of a class count, the best one most."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.numerics.values import _positive
from imprint_pl.parts.agg.base import Aggregation


class LogSumExp(Aggregation):
    """logsumexp: all proxies of a class count, the best one most.

    score_c(z) = T log Σ over proxies p of class c of exp((w_p · z + b_p) / T). Close to `max` for
    small T; −∞ for a class without proxies.

    Args:
        temperature: T > 0, in units of the inner product.
    """

    name = "logsumexp"

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _positive("temperature", temperature)

    def forward(
        self, z: Tensor, proxies: Tensor, bias: Tensor, proxy_classes: Tensor, num_classes: int
    ) -> Tensor:
        """Shapes as in `Max`."""
        scores = torch.addmm(bias, z, proxies.T) / self.temperature
        classes = proxy_classes.expand_as(scores)
        highest = scores.new_full((scores.shape[0], num_classes), -torch.inf)
        highest = highest.scatter_reduce(1, classes, scores.detach(), "amax")
        sums = torch.zeros_like(highest)
        sums = sums.scatter_add(1, classes, (scores - highest.gather(1, classes)).exp())
        return self.temperature * (sums.log() + highest)
