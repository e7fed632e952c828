"""What the data say of their classes and embeddings before the first batch comes."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from imprint_pl.numerics.labels import names_of


class DataFacts:
    """Names, number and sizes of the classes, and the layers in embeddings, as a DataModule gives
    them; each is read once, when it is asked for, and `None` where the data do not say.

    Args:
        data: a DataModule, or anything else.
        loader: of its training samples, or anything else.
    """

    def __init__(self, data: Any, loader: Any = None) -> None:
        self.data, self.loader = data, loader

    @cached_property
    def class_names(self) -> list[str] | None:
        """The C names."""
        return names_of(self.data) or None

    @cached_property
    def names_of_dataset(self) -> list[str] | None:
        """The names in the loader's data set, which may have more classes than its samples."""
        return names_of_dataset(getattr(self.loader, "dataset", None))

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


def names_of_dataset(dataset: Any) -> list[str] | None:
    """The class names that a data set has as `classes`, as those of torchvision do; `None` where it
    has none, or changes its labels.

    Args:
        dataset: a data set, or a `Subset` of one.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or getattr(dataset, "target_transform", None):
        return None
    # Those of ImageNet are tuples of synonyms.
    texts = [", ".join(map(str, name)) if isinstance(name, tuple) else name for name in names]
    return texts if texts and all(isinstance(name, str) for name in texts) else None
