"""Linear discriminant analysis: one proxy a class, from sums alone."""

from __future__ import annotations

import torch

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.factorisations import (
    OAS,
    checked_shrinkage,
    cholesky,
    double,
    shrunk_within,
)
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.gen.base import Generator, Proxies

PRIORS = ("empirical", "uniform")
# Largest part of the scores that all classes may share. A float32 score of this size is exact to
# 1/64; with larger ones, rounding would change labels.
LARGEST_SHARED = 2.0**17


class LDA(Generator):
    """lda: the Bayes rule for normal classes with one covariance.

    w_c = Σ⁻¹ μ_c, b_c = −½ μ_cᵀ Σ⁻¹ μ_c + log π_c, with μ_c `(d,)` the class means and
    Σ = (1−s) Σ_W + s (tr Σ_W / d) I, Σ_W the within-class covariance pooled over all samples.
    Scores are log posteriors up to a term that all classes share. Computed in float64, by Cholesky.

    The shared term helps to detect samples of unknown classes. But where the embeddings lie many
    times their spread from the origin, it is so large that float32 cannot hold the differences. The
    term is then left out: with μ the mean of all samples, w_c = Σ⁻¹ (μ_c − μ) and
    b_c = −½ (μ_c + μ)ᵀ w_c + log π_c.

    Args:
        shrinkage: s, from 0 to 1, or "oas", as for `whiten`.
        prior: π_c: "empirical", the class's share of the samples, or "uniform", 1/C.

    Raises:
        ImprintError: a parameter out of range; the matrix is singular to rounding.

    Source: Fisher 1936; Rao 1948.
    """

    name = "lda"
    from_moments = True
    needs_gram = True

    def __init__(self, shrinkage: float | str = OAS, prior: str = "empirical") -> None:
        if prior not in PRIORS:
            raise ImprintError(f"unknown prior={prior!r} (known: {', '.join(PRIORS)})")
        self.shrinkage = checked_shrinkage(shrinkage)
        self.prior = prior

    def __call__(self, moments: Moments) -> Proxies:
        """`Moments` of C classes with a pooled Gram matrix → C proxies in float32."""
        factor = cholesky(*shrunk_within(moments, self.shrinkage))
        means, centre = double(moments.means), double(moments.global_mean)
        shared = centre @ torch.cholesky_solve(centre[:, None], factor)
        if shared < LARGEST_SHARED:
            centre = torch.zeros_like(centre)
        weights = torch.cholesky_solve((means - centre).T, factor).T
        counts = double(moments.counts)
        if self.prior == "uniform":
            counts = torch.ones_like(counts)
        priors = counts / counts.sum()
        bias = -0.5 * (weights * (means + centre)).sum(1) + priors.log()
        weights, bias = (t.to(moments.sums.device, torch.float32) for t in (weights, bias))
        return Proxies(weights.contiguous(), bias, torch.arange(len(bias), device=bias.device))
