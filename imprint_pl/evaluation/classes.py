"""The figures of a validation or test and of each of its classes, with their intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from imprint_pl.evaluation.intervals import Interval, bootstrap, of_f1, wilson
from imprint_pl.evaluation.predictions import Confusion, Predictions


class Figure(NamedTuple):
    """A figure and its interval, fractions; `None` if it is not defined."""

    value: float | None
    interval: Interval | None


@dataclass(frozen=True)
class ClassFigures:
    """The figures of a class.

    Attributes:
        label, name: those of the class.
        images: how many images of the class were measured; without any, recall and F1 are `None`.
        right: how many of these images were predicted correctly.
        recall: right / images; the accuracy of the class.
        precision: the share of the images predicted as this class that belong to it.
        f1: the harmonic mean of recall and precision.
        trained: how many training images the class has; `None` if unknown.
        mistaken_for: the class that most of its wrong images were predicted as; `None` if none is
            wrong.
        mistaken: how many images were predicted as `mistaken_for`.
    """

    label: int
    name: str
    images: int
    right: int
    recall: Figure
    precision: Figure
    f1: Figure
    trained: int | None = None
    mistaken_for: int | None = None
    mistaken: int = 0

    @property
    def wrong(self) -> int:
        return self.images - self.right


@dataclass(frozen=True)
class Measured:
    """The figures of a loader.

    Attributes:
        images: how many images were measured.
        right: how many of them were predicted correctly.
        accuracy, balanced_accuracy, macro_f1: the figures over all classes.
        classes: the figures of each class, in the order of the labels.
        confusion: the confusion matrix, true by predicted class.
    """

    images: int
    right: int
    accuracy: Figure
    balanced_accuracy: Figure
    macro_f1: Figure
    classes: list[ClassFigures]
    confusion: Confusion

    def weakest(self) -> list[ClassFigures]:
        """The classes that have images, by ascending recall; among equal ones, the class with the
        most images comes first."""
        there = [found for found in self.classes if found.images]
        return sorted(there, key=lambda found: (found.recall.value, -found.images))


def measure(predictions: Predictions, trained: Tensor | None = None) -> Measured:
    """Computes the figures of predictions.

    Args:
        predictions: the predictions of a loader.
        trained: `(C,)`, how many training images each class has, if that is known.
    """
    confusion = predictions.confusion
    errors = confusion.without_diagonal()
    sizes, taken = (confusion.sums(of).tolist() for of in (confusion.true, confusion.predicted))
    wrong = errors.sums(errors.true).tolist()
    right = [size - missed for size, missed in zip(sizes, wrong, strict=True)]
    # The largest error of each class; among equal ones, the first.
    mistaken: dict[int, tuple[int, int]] = {}
    cells = (errors.true, errors.predicted, errors.counts)
    for true, other, count in zip(*(part.tolist() for part in cells), strict=True):
        if true not in mistaken or count > mistaken[true][1]:
            mistaken[true] = (other, count)
    classes = [
        ClassFigures(
            label,
            name,
            sizes[label],
            right[label],
            _share(right[label], sizes[label]),
            _share(right[label], taken[label]),
            _f1(right[label], sizes[label], taken[label]),
            None if trained is None else int(trained[label]),
            *mistaken.get(label, (None, 0)),
        )
        for label, name in enumerate(predictions.class_names)
    ]
    drawn = bootstrap(confusion)
    recalls = [found.recall.value for found in classes if found.recall.value is not None]
    f1 = [found.f1.value for found in classes if found.f1.value is not None]
    return Measured(
        len(predictions),
        sum(right),
        _share(sum(right), len(predictions)),
        Figure(_mean(recalls), drawn.balanced_accuracy),
        Figure(_mean(f1), drawn.macro_f1),
        classes,
        confusion,
    )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(part: int, whole: int) -> Figure:
    return Figure(part / whole if whole else None, wilson(part, whole))


def _f1(right: int, images: int, taken: int) -> Figure:
    if images + taken == 0:
        return Figure(None, None)
    # The errors are the missed images of the class and the other images predicted as it.
    return Figure(2 * right / (images + taken), of_f1(right, images + taken - 2 * right))
