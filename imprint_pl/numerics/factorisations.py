"""Factorisations of float64 matrices, which the closed forms in NORM and GEN share. If one fails,
an error says what to change.

Factorisations whose threads synchronise every few microseconds run on one CPU thread. If other
programs use the cores, several threads wait for each other: a 2000 × 2000 matrix then took up to
48 s instead of 0.6 s.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.moments import Moments

# The value of `shrinkage` that chooses the shrinkage from the data.
OAS = "oas"
_ALONE = threading.Lock()


def double(x: Tensor) -> Tensor:
    """Convert `x` to float64, on the CPU if its device has no float64 (Apple's MPS)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def cholesky(matrix: Tensor, cure: str) -> Tensor:
    """Factorise a symmetric positive definite `matrix (n, n)` as L Lᵀ; return L, in float64.

    Raises:
        ImprintError: the matrix is singular to rounding; `cure` says what to change.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal().square()
    # Rounding may hide that a matrix is singular, so pivots as small as rounding errors count as 0.
    smallest = len(matrix) * torch.finfo(torch.float64).eps * matrix.diagonal().abs().max()
    if failed.item() or not pivots.min() > smallest:
        raise ImprintError(
            f"the {len(matrix)} × {len(matrix)} matrix to be inverted is singular to rounding "
            f"(fewer samples than dimensions, or features that depend on each other): {cure}"
        )
    return factor


class Tridiagonal:
    """A symmetric matrix as V T Vᵀ, V orthogonal, T tridiagonal, on the CPU in float64.

    Args:
        matrix: `(n, n)`, symmetric.

    Raises:
        ImprintError: the matrix has values that are not finite.
    """

    def __init__(self, matrix: Tensor) -> None:
        from scipy.linalg import lapack  # imported here, since it takes a third of a second

        if not matrix.isfinite().all():
            raise ImprintError("the Gram matrix overflows: scale the embeddings down, by l2 say")
        self._lapack, n = lapack, len(matrix)
        size = int(lapack.dsytrd_lwork(n, lower=1)[0])
        with _one_thread():
            packed, self._diagonal, self._beside, self._scale, _ = lapack.dsytrd(
                matrix.double().cpu().numpy().T, lower=1, lwork=size
            )
        # V does not change the first row; it consists of n − 1 reflections of the other rows.
        self._reflections = np.asfortranarray(packed[1:, :-1])

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues `(n,)`, ascending."""
        if len(self._diagonal) == 1:
            return torch.from_numpy(self._diagonal.copy())
        values, failed = self._lapack.dsterf(self._diagonal, self._beside)
        if failed:
            raise ImprintError(f"the eigenvalues of the Gram matrix were not found ({failed})")
        return torch.from_numpy(values)

    def turn(self, columns: Tensor) -> Tensor:
        """Return Vᵀ times `columns (n, c)`, in float64 on the CPU."""
        return self._reflected(columns, "T")

    def turn_back(self, columns: Tensor) -> Tensor:
        """Return V times `columns (n, c)`."""
        return self._reflected(columns, "N")

    def solve(self, lam: float, columns: Tensor) -> Tensor:
        """Return (T + λI)⁻¹ times `columns (n, c)`, for λ > 0 and T positive semidefinite."""
        diagonal = self._diagonal + lam
        if len(diagonal) == 1:
            return columns / diagonal[0]
        *_, solution, failed = self._lapack.dptsv(diagonal, self._beside, columns.numpy())
        if failed:
            raise ImprintError(f"lam={lam}: the matrix is singular to rounding; give a larger lam")
        return torch.from_numpy(solution)

    def squares(self, lams: Tensor, columns: Tensor) -> Tensor:
        """Compute cᵀ (T + λI)⁻¹ c for each of `lams (L,)`, λ > 0, and each c of `columns (n, m)`.

        It factorises T + λI = L D Lᵀ, row by row for all λ and columns at once, which takes half of
        the time of solving.

        Returns:
            `(L, m)`.
        """
        pivot = self._diagonal[0] + lams.numpy()[:, None]
        rows = columns.numpy()
        forward = np.broadcast_to(rows[0], (len(lams), columns.shape[1])).copy()
        total = forward**2 / pivot
        beside = self._beside if len(self._diagonal) > 1 else []
        for row, diagonal, off in zip(rows[1:], self._diagonal[1:], beside, strict=True):
            share = off / pivot
            pivot = diagonal + lams.numpy()[:, None] - off * share
            forward *= -share
            forward += row
            total += forward**2 / pivot
        return torch.from_numpy(total)

    def _reflected(self, columns: Tensor, transposed: str) -> Tensor:
        result = columns.double().cpu().numpy().copy(order="F")
        if len(result) > 1:
            size = 64 * result.shape[1]
            result[1:], _, _ = self._lapack.dormqr(
                "L", transposed, self._reflections, self._scale, result[1:], lwork=size
            )
        return torch.from_numpy(result)


@contextmanager
def _one_thread() -> Iterator[None]:
    # The limit holds for the whole process. The lock keeps two threads from restoring each other's
    # setting.
    with _ALONE, threadpool_limits(1):
        yield


def inverse_factor(matrix: Tensor, cure: str) -> Tensor:
    """Return L⁻¹ for the factor L of `cholesky`, with the same errors."""
    factor = cholesky(matrix, cure)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    with _one_thread() if matrix.device.type == "cpu" else nullcontext():
        return torch.linalg.solve_triangular(factor, identity, upper=False)


def shrunk_within(moments: Moments, shrinkage: float | str) -> tuple[Tensor, str]:
    """Compute the shrunk within-class covariance (1−s) Σ_W + s (tr Σ_W / d) I.

    Σ_W is the within-class covariance pooled over all samples, divided by N; s is the shrinkage,
    which `"oas"` chooses.

    Returns:
        The matrix `(d, d)`, float64, and the advice for an error if it is singular.

    Raises:
        ImprintError: Σ_W is zero.
    """
    within = double(moments.within("micro"))
    variance = within.diagonal().mean()
    # If the samples of each class are equal, the covariance is not exactly 0 but rounding errors.
    size = (double(moments.pooled_gram).diagonal() / double(moments.counts).sum()).mean()
    if not variance > 1e-13 * size:
        raise ImprintError(
            f"shrinkage={shrinkage}: the samples of each class do not differ (one sample a "
            "class?), so that there is no within-class covariance: give more samples a class, or a "
            "recipe without it, such as 'qi'"
        )
    if shrinkage == OAS:
        shrinkage = oas(within, int(moments.counts.sum()) - int((moments.counts > 0).sum()))
    shrinkage = float(shrinkage)
    matrix = (1 - shrinkage) * within
    matrix.diagonal().add_(shrinkage * variance)
    return matrix, f"shrinkage={shrinkage}: give a larger one, such as 0.01, or 'oas'"


def oas(covariance: Tensor, freedom: int) -> float:
    """Return the shrinkage of a covariance S `(d, d)` that approximately minimises the expected
    squared error for normal samples.

    s = ((1 − 2/d) tr S² + (tr S)²) / ((n + 1 − 2/d) (tr S² − (tr S)²/d)), at most 1. n are the
    degrees of freedom: the number of samples minus the number of classes.

    Source: Chen et al. 2010, "Shrinkage Algorithms for MMSE Covariance Estimation", equation 23.

    >>> round(oas(torch.diag(torch.tensor([4.0, 1.0])), 100), 4)  # (0 · 17 + 25) / (100 · 4.5)
    0.0556
    """
    d = len(covariance)
    squared, trace = covariance.square().sum().item(), covariance.trace().item() ** 2
    apart = (freedom + 1 - 2 / d) * (squared - trace / d)
    # If S is a multiple of the identity, shrinkage does not change it.
    return min(1.0, ((1 - 2 / d) * squared + trace) / apart) if apart > 0 else 1.0


def checked_shrinkage(shrinkage: float | str) -> float | str:
    """Return the shrinkage, a number from 0 to 1 or "oas"; raise an `ImprintError` otherwise.

    YAML reads 1e-2 as text, so text that is a number is accepted, too.
    """
    if shrinkage == OAS:
        return OAS
    try:
        number = float(shrinkage)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number <= 1:
        raise ImprintError(
            f"shrinkage={shrinkage!r}: give a number from 0 to 1, such as 0.01, or 'oas', which "
            "chooses one"
        )
    return number
