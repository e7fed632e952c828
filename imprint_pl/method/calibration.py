"""Turns scores into probabilities by a temperature, which is fitted on held-out training
embeddings.

This file knows scores, labels and folds, but no recipes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imprint_pl.errors import ImprintError, warn
from imprint_pl.numerics.draws import place_in_class

# Held-out samples that suffice to fit a temperature or to choose between recipes.
ENOUGH = 500
# Most scores of a fold, samples × classes: 128 MB in float64.
SCORES = 2**24


def folds(
    y: Tensor, seed: int, enough: int = ENOUGH, most: int = 5, spare: bool = False
) -> list[Tensor]:
    """Draw stratified folds of the labels `y (N,)`, as masks `(N,)` of the held-out samples.

    One fold with a tenth of each class is drawn by the seed if it holds `enough` samples. Otherwise
    there are up to `most` folds, until together they hold enough: with `most=5`, each holds a fifth
    of each class, and at most one sample of a class with fewer than five. The only sample of a
    class is never held out, since the class would have no proxy. If no class has two samples, there
    is no fold.

    Args:
        y: `(N,)`, labels from 0.
        seed: fixes the draw.
        enough: how many samples the folds should hold together.
        most: most folds.
        spare: also return the folds that are not needed, in case one of the first fails.
    """
    labels = y.cpu()
    counts = torch.bincount(labels)
    repeated = counts[counts > 1]
    if not len(repeated):
        return []
    number = int(repeated.median().clamp(2, 10 if len(y) >= 10 * enough else most))
    generator = torch.Generator().manual_seed(seed)
    place = place_in_class(labels, torch.randperm(len(y), generator=generator))
    # Small classes start at different folds, so that all folds have about the same size.
    start = torch.randint(number, (len(counts),), generator=generator)
    fold = (place + start[labels]) % number
    fold[counts[labels] < 2] = -1
    masks, held = [], 0
    for i in range(number):
        mask = fold == i
        if mask.any():
            masks.append(mask.to(y.device))
            held += int(mask.sum())
        if held >= enough and not spare:
            break
    return masks


class Fold(NamedTuple):
    """A head's scores of samples that were held out from it.

    Attributes:
        scores: `(n, C)`.
        y: `(n,)`, their labels.
        classes: `(P,)`, the classes of the head's proxies.
        rows: `(n,)`, the samples' indices among all rows.
    """

    scores: Tensor
    y: Tensor
    classes: Tensor
    rows: Tensor


class HeldOut(NamedTuple):
    """The scores of held-out samples, all folds together, each by the head made without its fold.

    Attributes:
        scores: `(n, C)`, of the held-out samples whose class still has a proxy.
        y: `(n,)`, their labels.
        error: why no head could be made for the last fold that failed; `None` if none failed.
        rows: `(n,)`, the samples' indices among all rows.
    """

    scores: Tensor
    y: Tensor
    error: ImprintError | None
    rows: Tensor


def rows_to_score(rows: Tensor, num_classes: int) -> Tensor:
    """Return the held-out samples, indices `(n,)`, that are scored.

    These are usually all. With so many classes that the scores would take too much memory, only
    every second, third, … sample is scored.
    """
    return rows[:: max(1, math.ceil(len(rows) * num_classes / SCORES))]


def score_folds(
    held: Iterable[Any],
    score: Callable[[Any], Fold],
    enough: float = math.inf,
) -> HeldOut:
    """Scores the folds one after the other until `enough` samples have a score.

    Args:
        held: folds.
        score: called with a fold. If it raises an `ImprintError`, since no head can be made
            without that fold, the fold is left out.
        enough: the number of samples with a score after which no further fold is scored.

    Returns:
        The scores of all folds together.
    """
    scores: list[Tensor] = []
    labels: list[Tensor] = []
    places: list[Tensor] = []
    number, error = 0, None
    for fold in held:
        try:
            of_fold, y, classes, rows = score(fold)
        except ImprintError as failed:
            error = failed
            continue
        # Skip classes whose samples were all held out: they have no proxy to score.
        known = torch.isin(y, classes)
        scores.append(of_fold[known])
        labels.append(y[known])
        places.append(rows[known])
        number += len(labels[-1])
        if number >= enough:
            break
    if not scores:
        none = torch.zeros(0, dtype=torch.int64)
        return HeldOut(torch.zeros(0, 1), none, error, none)
    return HeldOut(torch.cat(scores), torch.cat(labels), error, torch.cat(places))


def set_temperature(head: Any, held_out: HeldOut) -> None:
    """Fits the temperature of a head, or warns that its probabilities are not calibrated.

    Also sets `head.held_out_accuracy`. If no held-out sample has a score, the temperature stays as
    it is, and `head.settings["calibrated"]` is false.
    """
    if len(held_out.y):
        head.temperature = fit_temperature(held_out.scores, held_out.y)
        right = held_out.scores.argmax(1) == held_out.y
        head.held_out_accuracy = right.double().mean().item()
    elif len(head.proxy_classes.unique()) > 1:
        say_uncalibrated(
            head,
            "no class has two samples, so that none can be held out"
            if held_out.error is None
            else f"without the held-out samples there is no head ({held_out.error})",
        )


def say_uncalibrated(head: Any, reason: str) -> None:
    """Warns that the probabilities of a head are not calibrated, and notes it in its settings."""
    head.settings["calibrated"] = False
    warn(
        f"the probabilities are not calibrated: no temperature was fitted, since {reason}; labels "
        "are not concerned"
    )


def fit_temperature(scores: Tensor, y: Tensor) -> float:
    """Fit the T > 0 for which softmax(scores / T) has the largest likelihood of the labels.

    The labels are smoothed by 1 / (n + 2), as by Platt: if a few samples are all correct, the head
    is good, but not certain to be always right. The negative log-likelihood is convex in 1 / T; its
    minimum is found by bisection of the derivative, in float64.

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
    values, labels = scores.detach().double().cpu().numpy(), y.cpu().numpy()
    live = np.isfinite(values)
    # Leave out samples whose class had no proxy.
    rows = live[np.arange(len(labels)), labels]
    values, labels, live = values[rows], labels[rows], live[rows]
    highest = values.max(axis=1, keepdims=True, initial=-np.inf) if len(labels) else values
    gaps = np.where(live, values - highest, 0.0)
    spread = -gaps.min(initial=0.0)
    if not spread > 0:
        return 1.0
    smoothing = 1 / (len(labels) + 2)
    target = live * (smoothing / live.sum(axis=1, keepdims=True))
    target[np.arange(len(labels)), labels] += 1 - smoothing
    expected = (target * gaps).sum()

    def slope(inverse: float) -> float:
        """Derivative of the negative log-likelihood with respect to 1 / T; it is increasing."""
        weights = np.where(live, np.exp(gaps * inverse), 0.0)
        return ((weights * gaps).sum(1) / weights.sum(1)).sum() - expected

    low, high = math.log(1e-4 / spread), math.log(1e6 / spread)
    if slope(math.exp(low)) >= 0:
        # The held-out accuracy is no better than chance, so make the probabilities nearly equal.
        return math.exp(-low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)
