"""The metrics by which candidates are compared: accuracy, balanced accuracy and macro F1, with the
standard error of a difference between two candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError, did_you_mean

ACCURACY = "accuracy"
METRICS = (ACCURACY, "balanced_accuracy", "macro_f1")


class Difference(NamedTuple):
    """How much better one set of predictions is than another, and the standard error of this
    difference; both are fractions."""

    value: float
    standard_error: float


def checked_metric(metric: str) -> str:
    """Return the metric; raise an `ImprintError` unless it is one of `METRICS`."""
    if metric not in METRICS:
        raise ImprintError(
            f"metric={metric!r}{did_you_mean(metric, METRICS)}: give one of {', '.join(METRICS)}"
        )
    return metric


def compared_by(tried: list[dict[str, Any]]) -> str:
    """Return the metric by which `auto` compared its candidates, from the rows of `head.tried`."""
    others = [name for name in METRICS[1:] if tried and name in tried[0]]
    return others[0] if others else ACCURACY


def measured_by(metric: str, predicted: Tensor, y: Tensor) -> float:
    """Compute accuracy, balanced accuracy (the mean of the classes' recalls) or macro F1.

    Macro F1 is the mean over the classes of 2 right / (samples + predicted). Classes without
    samples are left out, except that for macro F1 such a class counts with 0 if it is predicted.

    Args:
        metric: one of `METRICS`.
        predicted: `(n,)`, labels.
        y: `(n,)`, the true labels, n > 0.

    >>> predicted, y = torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1])
    >>> [round(measured_by(metric, predicted, y), 4) for metric in METRICS]
    [0.75, 0.5, 0.4286]
    """
    right, size, taken = _counts(predicted, y)
    if metric == ACCURACY:
        return right.sum().item() / len(y)
    if metric == "macro_f1":
        return (2 * right / (size + taken).clamp_min(1))[size + taken > 0].mean().item()
    return (right / size)[size > 0].mean().item()


def difference(metric: str, predicted: Tensor, first: Tensor, y: Tensor) -> Difference:
    """Compute how much better `predicted (n,)` is than `first (n,)` on the labels `y (n,)`.

    The comparison is paired. The standard error is √(Σ ψ² − (Σ ψ)² / (n + 2) + s) / (n + 2). ψ is
    the influence of a sample on n times the difference, to first order (the delta method). s is the
    squared influence of one additional sample that only one of the two labels correctly; it makes
    the comparison careful where there are few such samples, such as four of fifty. For accuracy ψ
    is 1, 0 or −1 and s is 1.

    Source: Agresti & Min 2005, "Simple improved confidence intervals for comparing matched
    proportions"; for other metrics the same rule, with a sample's influence in place of the 1.
    """
    n = len(y)
    if metric == ACCURACY:
        influence = (predicted == y).double() - (first == y).double()
        value, more = influence.sum().item() / n, 1.0
    else:
        value = measured_by(metric, predicted, y) - measured_by(metric, first, y)
        influence = _influence(metric, predicted, y) - _influence(metric, first, y)
        size = torch.bincount(y).double()
        size = size[size > 0]
        more = (n / (len(size) * size)).square().mean().item()
    squares, total = influence.square().sum().item(), influence.sum().item()
    return Difference(value, (squares + more - total**2 / (n + 2)) ** 0.5 / (n + 2))


def _counts(predicted: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, for each class, the correct samples, the samples, and the samples that are predicted
    as this class; float64, on the CPU."""
    predicted, y = predicted.cpu(), y.cpu()
    C = int(torch.maximum(predicted.max(), y.max())) + 1
    right = torch.bincount(y[predicted == y], minlength=C)
    size, taken = torch.bincount(y, minlength=C), torch.bincount(predicted, minlength=C)
    return right.double(), size.double(), taken.double()


def _influence(metric: str, predicted: Tensor, y: Tensor) -> Tensor:
    """Return the influence `(n,)` of each sample on n times the metric, to first order; the
    influences add up to 0."""
    right, size, taken = _counts(predicted, y)
    predicted, y = predicted.cpu(), y.cpu()
    hit = (predicted == y).double()
    if metric == "balanced_accuracy":
        recall = right / size.clamp_min(1)
        return len(y) / ((size > 0).sum() * size[y]) * (hit - recall[y])
    seen = size + taken
    f1 = 2 * right / seen.clamp_min(1)
    one, other = (1 / seen[labels].clamp_min(1) for labels in (y, predicted))
    added = 2 * hit * one - f1[y] * one - f1[predicted] * other
    return len(y) / (seen > 0).sum() * added
