"""AGG `mnn`: the m proxies that are nearest to a sample vote for their classes.

Like every AGG it returns a score for each class, not only the winner.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.values import _one_of, _positive, is_count
from imprint_pl.parts.agg.base import Aggregation
from imprint_pl.parts.agg.distances import DISTANCES, Mahalanobis, distances

# Numbers in a block of distances, samples × proxies: 256 MB in float64.
BLOCK = 2**25


class _Known(NamedTuple):
    """A metric and the state of the proxies that it was computed from."""

    proxies: weakref.ref[Tensor]
    state: tuple[int, int, torch.device]
    metric: Mahalanobis


class NearestProxies(Aggregation):
    """mnn: the m nearest proxies of all classes vote.

    score_c(z) = Σ of the votes of the proxies of class c among the m nearest. A vote is 1 / m
    ("uniform"), 1 / (distance + 1e-10) ("weighted_by_distance"), or
    exp(−distance / T) / Σ exp(−distance / T) ("softmax"). A tie of uniform votes goes to the class
    with the nearer proxy, by a bonus of at most half a vote.

    Args:
        m: Number of proxies that vote; all of them where there are fewer.
        distance: "euclidean", "cosine" (1 − cos), "manhattan", "chebyshev" or "mahalanobis"
            (under the covariance of the proxies + 1e-6 I, in float64).
        votes: "uniform", "weighted_by_distance" or "softmax".
        temperature: T of the softmax votes, in units of the distance. Default: 0.07.
        as_published: Ties go to the lowest label, as in the paper's code.

    Source: Westerhoff et al. 2025, Section 3.4.
    """

    name = "mnn"
    by_distance = True

    def __init__(
        self,
        m: int = 5,
        distance: str = "euclidean",
        votes: str = "weighted_by_distance",
        temperature: float | None = None,
        as_published: bool = False,
    ) -> None:
        super().__init__()
        if not is_count(m):
            raise ImprintError(
                f"m={m!r}: at least one proxy has to vote; give a whole number m ≥ 1"
            )
        self.m = m
        self.distance = _one_of("distance", distance, DISTANCES)
        self.votes = _one_of("votes", votes, ("uniform", "weighted_by_distance", "softmax"))
        if votes == "softmax":
            temperature = _positive("temperature", 0.07 if temperature is None else temperature)
        elif temperature is not None:
            raise ImprintError(
                f"temperature={temperature} is not used by votes={votes!r}: leave it out, or give "
                'votes="softmax"'
            )
        self.temperature = temperature
        self.as_published = as_published
        self._mahalanobis: _Known | None = None

    def forward(
        self, z: Tensor, proxies: Tensor, bias: Tensor, proxy_classes: Tensor, num_classes: int
    ) -> Tensor:
        """Shapes as in `Max`; the bias is not used. Blocks bound the memory."""
        if torch.compiler.is_exporting():
            # An exported file cannot loop over an unknown number of blocks.
            return self._scores(z, proxies, proxy_classes, num_classes)
        rows = max(1, BLOCK // max(proxies.shape[0], 1))
        if self.distance == "manhattan" or self.distance == "chebyshev":
            rows = max(1, rows // 8)
        return torch.cat(
            [self._scores(block, proxies, proxy_classes, num_classes) for block in z.split(rows)]
        )

    def _scores(
        self, z: Tensor, proxies: Tensor, proxy_classes: Tensor, num_classes: int
    ) -> Tensor:
        far, nearest = self.nearest(z, proxies)
        return self.vote(far, proxy_classes[nearest], num_classes).to(z.dtype)

    def nearest(self, z: Tensor, proxies: Tensor) -> tuple[Tensor, Tensor]:
        """Find the m proxies that are nearest to each sample.

        Args:
            z: Samples `(B, d)`.
            proxies: Proxies `(P, d)`.

        Returns:
            Their distances, ascending, and their indices, both `(B, min(m, P))`.
        """
        return self.nearest_of(self.far(z, proxies))

    def far(self, z: Tensor, proxies: Tensor) -> Tensor:
        """Return the distances `(B, P)` of samples `(B, d)` and proxies `(P, d)`."""
        if self.distance == "mahalanobis":
            return self._metric(proxies)(z, proxies)
        return distances(z, proxies, self.distance)

    def nearest_of(self, far: Tensor) -> tuple[Tensor, Tensor]:
        """Find the nearest proxies from all distances `(B, P)`.

        With ties, the nearest proxies for a smaller m are not always the first ones for a larger m.
        """
        found = far.topk(min(self.m, far.shape[1]), dim=1, largest=False)
        return found.values, found.indices

    def vote(self, far: Tensor, classes: Tensor, num_classes: int) -> Tensor:
        """Return the scores `(B, C)`, from the nearest proxies' distances and classes `(B, m)`."""
        votes = self.vote_weights(far)
        scores = votes.new_zeros(far.shape[0], num_classes)
        scores = scores.scatter_add(1, classes, votes)
        if self.votes == "uniform" and not self.as_published:
            bonus = torch.arange(votes.shape[1], 0, -1, device=far.device) / (2 * votes.shape[1])
            bonus = bonus.to(votes.dtype).expand_as(votes) * votes
            scores = scores + torch.zeros_like(scores).scatter_reduce(1, classes, bonus, "amax")
        if self.distance == "mahalanobis":
            # The distances share a large term, so scores may become equal by rounding to float32:
            # the lowest label would win. Increase the best score by more than the rounding.
            ahead = scores.amax(1, keepdim=True) * (1 + 2**-21)
            scores = scores.scatter(1, scores.argmax(1, keepdim=True), ahead)
        return scores

    def vote_weights(self, far: Tensor) -> Tensor:
        """Distances of the m nearest proxies `(B, m)` → what the vote of each weighs, `(B, m)`."""
        if self.votes == "weighted_by_distance":
            return 1 / (far + 1e-10)
        if self.votes == "softmax" and self.temperature is not None:
            return torch.softmax(-far / self.temperature, dim=1)
        return torch.full_like(far, 1 / far.shape[1])

    def _metric(self, proxies: Tensor) -> Mahalanobis:
        if torch.compiler.is_exporting():
            # An exporter traces without numbers, so there is nothing to decompose.
            if self._mahalanobis is None:
                raise ImprintError(
                    'distance="mahalanobis" is exported as computed beforehand: call the head once '
                    "on embeddings, then export"
                )
            return self._mahalanobis.metric
        if proxies.is_inference():
            # Tensors of inference mode have no version counter that would show a change.
            return Mahalanobis(proxies)
        # The decomposition takes longer than many batches, so keep it until the proxies change.
        # Memory can be reused, so the data pointer alone does not identify the tensor.
        state = (proxies.data_ptr(), proxies._version, proxies.device)
        known = self._mahalanobis
        if known is None or known.proxies() is not proxies or known.state != state:
            known = _Known(weakref.ref(proxies), state, Mahalanobis(proxies.detach()))
            self._mahalanobis = known
        return known.metric

    def __getstate__(self) -> dict[str, Any]:
        """Leave the metric out, since a copy has other proxies."""
        return self.__dict__ | {"_mahalanobis": None}
