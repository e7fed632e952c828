"""NORM: normalisation of embeddings before GEN (NORM_pre), of proxies (NORM_post) and of embeddings
at inference (NORM_inf). Each is a small module on the last dimension; `Chain` applies several.
`norm_learned.py` has the ones that learn from the training embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from imprint_pl.limits import SMALLEST_LENGTH
from imprint_pl.moments import CHUNK, Moments


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


class L2(Norm):
    """l2: scales each row to unit Euclidean length; a row of zeros stays zero.

    >>> L2()(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    name = "l2"

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        return functional.normalize(x, dim=-1, eps=SMALLEST_LENGTH)


class Power(Norm):
    """power: the signed square root of each feature, sign(z) √|z|.

    Evens out features that few large values rule.

    Source: Perronnin et al. 2010, "Improving the Fisher Kernel for Large-Scale Image
    Classification".

    >>> Power()(torch.tensor([4.0, -9.0, 0.0]))
    tensor([ 2., -3.,  0.])
    """

    name = "power"

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        # The root of 1 where x is 0: that of 0 has an infinite slope, which fine-tuning would
        # hand on as NaN.
        return x.sign() * x.abs().where(x != 0, 1.0).sqrt()


class Quantile(Norm):
    """quantile: gives the weights of each proxy the distribution of a reference (NORM_post only).

    The i-th smallest weight of a proxy becomes the quantile (i + ½) / d, i = 0..d−1, of the
    reference, linearly interpolated. The reference is the weights of the backbone's original
    classifier, or, where there is none, of all proxies pooled; the order of the classes does not
    matter.

    Args:
        as_published: take as reference the already normalised proxies of the classes before, and
            leave the first class as it is, as the paper's code does.

    Source: Hosoda et al. 2024; Westerhoff et al. 2025, Section 3.3.

    >>> Quantile()(torch.tensor([[1.0, 3.0], [10.0, 5.0]]))
    tensor([[2.5000, 6.2500],
            [6.2500, 2.5000]])
    """

    name = "quantile"

    def __init__(self, as_published: bool = False) -> None:
        super().__init__()
        self.as_published = as_published

    def forward(self, x: Tensor) -> Tensor:
        """`(P, d)` → `(P, d)`, with all rows as the reference."""
        return _with_values(x, quantiles(x))

    def of_proxies(
        self, weights: Tensor, classes: Tensor, classifier: Tensor | None = None
    ) -> Tensor:
        if not self.as_published:
            if classifier is None or classifier.shape[-1] != weights.shape[1]:
                return self(weights)
            ascending = classifier if classifier.ndim == 1 else quantiles(classifier.to(weights))
            return _with_values(weights, ascending.to(weights))
        done = weights.clone()
        for c in classes.unique().tolist()[1:]:
            rows = classes == c
            done[rows] = _with_values(weights[rows], quantiles(done[classes < c]))
        return done


class Chain(Norm):
    """Several norms, one after the other, each fitted on what those before it give.

    Args:
        steps: norms in the order of their application.

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


NORMS = {part.name: part for part in (NoNorm, L2, Power)}
# Of proxies only: a single embedding at inference has no reference distribution.
PROXY_NORMS = NORMS | {Quantile.name: Quantile}


def quantiles(reference: Tensor) -> Tensor:
    """The quantiles (i + ½) / d, i = 0..d−1, of all values of `(·, d)`: `(d,)`, ascending."""
    d = reference.shape[1]
    values = reference.double().flatten().sort().values
    # torch.quantile stops at 16 million values.
    position = (torch.arange(d, device=values.device, dtype=values.dtype) + 0.5) / d
    position = position * (len(values) - 1)
    below = position.long()
    above = (below + 1).clamp(max=len(values) - 1)
    return torch.lerp(values[below], values[above], position - below).to(reference.dtype)


def _with_values(x: Tensor, ascending: Tensor) -> Tensor:
    """Each row of `x (P, d)` with its i-th smallest value replaced by `ascending[i]`."""
    order = x.argsort(dim=1, stable=True)
    return torch.zeros_like(x).scatter(1, order, ascending.expand_as(x))
