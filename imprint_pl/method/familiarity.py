"""How familiar an embedding is: whether it is like the training samples at all, whatever its class.

The class scores cannot say that: they compare classes with each other. `accept` sets its threshold
on this score, and `predict` reports it. `threshold.py` fits it on samples that were held out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprint_pl.numerics.constants import Constants
from imprint_pl.numerics.factorisations import double, oas
from imprint_pl.numerics.moments import CHUNK, Moments
from imprint_pl.parts.norm.layers import last_columns

# Directions of the within-class covariance that are kept, and at most as many of the class means:
# 64, 128 and 256 give the same AUROC within half a point. With 1,280 features 1.3 MB.
DIRECTIONS = 128
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


class Familiarity(Constants):
    """A score of familiarity, kept in the head; empty where no `accept` was asked for.

    It is the mean of three scores, each less its mean and over its standard deviation on held-out
    training samples: the best class score, the relative and the absolute Mahalanobis distance. So
    0 is a usual training sample, and −2 a strange one. The distances are those of the last layer's
    unit vectors z, with the within-class covariance W, shrunk by OAS, and the covariance of all
    samples T = W + B:

    min_c (z − m_c)ᵀ W⁻¹ (z − m_c) [− (z − m)ᵀ T⁻¹ (z − m)]

    W is kept along the directions of the class means and along those in which it is largest; it
    counts as one number σ² along the others, where the relative distance is 0.

    Attributes:
        mean: `(d,)`, m; d is the width of the last layer.
        basis: `(d, q)`, orthonormal: the directions that are kept.
        turn: `(q, q)`: coordinates in which W is the identity and B diagonal.
        centres: `(C, q)`, the class means there.
        shares: `(q,)`, the share of W in T along each.
        noise: `(1,)`, σ².
        scale: `(2, 3)`, means and standard deviations of the three scores.

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
        self.clear()

    def clear(self) -> None:
        """Forgets what was fitted."""
        device = self.mean.device if hasattr(self, "mean") else None
        for name in self.constants:
            setattr(self, name, torch.zeros(0, device=device))

    @property
    def is_empty(self) -> bool:
        return not self.mean.numel()

    def fit(self, moments: Moments, seed: int = 0) -> Familiarity:
        """Fits the distances; `standardise` fits the scale.

        Args:
            moments: sums of unit vectors, with a pooled Gram matrix; see `unit_sums`.
            seed: fixes the random start of the iteration.

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
        basis = _basis(centres * counts.sqrt()[:, None], within, seed)
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
        z = nn.functional.normalize(embeddings[..., -len(mean) :].to(dtype)) - mean
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
        return ((standard * counts).sum(1) / counts.sum().clamp(min=1)).float()

    def fits(self, embedding_dim: int) -> bool:
        """Whether the constants of a file fit each other and embeddings of so many numbers."""
        if self.is_empty:
            return all(not getattr(self, name).numel() for name in self.constants)
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

    # Heads without a familiarity have the files that they always had.

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if not self.is_empty:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(prefix + name in state_dict for name in self.constants):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        else:
            self.clear()


def unit_sums(x: Tensor, y: Tensor, num_classes: int, layer_widths: list[int] | None) -> Moments:
    """The sums that `Familiarity.fit` takes, of embeddings `x (N, d)`, `y (N,)` in 0..C−1."""
    dim = last_columns(x[:1], layer_widths).shape[1]
    return add_units(Moments.zeros(num_classes, dim, device=x.device), x, y, layer_widths)


def add_units(moments: Moments, x: Tensor, y: Tensor, layer_widths: list[int] | None) -> Moments:
    """Adds embeddings `x (n, d)`, `y (n,)` to such sums in place, and returns them."""
    device = moments.sums.device
    for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        unit = nn.functional.normalize(last_columns(rows, layer_widths).to(device, torch.float32))
        moments.add(unit, labels.to(device))
    return moments


def _squared(x: Tensor, centres: Tensor) -> Tensor:
    """Squared distances `(B, C)`."""
    squares = x.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * x @ centres.T).clamp(min=0)


def _basis(means: Tensor, within: Tensor, seed: int) -> Tensor:
    """An orthonormal basis `(d, q)` of the directions to keep: those of the class means `(C, d)`,
    weighted by the square roots of the counts, and the main ones of `within (d, d)`."""
    d = len(within)
    # One direction fewer than classes: the means are relative to the mean of all.
    few = min(len(means) - 1, DIRECTIONS, d)
    of_means = torch.linalg.svd(means, full_matrices=False)[2][:few].T
    more = min(DIRECTIONS, d - few)
    if more < DIRECTIONS:
        return torch.eye(d, dtype=within.dtype, device=within.device)
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(d, more, generator=generator, dtype=torch.float64).to(within)
    for _ in range(ROUNDS):
        columns = torch.linalg.qr(within @ columns)[0]
    return torch.linalg.qr(torch.cat([of_means, columns], 1))[0]
