"""What every generator returns, and the loop over classes that the per-class ones share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from imprint_pl.ranks import share


class Proxies(NamedTuple):
    """What a generator returns.

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


class PerClass:
    """A generator that looks at one class at a time; subclasses define `of_class`.

    Every class gets the same seed: its proxies depend on its own samples alone, whatever label it
    has in a task and whatever the other classes are.
    """

    name: str
    from_moments = False
    # Whether the processes of a run take a share of the classes each: it pays where a class takes
    # longer than to send it.
    shared = False

    def __call__(
        self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0, progress: bool = False
    ) -> Proxies:
        """Embeddings `x (N, d)`, labels `y (N,)` in 0..C−1 → `Proxies`."""
        order = torch.argsort(y, stable=True)
        members = order.split(torch.bincount(y, minlength=num_classes).tolist())
        xs = [x[rows] for rows in members]
        if self.shared:
            weights = share(self.of_classes, xs, seed, progress)
        else:
            weights = self.of_classes(xs, seed, progress)
        sizes = torch.tensor([len(of_class) for of_class in weights], device=x.device)
        classes = torch.arange(num_classes, device=x.device).repeat_interleave(sizes)
        stacked = torch.cat(weights)
        return Proxies(stacked, stacked.new_zeros(len(stacked)), classes)

    def of_classes(self, xs: list[Tensor], seed: int, progress: bool) -> list[Tensor]:
        """Each class's embeddings `(n, d)` → its proxies `(p, d)`; one after the other."""
        bar = tqdm(xs, desc=f"GEN {self.name}", unit="class", disable=not progress, delay=2)
        return [self.of_class(x, seed) for x in bar]

    def of_class(self, x: Tensor, seed: int) -> Tensor:
        """One class's embeddings `(n, d)` → its proxies `(p, d)`."""
        raise NotImplementedError
