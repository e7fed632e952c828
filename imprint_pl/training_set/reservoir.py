"""Reservoir sampling: random samples of bounded size from a stream of batches. It serves
`max_per_class` of an imprint epoch and the held-out sample of `sums.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imprint_pl.numerics.draws import place_in_class, random_keys
from imprint_pl.ranks import gather_rows, positions_in_dataset
from imprint_pl.training_set.store import Collector, check_batch, check_labels

# Number of new samples that are collected before the kept ones are chosen again.
BLOCK = 2048

_NEVER = torch.iinfo(torch.int64).max


class Drawn(NamedTuple):
    """Embeddings `x (n, d)`, labels `y (n,)` and the positions or keys `(n,)` of the draw."""

    x: Tensor
    y: Tensor
    positions: Tensor


class Reservoir:
    """Keeps the first `size` samples, or the first `size` of each class, in a random order.

    The order is a random permutation of all positions in the data set (or of all keys of rows)
    which the seed decides on. The kept samples therefore do not depend on the batches or the number
    of ranks. They are kept on the CPU; the memory is at most 2.5 times that of the kept samples and
    a block.
    """

    def __init__(self, size: int, seed: int, per_class: bool = False) -> None:
        self.size, self.seed, self.per_class = size, seed, per_class
        self._parts: list[Drawn] = []
        self._chosen = self._waiting = 0
        # For each class that has enough samples, the random number of the last one that is kept.
        self._last = torch.full((1,), _NEVER)

    def add(self, x: Tensor, y: Tensor, positions: Tensor) -> None:
        """Adds embeddings `(B, d)` with labels `(B,)` from 0 and their positions in the data set
        `(B,)`."""
        if not len(y):
            return
        y = y.cpu()
        group = self._group(y)
        soon = random_keys(positions, self.seed) < self._last[group]
        self._parts.append(Drawn(x[soon.to(x.device)].cpu(), y[soon], positions[soon]))
        self._waiting += int(soon.sum())
        if self._waiting >= max(BLOCK, self._chosen // 4):
            self._choose()

    def relabel(self, places: Tensor) -> None:
        """Changes label c to `places[c]`. Only for one draw over all classes, whose kept samples
        stay the same."""
        if self.per_class:
            raise ValueError("samples that were drawn for each class keep their labels")
        self._parts = [part._replace(y=places[part.y]) for part in self._parts]

    def drawn(self) -> Drawn | None:
        """The kept samples, in the order of their positions; `None` before the first."""
        self._choose()
        if not self._parts:
            return None
        order = self._parts[0].positions.argsort(stable=True)
        return Drawn(*(part[order] for part in self._parts[0]))

    def gather(self, dim: int) -> Drawn | None:
        """The kept samples of all ranks, on rank 0; `None` on the others.

        Args:
            dim: d, for a rank that has no sample.
        """
        nothing = torch.zeros(0, dtype=torch.int64)
        kept = self.drawn() or Drawn(torch.zeros(0, dim), nothing, nothing)
        gathered = [gather_rows(part) for part in kept]
        rows = [part for part in gathered if part is not None]
        if not rows:
            return None
        self._parts = [Drawn(*rows)]
        return self.drawn()

    def _group(self, y: Tensor) -> Tensor:
        """Returns the group `(B,)` of each sample: all its samples compete for the same `size`
        places. Makes room for new classes."""
        if not self.per_class:
            return torch.zeros_like(y)
        more = int(y.max()) + 1 - len(self._last)
        if more > 0:
            self._last = torch.cat([self._last, self._last.new_full((more,), _NEVER)])
        return y

    def _choose(self) -> None:
        if sum(len(part.y) for part in self._parts) == 0:
            return
        rows = Drawn(*(torch.cat(parts) for parts in zip(*self._parts, strict=True)))
        turn, group = random_keys(rows.positions, self.seed), self._group(rows.y)
        place = place_in_class(group, turn.argsort(stable=True))
        last = place == self.size - 1
        self._last[group[last]] = turn[last]
        kept = place < self.size
        self._parts = [Drawn(*(part[kept] for part in rows))]
        self._chosen, self._waiting = int(kept.sum()), 0


class EmbeddingReservoir(Collector):
    """Collects rows with labels as `RowStore` does, but keeps at most `max_per_class` of each
    class, drawn at random.

    Args:
        max_per_class: how many; all are kept if it is at least the size of the largest class.
        seed: fixes the draw.
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
        """Takes a batch `(B, d)` with labels `(B,)`.

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
