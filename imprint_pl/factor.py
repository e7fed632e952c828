"""What the closed forms in NORM and GEN share: float64 matrices and their factorisations. One that
fails is an error with a cure, never skipped.

Those that meet at a barrier every few microseconds run on one thread on a CPU. Where other programs
hold a core, several threads wait for each other: 2000 × 2000 took up to 48 s instead of 0.6 s.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.moments import Moments


def double(x: Tensor) -> Tensor:
    """`x` in float64; on the CPU where its device has none (Apple's MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def cholesky(matrix: Tensor, cure: str) -> Tensor:
    """The lower factor L of a symmetric positive definite `matrix (n, n)`, L Lᵀ, in float64.

    Raises:
        ImprintError: the matrix is singular to rounding; `cure` says what to change.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    # A singular matrix may slip through by rounding, with pivots that are nothing but rounding.
    smallest = len(matrix) * torch.finfo(torch.float64).eps * matrix.diagonal().abs().max()
    if failed.item() or not pivots.min() > smallest:
        raise ImprintError(
            f"the {len(matrix)} × {len(matrix)} matrix to be inverted is singular to rounding "
            f"(fewer samples than dimensions, or features that depend on each other): {cure}"
        )
    return factor


def eigen(matrix: Tensor, what: str) -> tuple[Tensor, Tensor]:
    """Eigenvalues `(n,)`, ascending, and eigenvectors `(n, n)` as columns of a symmetric matrix."""
    try:
        if matrix.device.type != "cpu":
            return torch.linalg.eigh(matrix)
        # numpy's takes two thirds of torch's time.
        with threadpool_limits(1):
            values, vectors = np.linalg.eigh(matrix.numpy())
        return torch.from_numpy(values), torch.from_numpy(vectors)
    except (torch.linalg.LinAlgError, np.linalg.LinAlgError) as error:
        raise ImprintError(f"{what}: the eigendecomposition failed ({error})") from error


def inverse_factor(matrix: Tensor, cure: str) -> Tensor:
    """L⁻¹ of the factor L that `cholesky` gives; it raises the same."""
    factor = cholesky(matrix, cure)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    with threadpool_limits(1) if matrix.device.type == "cpu" else nullcontext():
        return torch.linalg.solve_triangular(factor, identity, upper=False)


def shrunk_within(moments: Moments, shrinkage: float) -> tuple[Tensor, str]:
    """(1−s) Σ_W + s (tr Σ_W / d) I `(d, d)`, s the shrinkage, in float64, and a cure should it turn
    out singular.

    Σ_W is the within-class covariance pooled over all samples, divided by N.

    Raises:
        ImprintError: Σ_W is zero.
    """
    within = double(moments.within("micro"))
    variance = within.diagonal().mean()
    # Sums of squares leave rounding behind where the samples of each class are alike.
    size = (double(moments.gram).diagonal() / double(moments.counts).sum()).mean()
    if not variance > 1e-13 * size:
        raise ImprintError(
            f"shrinkage={shrinkage}: the samples of each class do not differ (one sample a "
            "class?), so that there is no within-class covariance: give more samples a class, or a "
            "recipe without it, such as 'qi'"
        )
    matrix = (1 - shrinkage) * within
    matrix.diagonal().add_(shrinkage * variance)
    return matrix, f"shrinkage={shrinkage}: give a larger one, such as 0.01"


def check_shrinkage(shrinkage: float) -> None:
    """Raises an `ImprintError` unless 0 ≤ shrinkage ≤ 1."""
    if not 0 <= shrinkage <= 1:
        raise ImprintError(f"shrinkage={shrinkage}: give a number from 0 to 1, such as 0.01")
