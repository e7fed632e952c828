"""NORM: normalisation of embeddings before GEN (NORM_pre), of proxies (NORM_post) and of embeddings
at inference (NORM_inf).

Each NORM is a small module on the last dimension; `Chain` applies several. `learned.py` has the
base class of NORMs that learn from the training embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

from torch import Tensor, nn

from imprint_pl.numerics.large import rows_like
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.passes import CHUNK, blocks


class Norm(nn.Module):
    """The base of all NORMs. A NORM_pre may learn; a NORM_post may use the proxies' classes.

    A sweep reads `fixed`, `row_by_row` and `row_scale` only where the class states them in its own
    body (see `parts.by_name.declared`): a subclass inherits none of them.

    Attributes:
        name: what messages call it.
        learns: whether `fit` has anything to do.
        uses_labels: whether what it learns depends on the labels.
        maps: whether its output is of another space, with dimensions of its own.
        input_dim: d of the embeddings that it was fitted for; `None` where it takes any.
        fixed: the seed changes nothing in what it learns.
        row_by_row: a row of its output depends on that row of its input alone.
        from_moments: it needs sums alone. `fit_moments` fits it from sums of its input, and
            `of_moments` turns them into the sums of its output.
    """

    name = "own"
    learns = False
    uses_labels = False
    maps = False
    fixed = False
    row_by_row = False
    from_moments = False

    # An attribute, so that a user's own NORM may set it in `fit`; ours compute it.
    input_dim: int | None = None

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Norm:
        """Learn from the training embeddings (as NORM_pre).

        Args:
            x: Embeddings `(N, d)`; every class has a sample.
            y: Labels `(N,)` in 0..C−1.
            num_classes: C.
            seed: Seed of all random choices.

        Returns:
            Itself.
        """
        return self

    def fit_sums(
        self,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        seed: int = 0,
        gram: str = "pooled",
        weights: Tensor | None = None,
    ) -> Moments:
        """Learn as `fit` does, and return the sums of the normalised `x`.

        The normalised `x` is never kept whole: it may be many times the size of `x`. The sums have
        the `weights (N,)`, where there are any.
        """
        if self.learns:
            self.fit(x, y, num_classes, seed)
        return sums_of(self, x, y, num_classes, gram, weights)

    def fit_transform(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Tensor:
        """Learn as `fit` does, and return the normalised `x`, with the rounding of `of_many`."""
        if self.learns:
            self.fit(x, y, num_classes, seed)
        return transform(self, x)

    def places(self, samples: int, seed: int) -> Tensor | None:
        """Return the indices `(n,)` of the few rows that it learns from; `None` if it needs all.

        Such a NORM is fitted in two steps. `fit_few` learns from the few rows. `centred` then takes
        the sums of the transformed rows, learns their mean, and returns the sums about that mean. A
        chain calls these instead of `fit_sums` if the NORM's own class defines `places`: a subclass
        that inherits it may override something that needs all rows.
        """
        return None

    def fit_few(self, few: Tensor) -> Norm:
        """Learn from the rows `(n, d)` at the indices that `places` returned."""
        raise NotImplementedError

    def centred(self, moments: Moments) -> Moments:
        """Learn the mean, and return the sums relative to it."""
        raise NotImplementedError

    def fit_moments(self, moments: Moments) -> Norm:
        """Learn as `fit` does, but from sums with squares; for a NORM with `from_moments`."""
        raise NotImplementedError

    def of_moments(self, moments: Moments) -> Moments:
        """Turn the sums of embeddings into the sums of the normalised embeddings, once fitted."""
        raise NotImplementedError

    def features(self, dim: int, samples: int) -> int:
        """Return the output dimension for embeddings of `dim`, once fitted on `samples` of them."""
        return dim

    def of_many(self, x: Tensor) -> Tensor:
        """Normalise training embeddings, with the same rounding for any number of rows."""
        return self(x)

    def clear(self) -> None:
        """Forget what was learned."""

    def row_scale(self, x: Tensor) -> Tensor | None:
        """Return the positive numbers `(n,)` by which it multiplies the rows `(n, d)`.

        `None` means that all are 1. Only a NORM that does nothing else than scale rows has this.
        """
        raise NotImplementedError

    def of_proxies(
        self, weights: Tensor, classes: Tensor, classifier: Tensor | None = None
    ) -> Tensor:
        """Normalise proxies (as NORM_post).

        Args:
            weights: Proxies `(P, d)`.
            classes: Their classes `(P,)`, ascending.
            classifier: Weights `(·, d)` of the backbone's original classifier, where there is one.
                Pass its `quantiles` `(d,)` when calling repeatedly: computing them takes most of
                the time.

        Returns:
            `(P, d)`.
        """
        return self(weights)


class NoNorm(Norm):
    """none: returns its input unchanged."""

    name = "none"
    row_by_row = True

    def forward(self, x: Tensor) -> Tensor:
        """`(..., d)` → `(..., d)`."""
        return x

    def row_scale(self, x: Tensor) -> None:
        """All rows stay as they are."""


class Chain(Norm):
    """Several norms, one after the other, each fitted on the output of the ones before.

    Args:
        steps: Norms in the order of their application.

    >>> import torch
    >>> from imprint_pl.parts.norm.l2 import L2
    >>> from imprint_pl.parts.norm.power import Power
    >>> Chain([Power(), L2()])(torch.tensor([9.0, 16.0]))
    tensor([0.6000, 0.8000])
    """

    def __init__(self, steps: Iterable[Norm]) -> None:
        super().__init__()
        self.steps = nn.ModuleList(steps)
        # `resolve` takes names that are joined like this, too.
        self.name = "+".join(step.name for step in self.norms)
        # A step may be a module of the user's own, without these attributes.
        self.learns = any(getattr(step, "learns", False) for step in self.norms)
        self.uses_labels = any(getattr(step, "uses_labels", False) for step in self.norms)

    @property
    def norms(self) -> list[Norm]:
        """The steps of the chain."""
        return cast(list[Norm], list(self.steps))

    @property
    def input_dim(self) -> int | None:  # type: ignore[override]
        # The steps before the first that learned keep the dimension.
        return next((step.input_dim for step in self.norms if step.input_dim is not None), None)

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Chain:
        last = max((i for i, step in enumerate(self.norms) if step.learns), default=-1)
        for i, step in enumerate(self.norms[: last + 1]):
            step.fit(x, y, num_classes, seed)
            if i < last:
                x = transform(step, x)
        return self

    def fit_sums(
        self,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        seed: int = 0,
        gram: str = "pooled",
        weights: Tensor | None = None,
    ) -> Moments:
        *others, last = self.norms
        if not last.learns:
            return super().fit_sums(x, y, num_classes, seed, gram, weights)
        first = Chain(others).fit(x, y, num_classes, seed)
        few = isinstance(last, Norm) and "places" in vars(type(last))
        places = last.places(len(x), seed) if few else None
        if places is not None:
            # One pass over x, so that nothing as large as x is kept.
            last.fit_few(transform(first, x[places.to(x.device)]))
            return last.centred(sums_of(self, x, y, num_classes, gram, weights))
        # A user's own NORM may not take weights, so pass them only where there are any.
        more = {} if weights is None else {"weights": weights}
        return last.fit_sums(transform(first, x), y, num_classes, seed, gram, **more)

    def fit_transform(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> Tensor:
        *others, last = self.norms
        if not last.learns:
            return super().fit_transform(x, y, num_classes, seed)
        first = Chain(others).fit(x, y, num_classes, seed)
        return last.fit_transform(transform(first, x), y, num_classes, seed)

    def features(self, dim: int, samples: int) -> int:
        for step in self.norms:
            dim = step.features(dim, samples)
        return dim

    def clear(self) -> None:
        for step in self.norms:
            step.clear()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.norms:
            x = step(x)
        return x

    def of_many(self, x: Tensor) -> Tensor:
        for step in self.norms:
            x = step.of_many(x)
        return x

    def of_proxies(
        self, weights: Tensor, classes: Tensor, classifier: Tensor | None = None
    ) -> Tensor:
        for step in self.norms:
            weights = step.of_proxies(weights, classes, classifier)
        return weights


def transform(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Normalise many rows `(N, d)` by chunks, so that only the result takes memory of its size, or
    a file where it does not fit."""
    apply = getattr(norm, "of_many", norm)
    first = apply(x[:CHUNK])
    if len(x) <= CHUNK:
        return first
    result = rows_like(first, len(x))
    result[:CHUNK] = first
    for block in blocks(len(x), "normalising"):
        if block.start:
            result[block] = apply(x[block])
    return result


def sums_of(
    norm: nn.Module,
    x: Tensor,
    y: Tensor,
    num_classes: int,
    gram: str,
    weights: Tensor | None = None,
) -> Moments:
    """Add up `norm(x)` by chunks; `gram` is as in `Moments.zeros`, `weights (N,)` as in `add`.

    A NORM with `from_moments` computes them from the sums of `x`, so that rows in memory give the
    same result as a stream of batches.
    """
    if getattr(norm, "from_moments", False):
        return cast(Norm, norm).of_moments(Moments.of(x, y, num_classes, weights, gram=gram))
    apply = getattr(norm, "of_many", norm)
    first = apply(x[:CHUNK])
    moments = Moments.zeros(num_classes, first.shape[1], gram=gram, device=first.device)
    for block in blocks(len(x), "adding up"):
        z = apply(x[block]) if block.start else first
        moments.add(z, y[block], None if weights is None else weights[block])
    return moments
