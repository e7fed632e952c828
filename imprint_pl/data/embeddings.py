"""Embeddings in place of images: the same splits, classes, shots and tasks on 2-D float batches.

`embedding.embed` makes an `EmbeddingDataModule` from a data module of images. Arrays of your own
become one through `Splits` of `ArrayDataset`s.
"""

from typing import Any, cast

from torch import Tensor

from imprint_pl.data.arrays import ArrayDataset
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.splits import Splits
from imprint_pl.errors import ImprintError

TASK_OPTIONS = ("classes", "d", "num_labels", "task_seed", "shots", "max_images", "val_fraction")


class EmbeddingDataModule(ImageDataModule):
    """A data set whose batches are `(embeddings, labels)`, float32 `(B, d)` and int64 `(B,)`.

    A model takes them like images, and its backbone passes them through unchanged. Only a backbone
    that is a module of your own would embed them again: use `backbone=None` instead. Several tasks
    share the splits: `EmbeddingDataModule(other.splits, classes="even", shots=5)`.

    Args:
        splits: The whole splits, each an `ArrayDataset(x, y)` with x float32 `(N, d)` and y `(N,)`.
        name: Name of the data set, for `task`.
        layer_widths: How many columns each layer of the backbone has, in their order, where x holds
            several layers side by side.
        task: Keywords of `ImageDataModule` but `root`, `download` and `num_workers`.
    """

    def __init__(
        self,
        splits: Splits,
        name: str = "embeddings",
        layer_widths: list[int] | None = None,
        **task: Any,
    ) -> None:
        super().__init__(root="data", download=False, num_workers=None, **task)
        if layer_widths is not None:
            layer_widths = list(layer_widths)
            if not layer_widths or not all(isinstance(n, int) and n > 0 for n in layer_widths):
                raise ImprintError(
                    f"layer_widths={layer_widths!r}: expected how many columns each layer has, "
                    "such as [320, 1280]"
                )
        self.splits = splits
        self.name = name
        self.layer_widths = layer_widths

    def load(self) -> Splits:
        return self.splits

    def setup(self, stage: str | None = None) -> None:
        """Select the task's samples, and check that their columns are those of the layers.

        Raises:
            ImprintError: If the widths of the layers do not add up to the number of columns.
        """
        super().setup(stage)
        for split in ("train", "val", "test") if self.layer_widths else ():
            rows = getattr(self, f"{split}_dataset").images
            if rows.shape[1] != sum(self.layer_widths or ()):
                raise ImprintError(
                    f"layer_widths={self.layer_widths} add up to {sum(self.layer_widths or ())}, "
                    f"but the {split} embeddings of {self.name!r} have {rows.shape[1]} columns: "
                    "give the widths of the backbone's layers (Backbone.layer_widths), or leave "
                    "layer_widths out"
                )

    def arrays(self, split: str = "train") -> tuple[Tensor, Tensor]:
        """Return the embeddings `(N, d)`, float32, and the labels `(N,)` of a split of the task."""
        dataset = cast(ArrayDataset, self._dataset(split))
        return dataset.images, dataset.labels
