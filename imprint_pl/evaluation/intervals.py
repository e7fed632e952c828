"""Confidence intervals of 95 % for figures that were measured on few images.

A share, such as accuracy or the recall of a class, has Wilson's interval (Wilson 1927): 25 of 25
right is an accuracy between 87 and 100 %. Balanced accuracy and macro F1 have a bootstrap (Efron
and Tibshirani 1993) that draws the images of each class anew, so that no class vanishes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from imprint_pl.evaluation.predictions import Confusion

CONFIDENCE = 0.95
# Most and fewest draws of a bootstrap, and the most cells of the confusion matrix in all draws:
# with many cells there are fewer draws, since they would take seconds.
MOST_DRAWS, FEWEST_DRAWS, CELLS = 1000, 100, 10_000_000


class Interval(NamedTuple):
    """The ends of a 95 % confidence interval, fractions."""

    low: float
    high: float


def wilson(successes: int, trials: int) -> Interval | None:
    """Compute Wilson's interval of a share; `None` without trials.

    >>> wilson(25, 25)
    Interval(low=0.8668, high=1.0)
    >>> wilson(0, 16)
    Interval(low=0.0, high=0.1936)
    """
    from scipy.stats import binomtest

    if trials == 0:
        return None
    found = binomtest(successes, trials).proportion_ci(CONFIDENCE, method="wilson")
    # Rounding errors must not lead outside of 0 to 1.
    low, high = (round(min(max(float(end), 0.0), 1.0), 4) for end in found)
    return Interval(low, high)


def of_f1(right: int, wrong: int) -> Interval | None:
    """Compute the interval of a class's F1.

    F1 = 2 J / (1 + J), where J = right / (right + wrong) is a share of images, which has Wilson's
    interval (Hand, Christen and Kirielle 2021 on the relation).

    Args:
        right: number of images of the class that were predicted as it.
        wrong: number of its other images, and of images of other classes predicted as it.
    """
    shares = wilson(right, right + wrong)
    if shares is None:
        return None
    low, high = (round(2 * share / (1 + share), 4) for share in shares)
    return Interval(low, high)


class Bootstrapped(NamedTuple):
    """Intervals of figures over all classes; `None` if every draw gives the same figure, as without
    any error."""

    balanced_accuracy: Interval | None
    macro_f1: Interval | None


def bootstrap(confusion: Confusion, seed: int = 0) -> Bootstrapped:
    """Computes bootstrap intervals by drawing the images of each class with replacement.

    The predictions of n images drawn from a class are a multinomial draw from its row of the
    confusion matrix, so the time does not depend on the number of images.

    Args:
        confusion: the confusion matrix of all images.
        seed: fixes the draws.
    """
    if not len(confusion.counts):
        return Bootstrapped(None, None)
    C, sizes = confusion.num_classes, confusion.sums(confusion.true).numpy()
    draws = max(FEWEST_DRAWS, min(MOST_DRAWS, CELLS // max(1, len(confusion.counts))))
    generator = np.random.default_rng(seed)
    right, taken = np.zeros((draws, C)), np.zeros((draws, C))
    # The cells are sorted by true class, so those of a class are consecutive.
    labels, lengths = torch.unique_consecutive(confusion.true, return_counts=True)
    parts = (part.split(lengths.tolist()) for part in (confusion.predicted, confusion.counts))
    for label, columns, counts in zip(labels.tolist(), *parts, strict=True):
        drawn = generator.multinomial(sizes[label], counts.numpy() / sizes[label], size=draws)
        taken[:, columns.numpy()] += drawn
        right[:, label] = drawn[:, columns.numpy() == label].sum(1)
    there = sizes > 0
    balanced = (right[:, there] / sizes[there]).mean(1)
    seen = sizes + taken
    # Like torchmetrics, leave out of F1 a class that has no image and is never predicted.
    f1 = np.divide(2 * right, seen, out=np.full_like(right, np.nan), where=seen > 0)
    return Bootstrapped(_middle(balanced), _middle(np.nanmean(f1, axis=1)))


def _middle(values: np.ndarray) -> Interval | None:
    if not np.ptp(values) > 0:
        return None
    ends = torch.from_numpy(values).quantile(
        torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    )
    low, high = (round(float(end), 4) for end in ends)
    return Interval(low, high)
