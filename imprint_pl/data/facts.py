"""Facts about the data that are known before the first batch: classes and layers."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from imprint_pl.numerics.labels import names_of


class DataFacts:
    """Names, number and sizes of the classes, and the layers in embeddings, from a DataModule.

    Each is read once, when it is first used, and is `None` if the data do not provide it.

    Args:
        data: a DataModule, or anything else.
        loader: the loader of its training samples, or anything else.
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
    """Return the class names from a data set's attribute `classes`, as in torchvision's data sets.

    The result is `None` if the data set has no such names, or changes its labels.

    Args:
        dataset: a data set, or a `Subset` of one.
    """
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple) or getattr(dataset, "target_transform", None):
        return None
    # The names of torchvision's ImageNet are tuples of synonyms.
    texts = [", ".join(map(str, name)) if isinstance(name, tuple) else name for name in names]
    return texts if texts and all(isinstance(name, str) for name in texts) else None
