"""How familiar an embedding is: whether it is like the training samples at all, whatever its class.

The class scores cannot say that: they compare classes with each other. `accept` sets its threshold
on this score, and `predict` reports it. `threshold.py` fits it on samples that were held out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from imprint_pl.numerics.constants import OptionalConstants
from imprint_pl.numerics.factorisations import double, oas
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.passes import blocks

# Directions of the within-class covariance that are kept, and at most as many of the class means:
# 64, 128 and 256 give the same AUROC within half a point. With 1,280 features 1.3 MB.
DIRECTIONS = 128
# Bytes that all of it may take where no backbone is known: a quarter of EfficientNet-Lite0's.
MOST_BYTES = 18_600_000 // 4
# What the three scores weigh: the class score as much as both distances, which are of one model.
# Where the model is wrong, as for a pullover among coats and shirts, it then does less harm.
WEIGHTS = (2.0, 1.0, 1.0)
# Standard deviations above the mean from which on a class score counts alike: scores of linear
# recipes go on growing far away from all samples.
SURE = 1.0
# Layers that are shorter than this share of the embedding stay short: what they hold is rounding,
# such as the deviations over an image of one colour. Those of EfficientNet-Lite0 are 0.01 at least.
SHORTEST = 1e-2
# So that an embedding of zeros stays one.
LEAST_SQUARE = 1e-24
# Rounds of subspace iteration. It starts anew for sums without held-out samples: directions that
# were found with them would make them look more familiar than they are.
ROUNDS = 2
# Smallest variance in any direction, as a share of the average variance: samples may be all alike.
LEAST = 1e-6


class Distances(NamedTuple):
    """How far embeddings are from the classes, negative, so that more is more familiar.

    Attributes:
        relative: `(B,)`, −(Mahalanobis distance to the nearest class − that to all samples). It
            tells apart what is near, such as a further class of the same kind of images.
        absolute: `(B,)`, −Mahalanobis distance to the nearest class. It tells apart what is far,
            such as images of another kind.
    """

    relative: Tensor
    absolute: Tensor


class Familiarity(OptionalConstants):
    """A score of familiarity, kept in the head; empty where no `accept` was asked for.

    It is the weighted mean of three scores, each less its mean and over its standard deviation on
    held-out training samples: the best class score, the relative and the absolute Mahalanobis
    distance. So 0 is a usual training sample, and −2 a strange one. The distances are those of
    vectors z in which every layer of the embedding has unit length: earlier layers show differences
    that the last one was trained to ignore. They go by the within-class covariance W, shrunk by
    OAS, and the covariance of all samples T = W + B:

    min_c (z − m_c)ᵀ W⁻¹ (z − m_c) [− (z − m)ᵀ T⁻¹ (z − m)]

    W is kept along the directions of the class means and along those in which it is largest; it
    counts as one number σ² along the others, where the relative distance is 0.

    Attributes:
        mean: `(d,)`, m.
        basis: `(d, q)`, orthonormal: the directions that are kept.
        turn: `(q, q)`: coordinates in which W is the identity and B diagonal.
        centres: `(C, q)`, the class means there.
        shares: `(q,)`, the share of W in T along each.
        noise: `(1,)`, σ².
        scale: `(2, 3)`, means and standard deviations of the three scores.
        unit: makes z of an embedding.

    Source: Ren et al. 2021, "A Simple Fix to Mahalanobis Distance for Improving Near-OOD
    Detection"; Müller & Hein 2025, "Mahalanobis++" (unit vectors).
    """

    constants = ("mean", "basis", "turn", "centres", "shares", "noise", "scale")
    mean: Tensor
    basis: Tensor
    turn: Tensor
    centres: Tensor
    shares: Tensor
    noise: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.unit = UnitLayers()

    def clear(self) -> None:
        super().clear()
        self.unit.clear()

    def fit(
        self,
        moments: Moments,
        seed: int = 0,
        most_bytes: int = MOST_BYTES,
        layer_widths: list[int] | None = None,
    ) -> Familiarity:
        """Fits the distances; `standardise` fits the scale.

        Args:
            moments: sums of unit vectors, with a pooled Gram matrix; see `unit_sums`.
            seed: fixes the random start of the iteration.
            most_bytes: bytes that the constants may take; fewer directions are kept where they
                would take more.
            layer_widths: as `unit_sums` had them.

        Returns:
            Itself.

        Source: Halko, Martinsson & Tropp 2011 (subspace iteration from a random start); Chen et al.
        2010 (OAS).
        """
        moments = moments.present()
        counts, gram = double(moments.counts), double(moments.pooled_gram)
        n, d = counts.sum(), len(gram)
        mean = double(moments.sums).sum(0) / n
        centres = double(moments.means) - mean
        total = gram / n - torch.outer(mean, mean)
        within = total - (centres * (counts / n)[:, None]).T @ centres
        spread = total.diagonal().mean().clamp(min=1e-12)
        shrinkage = oas(within, int(n) - len(counts))
        level = shrinkage * within.diagonal().mean() + LEAST * spread
        within = (1 - shrinkage) * within
        within.diagonal().add_(level)
        self.unit.fit(layer_widths, moments.counts.device)
        most = _most_directions(most_bytes - self.unit.layers.nbytes, d, len(counts))
        basis = _basis(centres * counts.sqrt()[:, None], within, most, seed)
        inner = basis.T @ within @ basis
        left = d - basis.shape[1]
        rest = within.diagonal().sum() - inner.diagonal().sum()
        noise = (rest / left).clamp(min=LEAST * spread) if left else torch.ones_like(rest)
        factor = torch.linalg.cholesky((inner + inner.T) / 2)
        scaled = torch.linalg.solve_triangular(factor, (centres @ basis).T, upper=False)
        turned, between, _ = torch.linalg.svd(scaled * (counts / n).sqrt())
        shares = torch.ones_like(turned[0])
        shares[: len(between)] = 1 / (1 + between.square())
        turn = torch.linalg.solve_triangular(factor.T, turned, upper=True)
        scale = torch.tensor([[0.0] * 3, [1.0] * 3])
        self._set(
            moments.counts.device,
            mean=mean,
            basis=basis,
            turn=turn,
            centres=centres @ basis @ turn,
            shares=shares,
            noise=noise.reshape(1),
            scale=scale,
        )
        return self

    def standardise(self, scores: Tensor) -> None:
        """Fits the scale on the three scores `(n, 3)` of held-out samples.

        A score that is the same for all of them, such as the relative distance to a single class,
        does not count.
        """
        scores = double(scores)
        means = scores.mean(0)
        deviations = scores.std(0, correction=0)
        same = ~(deviations > 1e-9 * means.abs())
        self._set(self.mean.device, scale=torch.stack([means, deviations.where(~same, 0.0)]))

    def distances(self, embeddings: Tensor) -> Distances:
        """Embeddings `(B, d)`, or of several layers `(B, Σd)`, → their distances, in float64."""
        # Squares of what is left of a unit vector would lose most of their digits in float32.
        exact = embeddings.device.type != "mps"
        dtype = torch.float64 if exact else torch.float32
        mean, basis, turn, centres, shares, noise = (
            getattr(self, name).to(dtype) for name in self.constants[:-1]
        )
        # Heads of earlier versions have the mean of the last layer alone.
        z = self.unit(embeddings[..., -len(mean) :].to(dtype)) - mean
        inner = z @ basis
        turned = inner @ turn
        nearest = _squared(turned, centres).amin(1)
        rest = (z.square().sum(1) - inner.square().sum(1)).clamp(min=0) / noise
        if basis.shape[0] == basis.shape[1]:
            rest = 0 * rest
        return Distances((turned.square() * shares).sum(1) - nearest, -nearest - rest)

    def scores(self, embeddings: Tensor, best: Tensor) -> Tensor:
        """Embeddings and their best class scores `(B,)` → the three scores `(B, 3)`."""
        distances = self.distances(embeddings)
        return torch.stack([best.to(distances.relative), *distances], 1)

    def forward(self, embeddings: Tensor, best: Tensor) -> Tensor:
        """Embeddings `(B, d)` and their best class scores `(B,)` → familiarity `(B,)` float32."""
        return self.of_scores(self.scores(embeddings, best))

    def of_scores(self, scores: Tensor) -> Tensor:
        """The three scores `(B, 3)` → familiarity `(B,)`."""
        means, deviations = self.scale.to(scores)
        counts = (deviations > 0).to(scores)
        standard = (scores - means) / deviations.where(deviations > 0, 1.0)
        standard = torch.cat([standard[:, :1].clamp(max=SURE), standard[:, 1:]], 1) * counts
        # Weights as numbers: a tensor of them would have to be copied to the GPU each time.
        a, b, c = WEIGHTS
        total = a * counts[0] + b * counts[1] + c * counts[2]
        score = a * standard[:, 0] + b * standard[:, 1] + c * standard[:, 2]
        return (score / total.clamp(min=1)).float()

    def fits(self, embedding_dim: int) -> bool:
        """Whether the constants of a file fit each other and embeddings of so many numbers."""
        if self.is_empty:
            left = (getattr(self, name) for name in self.constants)
            return self.unit.is_empty and not any(value.numel() for value in left)
        values = [getattr(self, name) for name in self.constants]
        q = len(self.shares)
        shapes = (
            self.mean.ndim == 1
            and len(self.mean) <= embedding_dim
            and self.basis.shape == (len(self.mean), q)
            and self.turn.shape == (q, q)
            and self.centres.ndim == 2
            and self.centres.shape[0] > 0
            and self.centres.shape[1] == q
            and self.shares.ndim == 1
            and self.noise.shape == (1,)
            and self.scale.shape == (2, 3)
            and self.unit.fits(len(self.mean))
        )
        return (
            shapes
            and all(v.is_floating_point() and bool(v.isfinite().all()) for v in values)
            and bool((self.noise > 0).all() and (self.scale[1] >= 0).all())
        )

    def _set(self, device: torch.device, **values: Tensor) -> None:
        # Outside of inference mode, since constants made under it cannot be changed any more.
        with torch.inference_mode(False):
            for name, value in values.items():
                setattr(self, name, value.detach().to(device, torch.float32).clone())


class UnitLayers(OptionalConstants):
    """Embeddings `(B, d)` → every layer at unit length, side by side, `(B, d)`.

    Attributes:
        layers: `(L, d)`, 1 where a feature belongs to a layer, else 0; empty where there is one
            layer.
    """

    constants = ("layers",)
    layers: Tensor

    def fit(self, layer_widths: list[int] | None, device: torch.device | str = "cpu") -> UnitLayers:
        """Takes how many features each layer has, and returns itself."""
        self.clear()
        if layer_widths is not None and len(layer_widths) > 1:
            widths = torch.tensor(layer_widths)
            layer = torch.arange(len(widths)).repeat_interleave(widths)
            with torch.inference_mode(False):
                self.layers = nn.functional.one_hot(layer).T.to(device, torch.float32)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.is_empty:
            return nn.functional.normalize(x)
        layers = self.layers.to(x)
        squares = x.square() @ layers.T
        least = SHORTEST**2 * squares.sum(1, keepdim=True).clamp(min=LEAST_SQUARE)
        return x / (squares.maximum(least).sqrt() @ layers)

    def fits(self, dim: int) -> bool:
        """Whether the constant of a file is one of embeddings of so many numbers."""
        one = (self.layers == 0) | (self.layers == 1)
        return self.is_empty or (
            self.layers.ndim == 2
            and self.layers.shape[1] == dim
            and bool(one.all() and (self.layers.sum(0) == 1).all())
        )


def unit_sums(x: Tensor, y: Tensor, num_classes: int, layer_widths: list[int] | None) -> Moments:
    """The sums that `Familiarity.fit` takes, of embeddings `x (N, d)`, `y (N,)` in 0..C−1."""
    empty = Moments.zeros(num_classes, x.shape[1], device=x.device)
    return add_units(empty, x, y, layer_widths)


def add_units(moments: Moments, x: Tensor, y: Tensor, layer_widths: list[int] | None) -> Moments:
    """Adds embeddings `x (n, d)`, `y (n,)` to such sums in place, and returns them."""
    device = moments.sums.device
    unit = UnitLayers().fit(layer_widths, device)
    for block in blocks(len(x), "adding up"):
        moments.add(unit(x[block].to(device, torch.float32)), y[block].to(device))
    return moments


def _squared(x: Tensor, centres: Tensor) -> Tensor:
    """Squared distances `(B, C)`."""
    squares = x.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * x @ centres.T).clamp(min=0)


def _most_directions(most_bytes: int, d: int, num_classes: int) -> int:
    """The largest q ≥ 1 for which the constants take at most so many bytes: they are
    q (d + q + C + 1) numbers of four bytes, beside d + 7 that do not depend on q."""
    half = (d + num_classes + 1) / 2
    return max(1, int(math.sqrt(half**2 + max(0, most_bytes / 4 - d - 7)) - half))


def _basis(means: Tensor, within: Tensor, most: int, seed: int) -> Tensor:
    """An orthonormal basis `(d, q)` of the directions to keep, at most so many: those of the class
    means `(C, d)`, weighted by the square roots of the counts, and the main ones of
    `within (d, d)`."""
    d = len(within)
    # One direction fewer than classes: the means are relative to the mean of all.
    few = min(len(means) - 1, DIRECTIONS, most // 2, d)
    of_means = torch.linalg.svd(means, full_matrices=False)[2][:few].T
    more = min(DIRECTIONS, most - few, d - few)
    if few + more == d:
        return torch.eye(d, dtype=within.dtype, device=within.device)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(d, more, generator=generator, dtype=torch.float64).to(within)
    for _ in range(ROUNDS):
        columns = torch.linalg.qr(within @ columns)[0]
    return torch.linalg.qr(torch.cat([of_means, columns], 1))[0]
