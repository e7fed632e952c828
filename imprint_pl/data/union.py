"""Several data sets as one, with one set of labels; CombiDigits is the paper's.

Classes of the same name are one class. Images keep their sizes and channels, so a batch is a list.
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprint_pl.data.arrays import MNIST
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.digit_sets import DIGITS, MNISTM, SVHN, USPS
from imprint_pl.data.splits import SplitDataset, Splits
from imprint_pl.errors import ImprintError
from imprint_pl.files import local_path
from imprint_pl.numerics.labels import composed, warn_of_alike


class Share(NamedTuple):
    """The samples that one part of a union holds.

    Args:
        part: The data set.
        places: Indices `(M,)` into the requested positions.
        own: The samples' positions `(M,)` in `part`.
    """

    part: SplitDataset
    places: Tensor
    own: Tensor


class UnionDataset(SplitDataset):
    """Data sets one after the other.

    A batch, `__getitems__(indices)`, is `(images, labels)`: a list of uint8 `(C, H, W)`, int64
    `(B,)`.

    Args:
        parts: The data sets, each with `__getitems__` and `select`; their labels are not used.
        labels: `(N,)` int64, where N counts the samples of all parts.
    """

    def __init__(self, parts: Sequence[SplitDataset], labels: Tensor) -> None:
        self.parts = list(parts)
        self.labels = labels
        self.from_files = any(getattr(part, "from_files", False) for part in parts)
        ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), ends])

    def __getitems__(self, indices: Sequence[int]) -> Any:
        positions = torch.as_tensor(indices)
        images: list = [None] * len(positions)
        for part, places, own in self.split(positions):
            batch = part.__getitems__(own.tolist())
            if isinstance(batch, ImprintError):  # a worker could not read a file
                return batch
            for place, image in zip(places.tolist(), batch[0], strict=True):
                images[place] = image
        return images, self.labels[positions]

    def split(self, positions: Tensor) -> list[Share]:
        """Return the parts that hold the samples at `positions` `(M,)`."""
        number = torch.bucketize(positions, self._starts[1:], right=True)
        found = []
        for index in number.unique().tolist():
            places = (number == index).nonzero().flatten()
            own = positions[places] - self._starts[index]
            found.append(Share(self.parts[index], places, own))
        return found

    def select(self, positions: Tensor, labels: Tensor) -> "UnionDataset":
        """Return the samples at `positions` `(M,)`, ascending, with new labels `(M,)`."""
        parts = [part.select(own, labels[places]) for part, places, own in self.split(positions)]
        return UnionDataset(parts, labels)

    def sized(self, max_side: int | None, least_side: int | None) -> "UnionDataset":
        """Return the union with its image files read as a model wants, as `ImageFileDataset`."""
        union = copy.copy(self)
        union.parts = [
            part.sized(max_side, least_side) if hasattr(part, "sized") else part
            for part in self.parts
        ]
        return union


class Union(ImageDataModule):
    """Several data sets as one: their classes in order of appearance, those of one name merged.

    The `original_labels` also tell the source of a sample: `original_class_names` has names such as
    `"svhn: 3"`. Validation splits of the sources are not used.

    Args:
        sources: The data sets, whole: options that select samples are given to the union.
        task: Keywords of `ImageDataModule` but `root` and `download`.
    """

    name = "union"

    def __init__(self, sources: list[ImageDataModule], **task: Any) -> None:
        super().__init__(root="data", download=False, **task)
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
        sides = {source.max_side for source in sources}
        # If the sources differ in `max_side`, there is no value that later images could share.
        self.max_side = sides.pop() if len(sides) == 1 else None

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
        """Return the name that a source's class has in the union."""
        return class_name


class CombiDigits(Union):
    """MNIST, MNIST-M, USPS and SVHN as one set of ten digits: the paper's multimodal classes.

    Args:
        root: Folder that holds the files of all four, in the layouts of MNIST, MNISTM, USPS and
            SVHN.
        download: Whether to fetch missing files.
        task: Keywords of `ImageDataModule`.
    """

    name = "combi_digits"

    def __init__(self, root: str = "data", download: bool = True, **task: Any) -> None:
        super().__init__(
            [source(root=root, download=download) for source in (MNIST, MNISTM, USPS, SVHN)], **task
        )
        self.root = local_path(root)
        self.download = download

    def rename(self, class_name: str) -> str:
        """Return the digit: MNIST calls its classes `"0 - zero"` and so on."""
        return class_name[0] if class_name[0] in DIGITS else class_name


def _unite(parts: list[tuple[SplitDataset, list[str]]], names: list[str]) -> UnionDataset:
    labels, original, first = [], [], 0
    for dataset, own_names in parts:
        numbers = torch.tensor([names.index(name) for name in own_names])
        labels.append(numbers[dataset.labels])
        original.append(dataset.labels + first)
        first += len(own_names)
    union = UnionDataset([dataset for dataset, _ in parts], torch.cat(labels))
    union.original_labels = torch.cat(original)
    return union
