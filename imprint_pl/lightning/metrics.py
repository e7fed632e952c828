"""Measures and logs a validation or test. Each sample counts once on any number of ranks, and the
data's classes are matched with the head's by name.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
)

from imprint_pl.data.batch_hooks import datamodule_of
from imprint_pl.data.loaders import loader_at, sampler_length
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.method.head import ImprintedHead
from imprint_pl.numerics.labels import composed, names_of, place_of
from imprint_pl.ranks import positions_in_dataset

TASK = "give the data and classes of the checkpoint's task"
# Most classes whose accuracies are logged: more would flood a logger. `class_accuracy` and the run
# folder have all of them.
LOGGED_CLASSES = 20


def stage_of(trainer: Trainer) -> str:
    """Returns the prefix of logged values: "test", or "val" in a validation of any kind."""
    return "test" if trainer.testing else "val"


class Measurement:
    """A validation or a test: measures each loader on its own and logs the values.

    Args:
        module: the module that logs the values.
        head: the head of the module, not empty.

    Attributes:
        metrics: the metrics of each loader, by its number.

    Raises:
        ImprintError: the data have a class that the head does not have.
    """

    def __init__(self, module: LightningModule, head: ImprintedHead) -> None:
        self.module, self.head = module, head
        self.stage = stage_of(module.trainer)
        self.metrics: dict[int, TaskMetrics] = {}
        # The accuracies of the classes, for each loader that was logged.
        self._accuracies: dict[int, Tensor] = {}
        # The head's label for each class of the data, if they differ.
        self._places = places_of(names_of(datamodule_of(module.trainer)), head)

    def labels_of_head(self, labels: Tensor) -> Tensor:
        """Turns labels `(B,)` of the data into the head's labels, by the classes' names.

        Raises:
            ImprintError: a label that is none of the data's classes.
        """
        return labels_of_head(labels, self._places)

    def add(self, logits: Tensor, labels: Tensor, batch: int, loader: int) -> None:
        """Adds a batch.

        Args:
            logits: `(B, C)`.
            labels: `(B,)`, labels of the head.
            batch: the number of the batch.
            loader: the number of its loader.
        """
        if loader not in self.metrics:
            self.metrics[loader] = TaskMetrics(self.head.num_classes).to(logits.device)
        loaders = getattr(self.module.trainer, f"{self.stage}_dataloaders")
        self.metrics[loader].add(logits, labels, sampler_length(loader_at(loader, loaders)))
        if len(self._batches) > 1 and batch + 1 == self._batches[loader]:
            # Log in the loader's last step, since Lightning returns the values by loader only then.
            self._log(loader, "")

    def finish(self) -> Tensor:
        """Logs the loaders that are not logged yet.

        Returns:
            The accuracy of each class `(C,)`; with L loaders `(L, C)`.
        """
        loaders = len(self._batches)
        for loader in sorted(self.metrics.keys() - self._accuracies.keys()):
            # This is the only loader, or one whose last batch could not be known beforehand.
            self._log(loader, f"/dataloader_idx_{loader}" if loaders > 1 else "")
        missing = torch.full((self.head.num_classes,), torch.nan)
        rows = [self._accuracies.get(loader, missing) for loader in range(loaders)]
        return torch.stack(rows) if loaders > 1 else rows[0]

    @property
    def _batches(self) -> list[float]:
        """Returns the number of batches of each loader."""
        return getattr(self.module.trainer, f"num_{self.stage}_batches")

    def _log(self, loader: int, suffix: str) -> None:
        """Logs the values of a loader. Within a step, Lightning adds the suffix itself."""
        values = self.metrics[loader].compute()
        accuracies = values.pop("class_accuracy")
        self._accuracies[loader] = accuracies.cpu()
        log = partial(
            self.module.log,
            on_step=False,
            on_epoch=True,
            batch_size=1,
            sync_dist=True,
            add_dataloader_idx=not suffix,
        )
        for name, value in values.items():
            shown = name in ("accuracy", "macro_f1")
            log(f"{self.stage}/{name}{suffix}", value, prog_bar=shown)
        if self.head.num_classes <= LOGGED_CLASSES:
            for label, value in enumerate(accuracies):
                if not value.isnan():  # a class without samples
                    log(f"{self.stage}/accuracy/{self.head.name_of(label)}{suffix}", value)


def labels_of_head(labels: Tensor, places: Tensor | None, num_classes: int | None = None) -> Tensor:
    """Turns labels of the data into the head's labels `(B,)`.

    Args:
        labels: `(B,)`.
        places: the result of `places_of`.
        num_classes: C of the head, to check also labels that need no change.

    Raises:
        ImprintError: a label is none of the data's classes, or none of the head's.
    """
    if places is None:
        if num_classes is not None:
            check_labels(labels, num_classes)
        return labels
    check_labels(labels, len(places))
    return places.to(labels.device)[labels]


def places_of(names: list[str], head: ImprintedHead) -> Tensor | None:
    """Finds the head's label for each class of the data, by name.

    Returns:
        `(C,)`; `None` if the labels are the same, or if the data or the head have no names.

    Raises:
        ImprintError: the head does not have a class, or two classes have the same name.
    """
    known = head.class_names
    if not names or not known or list(map(composed, names)) == list(map(composed, known)):
        return None
    places = [place for name in names if (place := place_of(name, known)) is not None]
    if len(places) < len(names):
        name = next(name for name in names if place_of(name, known) is None)
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
    """Raises an `ImprintError` if one of the labels `(B,)` is none of the head's."""
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ImprintError(
            f"label {int(labels[outside][0])} is out of range for a head of {num_classes} "
            f"classes (0..{num_classes - 1}): {TASK}"
        )


