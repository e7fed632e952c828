"""NORM `nystrom`: features of an RBF kernel, from landmarks."""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.factorisations import (
    double,
    inverse_factor,
)
from imprint_pl.numerics.moments import Moments, gram_of_rows
from imprint_pl.numerics.values import is_number
from imprint_pl.parts.norm.base import sums_of, transform
from imprint_pl.parts.norm.learned import Learned, check_projection_dim

# Added to the diagonal of the landmarks' kernel, which is 1 there. Inference is in float32: along
# eigenvectors with smaller eigenvalues, features would be amplified rounding errors.
JITTER = 1e-6

# Most rows that are computed in float64, as in exported files: the rounding of float32 differs
# between machines and would change the probabilities of an image by up to 6e-5. For more rows, as
# in a fit, float64 would take up a third of the whole time.
EXACT_ROWS = 512

# Columns of a triangular product computed at a time.
BLOCK = 512


class Nystrom(Learned):
    """nystrom: features whose inner product approximates an RBF kernel.

    k(x, z) = exp(−‖x − z‖² / (2σ²)). With landmarks l_1 … l_p, drawn at random from the training
    embeddings, and their kernel matrix K `(p, p)`:
    z ↦ L⁻¹ (k(l_1, z), …, k(l_p, z)) − the mean of that over the training embeddings, where
    L Lᵀ = K + 1e-6 I, by Cholesky in float64: a K^(-1/2) up to a rotation, which neither inner
    products nor distances see. With all samples as landmarks, a linear method on the features is
    the kernel method.

    Args:
        projection_dim: p, at most the number of training samples. `head.feature_dim` is the p in
            use.
        width: σ over the median of the distances above 0 between landmarks.

    Raises:
        ImprintError: If a parameter is not positive, or the factorisation fails.

    Source: Williams & Seeger 2001, "Using the Nyström Method to Speed Up Kernel Machines".
    """

    name = "nystrom"
    maps = True
    # The landmarks are kept relative to `shift`, their mean: embeddings far from the origin would
    # lose digits in ‖x‖² + ‖z‖² − 2xz. `gamma` is 1 / (2σ²).
    constants = ("shift", "landmarks", "gamma", "matrix", "mean")
    mean: Tensor

    def __init__(self, projection_dim: int = 2000, width: float = 1.0) -> None:
        check_projection_dim(projection_dim)
        if not is_number(width) or not 1e-6 <= width <= 1e6:
            raise ImprintError(f"width={width!r}: give a number above 0, such as 1.0")
        super().__init__()
        self.projection_dim = projection_dim
        self.width = width

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Nystrom:
        self.fit_sums(x, y, num_classes, seed, gram="none")
        return self

    def features(self, dim: int, samples: int) -> int:
        return min(self.projection_dim, samples)

    def fit_sums(
        self,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        seed: int = 0,
        gram: str = "pooled",
        weights: Tensor | None = None,
    ) -> Moments:
        # One pass is enough: compute the sums without the shift, then shift them by their mean.
        self.fit_few(x[self.places(len(x), seed).to(x.device)])
        return self.centred(sums_of(self, x, y, num_classes, gram, weights))

    def places(self, samples: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(samples, generator=generator)[: self.projection_dim]
        return drawn.sort().values

    def centred(self, moments: Moments) -> Moments:
        self._set(self.mean, mean=moments.global_mean)
        return moments.shifted(self.mean)

    def fit_transform(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Tensor:
        self.fit_few(x[self.places(len(x), seed).to(x.device)])
        z = transform(self, x)
        self._set(x, mean=double(z).mean(0))
        return z - self.mean

    def fit_few(self, few: Tensor) -> Nystrom:
        """Set all constants, with the landmarks `(p, d)`; the mean is 0."""
        landmarks = double(few)
        shift = landmarks.mean(0)
        landmarks = landmarks - shift
        squares = landmarks.square().sum(1)
        squared = (squares[:, None] + squares - 2 * gram_of_rows(landmarks)).clamp_min_(0)
        squared.fill_diagonal_(0)
        apart = squared[squared > 1e-12 * squared.max()]
        # If all landmarks are equal, the kernel is 1 everywhere for any width.
        sigma = self.width * apart.median().sqrt() if len(apart) else squared.new_ones(())
        gamma = (0.5 / sigma.square()).reshape(1)
        kernel = torch.exp(-gamma * squared)
        kernel.diagonal().add_(JITTER)
        cure = f"width={self.width}: give a smaller one, or fewer landmarks (projection_dim)"
        matrix = inverse_factor(kernel, cure).T
        mean = torch.zeros(len(kernel))
        self._set(few, shift=shift, landmarks=landmarks, gamma=gamma, matrix=matrix, mean=mean)
        return self

    def apply_fitted(self, x: Tensor) -> Tensor:
        exact = torch.compiler.is_exporting() or x.shape[:-1].numel() <= EXACT_ROWS
        return self._mapped(x, torch.float64 if exact and x.device.type != "mps" else x.dtype)

    def of_many(self, x: Tensor) -> Tensor:
        # Use one type for any number of rows: rows that are subtracted from sums again would leave
        # the difference of roundings behind, which a small λ amplifies.
        return self._mapped(x, x.dtype)

    def _mapped(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        shift, landmarks, gamma, matrix, mean = (getattr(self, n).to(dtype) for n in self.constants)
        z = torch.exp(-gamma * _squared_distances(x.to(dtype) - shift, landmarks))
        # The matrix is upper triangular: a block of columns needs only the first rows.
        blocks = [
            z[..., : i + BLOCK] @ matrix[: i + BLOCK, i : i + BLOCK]
            for i in range(0, len(landmarks), BLOCK)
        ]
        return (torch.cat(blocks, -1) - mean).to(x.dtype)


def _squared_distances(x: Tensor, z: Tensor) -> Tensor:
    """`(..., d)` and `(p, d)` → `(..., p)`."""
    squares = x.square().sum(-1, keepdim=True) + z.square().sum(-1)
    return (squares - 2 * (x @ z.T)).clamp_min(0)
