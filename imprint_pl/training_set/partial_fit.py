"""What `partial_fit` keeps between batches: sums where they suffice for GEN, all rows where not.

Below `estimator.py`, which knows scikit-learn and labels of any kind; here they are 0..C−1.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.holdout import HELD
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.pipeline import calibrate_from_sums, few_for, head_of_sums, make_head
from imprint_pl.method.recipes import Recipe
from imprint_pl.numerics.draws import random_keys
from imprint_pl.numerics.moments import CHUNK, Moments
from imprint_pl.numerics.order import in_order, keys
from imprint_pl.parts.norm.base import transform


class Rows:
    """Every row of every batch, on the CPU, for a GEN that has to see them.

    Args:
        parts: what makes the head.
        x: `(n, d)`, the first batch, not added yet.
        labels: `(n,)`, its labels.
        seed: fixes every random choice.
        tried: what "auto" compared, to be handed on to the head.
    """

    def __init__(
        self, parts: Recipe, x: Tensor, labels: Tensor, seed: int, tried: list[dict[str, Any]]
    ) -> None:
        self.parts, self.seed, self.tried = parts, seed, tried
        self.x: list[Tensor] = []
        self.labels: list[Tensor] = []

    def renumber(self, places: Tensor, num_classes: int) -> None:
        """Label c becomes `places[c]`; from now on there are `num_classes`."""
        self.labels = [places[torch.cat(self.labels)]]

    def add(self, x: Tensor, labels: Tensor, num_classes: int) -> None:
        """Adds a batch `(n, d)`, `(n,)`."""
        # A copy: callers may refill one buffer for every batch.
        self.x.append(x.to("cpu", copy=True))
        self.labels.append(labels)

    def head(self, class_names: list[str], device: torch.device) -> ImprintedHead:
        """The head of all rows so far, on the device."""
        self.x, self.labels = [torch.cat(self.x)], [torch.cat(self.labels)]
        x, labels = self.x[0].to(device), self.labels[0]
        head = imprint_parts(x, labels, self.parts, None, class_names, self.seed, allow_empty=True)
        head.tried = self.tried
        return head

    def cpu(self) -> Rows:
        return self


class Sums:
    """Moments of NORM_pre(x) over all batches, and a bounded sample of rows; on the CPU.

    NORM_pre is fitted on the first batch. The sample is drawn by what the rows hold, the same
    however they are ordered and batched. The sums less those of a part of the sample make a head
    that has not seen that part, but for what NORM_pre learned from it; its scores there give the
    temperature. Arguments as of `Rows`.
    """

    def __init__(
        self, parts: Recipe, x: Tensor, labels: Tensor, seed: int, tried: list[dict[str, Any]]
    ) -> None:
        self.parts, self.seed, self.tried = parts, seed, tried
        self.norm_pre, empty = parts.fresh()
        self.norm_inf = empty.norm_inf
        if getattr(self.norm_pre, "learns", False):
            rows = in_order(x, labels)
            present, codes = torch.unique(labels.to(x.device)[rows], return_inverse=True)
            self.norm_pre.to(x.device).fit(x[rows], codes, len(present), seed)
        self.moments: Moments | None = None
        # Reservoir sampling: keep the rows with the smallest random keys.
        self.x = torch.empty(0, x.shape[1])
        self.labels = torch.empty(0, dtype=torch.int64)

    def renumber(self, places: Tensor, num_classes: int) -> None:
        """As `Rows.renumber`."""
        counts = self.moments.counts.new_zeros(num_classes)
        sums = self.moments.sums.new_zeros(num_classes, self.moments.sums.shape[1])
        counts[places], sums[places] = self.moments.counts, self.moments.sums
        self.moments = Moments(counts, sums, self.moments.gram)
        self.labels = places[self.labels]

    def add(self, x: Tensor, labels: Tensor, num_classes: int) -> None:
        """As `Rows.add`."""
        moments = self.moments and _moved(self.moments, x.device)
        self.moments = _moved(self._added(moments, x, labels, num_classes), "cpu")
        self._sample(x, labels)

    def head(self, class_names: list[str], device: torch.device) -> ImprintedHead:
        """As `Rows.head`."""
        rows = in_order(self.x, self.labels)
        x, labels = self.x[rows].to(device), self.labels[rows].to(device)
        samples = int(self.moments.counts.sum())
        if samples == len(x) and few_for(self.parts.gen, self.norm_pre, x):
            # All rows are there, and are solved faster than a Gram matrix of so many features.
            norms = self.norm_pre, self.norm_inf
            rest = (len(class_names), class_names, self.seed, None, False, True, norms)
            head = make_head(x, labels, self.parts, *rest)
            head.tried = self.tried
            return head
        moments = _moved(self.moments, device)
        # NORM_inf never changes again, so that heads may share it.
        head = ImprintedHead(self.norm_inf, copy.deepcopy(self.parts.agg))
        head = head_of_sums(moments, self.parts, head, class_names, self.seed)
        head.tried = self.tried
        rest = (self.norm_pre.to(device), (x, labels), samples, self.seed)
        calibrate_from_sums(head, moments, self.parts, *rest)
        return head

    def cpu(self) -> Sums:
        """Moves the norms, which rest where they were used last; all else is there already."""
        self.norm_pre.cpu()
        return self

    def _added(
        self, moments: Moments | None, x: Tensor, labels: Tensor, num_classes: int
    ) -> Moments:
        """The sums, or new ones, with a batch added."""
        norm_pre, gram = self.norm_pre.to(x.device), self.parts.gen.needs_gram
        for rows, of in zip(x.split(CHUNK), labels.to(x.device).split(CHUNK), strict=True):
            z = transform(norm_pre, rows)
            if moments is None:
                moments = Moments.zeros(
                    num_classes, z.shape[1], gram="pooled" if gram else "none", device=x.device
                )
            moments.add(z, of)
        return moments

    def _sample(self, x: Tensor, labels: Tensor) -> None:
        self.x = torch.cat([self.x, x.cpu()])
        self.labels = torch.cat([self.labels, labels])
        if len(self.x) > HELD:
            first = random_keys(keys(self.x), self.seed).argsort(stable=True)[:HELD]
            self.x, self.labels = self.x[first], self.labels[first]


def _moved(moments: Moments, device: torch.device | str) -> Moments:
    gram = None if moments.gram is None else moments.gram.to(device)
    return Moments(moments.counts.to(device), moments.sums.to(device), gram)
