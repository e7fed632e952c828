"""Several data sets as one, under one label set; CombiDigits is the paper's.

Classes of the same name are one class. Images keep their own sizes and channels, so a batch is a
list.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from imprint_pl.data.arrays import MNIST
from imprint_pl.data.base import ImageDataModule, Splits
from imprint_pl.data.digit_sets import DIGITS, MNISTM, SVHN, USPS
from imprint_pl.errors import ImprintError
from imprint_pl.files import local_path
from imprint_pl.numerics.labels import composed, warn_of_alike


class UnionDataset(Dataset):
    """Data sets one after the other.

    A batch, `__getitems__(indices)`, is `(images, labels)`: a list of uint8 `(C, H, W)`, int64
    `(B,)`.

    Args:
        parts: the data sets, each with `__getitems__` and `select`; their labels are not used.
        labels: `(N,)` int64, N the samples of all parts.
    """

    def __init__(self, parts: Sequence[Dataset], labels: Tensor) -> None:
        self.parts = list(parts)
        self.labels = labels
        self.from_files = any(getattr(part, "from_files", False) for part in parts)
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]):
        positions = torch.as_tensor(indices)
        images: list = [None] * len(positions)
        for part, places, own in self.split(positions):
            batch = part.__getitems__(own.tolist())
            if isinstance(batch, ImprintError):  # of a file, inside a worker
                return batch
            for place, image in zip(places.tolist(), batch[0], strict=True):
                images[place] = image
        return images, self.labels[positions]

    def split(self, positions: Tensor) -> list[tuple[Dataset, Tensor, Tensor]]:
        """Parts that hold samples of `positions` `(M,)`: the part, where in `positions` they stand,
        and their positions in the part."""
        number = torch.bucketize(positions, self._starts[1:], right=True)
        found = []
        for index in number.unique().tolist():
            places = (number == index).nonzero().flatten()
            found.append((self.parts[index], places, positions[places] - self._starts[index]))
        return found

    def select(self, positions: Tensor, labels: Tensor) -> "UnionDataset":
        """The samples at `positions` `(M,)`, ascending, under new labels `(M,)`."""
        parts = [part.select(own, labels[places]) for part, places, own in self.split(positions)]
        return UnionDataset(parts, labels)


class Union(ImageDataModule):
    """Several data sets as one: their classes in order of appearance, those of one name merged.

    Each sample's `original_labels` tell its source too: `original_class_names` are such as
    `"svhn: 3"`. Where the sources have validation splits of their own, these are not used.

    Args:
        sources: The data sets, whole: options that select samples are given to the union.
        classes: Classes to keep, as indices or names; they become labels 0..C-1 in this order. An
            inner list is merged into one label, as in [[0, 3], 1]. Or a subset by name: "all",
            "even", "odd", "short" (the first three). All of them where left out.
        d: Makes a d-in-1 task: each label merges d of the classes, drawn with `task_seed`.
        num_labels: Of the d-in-1 task; as many as the classes suffice for where left out.
        task_seed: Of the d-in-1 task.
        shots: Training images a label, drawn at random among all sources; all of them where left
            out. A label with fewer is an error.
        val_fraction: Part of each class's training images to hold out for validation.
        batch_size: Images a batch (and a process).
        num_workers: Processes that decode image files; where left out, one for each processor core
            that this process has (16 at most), and none for sets in memory, which need none.
        seed: Of the shots and of the held-out part.
    """

    name = "union"

    def __init__(
        self,
        sources: list[ImageDataModule],
        classes: list[int | str | list[int | str]] | str | None = None,
        d: int | None = None,
        num_labels: int | None = None,
        task_seed: int = 0,
        shots: int | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 256,
        num_workers: int | None = None,
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
            num_workers=num_workers,
            seed=seed,
        )
        if not sources:
            raise ImprintError("sources is empty: name the data sets to unite")
        for source in sources:
            for option in ("classes", "d", "shots", "val_fraction"):
                if getattr(source, option):
                    raise ImprintError(
                        f"{option}={getattr(source, option)!r} of the source {source.name!r}: give "
                        f"{option} to the union, its sources are taken whole"
                    )
        self.sources = list(sources)
        if type(self) is Union:
            self.name = "+".join(source.name for source in sources)

    def prepare_data(self) -> None:
        for source in self.sources:
            source.prepare_data()

    def load(self) -> Splits:
        loaded = [source.load() for source in self.sources]
        for source in self.sources:
            self.unreadable |= source.unreadable
        for splits in loaded:
            splits.class_names = [composed(self.rename(name)) for name in splits.class_names]
        names = list(dict.fromkeys(name for splits in loaded for name in splits.class_names))
        warn_of_alike(names, self.name)
        return Splits(
            names,
            _unite([(splits.train, splits.class_names) for splits in loaded], names),
            _unite([(splits.test, splits.class_names) for splits in loaded], names),
            original_class_names=[
                f"{source.name}: {name}"
                for source, splits in zip(self.sources, loaded, strict=True)
                for name in splits.class_names
            ],
        )

    def rename(self, class_name: str) -> str:
        """The name of a source's class in the union."""
        return class_name


class CombiDigits(Union):
    """MNIST, MNIST-M, USPS and SVHN as one set of ten digits: the paper's multimodal classes.

    Args:
        root: The folder that holds the files of all four, as MNIST, MNISTM, USPS and SVHN say.
        classes: Digits to keep; they become labels 0..C-1 in this order. An inner list is merged
            into one label, as in [[0, 3], 1]. Or "all", "even", "odd", "short" (0, 1, 2). All of
            them where left out.
        d: Makes a d-in-1 task: each label merges d of the digits, drawn with `task_seed`.
        num_labels: Of the d-in-1 task; as many as the digits suffice for where left out.
        task_seed: Of the d-in-1 task.
        shots: Training images a label, drawn at random among all four; all of them where left out.
        val_fraction: Part of each digit's training images to hold out for validation.
        batch_size: Images a batch (and a process).
        num_workers: Processes that decode MNIST-M where it comes as image files.
        download: Whether to fetch files that are missing.
        seed: Of the shots and of the held-out part.
    """

    name = "combi_digits"

    def __init__(
        self,
        root: str = "data",
        classes: list[int | str | list[int | str]] | str | None = None,
        d: int | None = None,
        num_labels: int | None = None,
        task_seed: int = 0,
        shots: int | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 256,
        num_workers: int | None = None,
        download: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            [source(root=root, download=download) for source in (MNIST, MNISTM, USPS, SVHN)],
            classes=classes,
            d=d,
            num_labels=num_labels,
            task_seed=task_seed,
            shots=shots,
            val_fraction=val_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = local_path(root)

    def rename(self, class_name: str) -> str:
        """The digit: MNIST's classes are called `"0 - zero"`."""
        return class_name[0] if class_name[0] in DIGITS else class_name


def _unite(parts: list[tuple[Dataset, list[str]]], names: list[str]) -> UnionDataset:
    labels, original, first = [], [], 0
    for dataset, own_names in parts:
        numbers = torch.tensor([names.index(name) for name in own_names])
        labels.append(numbers[dataset.labels])
        original.append(dataset.labels + first)
        first += len(own_names)
    union = UnionDataset([dataset for dataset, _ in parts], torch.cat(labels))
    union.original_labels = torch.cat(original)
    return union
