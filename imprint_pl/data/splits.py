"""The samples of a data set, before a task selects some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset


class SplitDataset(Dataset):
    """The samples of one split, such as train.

    A subclass sets `labels` and writes `__getitems__` and `select`. For `embed` it also needs
    `fingerprint()`, which returns a text that changes when the images do.

    Attributes:
        labels: `(N,)` int64.
        original_labels: `(N,)` int64, the labels before classes were merged, where they differ.
        paths: One path for each sample, where the samples come from files.
        from_files: Whether a loader should decode in worker processes.
    """

    labels: Tensor
    original_labels: Tensor
    paths: list[str] | None = None
    from_files = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Any:
        """Return a whole batch, `(images, labels)`."""
        raise NotImplementedError

    def select(self, positions: Tensor, labels: Tensor) -> SplitDataset:
        """Return the samples at `positions` `(M,)`, ascending, with new labels `(M,)`."""
        raise NotImplementedError


@dataclass
class Splits:
    """The whole splits of a data set, as `ImageDataModule.load` returns them.

    Args:
        class_names: The names in label order.
        train: The training split. A split needs the attribute `labels` `(N,)`, int64 indices into
            `class_names`, and the methods `__len__`, `__getitems__` and `select` of `SplitDataset`.
        test: The test split.
        val: The validation split, where the data set has one.
        original_class_names: Names of the splits' `original_labels` `(N,)`, where the data set
            merges classes.
    """

    class_names: list[str]
    train: SplitDataset
    test: SplitDataset
    val: SplitDataset | None = None
    original_class_names: list[str] | None = None
