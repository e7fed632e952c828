"""Embeddings in place of images: the same splits, classes, shots and tasks on 2-D float batches.

`embedding.embed` makes one from a data set of images; with arrays of one's own it is made from
`Splits` of `ArrayDataset`s.
"""

from imprint_pl.data.base import ImageDataModule, Splits

TASK_OPTIONS = ("classes", "d", "num_labels", "task_seed", "shots", "val_fraction")


class EmbeddingDataModule(ImageDataModule):
    """A data set whose batches are `(embeddings, labels)`, float32 `(B, d)` and int64 `(B,)`.

    A model takes them like images, and its backbone leaves them as they are; only a backbone that
    is a module of one's own would embed them again: give it as `backbone=None`. Several tasks
    share the splits: `EmbeddingDataModule(other.splits, classes="even", shots=5)`.

    Args:
        splits: the whole splits; `ArrayDataset(x, y)` with x float32 `(N, d)` and y `(N,)`.
        name: the data set's, for `task`.
        classes, d, num_labels, task_seed, shots, val_fraction, batch_size, seed: as for
            `ImageDataModule`.
    """

    def __init__(
        self,
        splits: Splits,
        name: str = "embeddings",
        classes: list[int | str | list[int | str]] | str | None = None,
        d: int | None = None,
        num_labels: int | None = None,
        task_seed: int = 0,
        shots: int | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            classes=classes,
            d=d,
            num_labels=num_labels,
            task_seed=task_seed,
            shots=shots,
            val_fraction=val_fraction,
            batch_size=batch_size,
            download=False,
            seed=seed,
        )
        self.splits = splits
        self.name = name

    def load(self) -> Splits:
        return self.splits

    def arrays(self, split: str = "train"):
        """The embeddings `(N, d)`, float32, and labels `(N,)` of a split of the task."""
        dataset = self._dataset(split)
        return dataset.images, dataset.labels
