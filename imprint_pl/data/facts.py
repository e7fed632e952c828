"""What the data say of their classes and embeddings before the first batch comes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor

from imprint_pl.numerics.labels import names_of


class DataFacts:
    """Names, number and sizes of the classes, and the layers in embeddings, as a DataModule gives
    them; each is read once, when it is asked for, and `None` where the data do not say.

    Args:
        data: a DataModule, or anything else.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    @cached_property
    def class_names(self) -> list[str] | None:
        """The C names."""
        return names_of(self.data) or None

    @cached_property
    def num_classes(self) -> int | None:
        """C."""
        return len(self.class_names or []) or getattr(self.data, "num_classes", None) or None

    @cached_property
    def class_counts(self) -> Tensor | None:
        """`(C,)`, the training samples of each class."""
        return getattr(self.data, "class_counts", None)

    @cached_property
    def layer_widths(self) -> list[int] | None:
        """The width of each layer, where batches are embeddings of several layers."""
        return getattr(self.data, "layer_widths", None)
