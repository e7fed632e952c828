"""A held-out sample of bounded size, drawn while the samples go by, for the temperature of a head
that was made from sums (`sums.py`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imprint_pl.calibration import ENOUGH, folds
from imprint_pl.store import gather_rows

HELD = 2000


class HeldOut:
    """Keeps at most `HELD` samples, those that come first in a random order of all positions.

    The order follows from the seed: it is the same in any batches and on any number of ranks.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        # The turn of the last that is kept, once there are enough.
        self._last = torch.iinfo(torch.int64).max

    def add(self, x: Tensor, y: Tensor, positions: Tensor) -> None:
        """Embeddings `(B, d)`, labels `(B,)`, positions in the data set `(B,)`."""
        soon = _turns(positions, self.seed) < self._last
        rows = [part[soon.to(part.device)].cpu() for part in (x, y, positions)]
        if self._kept is not None:
            rows = [torch.cat(pair) for pair in zip(self._kept, rows, strict=True)]
        turns, order = _turns(rows[2], self.seed).sort()
        order = order[:HELD]
        self._kept = tuple(part[order] for part in rows)
        if len(order) == HELD:
            self._last = int(turns[HELD - 1])

    def gather(self, dim: int) -> None:
        """Brings the samples of all ranks to rank 0; `dim` is d, for a rank that has none."""
        nothing = torch.zeros(0, dtype=torch.int64)
        kept = self._kept or (torch.zeros(0, dim), nothing, nothing)
        self._kept = tuple([gather_rows(part) for part in kept])

    def folds(self, samples: int) -> list[tuple[Tensor, Tensor]]:
        """Embeddings and labels to hold out, fold by fold; `samples` is the number of all samples.

        Where all of them are kept, those of `calibration.folds`; else a tenth of all samples, at
        most `HELD`, and more folds where that is fewer than `ENOUGH`.
        """
        x, y, positions = self._kept
        everything = samples <= HELD
        order = (positions if everything else _turns(positions, self.seed)).argsort()[:HELD]
        x, y = x[order], y[order]
        if everything:
            return [(x[mask], y[mask]) for mask in folds(y, self.seed)]
        size = min(HELD, samples // 10)
        starts = range(0, min(ENOUGH, HELD - size + 1), size)
        return [(x[i : i + size], y[i : i + size]) for i in starts]


def _turns(positions: Tensor, seed: int) -> Tensor:
    """The turn of each position `(n,)` in the random order, int64, without drawing the others'.

    Source: Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    # Mixed first, as neighbouring seeds would differ by a shift of the positions.
    start = _mixed(np.array([seed]).astype(np.uint64))
    mixed = _mixed(start + positions.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
