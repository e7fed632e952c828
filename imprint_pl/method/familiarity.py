"""The familiarity of an embedding: how similar it is to the training samples of any class.

Class scores do not measure this, since they compare classes with each other. `accept` sets a
threshold on the familiarity, and `predict` reports it. `threshold.py` fits it on held-out samples.
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

# Directions of the within-class covariance that are kept, and the most directions of the class
# means. 64, 128 and 256 give the same AUROC within half a point. 1.3 MB with 1,280 features.
DIRECTIONS = 128
# Most bytes of all constants if the backbone is not known: a quarter of EfficientNet-Lite0's.
MOST_BYTES = 18_600_000 // 4
# Weights of the three scores. The class score counts as much as both distances together, since
# these share one model of the data. If that model is wrong, as for a pullover among coats and
# shirts, it does less harm.
WEIGHTS = (2.0, 1.0, 1.0)
# Class scores are cut off at this many standard deviations above the mean, since the scores of
# linear recipes keep growing far away from all samples.
SURE = 1.0
# A layer whose length is less than this share of the embedding's is not scaled to unit length: it
# holds only rounding errors, such as deviations over an image of one colour. The layers of
# EfficientNet-Lite0 have at least 0.01.
SHORTEST = 1e-2
# Smallest squared length to divide by, so that an embedding of zeros stays zero.
LEAST_SQUARE = 1e-24
# Rounds of subspace iteration. The iteration starts anew for sums without held-out samples, since
# directions found with these samples would make them look more familiar than they are.
ROUNDS = 2
# Smallest variance in any direction, as a share of the average variance. It is needed where all
# samples are alike.
LEAST = 1e-6


class Distances(NamedTuple):
    """How far embeddings are from the classes, negative, so that more is more familiar.

    Attributes:
        relative: `(B,)`, −(Mahalanobis distance to the nearest class − that to all samples). It
            detects similar images of an unknown class.
        absolute: `(B,)`, −Mahalanobis distance to the nearest class. It detects images of another
            kind.
    """

    relative: Tensor
    absolute: Tensor


class Familiarity(OptionalConstants):
    """A score of familiarity, kept in the head; empty if the head was fitted without `accept`.

    It is the weighted mean of three standardised scores: the best class score, and the relative and
    the absolute Mahalanobis distance. The means and standard deviations are those of held-out
    training samples, so 0 is a usual training sample and −2 an unusual one. The distances are
    computed on vectors z in which every layer of the embedding has unit length: earlier layers show
    differences that the last one was trained to ignore. They use the within-class covariance W,
    shrunk by OAS, and the covariance of all samples T = W + B:

    min_c (z − m_c)ᵀ W⁻¹ (z − m_c) [− (z − m)ᵀ T⁻¹ (z − m)]

    W is stored for the directions of the class means and for those in which it is largest. In all
    other directions it is approximated by one number σ², and the relative distance is 0.

    Attributes:
        mean: `(d,)`, m.
        basis: `(d, q)`, orthonormal: the directions that are kept.
        turn: `(q, q)`, maps to coordinates in which W is the identity and B is diagonal.
        centres: `(C, q)`, the class means in these coordinates.
        shares: `(q,)`, the share of W in T along each coordinate.
        noise: `(1,)`, σ².
        scale: `(2, 3)`, means and standard deviations of the three scores.
        unit: turns an embedding into z.

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
            layer_widths: those given to `unit_sums`.

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
        # The distances are small differences of squares, which would lose most of their digits in
        # float32.
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
        # Use plain numbers as weights, since a tensor would have to be copied to the GPU each time.
        a, b, c = WEIGHTS
        total = a * counts[0] + b * counts[1] + c * counts[2]
        score = a * standard[:, 0] + b * standard[:, 1] + c * standard[:, 2]
        return (score / total.clamp(min=1)).float()

    def fits(self, embedding_dim: int) -> bool:
        """Whether the constants of a file fit each other and embeddings of `embedding_dim`."""
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
        # Leave inference mode, since constants made under it cannot be changed later.
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
        """Sets how many features each layer has, and returns itself."""
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
        """Whether the constant of a file fits embeddings of `dim` numbers."""
        one = (self.layers == 0) | (self.layers == 1)
        return self.is_empty or (
            self.layers.ndim == 2
            and self.layers.shape[1] == dim
            and bool(one.all() and (self.layers.sum(0) == 1).all())
        )


def unit_sums(x: Tensor, y: Tensor, num_classes: int, layer_widths: list[int] | None) -> Moments:
    """Return the sums that `Familiarity.fit` takes, of embeddings `x (N, d)` with labels `y (N,)`
    in 0..C−1."""
    empty = Moments.zeros(num_classes, x.shape[1], device=x.device)
    return add_units(empty, x, y, layer_widths)


def add_units(moments: Moments, x: Tensor, y: Tensor, layer_widths: list[int] | None) -> Moments:
    """Adds embeddings `x (n, d)` with labels `y (n,)` to the sums of `unit_sums` in place, and
    returns them."""
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
    """Return the largest q ≥ 1 for which the constants take at most `most_bytes`.

    The constants are q (d + q + C + 1) numbers of four bytes, and d + 7 that do not depend on q.
    """
    half = (d + num_classes + 1) / 2
    return max(1, int(math.sqrt(half**2 + max(0, most_bytes / 4 - d - 7)) - half))


def _basis(means: Tensor, within: Tensor, most: int, seed: int) -> Tensor:
    """Return an orthonormal basis `(d, q)` of the directions to keep, q ≤ `most`.

    They are the directions of the class means `(C, d)`, weighted by the square roots of the counts,
    and the principal directions of `within (d, d)`.
    """
    d = len(within)
    # C means span at most C − 1 directions, since they are relative to the mean of all samples.
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
