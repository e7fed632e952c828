"""A held-out sample of bounded size, drawn while the samples go by, for the temperature of a head
that was made from sums (`sums.py`).
"""

from __future__ import annotations

from torch import Tensor

from imprint_pl.calibration import ENOUGH, folds
from imprint_pl.reservoir import Reservoir, turns

HELD = 2000


class HeldOut:
    """Keeps at most `HELD` samples, drawn at random; the same in any batches and on any number of
    ranks."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._kept = Reservoir(HELD, seed)
        self._gathered: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, x: Tensor, y: Tensor, positions: Tensor) -> None:
        """Embeddings `(B, d)`, labels `(B,)`, positions in the data set `(B,)`."""
        self._kept.add(x, y, positions)

    def gather(self, dim: int) -> None:
        """Brings the samples of all ranks to rank 0; `dim` is d, for a rank that has none."""
        self._gathered = self._kept.gather(dim)

    def folds(self, samples: int) -> list[tuple[Tensor, Tensor]]:
        """Embeddings and labels to hold out, fold by fold; `samples` is the number of all samples.

        Where all of them are kept, those of `calibration.folds`; else a tenth of all samples, at
        most `HELD`, and more folds where that is fewer than `ENOUGH`.
        """
        x, y, positions = self._gathered
        if samples <= HELD:
            return [(x[mask], y[mask]) for mask in folds(y, self.seed)]
        order = turns(positions, self.seed).argsort()
        x, y = x[order], y[order]
        size = min(HELD, samples // 10)
        starts = range(0, min(ENOUGH, HELD - size + 1), size)
        return [(x[i : i + size], y[i : i + size]) for i in starts]
