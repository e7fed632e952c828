"""NORM: normalisation of embeddings before GEN (NORM_pre), of proxies (NORM_post) and of embeddings
at inference (NORM_inf). Each is a small module on the last dimension; `Chain` applies several.
`learned.py` is the base of those that learn from the training embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from imprint_pl.numerics.moments import CHUNK, Moments


class Norm(nn.Module):
    """What all parts share: as NORM_pre they may learn, as NORM_post look at the proxies' classes.

    Attributes:
        learns: whether `fit` has anything to do.
        uses_labels: whether what it learns depends on the labels.
        maps: whether its output is of another space, with dimensions of its own.
        input_dim: d of the embeddings that it was fitted for; `None` where it takes any.
    """

    learns = False
    uses_labels = False
    maps = False
    input_dim: int | None = None

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Norm:
        """NORM_pre: learns from embeddings `x (N, d)`, labels `y (N,)` in 0..C−1; returns itself.

        Every class has a sample. Random choices follow the seed.
        """
        return self

    def fit_sums(
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, gram: str = "pooled"
    ) -> Moments:
        """As `fit`, and the sums of what it then makes of `x`, which is never kept: it may be many
        times the size of `x`."""
        if self.learns:
            self.fit(x, y, num_classes, seed)
        return sums_of(self, x, y, num_classes, gram)

    def features(self, dim: int, samples: int) -> int:
        """How many numbers it makes of embeddings of `dim`, once fitted on `samples` of them."""
        return dim

    def of_many(self, x: Tensor) -> Tensor:
        """As `forward`, of training embeddings: rounded alike, however many rows come at a time."""
        return self(x)

    def clear(self) -> None:
        """Forgets what it has learned."""

    def of_proxies(
        self, weights: Tensor, classes: Tensor, classifier: Tensor | None = None
    ) -> Tensor:
        """NORM_post: proxies `(P, d)` of the classes `(P,)`, sorted → `(P, d)`.

        `classifier` `(·, d)` is the backbone's original classifier, where there is one, or `(d,)`
        its `quantiles`, for who asks many times: they take longer than all else.
        """
        return self(weights)


class NoNorm(Norm):
    """none: leaves its input as it is."""

    name = "none"

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        return x


class Chain(Norm):
    """Several norms, one after the other, each fitted on what those before it give.

    Args:
        steps: norms in the order of their application.

    >>> import torch
    >>> from imprint_pl.parts.norm.l2 import L2
    >>> from imprint_pl.parts.norm.power import Power
    >>> Chain([Power(), L2()])(torch.tensor([9.0, 16.0]))
    tensor([0.6000, 0.8000])
    """

    def __init__(self, steps: Iterable[Norm]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)

    @property
    def name(self) -> str:
        """The steps' names, joined by `+`; `resolve` takes them so, too."""
        return "+".join(step.name for step in self.steps)

    @property
    def learns(self) -> bool:
        return any(step.learns for step in self.steps)

    @property
    def uses_labels(self) -> bool:
        return any(step.uses_labels for step in self.steps)

    @property
    def input_dim(self) -> int | None:
        # The steps before the first that learned keep the dimension.
        return next((step.input_dim for step in self.steps if step.input_dim is not None), None)

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Chain:
        last = max((i for i, step in enumerate(self.steps) if step.learns), default=-1)
        for i, step in enumerate(self.steps[: last + 1]):
            step.fit(x, y, num_classes, seed)
            if i < last:
                x = transform(step, x)
        return self

    def fit_sums(
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, gram: str = "pooled"
    ) -> Moments:
        *first, last = self.steps
        if not last.learns:
            return super().fit_sums(x, y, num_classes, seed, gram)
        first = Chain(first)
        first.fit(x, y, num_classes, seed)
        return last.fit_sums(transform(first, x), y, num_classes, seed, gram)

    def features(self, dim: int, samples: int) -> int:
        for step in self.steps:
            dim = step.features(dim, samples)
        return dim

    def clear(self) -> None:
        for step in self.steps:
            step.clear()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x

    def of_many(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step.of_many(x)
        return x

    def of_proxies(
        self, weights: Tensor, classes: Tensor, classifier: Tensor | None = None
    ) -> Tensor:
        for step in self.steps:
            weights = step.of_proxies(weights, classes, classifier)
        return weights


def transform(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm(x)` of many rows `(N, d)`, a chunk at a time: nothing else of the result's size."""
    norm = getattr(norm, "of_many", norm)
    if len(x) <= CHUNK:
        return norm(x)
    result = None
    for i in range(0, len(x), CHUNK):
        rows = norm(x[i : i + CHUNK])
        if result is None:
            result = rows.new_empty(len(x), rows.shape[1])
        result[i : i + CHUNK] = rows
    return result


def sums_of(norm: nn.Module, x: Tensor, y: Tensor, num_classes: int, gram: str) -> Moments:
    """The sums of `norm(x)`, a chunk at a time. `gram` as in `Moments.zeros`."""
    norm, moments = getattr(norm, "of_many", norm), None
    for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        z = norm(rows)
        if moments is None:
            moments = Moments.zeros(num_classes, z.shape[1], gram=gram, device=z.device)
        moments.add(z, labels)
    return moments
