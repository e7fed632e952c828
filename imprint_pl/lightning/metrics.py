"""The metrics of a labelled pass over data, each sample counted once on any number of ranks, and
which of the head's labels each class of the data is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.method.head import ImprintedHead
from imprint_pl.numerics.labels import composed, place_of
from imprint_pl.ranks import positions_in_dataset

TASK = "give the data and classes of the checkpoint's task"


def places_of(names: list[str], head: ImprintedHead) -> Tensor | None:
    """The head's label of each of the data's classes `(C,)`, found by name; `None` where label c of
    the data is label c of the head, and where either has no names.

    Raises:
        ImprintError: a class that the head does not have, or names that do not tell classes apart.
    """
    known = head.class_names
    if not names or not known or list(map(composed, names)) == list(map(composed, known)):
        return None
    places = [place_of(name, known) for name in names]
    if None in places:
        name = names[places.index(None)]
        raise ImprintError(
            f"the head was imprinted for the classes {_shown(known)}, the data has "
            f"{_shown(names)}, and {name!r} is none of the head's{did_you_mean(name, known)}: "
            f"{TASK}"
        )
    if len(set(places)) < len(names) or len(set(map(composed, known))) < len(known):
        raise ImprintError(
            f"the head was imprinted for the classes {_shown(known)}, the data has "
            f"{_shown(names)}, and some names stand for two classes: {TASK}"
        )
    return torch.tensor(places)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises an `ImprintError` for a label `(B,)` that is none of the head's."""
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ImprintError(
            f"label {int(labels[outside][0])} is out of range for a head of {num_classes} "
            f"classes (0..{num_classes - 1}): {TASK}"
        )


def _shown(names: list[str]) -> str:
    more = ", …" if len(names) > 6 else ""
    return f"[{', '.join(names[:6])}{more}] ({len(names)})"


# Samples that are measured together: a batch takes about as long, and on a GPU the processor has
# to wait for it.
ROWS = 2048


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits: |confidence − accuracy|, averaged over 15 equal bins of
    confidence by their samples."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Logits `(B, C)`, labels `(B,)`."""
        # Given logits, torchmetrics takes those that lie in 0..1 for probabilities.
        super().update(preds.softmax(1), target)


class ClassAccuracy(MulticlassAccuracy):
    """Accuracy of each class `(C,)`; NaN for a class without samples."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None)

    def compute(self) -> Tensor:
        """`(C,)`."""
        return super().compute().masked_fill(self.tp + self.fn == 0, torch.nan)


class TaskMetrics(MetricCollection):
    """`accuracy` (micro), `macro_f1`, `calibration_error` (expected; for C > 1) and
    `class_accuracy` `(C,)`, as fractions; NaN for a class without samples.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        # torchmetrics takes two classes at least: beside a single one there is an empty one.
        rooms = max(num_classes, 2)
        metrics = {
            "accuracy": MulticlassAccuracy(rooms, average="micro"),
            "macro_f1": MulticlassF1Score(rooms, average="macro"),
            "class_accuracy": ClassAccuracy(rooms),
        }
        if num_classes > 1:
            metrics["calibration_error"] = CalibrationError(num_classes, n_bins=15)
        super().__init__(metrics)
        self.num_classes = num_classes
        self.seen = 0
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, scores: Tensor, labels: Tensor, dealt: int | None) -> None:
        """A batch in the loader's order: logits `(B, C)`, labels `(B,)`.

        `dealt` is what `sampler_length` says of the loader: what its sampler repeats to make the
        ranks even is left out.

        Raises:
            ImprintError: a label that is none of the C; perhaps later, at the latest by `compute`.
        """
        if dealt is not None:
            # The repeated ones are the last.
            once = int((positions_in_dataset(self.seen, len(labels)) < dealt).sum())
            self.seen += len(labels)
            scores, labels = scores[:once], labels[:once]
        # A copy: a loader may fill the same tensor anew.
        self._waiting.append((scores, labels.clone()))
        if sum(len(labels) for _, labels in self._waiting) >= ROWS:
            self._update()

    def compute(self) -> dict[str, Any]:
        """The values over all batches and ranks."""
        self._update()
        values = super().compute()
        values["class_accuracy"] = values["class_accuracy"][: self.num_classes]
        return values

    def reset(self) -> None:
        """Forgets all samples, those that wait too."""
        super().reset()
        self.seen, self._waiting = 0, []

    def _update(self) -> None:
        if not self._waiting:
            return
        scores, labels = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        if len(labels):
            check_labels(labels, self.num_classes)
            if self.num_classes == 1:
                scores = nn.functional.pad(scores, (0, 1), value=-torch.inf)
            self.update(scores, labels)
