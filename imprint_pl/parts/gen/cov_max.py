"""The samples of each class that covary most with the other samples of the class."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.numerics.moments import sum_dtype
from imprint_pl.numerics.passes import CHUNK
from imprint_pl.numerics.values import check_count
from imprint_pl.parts.gen.base import PerClass


class CovMax(PerClass):
    """cov_max: the k samples whose covariances with all samples of the class have the largest sum.

    The samples are the variables, the d features their observations: with z̃_i = z_i − mean over
    the features of z_i, cov_ij = z̃_i · z̃_j / (d − 1), and sample i scores
    Σ_j cov_ij = z̃_i · (Σ_j z̃_j) / (d − 1): the n × n matrix is never formed. In float64; ties go
    to the first sample; smaller k gives a prefix of larger k.

    Args:
        k: proxies a class; a class with fewer samples gives all of them.

    Raises:
        ImprintError: `k < 1`.

    Source: Westerhoff et al. 2025 ("k-cov-max").

    >>> x = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0], [0.0, 2.0, 5.0], [1.0, 1.0, 0.0]])
    >>> CovMax(2).of_class(x, seed=0)
    tensor([[0., 2., 5.],
            [0., 1., 2.]])
    """

    name = "cov_max"
    per_class = True
    prefix_of_larger_k = True
    fixed = True
    shared = True

    def __init__(self, k: int = 20) -> None:
        check_count("k", k)
        self.k = k

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """`(n, d)` → `(min(n, k), d)`; nothing is random."""
        blocks = x.split(CHUNK)
        total = torch.stack([_centred(rows).sum(0) for rows in blocks]).sum(0)
        # The factor 1 / (d − 1) does not change the order.
        scores = torch.cat([_centred(rows) @ total for rows in blocks])
        return x[scores.argsort(descending=True, stable=True)[: self.k]]


def _centred(rows: Tensor) -> Tensor:
    rows = rows.to(sum_dtype(rows.device))
    return rows - rows.mean(1, keepdim=True)
