"""Farthest point sampling within each class: samples that cover it, its outliers first."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.numerics.draws import sample
from imprint_pl.numerics.values import check_count
from imprint_pl.parts.gen.base import PerClass


class FarthestPoints(PerClass):
    """fps: chooses a random sample, then k − 1 times the sample farthest from those chosen so far.

    z_{i+1} = argmax_z min_{j ≤ i} ‖z − z_j‖ (Euclidean) over the samples of the class that are not
    chosen yet; a tie goes to the first. Smaller k gives a prefix of larger k.

    Args:
        k: proxies a class; a class with fewer samples gives all of them.

    Raises:
        ImprintError: `k < 1`.

    Source: Westerhoff et al. 2025 ("k-fps"); Gonzalez 1985.

    >>> FarthestPoints(3).of_class(torch.tensor([[0.0], [4.0], [1.0], [9.0]]), seed=1).flatten()
    tensor([4., 9., 0.])
    """

    name = "fps"
    per_class = True
    prefix_of_larger_k = True

    def __init__(self, k: int = 20) -> None:
        check_count("k", k)
        self.k = k

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """`(n, d)` → `(min(n, k), d)`."""
        chosen = sample(len(x), 1, seed).to(x.device)
        distance = torch.full_like(x[:, 0], torch.inf)
        for _ in range(min(self.k, len(x)) - 1):
            newest = x[chosen[-1:]]
            # Subtract first: |a|² − 2ab + |b|² would rank near-duplicates by rounding errors.
            distance = torch.minimum(distance, (x - newest).norm(dim=1))
            distance[chosen[-1]] = -1  # never again, even where only its duplicates are left
            chosen = torch.cat([chosen, distance.argmax(0, keepdim=True)])
        return x[chosen]
