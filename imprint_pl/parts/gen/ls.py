"""Least squares: all classes at once, from sums alone. The paper's "oracle"."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.factorisations import cholesky, double
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.values import is_number
from imprint_pl.parts.gen.base import Generator, Proxies, checked_balance


class LeastSquares(Generator):
    """ls: one proxy a class, the least-squares fit of one-hot labels where all classes weigh alike.

    W = (1/C) Mᵀ (Σ_T + μ_G μ_Gᵀ + λI)⁻¹, with M `(d, C)` the class means as columns, Σ_T and μ_G
    `(d,)` the covariance (divided by N) and the mean of all N samples. Σ_T + μ_G μ_Gᵀ is the Gram
    matrix over N, Σ z zᵀ / N. Computed in float64, by Cholesky. There is no intercept; the bias
    is 0.

    Args:
        lam: λ ≥ 0, in units of a squared feature. The default serves normalised and raw embeddings
            alike; 0 needs more samples than dimensions.
        class_weight: "balanced" lets all classes weigh alike in Σ z zᵀ, too; see `checked_balance`.

    Raises:
        ImprintError: `lam` is negative or not finite, or too small for the matrix to be inverted.

    Source: Westerhoff et al. 2025, Section 3.2.
    """

    name = "ls"
    from_moments = True
    needs_gram = True
    # Proxies lie in the space that the samples span, and turn with it.
    spans = True
    takes_weights = True

    def __init__(self, lam: float = 1e-4, class_weight: str | None = None) -> None:
        check_lam(lam)
        self.lam = float(lam)
        self.class_weight = checked_balance(class_weight)

    def __call__(self, moments: Moments) -> Proxies:
        """`Moments` of C classes with a pooled Gram matrix → C proxies in float32.

        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> LeastSquares(lam=0.0)(Moments.of(x, torch.tensor([0, 1]), 2)).weights
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])
        """
        weights = solve(moments, self.lam)
        classes = torch.arange(len(weights), device=weights.device)
        return Proxies(weights, weights.new_zeros(len(weights)), classes)


def check_lam(lam: float) -> None:
    """Raises an `ImprintError` unless 0 ≤ lam < ∞."""
    if not is_number(lam) or not 0 <= lam < math.inf:
        raise ImprintError(
            f"lam={lam!r}: give a finite number of at least 0, such as 1e-4 (ridge can choose one)"
        )


def solve(moments: Moments, lam: float) -> Tensor:
    """`W (C, d)` of `LeastSquares`, float32. `moments` holds a pooled Gram matrix, unweighted."""
    matrix = double(moments.pooled_gram) / moments.counts.sum().item()
    matrix.diagonal().add_(lam)
    larger = max(1e-4, 1e-8 * matrix.diagonal().mean().item())
    factor = cholesky(matrix, f"lam={lam}: give a larger lam, such as {larger:.0e}")
    means = double(moments.means)
    weights = torch.cholesky_solve(means.T, factor).T / len(means)
    return weights.float().to(moments.sums.device).contiguous()
