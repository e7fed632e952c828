"""NORM that learns from the training embeddings: a shift or a map, fitted once, in the imprint
epoch, and kept in the head as constants. `norm.py` has the ones that need no data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.constants import Constants
from imprint_pl.errors import ImprintError
from imprint_pl.factor import OAS, checked_shrinkage, double, inverse_factor, shrunk_within
from imprint_pl.limits import is_count, is_number
from imprint_pl.moments import Moments
from imprint_pl.norm import Norm, sums_of

# Added to the diagonal of the landmarks' kernel, which is 1 there. Inference is in float32: along
# directions of the kernel below this, features would be amplified rounding.
JITTER = 1e-6
# A Gram matrix of more features would take terabytes.
MOST_FEATURES = 2**20
# Rows up to which nystrom is in float64, as in exported files: in float32 it would move the
# probabilities of an image by up to 6e-5, by other rounding on every machine. Of more rows, as in a
# fit, that would be a third of the time.
EXACT_ROWS = 512
# Columns of a triangular product computed at a time.
BLOCK = 512


class Learned(Norm, Constants):
    """A NORM with fitted state: constants, empty until `fit` or until a state dict fills them.

    Subclasses name them, the first with the input dimension as its first size.
    """

    learns = True

    def __init__(self) -> None:
        super().__init__()
        for name in self.constants:
            setattr(self, name, torch.zeros(0))

    def clear(self) -> None:
        for name in self.constants:
            setattr(self, name, getattr(self, name).new_zeros(0))

    @property
    def input_dim(self) -> int | None:
        first = getattr(self, self.constants[0])
        return first.shape[0] if first.numel() else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., p)`.

        Raises:
            ImprintError: not fitted yet.
        """
        if self.input_dim is None:
            raise ImprintError(
                f"{self.name} has not been fitted: imprint the head, or load a checkpoint"
            )
        return self.apply_fitted(x)

    def apply_fitted(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _set(self, like: Tensor, **values: Tensor) -> None:
        # Copied outside inference mode: a head must still be trainable through its norm.
        with torch.inference_mode(False):
            for name, value in values.items():
                setattr(self, name, value.detach().to(like.device, torch.float32).clone())


class Centre(Learned):
    """centre: subtracts the mean of all training embeddings, z ↦ z − μ_G."""

    name = "centre"
    constants = ("mean",)

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Centre:
        self._set(x, mean=Moments.of(x, y, num_classes, gram="none").global_mean)
        return self

    def apply_fitted(self, x: Tensor) -> Tensor:
        return x - self.mean


class Whiten(Learned):
    """whiten: makes the within-class covariance the identity.

    z ↦ L⁻¹ (z − μ_G), with L Lᵀ = (1−s) Σ_W + s (tr Σ_W / d) I; μ_G `(d,)` is the mean of all
    training embeddings, Σ_W `(d, d)` their within-class covariance pooled over all samples.
    Euclidean distances after it are Mahalanobis distances before it. In float64, by Cholesky.

    Args:
        shrinkage: s, from 0 (Σ_W as it is, which asks for more samples than dimensions) to 1 (all
            directions alike), or "oas", which chooses s from Σ_W and the number of samples: about
            0.6 at five samples a class of 1,280 numbers, 0.01 at a thousand. See `factor.oas`.

    Raises:
        ImprintError: the shrinkage is out of range; the matrix is singular to rounding.

    Source: Fisher 1936 (the metric of linear discriminants); Ledoit & Wolf 2004 (shrinkage towards
    a multiple of the identity).
    """

    name = "whiten"
    uses_labels = True
    constants = ("mean", "matrix")

    def __init__(self, shrinkage: float | str = OAS) -> None:
        super().__init__()
        self.shrinkage = checked_shrinkage(shrinkage)

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Whiten:
        return self.fit_moments(Moments.of(x, y, num_classes), x)

    def fit_moments(self, moments: Moments, like: Tensor) -> Whiten:
        """As `fit`, from sums with a pooled Gram matrix; the state goes to the device of `like`."""
        inverse = inverse_factor(*shrunk_within(moments, self.shrinkage))
        self._set(like, mean=moments.global_mean, matrix=inverse.T)
        return self

    def apply_fitted(self, x: Tensor) -> Tensor:
        return (x - self.mean) @ self.matrix


class RandomProjection(Learned):
    """random_projection: z ↦ relu(z R), R `(d, p)` of independent draws from N(0, 1/d).

    A fixed random layer, after which linear methods see products of features.

    Args:
        projection_dim: p, whatever the number of training samples: with one image a class, too, as
            many features are best.

    Attributes:
        capped: p is at most half the training samples (one at the least), as it was in earlier
            versions: for states that those have written.

    Source: McDonnell et al. 2023, "RanPAC: Random Projections and Pre-trained Models for Continual
    Learning".
    """

    name = "random_projection"
    maps = True
    constants = ("projection",)

    def __init__(self, projection_dim: int = 5000) -> None:
        check_projection_dim(projection_dim)
        super().__init__()
        self.projection_dim = projection_dim
        self.capped = False

    def features(self, dim: int, samples: int) -> int:
        return (
            max(1, min(self.projection_dim, samples // 2)) if self.capped else self.projection_dim
        )

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> RandomProjection:
        return self.draw(x, len(x), seed)

    def draw(self, like: Tensor, samples: int, seed: int = 0) -> RandomProjection:
        """As `fit`, which needs of the data only `d` (here of `like (…, d)`) and N, `samples`."""
        d = like.shape[-1]
        p = self.features(d, samples)
        generator = torch.Generator().manual_seed(seed)
        self._set(like, projection=torch.randn(d, p, generator=generator) / d**0.5)
        return self

    def apply_fitted(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.projection)


class Nystrom(Learned):
    """nystrom: features whose inner product approximates an RBF kernel.

    k(x, z) = exp(−‖x − z‖² / (2σ²)). With landmarks l_1 … l_p, drawn at random from the training
    embeddings, and their kernel matrix K `(p, p)`:
    z ↦ L⁻¹ (k(l_1, z), …, k(l_p, z)) − the mean of that over the training embeddings, where
    L Lᵀ = K + 1e-6 I, by Cholesky in float64: a K^(-1/2) up to a rotation, which neither inner
    products nor distances see. With all samples as landmarks, a linear method on the features is
    the kernel method.

    Args:
        projection_dim: p, capped by the number of training samples as k is by those of a class.
            The head shows the p in use as `head.feature_dim`.
        width: σ over the median of the distances between landmarks (of those above 0).

    Raises:
        ImprintError: a parameter is not positive; the factorisation fails.

    Source: Williams & Seeger 2001, "Using the Nyström Method to Speed Up Kernel Machines".
    """

    name = "nystrom"
    maps = True
    # The landmarks are kept relative to `shift`, their mean: embeddings far from the origin would
    # lose digits in ‖x‖² + ‖z‖² − 2xz. `gamma` is 1 / (2σ²).
    constants = ("shift", "landmarks", "gamma", "matrix", "mean")

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
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, gram: str = "pooled"
    ) -> Moments:
        # One pass: the mean is taken from the sums, and then out of them.
        self._place(x, seed)
        moments = sums_of(self, x, y, num_classes, gram)
        self._set(x, mean=moments.global_mean)
        return moments.shifted(self.mean)

    def _place(self, x: Tensor, seed: int) -> None:
        """Draws the landmarks; sets all but the mean, which stays 0."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(x), generator=generator)[: self.projection_dim]
        landmarks = double(x[drawn.sort().values.to(x.device)])
        shift = landmarks.mean(0)
        landmarks = landmarks - shift
        squared = _squared_distances(landmarks, landmarks)
        squared.fill_diagonal_(0)
        apart = squared[squared > 1e-12 * squared.max()]
        # Without two landmarks that differ the kernel is 1 everywhere, whatever the width.
        sigma = self.width * apart.median().sqrt() if len(apart) else squared.new_ones(())
        gamma = (0.5 / sigma.square()).reshape(1)
        kernel = torch.exp(-gamma * squared)
        kernel.diagonal().add_(JITTER)
        cure = f"width={self.width}: give a smaller one, or fewer landmarks (projection_dim)"
        matrix = inverse_factor(kernel, cure).T
        mean = torch.zeros(len(kernel))
        self._set(x, shift=shift, landmarks=landmarks, gamma=gamma, matrix=matrix, mean=mean)

    def apply_fitted(self, x: Tensor) -> Tensor:
        exact = torch.compiler.is_exporting() or x.shape[:-1].numel() <= EXACT_ROWS
        return self._mapped(x, torch.float64 if exact and x.device.type != "mps" else x.dtype)

    def of_many(self, x: Tensor) -> Tensor:
        # In one type whatever their number: rows that are taken out of sums again would leave the
        # difference of roundings behind, which a small λ does not bear.
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


LEARNED = {part.name: part for part in (Centre, Whiten, RandomProjection, Nystrom)}


def check_projection_dim(projection_dim: int) -> None:
    """Raises an `ImprintError` for what is no whole number from 1 to `MOST_FEATURES`."""
    if not is_count(projection_dim) or projection_dim > MOST_FEATURES:
        raise ImprintError(
            f"projection_dim={projection_dim!r}: give at least one dimension, a whole number, and "
            f"at most {MOST_FEATURES:,}"
        )


def _squared_distances(x: Tensor, z: Tensor) -> Tensor:
    """`(..., d)` and `(p, d)` → `(..., p)`."""
    squares = x.square().sum(-1, keepdim=True) + z.square().sum(-1)
    return (squares - 2 * (x @ z.T)).clamp_min(0)
