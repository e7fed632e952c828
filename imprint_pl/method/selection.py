"""Selects the training samples that GEN sees: a number of shots per class, or the samples at a
typical distance from their class mean. The selection comes before NORM_pre in the figure and gives
indices into the training set.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.draws import rows_by_class, sample
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.passes import blocks
from imprint_pl.numerics.values import check_count, is_number

# Distances are considered equal if their spread is below this share of the largest one, since they
# then differ only by rounding.
SAME = 1e-5


def draw_shots(y: Tensor, shots: int, seed: int) -> Tensor:
    """Draws `shots` samples of each class at random.

    A class with fewer samples keeps all it has, as in the paper's experiments, so that a sweep over
    shots runs on unbalanced data too. What is drawn from a class depends on its own number of
    samples and the seed alone; fewer shots are a subset of more.

    Args:
        y: `(N,)`, labels from 0.
        shots: samples a class.
        seed: the same for every class; the global generators are left alone.

    Returns:
        `(n,)`, the kept positions in 0..N−1, ascending, on `y`'s device.

    Raises:
        ImprintError: `shots < 1`.

    Source: Westerhoff et al. 2025, the low-data experiments.

    >>> draw_shots(torch.tensor([0, 1, 0, 0, 1, 2]), 1, seed=0)
    tensor([1, 3, 5])
    """
    check_count("shots", shots)
    kept = [
        rows[sample(len(rows), shots, seed).to(y.device)] for rows in rows_by_class(y) if len(rows)
    ]
    return torch.cat(kept).sort().values


def weibull_typical(x: Tensor, y: Tensor, lower: float, upper: float) -> Tensor:
    """Leaves out the samples that are untypically near to, or far from, their class mean.

    A sample stays if Q(lower) ≤ ‖z − μ_c‖ ≤ Q(upper), with μ_c the mean of its class and Q the
    quantile function of a three-parameter Weibull distribution (shape, location, scale) fitted by
    maximum likelihood to the distances of that class alone.

    A class never ends empty: where no sample lies between the bounds, the nearest to them stays. A
    class keeps all its samples where there is nothing to fit: fewer than three samples, distances
    that are all the same, or a fit that fails.

    Args:
        x: `(N, d)`, embeddings.
        y: `(N,)`, labels from 0.
        lower: a probability, `0 ≤ lower < upper`; 0 bounds nothing.
        upper: a probability, `lower < upper ≤ 1`; 1 bounds nothing.

    Returns:
        `(n,)`, the kept positions in 0..N−1, ascending, on `y`'s device.

    Raises:
        ImprintError: bounds that are not `0 ≤ lower < upper ≤ 1`.

    Source: Westerhoff et al. 2025; scipy.stats.weibull_min.

    >>> x = torch.tensor([9.0, 3.0, 2.5, 2.0, 1.5, 1.2, -1.2, -1.5, -2.0, -2.5, -3.0, -9.0])
    >>> weibull_typical(x[:, None], torch.zeros(12, dtype=torch.long), 0.0, 0.9)
    tensor([ 1,  2,  3,  4,  5,  6,  7,  8,  9, 10])
    """
    _check_bounds(lower, upper)
    present, y = torch.unique(y, return_inverse=True)
    means = Moments.of(x, y, len(present), gram="none").means
    distances = means.new_empty(len(x))
    for block in blocks(len(x), "distances"):
        distances[block] = (x[block].to(means.dtype) - means[y[block]]).norm(dim=1)
    kept = [rows[_typical(distances[rows], lower, upper)] for rows in rows_by_class(y) if len(rows)]
    return torch.cat(kept).sort().values


def checked_bounds(bounds: Any) -> tuple[float, float]:
    """Return the two bounds of `weibull_typical`; raise an `ImprintError` for anything else."""
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        raise ImprintError(f"weibull={bounds!r}: give two probabilities, such as (0.1, 0.9)")
    _check_bounds(*bounds)
    return tuple(bounds)


def _check_bounds(lower: Any, upper: Any) -> None:
    if not (is_number(lower) and is_number(upper)) or not 0 <= lower < upper <= 1:
        raise ImprintError(
            f"weibull bounds lower={lower!r}, upper={upper!r}: give two probabilities with "
            "0 ≤ lower < upper ≤ 1, such as 0.1 and 0.9"
        )


def _typical(distances: Tensor, lower: float, upper: float) -> Tensor:
    """`(n,)` bool: which samples of one class stay."""
    from scipy.stats import weibull_min  # here, not above: half a second to import

    values = distances.cpu().numpy().astype(np.float64)
    everything = torch.ones_like(distances, dtype=torch.bool)
    if len(values) < 3 or np.ptp(values) <= SAME * values.max():
        return everything
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            low, high = weibull_min.ppf([lower, upper], *weibull_min.fit(values))
        except (RuntimeError, ValueError, FloatingPointError):
            return everything
    if np.isnan([low, high]).any():
        return everything
    # The fitted location, which is Q(0), may lie above the nearest sample.
    low = low if lower > 0 else -np.inf
    outside = np.maximum(np.maximum(low - values, values - high), 0)
    return torch.from_numpy(outside <= outside.min()).to(distances.device)
