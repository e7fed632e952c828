"""What the closed forms in NORM and GEN share: float64 matrices and their factorisations. One that
fails is an error with a cure, never skipped.

Those that meet at a barrier every few microseconds run on one thread on a CPU. Where other programs
hold a core, several threads wait for each other: 2000 × 2000 took up to 48 s instead of 0.6 s.
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

# The shrinkage that chooses itself.
OAS = "oas"
_ALONE = threading.Lock()


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


class Tridiagonal:
    """A symmetric matrix as V T Vᵀ, V orthogonal, T tridiagonal, on the CPU in float64.

    Args:
        matrix: `(n, n)`, symmetric.

    Raises:
        ImprintError: the matrix has values that are not finite.
    """

    def __init__(self, matrix: Tensor) -> None:
        from scipy.linalg import lapack  # here, not above: a third of a second to import

        if not matrix.isfinite().all():
            raise ImprintError("the Gram matrix overflows: scale the embeddings down, by l2 say")
        self._lapack, n = lapack, len(matrix)
        size = int(lapack.dsytrd_lwork(n, lower=1)[0])
        with _one_thread():
            packed, self._diagonal, self._beside, self._scale, _ = lapack.dsytrd(
                matrix.double().cpu().numpy().T, lower=1, lwork=size
            )
        # V leaves the first row alone and is made of n − 1 reflections of the others.
        self._reflections = np.asfortranarray(packed[1:, :-1])

    def eigenvalues(self) -> Tensor:
        """`(n,)`, ascending."""
        if len(self._diagonal) == 1:
            return torch.from_numpy(self._diagonal.copy())
        values, failed = self._lapack.dsterf(self._diagonal, self._beside)
        if failed:
            raise ImprintError(f"the eigenvalues of the Gram matrix were not found ({failed})")
        return torch.from_numpy(values)

    def turn(self, columns: Tensor) -> Tensor:
        """Vᵀ times `columns (n, c)`, in float64 on the CPU."""
        return self._reflected(columns, "T")

    def turn_back(self, columns: Tensor) -> Tensor:
        """V times `columns (n, c)`."""
        return self._reflected(columns, "N")

    def solve(self, lam: float, columns: Tensor) -> Tensor:
        """(T + λI)⁻¹ times `columns (n, c)`, λ > 0 and T positive semidefinite."""
        diagonal = self._diagonal + lam
        if len(diagonal) == 1:
            return columns / diagonal[0]
        *_, solution, failed = self._lapack.dptsv(diagonal, self._beside, columns.numpy())
        if failed:
            raise ImprintError(f"lam={lam}: the matrix is singular to rounding; give a larger lam")
        return torch.from_numpy(solution)

    def squares(self, lams: Tensor, columns: Tensor) -> Tensor:
        """cᵀ (T + λI)⁻¹ c for each of `lams (L,)`, λ > 0, and each c of `columns (n, m)`: `(L, m)`.

        By T + λI = L D Lᵀ, row by row for all λ and columns at once: half of a solution each.
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
    # The limit is the whole process's: of two at a time one would put back what the other had set.
    with _ALONE, threadpool_limits(1):
        yield


def inverse_factor(matrix: Tensor, cure: str) -> Tensor:
    """L⁻¹ of the factor L that `cholesky` gives; it raises the same."""
    factor = cholesky(matrix, cure)
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    with _one_thread() if matrix.device.type == "cpu" else nullcontext():
        return torch.linalg.solve_triangular(factor, identity, upper=False)


def shrunk_within(moments: Moments, shrinkage: float | str) -> tuple[Tensor, str]:
    """(1−s) Σ_W + s (tr Σ_W / d) I `(d, d)`, s the shrinkage, in float64, and a cure should it turn
    out singular.

    Σ_W is the within-class covariance pooled over all samples, divided by N. `"oas"` chooses s.

    Raises:
        ImprintError: Σ_W is zero.
    """
    within = double(moments.within("micro"))
    variance = within.diagonal().mean()
    # Sums of squares leave rounding behind where the samples of each class are alike.
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
    """The shrinkage of a covariance `(d, d)` of normal samples with the least expected squared
    error, approximately.

    s = ((1 − 2/d) tr S² + (tr S)²) / ((n + 1 − 2/d) (tr S² − (tr S)²/d)), at most 1; n the degrees
    of freedom, samples less classes.

    Source: Chen et al. 2010, "Shrinkage Algorithms for MMSE Covariance Estimation", equation 23.

    >>> round(oas(torch.diag(torch.tensor([4.0, 1.0])), 100), 4)  # (0 · 17 + 25) / (100 · 4.5)
    0.0556
    """
    d = len(covariance)
    squared, trace = covariance.square().sum().item(), covariance.trace().item() ** 2
    apart = (freedom + 1 - 2 / d) * (squared - trace / d)
    # Round already: no shrinkage changes it.
    return min(1.0, ((1 - 2 / d) * squared + trace) / apart) if apart > 0 else 1.0


def checked_shrinkage(shrinkage: float | str) -> float | str:
    """A number from 0 to 1 (YAML reads 1e-2 as text), or "oas"; else an `ImprintError`."""
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
