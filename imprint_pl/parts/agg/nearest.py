"""AGG `mnn`: the m proxies that are nearest to a sample vote for their classes, by distance or not.

As every AGG it gives a score for every class, never a bare vote.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.values import _one_of, _positive, is_count
from imprint_pl.parts.agg.distances import DISTANCES, Mahalanobis, distances

# Numbers in a block of distances, samples × proxies: 256 MB in float64.
BLOCK = 2**25


class NearestProxies(nn.Module):
    """mnn: the m nearest proxies of all classes vote.

    score_c(z) = Σ of the votes of those of the m nearest proxies that belong to class c. A vote is
    1 / m ("uniform"), 1 / (distance + 1e-10) ("weighted_by_distance"), or
    exp(−distance / T) / Σ exp(−distance / T) ("softmax"). A tie of uniform votes goes to the class
    with the nearer proxy, by a bonus of at most half a vote.

    Args:
        m: how many proxies vote; all of them where there are fewer.
        distance: "euclidean", "cosine" (1 − cos), "manhattan", "chebyshev" or "mahalanobis"
            (under the covariance of the proxies + 1e-6 I, in float64).
        votes: "uniform", "weighted_by_distance" or "softmax".
        temperature: T of the softmax votes, in units of the distance; 0.07 by default.
        as_published: ties go to the lowest label, as in the paper's code.

    Source: Westerhoff et al. 2025, Section 3.4.
    """

    name = "mnn"

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
        self._mahalanobis: tuple[Any, tuple, Mahalanobis] | None = None

    def forward(
        self, z: Tensor, proxies: Tensor, bias: Tensor, proxy_classes: Tensor, num_classes: int
    ) -> Tensor:
        """Shapes as in `Max`; the bias does not count. In blocks of bounded memory."""
        if torch.compiler.is_exporting():
            # An exported file has no loop over a number of blocks that is not known yet.
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
        """`z (B, d)`, `proxies (P, d)` → distances of the m nearest, ascending, and which they are,
        both `(B, min(m, P))`."""
        return self.nearest_of(self.far(z, proxies))

    def far(self, z: Tensor, proxies: Tensor) -> Tensor:
        """Distances `(B, P)`."""
        if self.distance == "mahalanobis":
            return self._metric(proxies)(z, proxies)
        return distances(z, proxies, self.distance)

    def nearest_of(self, far: Tensor) -> tuple[Tensor, Tensor]:
        """As `nearest`, from all distances. Where they tie, fewer are no prefix of more."""
        return tuple(far.topk(min(self.m, far.shape[1]), dim=1, largest=False))

    def vote(self, far: Tensor, classes: Tensor, num_classes: int) -> Tensor:
        """Distances of the nearest proxies and their classes, both `(B, m)` → `(B, C)`."""
        votes = self._votes(far)
        scores = votes.new_zeros(far.shape[0], num_classes)
        scores = scores.scatter_add(1, classes, votes)
        if self.votes == "uniform" and not self.as_published:
            bonus = torch.arange(votes.shape[1], 0, -1, device=far.device) / (2 * votes.shape[1])
            bonus = bonus.to(votes.dtype).expand_as(votes) * votes
            scores = scores + torch.zeros_like(scores).scatter_reduce(1, classes, bonus, "amax")
        if self.distance == "mahalanobis":
            # Distances with a large part in common differ by less than float32 can hold, in which
            # scores leave: the best class is put ahead, or the lowest label would win.
            ahead = scores.amax(1, keepdim=True) * (1 + 2**-21)
            scores = scores.scatter(1, scores.argmax(1, keepdim=True), ahead)
        return scores

    def _votes(self, far: Tensor) -> Tensor:
        if self.votes == "weighted_by_distance":
            return 1 / (far + 1e-10)
        if self.votes == "softmax":
            return torch.softmax(-far / self.temperature, dim=1)
        return torch.full_like(far, 1 / far.shape[1])

    def _metric(self, proxies: Tensor) -> Mahalanobis:
        if torch.compiler.is_exporting():
            # A tracer has no numbers to decompose.
            if self._mahalanobis is None:
                raise ImprintError(
                    'distance="mahalanobis" is exported as computed beforehand: call the head once '
                    "on embeddings, then export"
                )
            return self._mahalanobis[2]
        if proxies.is_inference():
            # Made in inference mode, where nothing tells whether they have changed since.
            return Mahalanobis(proxies)
        # The decomposition takes longer than many batches: kept until the proxies change. Others
        # may come to lie where these were, so that their address alone does not tell.
        values = (proxies.data_ptr(), proxies._version, proxies.device)
        of, known, metric = self._mahalanobis or (lambda: None, None, None)
        if of() is not proxies or known != values:
            metric = Mahalanobis(proxies.detach())
            self._mahalanobis = (weakref.ref(proxies), values, metric)
        return metric

    def __getstate__(self) -> dict[str, Any]:
        """Without what is kept of proxies that a copy does not have."""
        return self.__dict__ | {"_mahalanobis": None}
