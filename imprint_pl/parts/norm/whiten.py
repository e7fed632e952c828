"""NORM `whiten`: makes the within-class covariance round."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.numerics.factorisations import (
    OAS,
    checked_shrinkage,
    inverse_factor,
    shrunk_within,
)
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.norm.learned import Learned


class Whiten(Learned):
    """whiten: makes the within-class covariance the identity.

    z ↦ L⁻¹ (z − μ), with L Lᵀ = (1−s) Σ_W + s (tr Σ_W / d) I; μ `(d,)` is the mean of the class
    means, Σ_W `(d, d)` the within-class covariance pooled over all samples. Euclidean distances
    after it are Mahalanobis distances before it. Computed in float64, by Cholesky.

    μ is not the mean of all samples, since that lies close to the mean of a class that has most of
    the samples. That class would then be at the origin, where scaling to unit length, as in
    `whitened`, turns it into noise.

    Args:
        shrinkage: s, from 0 (Σ_W unchanged, which needs more samples than dimensions) to 1 (all
            directions equal), or "oas", which chooses s from Σ_W and the number of samples: with
            1,280 dimensions about 0.6 at five samples for each class, 0.01 at a thousand. See
            `factorisations.oas`.

    Raises:
        ImprintError: If the shrinkage is out of range, or the matrix is singular up to rounding.

    Source: Fisher 1936 (the metric of linear discriminants); Ledoit & Wolf 2004 (shrinkage towards
    a multiple of the identity).
    """

    name = "whiten"
    fixed = True
    uses_labels = True
    constants = ("mean", "matrix")
    mean: Tensor
    matrix: Tensor

    def __init__(self, shrinkage: float | str = OAS) -> None:
        super().__init__()
        self.shrinkage = checked_shrinkage(shrinkage)

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Whiten:
        return self.fit_moments(Moments.of(x, y, num_classes), x)

    def fit_moments(self, moments: Moments, like: Tensor | None = None) -> Whiten:
        """Fit from sums with a pooled Gram matrix; the state goes to the device of `like`,
        or of the sums."""
        inverse = inverse_factor(*shrunk_within(moments, self.shrinkage))
        centre = moments.means[moments.counts > 0].mean(0)
        self._set(moments.sums if like is None else like, mean=centre, matrix=inverse.T)
        return self

    def apply_fitted(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.matrix
