"""Samples of bounded number, drawn at random while all go by: `max_per_class` of an imprint epoch,
and the held-out sample of `sums.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.numerics.draws import random_keys
from imprint_pl.ranks import gather_rows, positions_in_dataset
from imprint_pl.training_set.store import Collector, check_batch, check_labels

# Samples that wait before those which are kept are chosen anew.
BLOCK = 2048

_NEVER = torch.iinfo(torch.int64).max


class Reservoir:
    """Keeps at most `size` samples, or `size` of each class: those that come first in a random
    order of all positions in the data set.

    The order follows from the seed: what is kept is the same in any batches and on any number of
    ranks. Memory at most 2.5 times that of the kept samples and a block.
    """

    def __init__(self, size: int, seed: int, per_class: bool = False) -> None:
        self.size, self.seed, self.per_class = size, seed, per_class
        self._parts: list[list[Tensor]] = []
        self._chosen = self._waiting = 0
        # The turn of the last that is kept of each class, once there are enough.
        self._last = torch.full((1,), _NEVER)

    def add(self, x: Tensor, y: Tensor, positions: Tensor) -> None:
        """Embeddings `(B, d)`, labels `(B,)` from 0, positions in the data set `(B,)`."""
        if not len(y):
            return
        y = y.cpu()
        more = int(y.max()) + 1 - len(self._last)
        if self.per_class and more > 0:
            self._last = torch.cat([self._last, self._last.new_full((more,), _NEVER)])
        soon = random_keys(positions, self.seed) < self._last[self._group(y)]
        self._parts.append([x[soon.to(x.device)].cpu(), y[soon], positions[soon]])
        self._waiting += int(soon.sum())
        if self._waiting >= max(BLOCK, self._chosen // 4):
            self._choose()

    def gather(self, dim: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """The kept samples of all ranks on rank 0, in the order of their positions: embeddings
        `(n, d)`, labels and positions `(n,)`; `None` on the others. `dim` is d, for a rank that has
        none."""
        self._choose()
        nothing = torch.zeros(0, dtype=torch.int64)
        kept = self._parts[0] if self._parts else [torch.zeros(0, dim), nothing, nothing]
        gathered = [gather_rows(part) for part in kept]
        if gathered[0] is None:
            return None
        self._parts = [gathered]
        self._choose()
        order = self._parts[0][2].argsort()
        return tuple([part[order] for part in self._parts[0]])

    def _group(self, y: Tensor) -> Tensor:
        return y if self.per_class else torch.zeros_like(y)

    def _choose(self) -> None:
        if not self._parts:
            return
        x, y, positions = (torch.cat(parts) for parts in zip(*self._parts, strict=True))
        self._parts = []
        turn, group = random_keys(positions, self.seed), self._group(y)
        order = turn.argsort()
        order = order[group[order].argsort(stable=True)]
        counts = group.bincount()
        starts = counts.cumsum(0) - counts
        place = torch.arange(len(y)) - starts[group[order]]
        full = (counts >= self.size).nonzero().flatten()
        self._last[full] = turn[order[starts[full] + self.size - 1]]
        order = order[place < self.size]
        self._parts = [[x[order], y[order], positions[order]]]
        self._chosen, self._waiting = len(order), 0


class EmbeddingReservoir(Collector):
    """Collects rows with labels as `RowStore` does, but keeps at most `max_per_class` of each
    class, drawn at random.

    Args:
        max_per_class: how many; with as many as the largest class has, all are kept.
        seed: of the draw.
        num_classes: C, where it is known.
        dealt: as for `EmbeddingSums`.
    """

    def __init__(
        self,
        max_per_class: int,
        seed: int,
        num_classes: int | None = None,
        dealt: int | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.dealt = num_classes, dealt
        self._kept = Reservoir(max_per_class, seed, per_class=True)
        self._batches = self._seen = 0
        self._dim: int | None = None

    def take(self, embeddings: Tensor, labels: Tensor) -> None:
        """A batch `(B, d)` with labels `(B,)`.

        Raises:
            ImprintError: see `check_batch`; a negative label.
        """
        x, labels = embeddings.float(), labels.to("cpu", torch.int64)
        check_batch(x, self._batches, self._dim)
        check_labels(labels, self._batches, self.num_classes)
        positions = positions_in_dataset(self._seen, len(labels))
        own = slice(None) if self.dealt is None else positions < self.dealt
        self._kept.add(x[own], labels[own], positions[own])
        self._batches += 1
        self._seen += len(labels)
        self._dim = x.shape[1]

    def gather(self) -> tuple[Tensor, Tensor] | None:
        """`(n, d)` and `(n,)` on rank 0, in the order of the data set, `None` on the others."""
        self.take_waiting()
        gathered = self._kept.gather(self._dim or 0)
        return None if gathered is None else gathered[:2]
