"""The rows of all batches, which `partial_fit` keeps for a GEN that needs them; for other GENs it
keeps `TrainingSums`.

`estimator.py` uses this file. It handles scikit-learn and labels of any kind; here labels are
0..C−1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.recipes import Recipe
from imprint_pl.method.threshold import Limits, set_limits


class TrainingRows:
    """Every row of every batch, on the CPU; the methods are those of `TrainingSums`."""

    def __init__(
        self, parts: Recipe, seed: int, device: torch.device, limits: Limits | None = None
    ) -> None:
        self.parts, self.seed, self.device, self.limits = parts, seed, device, limits or Limits()
        self.x: list[Tensor] = []
        self.y: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch `(n, d)` with labels `(n,)`, whose values were checked."""
        # Copy, since callers may refill one buffer for every batch.
        self.x.append(x.to("cpu", copy=True))
        self.y.append(y)

    def relabel(self, places: Tensor, num_classes: int) -> None:
        """Label c becomes `places[c]`, one of `num_classes` from now on."""
        self.y = [places[torch.cat(self.y)]]

    def head(self, class_names: list[str]) -> ImprintedHead:
        """Makes the head of all rows so far, on the device."""
        self.x, self.y = [torch.cat(self.x)], [torch.cat(self.y)]
        x, y = self.x[0].to(self.device), self.y[0]
        head = imprint_parts(
            x,
            y,
            self.parts,
            None,
            class_names,
            self.seed,
            allow_empty=True,
            values_checked=True,
        )
        return set_limits(head, x, y, self.limits)

    def cpu(self) -> TrainingRows:
        return self
