"""Finds the rows of the embeddings that belong to a task, a label or a draw of shots."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.experiments.sweep.embeddings import Embeddings, tensor
from imprint_pl.experiments.sweep.grid import Configuration, Task
from imprint_pl.numerics.draws import sample
from imprint_pl.parts.norm.quantile import quantiles

# The original classes of a label.
Group = tuple[int, ...]


class Samples:
    """Embeddings as tensors, without a copy, and the positions of classes in them.

    Attributes:
        x, test_x: `(N, d)`; the training rows are sorted by class.
        order, rank: `(N,)`, the positions of the training rows in the data set, and in the order in
            which `imprint` processes them.
        layer_widths: the widths of the layers in an embedding; `None` for one layer.
        test_y: `(N_test,)`, original classes.
        classifier: `(d,)`, the quantiles of the backbone's classifier, which are all that NORM_post
            needs, or `None`.
    """

    def __init__(self, embeddings: Embeddings) -> None:
        self.class_names = embeddings.class_names
        self.x, self.test_x = tensor(embeddings.train_x), tensor(embeddings.test_x)
        self.test_y, self.order = tensor(embeddings.test_y), tensor(embeddings.order)
        self.rank, self.layer_widths = tensor(embeddings.rank), embeddings.layer_widths
        classifier = embeddings.classifier
        self.classifier = None if classifier is None else quantiles(tensor(classifier))
        classes, counts = torch.unique_consecutive(tensor(embeddings.train_y), return_counts=True)
        ends = counts.cumsum(0)
        self.slices = {
            c: slice(end - n, end)
            for c, n, end in zip(classes.tolist(), counts.tolist(), ends.tolist(), strict=True)
        }

    def groups(self, task: Task) -> list[Group]:
        return task.groups(self.class_names)

    def rows(self, group: Group, shots: int | None, seed: int | None) -> slice | Tensor:
        """Returns the training rows of a label, in the order of `imprint`."""
        if len(group) == 1 and shots is None:
            return self.slices[group[0]]
        rows = torch.cat([torch.arange(s.start, s.stop) for s in (self.slices[c] for c in group)])
        if shots is not None:
            # Shots are drawn from the rows in the order of the data set.
            rows = rows[self.order[rows].argsort()]
            rows = rows[sample(len(rows), shots, seed or 0)]
        return rows[self.rank[rows].argsort()]

    def training(self, group: Group, c: Configuration) -> Tensor:
        """Returns the training rows of a label after NORM_pre, `(n, d)`."""
        return c.variant.recipe.norm_pre(self.x[self.rows(group, c.shots, c.seed)])

    def together(
        self, groups: list[Group], shots: int | None, seed: int | None
    ) -> tuple[Tensor, list[int]]:
        """Returns the training rows of several labels before NORM_pre, label by label, and the
        number of rows of each. The rows are copied only if they are not adjacent."""
        parts = [self.rows(group, shots, seed) for group in groups]
        slices = [part for part in parts if isinstance(part, slice)]
        follows = all(one.stop == other.start for one, other in itertools.pairwise(slices))
        if len(slices) == len(parts) and follows:
            counts = [part.stop - part.start for part in slices]
            return self.x[slices[0].start : slices[-1].stop], counts
        rows = [self.x[part] for part in parts]
        return torch.cat(rows), [len(part) for part in rows]

    def count(self, group: Group, shots: int | None) -> int:
        n = sum(self.slices[c].stop - self.slices[c].start for c in group)
        return n if shots is None else min(n, shots)

    def test(self, groups: list[Group]) -> tuple[Tensor, Tensor]:
        """Returns the task's test rows, ascending, and their labels."""
        label = torch.full((len(self.class_names),), -1)
        for j, group in enumerate(groups):
            label[list(group)] = j
        y = label[self.test_y]
        rows = (y >= 0).nonzero().flatten()
        if len(rows) == 0:
            raise ImprintError("the task has no test sample")
        return rows, y[rows]
