"""The base classes of generators and the `Proxies` that they return."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.draws import rows_by_class
from imprint_pl.numerics.large import groups_that_fit
from imprint_pl.numerics.passes import bar
from imprint_pl.ranks import OfClasses, share


class Proxies(NamedTuple):
    """The proxies that a generator returns.

    Attributes:
        weights: `(P, d)`, the proxies.
        bias: `(P,)`, added to their scores.
        classes: `(P,)` int64, the class of each proxy, sorted.
        chosen: parameters that the generator chose by itself or was given, such as λ under "lam";
            a head keeps them in its settings, as `chosen_lam`.
    """

    weights: Tensor
    bias: Tensor
    classes: Tensor
    chosen: Mapping[str, float] = {}


BALANCED = "balanced"


def checked_balance(class_weight: str | None) -> str | None:
    """Check `class_weight` and return it.

    Args:
        class_weight: `None` (each sample weighs 1) or "balanced" (all classes weigh the same: a
            sample of a class of n samples weighs N / (C n)).

    Raises:
        ImprintError: any other value.
    """
    if class_weight not in (None, BALANCED):
        raise ImprintError(
            f"class_weight={class_weight!r}: give 'balanced', or leave it out; imprint and "
            "ImprintEstimator.fit take other weights as sample_weight"
        )
    return class_weight


class Generator:
    """The base of all generators. Its attributes describe them; the defaults here are always safe.

    A sweep reads `per_class` to `every_sample` only where the class states them in its own body
    (see `parts.by_name.declared`). A subclass inherits none of them: it may override a method that
    they describe, and the sweep would then share the base class's results.

    Attributes:
        name: what messages and progress bars call it.
        from_moments: it is called with `Moments`, instead of embeddings and labels.
        needs_gram: these `Moments` need a Gram matrix.
        needs_rows: with these `Moments` it is given some of their rows, as `left`; see
            `imprint_pl.parts.gen.choice_of_lam.LeftOut`.
        takes_weights: its samples may have weights: those of `Moments`, or, where it takes
            embeddings, a further argument `weights (N,)`.
        spans: its proxies lie in the space that the samples span, and turn with it.
        per_class: the proxies of a class depend on the samples of that class alone.
        prefix_of_larger_k: the first k proxies of a class are those of any larger k.
        clusters: it works on the k-means clusters of each class, as `k` and `engine` say.
        selection: a class whose `selection(x, smallest, largest).choose(k, seed)` gives the
            positions of the proxies among the samples `x (n, d)` of a class, for any such k.
        fixed: the seed changes nothing. GENs that take `Moments` see no seed.
        every_sample: every training sample becomes a proxy.
    """

    name = "own"
    from_moments = False
    needs_gram = False
    needs_rows = False
    takes_weights = False
    spans = False
    per_class = False
    prefix_of_larger_k = False
    selection: type[Any] | None = None
    every_sample = False

    @property
    def clusters(self) -> bool:
        return False

    @property
    def fixed(self) -> bool:
        return False


def by_groups(
    of_classes: OfClasses,
    x: Tensor,
    members: list[Tensor],
    seed: int,
    progress: bool,
    shared: bool = True,
) -> list[Tensor]:
    """Call `of_classes(xs, seed, progress)` for all classes at once, or for groups of classes.

    Groups are used where the rows of all classes together do not fit into memory.

    Args:
        of_classes: returns one tensor `(p, d)` per class, which must not depend on other classes.
        x: `(N, d)`, all rows.
        members: the row indices of each class.
        seed, progress: passed on; with several groups the bar counts groups.
        shared: whether the classes are divided among the processes of a run.

    Returns:
        One tensor `(p, d)` per class.
    """
    run = partial(share, of_classes) if shared else of_classes
    groups = [range(len(members))]
    if x.device.type == "cpu":
        groups = groups_that_fit([len(rows) for rows in members], x[:1].nbytes)
    return [
        proxies
        for group in bar(groups, "GEN", "group", progress and len(groups) > 1)
        for proxies in run([x[members[i]] for i in group], seed, progress and len(groups) == 1)
    ]


class PerClass(Generator):
    """A generator that looks at one class at a time; subclasses define `of_class`.

    Every class gets the same seed: its proxies depend on its own samples alone, whatever label it
    has in a task and whatever the other classes are.
    """

    # Whether the classes are divided among the processes of a run. This is worth it only where
    # the work on a class takes longer than sending its rows.
    shared = False

    def __call__(
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, progress: bool = False
    ) -> Proxies:
        """Embeddings `x (N, d)`, labels `y (N,)` in 0..C−1 → `Proxies`."""
        members = rows_by_class(y, num_classes)
        weights = by_groups(self.of_classes, x, members, seed, progress, self.shared)
        sizes = torch.tensor([len(of_class) for of_class in weights], device=x.device)
        classes = torch.arange(num_classes, device=x.device).repeat_interleave(sizes)
        stacked = torch.cat(weights)
        return Proxies(stacked, stacked.new_zeros(len(stacked)), classes)

    def of_classes(self, xs: list[Tensor], seed: int, progress: bool) -> list[Tensor]:
        """Each class's embeddings `(n, d)` → its proxies `(p, d)`; one after the other."""
        shown = bar(xs, f"GEN {self.name}", "class", progress)
        return [self.of_class(x, seed) for x in shown]

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """One class's embeddings `(n, d)` → its proxies `(p, d)`."""
        raise NotImplementedError
