"""The predictions of a validation or test, with the true labels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# How many numbers `row_of` keeps of an image.
COLUMNS = 4


@dataclass(frozen=True)
class Confusion:
    """A sparse confusion matrix, ordered by true class and then by predicted class.

    With many classes there are far more zeros than images.

    Attributes:
        true, predicted, counts: `(M,)` int64, the cells that are not zero.
        num_classes: C.
    """

    true: Tensor
    predicted: Tensor
    counts: Tensor
    num_classes: int

    def dense(self, classes: list[int] | None = None) -> Tensor:
        """Return the matrix `(c, c)` of some classes in their order, by default of all classes."""
        chosen = list(range(self.num_classes)) if classes is None else classes
        place = torch.full((self.num_classes,), -1)
        place[chosen] = torch.arange(len(chosen))
        row, column = place[self.true], place[self.predicted]
        inside = (row >= 0) & (column >= 0)
        matrix = torch.zeros(len(chosen), len(chosen), dtype=torch.int64)
        matrix[row[inside], column[inside]] = self.counts[inside]
        return matrix

    def without_diagonal(self) -> Confusion:
        """Return only the errors."""
        wrong = self.true != self.predicted
        return Confusion(
            self.true[wrong], self.predicted[wrong], self.counts[wrong], self.num_classes
        )

    def sums(self, of: Tensor) -> Tensor:
        """Return the counts summed by class, `(C,)`; `of` is `true` or `predicted`."""
        zeros = torch.zeros(self.num_classes, dtype=torch.int64)
        return zeros.index_add(0, of, self.counts)


@dataclass(frozen=True)
class Predictions:
    """The predictions for the images of a loader, in its order.

    Attributes:
        labels: `(N,)` int64, the true classes, of the C of the head.
        predicted: `(N,)` int64, the class of the best score, whatever the threshold.
        scores: `(N,)`, the logit of that class.
        probabilities: `(N,)`, its probability; NaN where an embedding is not finite.
        of_true: `(N,)`, the probability of the true class.
        class_names: C names.
        names: a file for each image; `None` if the images come from arrays.
        accepted: `(N,)` bool, whether the image reaches the head's threshold; `None` without one.
    """

    labels: Tensor
    predicted: Tensor
    scores: Tensor
    probabilities: Tensor
    of_true: Tensor
    class_names: list[str]
    names: list[str] | None = None
    accepted: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def confusion(self) -> Confusion:
        """How many images of each true class were predicted as each class."""
        C = len(self.class_names)
        pairs, counts = torch.unique(self.labels * C + self.predicted, return_counts=True)
        return Confusion(pairs // C, pairs % C, counts, C)

    def worst(self) -> Tensor:
        """The wrong images, `(E,)` int64, sorted by how much more probable the predicted class is
        than the true one."""
        wrong = (self.labels != self.predicted).nonzero().flatten()
        surplus = (self.probabilities - self.of_true)[wrong].nan_to_num(-1)
        return wrong[surplus.argsort(descending=True, stable=True)]

    @cached_property
    def folder(self) -> str | None:
        """The common folder of all files; `None` if there is none."""
        try:
            common = os.path.commonpath([os.path.dirname(name) for name in self.names or []])
        except ValueError:  # no file, or on several drives
            return None
        return common or None

    def name_of(self, index: int) -> str:
        """Return the name of an image: its file below `folder`, or its index in the loader."""
        if self.names is None:
            return f"image {index}"
        name = self.names[index]
        return name if self.folder is None else os.path.relpath(name, self.folder)


def rows_of(logits: Tensor, labels: Tensor, accepted: Tensor | None = None) -> Tensor:
    """Turn the logits of a batch into the rows that are kept for its predictions.

    A row has the predicted class, its logit, its probability, the probability of the true class,
    and 1 if the image reaches the threshold. A probability of −1 stands for NaN, which a store of
    rows refuses.

    Args:
        logits: `(B, C)`.
        labels: `(B,)`, the true labels.
        accepted: `(B,)` bool; by default all are accepted.

    Returns:
        `(B, 5)`, float32.
    """
    best, predicted = logits.float().max(1)
    probabilities = logits.float().softmax(1)
    of_both = torch.stack([predicted, labels.to(predicted)], 1)
    # Class indices are below 2^24 and therefore exact in float32. The logit of a class without
    # proxies is −∞.
    numbers = [predicted.float()[:, None], best[:, None], probabilities.gather(1, of_both)]
    rows = torch.cat(numbers, 1)
    rows[:, 1] = rows[:, 1].nan_to_num(neginf=torch.finfo(torch.float32).min)
    rows[:, 2:] = rows[:, 2:].nan_to_num(-1)
    passed = torch.ones_like(labels) if accepted is None else accepted
    return torch.cat([rows, passed.to(rows)[:, None]], 1)


def from_rows(
    rows: Tensor,
    labels: Tensor,
    class_names: list[str],
    names: list[str] | None,
    threshold: bool = False,
) -> Predictions:
    """Turn the rows of `rows_of` into predictions.

    Args:
        rows: `(N, 5)`, the rows of all batches, in the loader's order.
        labels: `(N,)`, the true labels.
        class_names: C names.
        names: as for `Predictions`.
        threshold: whether the head has a threshold.
    """
    predicted, scores = rows[:, 0].long(), rows[:, 1]
    best, of_true = rows[:, 2:4].masked_fill(rows[:, 2:4] < 0, torch.nan).unbind(1)
    accepted = rows[:, 4] > 0 if threshold else None
    return Predictions(labels, predicted, scores, best, of_true, class_names, names, accepted)
