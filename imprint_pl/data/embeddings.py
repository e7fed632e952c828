"""Embeddings in place of images: the same splits, classes, shots and tasks on 2-D float batches.

`embedding.embed` makes an `EmbeddingDataModule` from a data module of images. Arrays of your own
become one through `Splits` of `ArrayDataset`s.
"""

from typing import Any, cast

from torch import Tensor

from imprint_pl.data.arrays import ArrayDataset
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.splits import Splits

TASK_OPTIONS = ("classes", "d", "num_labels", "task_seed", "shots", "val_fraction")


class EmbeddingDataModule(ImageDataModule):
    """A data set whose batches are `(embeddings, labels)`, float32 `(B, d)` and int64 `(B,)`.

    A model takes them like images, and its backbone passes them through unchanged. Only a backbone
    that is a module of your own would embed them again: use `backbone=None` instead. Several tasks
    share the splits: `EmbeddingDataModule(other.splits, classes="even", shots=5)`.

    Args:
        splits: The whole splits, each an `ArrayDataset(x, y)` with x float32 `(N, d)` and y `(N,)`.
        name: Name of the data set, for `task`.
        task: Keywords of `ImageDataModule` but `root`, `download` and `num_workers`.
    """

    def __init__(self, splits: Splits, name: str = "embeddings", **task: Any) -> None:
        super().__init__(root="data", download=False, num_workers=None, **task)
        self.splits = splits
        self.name = name

    def load(self) -> Splits:
        return self.splits

    def arrays(self, split: str = "train") -> tuple[Tensor, Tensor]:
        """Return the embeddings `(N, d)`, float32, and the labels `(N,)` of a split of the task."""
        dataset = cast(ArrayDataset, self._dataset(split))
        return dataset.images, dataset.labels
