"""A GEN in ten lines: the mean of each class without its farthest samples."""

import torch

from imprint_pl.parts.gen import PerClass


class Trimmed(PerClass):
    """The mean of the samples nearest to the class mean; `keep` is their share."""

    name = "trimmed"

    def __init__(self, keep: float = 0.9) -> None:
        self.keep = keep

    def of_class(self, x: torch.Tensor, seed: int) -> torch.Tensor:
        """Embeddings `(n, d)` of one class → its proxy `(1, d)`."""
        distance = (x - x.mean(0)).norm(dim=1)
        nearest = distance.argsort()[: max(1, round(self.keep * len(x)))]
        return x[nearest].mean(0, keepdim=True)
