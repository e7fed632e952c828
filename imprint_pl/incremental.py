"""What `partial_fit` keeps between batches: sums where they suffice for GEN, all rows where not.

Below `estimator.py`, which knows scikit-learn and labels of any kind; here they are 0..C−1.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprint_pl.calibration import fit_temperature, folds
from imprint_pl.errors import ImprintError
from imprint_pl.head import ImprintedHead
from imprint_pl.imprinting import imprint_parts
from imprint_pl.moments import CHUNK, Moments
from imprint_pl.pipeline import head_of_sums, with_chosen_lam
from imprint_pl.recipes import Parts

# Rows kept beside the sums, to fit the temperature on.
SAMPLE = 2000


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
        self, parts: Parts, x: Tensor, labels: Tensor, seed: int, tried: list[dict[str, Any]]
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

    NORM_pre is fitted on the first batch. The sample is drawn uniformly, the same however the rows
    are batched. The sums less those of a part of the sample make a head that has not seen that
    part, but for what NORM_pre learned from it; its scores there give the temperature. Arguments
    as of `Rows`.
    """

    def __init__(
        self, parts: Parts, x: Tensor, labels: Tensor, seed: int, tried: list[dict[str, Any]]
    ) -> None:
        self.parts, self.seed, self.tried = parts, seed, tried
        self.norm_pre, empty = parts.fresh()
        self.norm_inf = empty.norm_inf
        if getattr(self.norm_pre, "learns", False):
            present, codes = torch.unique(labels.to(x.device), return_inverse=True)
            self.norm_pre.to(x.device).fit(x, codes, len(present), seed)
        self.moments: Moments | None = None
        # Of all rows, those of the smallest random numbers stay in the sample.
        self.generator = np.random.default_rng(seed)
        self.numbers = np.empty(0)
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
        moments = _moved(self.moments, device)
        x, labels = self.x.to(device), self.labels
        head = self._head(moments, class_names, self.parts.gen)
        gen = with_chosen_lam(self.parts.gen)
        scores, of = [torch.empty(0, len(class_names), device=device)], [labels[:0]]
        with torch.no_grad():
            for held in self._held_out():
                rest = moments - self._added(None, x[held], labels[held], len(class_names))
                try:
                    scores.append(self._head(rest, class_names, gen).scores(x[held]))
                    of.append(labels[held])
                except ImprintError:
                    # Too few rows without these; the head of all exists.
                    continue
        head.temperature = fit_temperature(torch.cat(scores), torch.cat(of))
        return head

    def cpu(self) -> Sums:
        """Moves the norms, which rest where they were used last; all else is there already."""
        self.norm_pre.cpu()
        return self

    def _head(self, moments: Moments, class_names: list[str], gen: Any) -> ImprintedHead:
        """A head from sums, temperature 1; a class without samples gets no proxy."""
        # NORM_inf never changes again, so that heads may share it.
        head = ImprintedHead(self.norm_inf, copy.deepcopy(self.parts.agg))
        head = head_of_sums(moments, self.parts, head, class_names, self.seed, gen=gen)
        head.tried = self.tried
        return head

    def _added(
        self, moments: Moments | None, x: Tensor, labels: Tensor, num_classes: int
    ) -> Moments:
        """The sums, or new ones, with a batch added."""
        norm_pre, gram = self.norm_pre.to(x.device), self.parts.gen.needs_gram
        for rows, of in zip(x.split(CHUNK), labels.to(x.device).split(CHUNK), strict=True):
            z = norm_pre(rows)
            if moments is None:
                moments = Moments.zeros(
                    num_classes, z.shape[1], gram="pooled" if gram else "none", device=x.device
                )
            moments.add(z, of)
        return moments

    def _sample(self, x: Tensor, labels: Tensor) -> None:
        numbers = np.concatenate([self.numbers, self.generator.random(len(x))])
        kept = np.sort(np.argsort(numbers)[:SAMPLE])
        self.numbers, kept = numbers[kept], torch.from_numpy(kept)
        before = len(self.x)
        old, new = kept[kept < before], kept[kept >= before] - before
        self.x = torch.cat([self.x[old], x[new.to(x.device)].cpu()])
        self.labels = torch.cat([self.labels[old], labels[new]])

    def _held_out(self) -> list[Tensor]:
        """Masks over the sample: all of it where it is a tenth of the rows, else folds."""
        if 10 * len(self.x) <= self.moments.counts.sum():
            return [torch.ones(len(self.x), dtype=torch.bool)]
        return folds(self.labels, self.seed)


def _moved(moments: Moments, device: torch.device | str) -> Moments:
    gram = None if moments.gram is None else moments.gram.to(device)
    return Moments(moments.counts.to(device), moments.sums.to(device), gram)
