"""The metrics of a labelled pass over data, each sample counted once on any number of ranks."""

from __future__ import annotations

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from imprint_pl.batch import dealt_positions


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits: |confidence − accuracy|, averaged over 15 equal bins of
    confidence by their samples."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Logits `(B, C)`, labels `(B,)`."""
        # Given logits, torchmetrics takes those that lie in 0..1 for probabilities.
        super().update(preds.softmax(1), target)


class TaskMetrics(MetricCollection):
    """`accuracy` (micro), `macro_f1`, `calibration_error` (expected; for C > 1) and
    `class_accuracy` `(C,)`, as fractions.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        metrics = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "macro_f1": MulticlassF1Score(num_classes, average="macro"),
            "class_accuracy": MulticlassAccuracy(num_classes, average=None),
        }
        if num_classes > 1:
            metrics["calibration_error"] = CalibrationError(num_classes, n_bins=15)
        super().__init__(metrics)
        self.seen = 0

    def add(self, scores: Tensor, labels: Tensor, dealt: int | None) -> None:
        """A batch in the loader's order: logits `(B, C)`, labels `(B,)`.

        `dealt` is what `dealt_samples` says of the loader: what its sampler repeats to make the
        ranks even is left out.
        """
        if dealt is not None:
            once = dealt_positions(self.seen, len(labels)) < dealt
            self.seen += len(labels)
            scores, labels = scores[once.to(scores.device)], labels[once.to(labels.device)]
        if len(labels):
            self.update(scores, labels)