def _shown(names: list[str]) -> str:
    more = ", …" if len(names) > 6 else ""
    return f"[{', '.join(names[:6])}{more}] ({len(names)})"


# Samples that are measured at a time: measuring each batch on its own would take about as long as
# this, and on a GPU the CPU would have to wait each time.
ROWS = 2048


class CalibrationError(MulticlassCalibrationError):
    """Expected calibration error of logits: |confidence − accuracy| in 15 equal bins of confidence,
    averaged over samples."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Logits `(B, C)`, labels `(B,)`."""
        # Apply the softmax here: torchmetrics would treat logits in 0..1 as probabilities.
        super().update(preds.softmax(1), target)


class ClassAccuracy(MulticlassAccuracy):
    """Accuracy of each class `(C,)`; NaN for a class without samples."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, average=None)

    def compute(self) -> Tensor:
        """`(C,)`."""
        # For type checkers: these are tensors, and lists only in metrics that keep every sample.
        samples = torch.as_tensor(self.tp) + torch.as_tensor(self.fn)
        return super().compute().masked_fill(samples == 0, torch.nan)


class BalancedAccuracy(ClassAccuracy):
    """Mean accuracy of the classes that have samples; NaN if none has."""

    def compute(self) -> Tensor:
        """A scalar."""
        # torchmetrics' own average counts a class without samples as 0 if it is predicted.
        return super().compute().nanmean()


class TaskMetrics(MetricCollection):
    """`accuracy` (micro), `balanced_accuracy`, `macro_f1`, `calibration_error` (expected; for
    C > 1) and `class_accuracy` `(C,)`, as fractions; NaN for a class without samples.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int) -> None:
        # torchmetrics needs at least two classes, so add an empty one to a single class.
        rooms = max(num_classes, 2)
        metrics: dict[str, Metric | MetricCollection] = {
            "accuracy": MulticlassAccuracy(rooms, average="micro"),
            "balanced_accuracy": BalancedAccuracy(rooms),
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
        """Adds a batch in the loader's order.

        Args:
            scores: logits `(B, C)`.
            labels: `(B,)`.
            dealt: the `sampler_length` of the loader. Samples that its sampler repeats, to make the
                ranks equally long, are left out.

        Raises:
            ImprintError: a label is none of the C classes; raised here or later, at the latest by
                `compute`.
        """
        if dealt is not None:
            # Repeated samples are the last ones.
            once = int((positions_in_dataset(self.seen, len(labels)) < dealt).sum())
            self.seen += len(labels)
            scores, labels = scores[:once], labels[:once]
        # Copy the labels, since a loader may reuse the same tensor.
        self._waiting.append((scores, labels.clone()))
        if sum(len(labels) for _, labels in self._waiting) >= ROWS:
            self._update()

    def compute(self) -> dict[str, Any]:
        """Returns the values over all batches and ranks."""
        self._update()
        values = super().compute()
        values["class_accuracy"] = values["class_accuracy"][: self.num_classes]
        return values

    def reset(self) -> None:
        """Drops all samples, including those that were not measured yet."""
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
