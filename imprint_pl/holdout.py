"""A held-out sample of bounded size, drawn while the samples go by, for the temperature of a head
that was made from sums (`sums.py`).
"""

from __future__ import annotations

from torch import Tensor

from imprint_pl.calibration import ENOUGH, folds
from imprint_pl.reservoir import turns

HELD = 2000


def held_out_folds(
    sample: tuple[Tensor, Tensor, Tensor], samples: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Embeddings and labels to hold out, fold by fold.

    Where all samples are kept, the folds of `calibration.folds`; else a tenth of all samples, at
    most `HELD`, and more folds where that is fewer than `ENOUGH`.

    Args:
        sample: what `Reservoir(HELD, seed).gather` gives.
        samples: number of all samples.
        seed: the reservoir's.
    """
    x, y, positions = sample
    if samples <= HELD:
        return [(x[mask], y[mask]) for mask in folds(y, seed)]
    order = turns(positions, seed).argsort()
    x, y = x[order], y[order]
    size = min(HELD, samples // 10)
    starts = range(0, min(ENOUGH, HELD - size + 1), size)
    return [(x[i : i + size], y[i : i + size]) for i in starts]
