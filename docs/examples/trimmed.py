"""A GEN in ten lines: the mean of each class without its farthest samples."""

import torch

from imprint_pl.parts.gen import PerClass


class Trimmed(PerClass):
    """The mean of a class without the samples farthest from it; `trim` is their share."""

    def __init__(self, trim: float = 0.1) -> None:
        self.trim = trim

    def of_class(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Embeddings `(n, d)` of one class → its proxy `(1, d)`."""
        distance = (x - x.mean(0)).norm(dim=1)
        nearest = distance.argsort()[: max(1, round((1 - self.trim) * len(x)))]
        return x[nearest].mean(0, keepdim=True)
