"""Random samples of each class: the baseline of the selecting generators."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.numerics.draws import sample
from imprint_pl.numerics.values import check_count
from imprint_pl.parts.gen.base import PerClass


class Random(PerClass):
    """random: the proxies of a class are k of its samples, drawn without replacement.

    Smaller k gives a prefix of larger k.

    Args:
        k: proxies a class; a class with fewer samples gives all of them.

    Raises:
        ImprintError: `k < 1`.

    Source: Westerhoff et al. 2025 ("k-random").

    >>> import torch
    >>> Random(2).of_class(torch.tensor([[1.0], [2.0], [3.0]]), seed=0).shape
    torch.Size([2, 1])
    """

    name = "random"
    per_class = True
    prefix_of_larger_k = True

    def __init__(self, k: int = 20) -> None:
        check_count("k", k)
        self.k = k

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """`(n, d)` → `(min(n, k), d)`."""
        return x[sample(len(x), self.k, seed).to(x.device)]
