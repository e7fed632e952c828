"""Prediction sets: for each image a set of classes that contains the true one with a given
probability, such as 95 %. They are fitted by split conformal prediction on held-out training
samples.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.constants import OptionalConstants

# A class has its own bound if at least this many of its held-out samples are expected below it:
# with 95 % that takes 100 held-out samples of the class, with 90 % it takes 50.
MISSES = 5


class PredictionSets(OptionalConstants):
    """The constants of prediction sets, kept in the head; empty if fitted without `coverage`.

    A class belongs to the set of an image if its probability reaches the class's bound. The bound
    is the ⌊(n + 1)(1 − coverage)⌋-th smallest probability that n held-out samples of the class had
    for it, or no bound where that is the 0-th. Classes with too few held-out samples (see `MISSES`)
    share the bound of their samples together, or, where these are too few, that of all samples.

    Attributes:
        log_probabilities: `(n,)`, of the true class of each held-out sample.
        classes: `(n,)` int64, these classes.

    Source: Sadinle, Lei & Wasserman 2019, "Least Ambiguous Set-Valued Classifiers with Bounded
    Error Levels"; by class: Vovk 2012, "Conditional validity of inductive conformal predictors".
    """

    constants = ("log_probabilities", "classes")
    integers = ("classes",)
    log_probabilities: Tensor
    classes: Tensor

    def fit(self, logits: Tensor, y: Tensor) -> None:
        """Fit the sets on the logits `(n, C)` of held-out samples and their labels `(n,)`."""
        logits = logits.detach().to("cpu" if logits.device.type == "mps" else logits.device)
        found = logits.double().log_softmax(1).gather(1, y.to(logits.device)[:, None])[:, 0]
        # Sort the values: their original order would reveal something about single samples.
        order = found.argsort(stable=True)
        with torch.inference_mode(False):
            self.log_probabilities = found[order].float().clone()
            self.classes = y.to(logits.device)[order].clone()

    def bounds(self, coverage: float, num_classes: int) -> Tensor:
        """Return the bound on the log-probability of each class, `(C,)`; −∞ if there is none."""
        miss = 1 - coverage
        counts = torch.bincount(self.classes, minlength=num_classes)
        large = counts * miss >= MISSES - 1e-9
        rest = self.log_probabilities[~large[self.classes]]
        if _place(len(rest), miss) < 1:
            rest = self.log_probabilities
        bounds = self.log_probabilities.new_full((num_classes,), _bound(rest, miss))
        for label in large.nonzero().flatten().tolist():
            bounds[label] = _bound(self.log_probabilities[self.classes == label], miss)
        return bounds

    def fits(self, num_classes: int) -> bool:
        """Whether the constants of a file fit each other and a head of `num_classes`."""
        values, classes = self.log_probabilities, self.classes
        return (
            values.shape == classes.shape
            and values.ndim == 1
            and values.is_floating_point()
            and classes.dtype == torch.int64
            and bool((values <= 0).all())
            and bool(((classes >= 0) & (classes < num_classes)).all())
        )


def checked_coverage(coverage: float | None, default: float | None = None) -> float:
    """Return the coverage, or the default if it is `None`.

    Raises:
        ImprintError: it is not above 0 and at most 1, or neither is given.
    """
    coverage = default if coverage is None else coverage
    if coverage is None or not 0 < coverage <= 1:
        raise ImprintError(
            f"coverage={coverage}: give a probability above 0 and at most 1, such as 0.95"
        )
    return coverage


def _place(samples: int, miss: float) -> int:
    return math.floor((samples + 1) * miss + 1e-9)


def _bound(log_probabilities: Tensor, miss: float) -> float:
    """Return the bound that follows from ascending log-probabilities `(n,)` of held-out samples."""
    place = min(_place(len(log_probabilities), miss), len(log_probabilities))
    return log_probabilities[place - 1].item() if place >= 1 else -math.inf
