"""AGG `max`: the best proxy of a class decides."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.parts.agg.base import Aggregation


class Max(Aggregation):
    """max: the score of a class is that of its best proxy, by inner product.

    score_c(z) = max over proxies p of class c of (w_p · z + b_p); −∞ for a class without
    proxies.
    """

    name = "max"
    best_product = True

    def forward(
        self, z: Tensor, proxies: Tensor, bias: Tensor, proxy_classes: Tensor, num_classes: int
    ) -> Tensor:
        """Compute the scores of the classes.

        Args:
            z: Embeddings `(B, d)`.
            proxies: `(P, d)`.
            bias: `(P,)`.
            proxy_classes: The proxies' classes `(P,)`.
            num_classes: C.

        Returns:
            `(B, C)`.
        """
        scores = torch.addmm(bias, z, proxies.T)
        classes = proxy_classes.expand_as(scores)
        lowest = scores.new_full((scores.shape[0], num_classes), -torch.inf)
        return lowest.scatter_reduce(1, classes, scores, "amax")
