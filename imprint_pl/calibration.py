"""From scores to probabilities: a temperature, fitted on training embeddings that the head which
scored them had not seen.

Knows scores and labels, and how to hold samples out; not recipes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

# Held-out samples that a temperature, or a choice between recipes, should rest on.
ENOUGH = 500
# Numbers among the scores of a fold, samples × classes: 128 MB in float64.
SCORES = 2**24


def folds(y: Tensor, seed: int, enough: int = ENOUGH, most: int = 5) -> list[Tensor]:
    """Stratified folds of the labels `y (N,)`, as masks `(N,)` of the held-out samples.

    A tenth of each class, drawn by the seed, where that makes `enough` samples; otherwise up to
    `most` folds, until they hold enough: a fifth of each class each, say, or one sample of a class
    of fewer than five. A class's only sample is never held out: no proxy could answer for it.
    Without a class of two samples there is no fold.
    """
    counts = torch.bincount(y.cpu())
    repeated = counts[counts > 1]
    if not len(repeated):
        return []
    number = int(repeated.median().clamp(2, 10 if len(y) >= 10 * enough else most))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    labels, by_class = y.cpu()[order].sort(stable=True)
    place = torch.arange(len(y)) - (counts.cumsum(0) - counts)[labels]
    # Small classes start at different folds, so that folds are of one size.
    start = torch.randint(number, (len(counts),), generator=generator)
    fold = (place + start[labels]) % number
    fold[counts[labels] < 2] = -1
    of_sample = torch.empty_like(fold)
    of_sample[order[by_class]] = fold
    masks, held = [], 0
    for i in range(number):
        mask = of_sample == i
        if mask.any():
            masks.append(mask.to(y.device))
            held += int(mask.sum())
        if held >= enough:
            break
    return masks


def scored(mask: Tensor, num_classes: int) -> Tensor:
    """Which of the held-out samples, mask `(N,)`, are scored: their positions; all of them, or with
    many classes, whose scores would fill the memory, every second, third, …"""
    rows = mask.nonzero().flatten()
    return rows[:: max(1, math.ceil(len(rows) * num_classes / SCORES))]


def fit_temperature(scores: Tensor, y: Tensor) -> float:
    """T > 0 that makes softmax(scores / T) the likeliest for the labels.

    The labels are smoothed by 1 / (n + 2), as Platt does: a few samples that are all right say that
    the head is good, not that it is never wrong. Convex in 1 / T, found by bisection of its
    derivative, in float64.

    Args:
        scores: `(n, C)`, of samples that the head has not seen; −∞ for a class without proxies.
        y: `(n,)`, their labels.

    Returns:
        T in the units of the scores; 1 where no temperature helps: no samples, or scores that do
        not differ.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks"; Platt 1999.

    >>> scores = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    >>> round(fit_temperature(scores, torch.tensor([0, 0, 0, 1])), 2)
    2.25
    """
    if not len(y):
        return 1.0
    scores = scores.detach().double().cpu().numpy()
    y = y.cpu().numpy()
    live = np.isfinite(scores)
    # Of a class that had no proxy nothing can be learned.
    rows = live[np.arange(len(y)), y]
    scores, y, live = scores[rows], y[rows], live[rows]
    highest = scores.max(axis=1, keepdims=True, initial=-np.inf) if len(y) else scores
    gaps = np.where(live, scores - highest, 0.0)
    spread = -gaps.min(initial=0.0)
    if not spread > 0:
        return 1.0
    smoothing = 1 / (len(y) + 2)
    target = live * (smoothing / live.sum(axis=1, keepdims=True))
    target[np.arange(len(y)), y] += 1 - smoothing
    expected = (target * gaps).sum()

    def slope(inverse: float) -> float:
        """Derivative of the negative log-likelihood by 1 / T; it rises."""
        weights = np.where(live, np.exp(gaps * inverse), 0.0)
        return ((weights * gaps).sum(1) / weights.sum(1)).sum() - expected

    low, high = math.log(1e-6 / spread), math.log(1e6 / spread)
    if slope(math.exp(low)) >= 0:
        # Held-out samples are no better than chance: probabilities are nearly even.
        return math.exp(-low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)
