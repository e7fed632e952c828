"""Which training samples are held out to fit a temperature: the same whether all are there
(`pipeline.py`) or a bounded sample, drawn while they went by (`training_set/`).
"""

from __future__ import annotations

from torch import Tensor

from imprint_pl.method.calibration import folds
from imprint_pl.numerics.draws import random_keys
from imprint_pl.numerics.order import keys

HELD = 2000


def held_out_rows(x: Tensor, y: Tensor, samples: int, seed: int, most: int = HELD) -> list[Tensor]:
    """Places of the rows to hold out, fold by fold; the first folds are the first to take.

    Of at most `HELD` samples, the folds of `calibration.folds`; of more, a tenth of all samples
    each, at most `most`, drawn by what the rows hold.

    Args:
        x, y: embeddings and labels in the order of `in_order`: all samples, or a sample of them
            that has the `HELD` with the first turns.
        samples: number of all samples.
        seed: fixes the draw.
        most: up to `HELD`. Where another fold is cheap, smaller ones leave heads that are nearer to
            the head of all.
    """
    if samples <= HELD:
        return [mask.nonzero().flatten() for mask in folds(y, seed, spare=True)]
    first = random_keys(keys(x), seed).argsort()[:HELD].to(x.device)
    size = min(most, HELD, samples // 10)
    return [first[i : i + size] for i in range(0, HELD - size + 1, size)]
