"""Data sets of the `datasets` library: a saved folder, a name of the hub, or an object."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from tqdm import tqdm

from imprint_pl.data.decode import decode_image, read_image
from imprint_pl.data.folders import SPLIT_NAMES, ImageFolder
from imprint_pl.data.image_files import SKIP_ADVICE, DecodedDataset
from imprint_pl.data.rows import ONE_LABEL, Faults, check_single_labels, label_of
from imprint_pl.data.splits import Splits
from imprint_pl.errors import ImprintError, did_you_mean, needs, shown
from imprint_pl.files import local_path
from imprint_pl.numerics.labels import warn_of_alike

# Rows that are read at a time.
ROWS = 1000


class HuggingFace(ImageFolder):
    """A data set of the `datasets` library, with a column of images and one of labels.

    Splits called train, val (valid, validation) and test are taken, as for `ImageFolder`; a data
    set without splits, or with train alone, has `test_fraction` of each class held out as
    validation and test. The classes are those of the label column: the names of a `ClassLabel`,
    else the labels of the training images, sorted. Images are decoded by this package, as if they
    were files. All rows that cannot be used are named at once.

    Args:
        root: A folder that `save_to_disk` wrote, or one of a hub's layout (Parquet files); a name
            of the Hugging Face hub, where there is a network; in Python a `datasets.Dataset`, or a
            `DatasetDict` of splits.
        config: The configuration of a data set of the hub that has several.
        image_column: The column of the images. Default: the only one of type `Image`.
        label_column: The column of the labels. Default: the only `ClassLabel`, else "label".
        options: Further keywords of `ImageFolder` but `exclude`.
    """

    def __init__(
        self,
        root: Any,
        config: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        **options: Any,
    ) -> None:
        given = isinstance(root, str | os.PathLike)
        super().__init__(root=os.fspath(root) if given else "data", exclude=None, **options)
        if not given:
            self.name = "dataset"
        self._source = self.root if given else root
        self.config = config
        self.image_column = image_column
        self.label_column = label_column
        self._splits: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        self._opened()

    def load(self) -> Splits:
        of_split = self._opened()
        image, label = self._columns(of_split["train"])
        names = getattr(of_split["train"].features[label], "names", None)
        labels = {split: self._labels(rows, label) for split, rows in of_split.items()}
        faults = Faults(shown(self.name))
        images = {
            split: EncodedImages(rows, image, split, self.max_side, SKIP_ADVICE)
            for split, rows in of_split.items()
        }
        first: dict[str, str] = {}
        for split, found in images.items():
            for row, given in enumerate(labels[split]):
                if given is None:
                    faults.add("No label", f"{split} {row}")
            found.check(faults, first)
        faults.check_none()
        if names is None:
            check_single_labels(
                [str(given) for given in chain.from_iterable(labels.values())],
                f"{self.name}, {label}",
            )
            names = _sorted({str(given) for given in labels["train"]})
        names = [str(name) for name in names]
        warn_of_alike(names, self.name)
        place = {name: number for number, name in enumerate(names)}
        lost = {str(g) for own in labels.values() for g in own} - set(place)
        if lost:
            raise ImprintError(
                f"{self.name} has labels without training images: {', '.join(sorted(lost)[:20])}: "
                "correct them, or add training images"
            )
        splits = {}
        for split, found in images.items():
            found.labels = torch.tensor([place[str(given)] for given in labels[split]])
            every = [found.called(row) for row in range(len(found))]
            splits[split] = self._readable(found, every, f"images of {shown(self.name)}")
        if len(splits) == 1:
            return self._hold_out(names, splits["train"], shown(self.name))
        test = splits["test"] if "test" in splits else splits["val"]
        return Splits(names, splits["train"], test, splits.get("val"))

    def _opened(self) -> dict[str, Any]:
        """Return the `datasets.Dataset` of each split, by "train", "val" and "test"."""
        if self._splits is None:
            source = self._source
            if isinstance(source, str):
                source = _read(source, self.config)
            self._splits = _of_splits(source, shown(self.name))
        return self._splits

    def _columns(self, rows: Any) -> tuple[str, str]:
        """Return the columns of the images and of the labels."""
        kinds = {name: type(kind).__name__ for name, kind in rows.features.items()}
        for option in ("image_column", "label_column"):
            wanted = getattr(self, option)
            if wanted is not None and wanted not in kinds:
                raise ImprintError(
                    f"{self.name} has no column {wanted!r}{did_you_mean(wanted, kinds)} (its "
                    f"columns: {', '.join(kinds)}): give {option}"
                )
        image, label = self.image_column, self.label_column
        if image is None:
            found = [name for name, kind in kinds.items() if kind == "Image"]
            if len(found) != 1:
                raise ImprintError(
                    f"{self.name} has {len(found)} columns of images (its columns: "
                    f"{', '.join(f'{n}, {k}' for n, k in kinds.items())}): give image_column"
                )
            image = found[0]
        if label is None:
            found = [name for name, kind in kinds.items() if kind == "ClassLabel"]
            found = found if len(found) == 1 else [n for n in ("label", "labels") if n in kinds]
            if not found:
                raise ImprintError(
                    f"{self.name} has no column 'label' (its columns: {', '.join(kinds)}): give "
                    "label_column"
                )
            label = found[0]
        if kinds[label] in ("Sequence", "List", "LargeList", "list"):
            raise ImprintError(f"{self.name}, {label}: each row has a list of labels: {ONE_LABEL}")
        return image, label

    def _labels(self, rows: Any, column: str) -> list[str | None]:
        """Return the label of each row as a class's name, None where it is missing."""
        names = getattr(rows.features.get(column), "names", None)
        found: list[str | None] = []
        for given in chain.from_iterable(_batches(rows, column)):
            # On the hub, -1 stands for labels that are not published.
            if names is not None:
                known = given is not None and 0 <= given < len(names)
                found.append(names[given] if known else None)
                continue
            try:
                found.append(label_of(given))
            except ImprintError as error:
                raise ImprintError(f"{self.name}, {column}, row {len(found)}: {error}") from None
        return found


class EncodedImages(DecodedDataset):
    """Images of a column of a `datasets.Dataset`, as bytes or as names of files.

    Args:
        rows: The `datasets.Dataset`.
        column: The column of the images.
        split: The split's name, for messages.
        max_side: As for `DecodedDataset`.
        advice: As for `DecodedDataset`.
    """

    def __init__(
        self, rows: Any, column: str, split: str, max_side: int | None, advice: str
    ) -> None:
        super().__init__(None, max_side, advice=advice)
        self.has_labels = True
        with needs("datasets", "--data HuggingFace"):
            import datasets
        try:
            rows = rows.select_columns([column]).with_format(None)
            # Read bytes or paths, so that `datasets` does not decode the images.
            rows = rows.cast_column(column, datasets.Image(decode=False))
        # pyarrow and datasets raise errors of many kinds.
        except Exception as error:
            raise ImprintError(
                f"the column {column!r} of {split} is no column of images "
                f"({' '.join(str(error).split())}): give image_column, or cast the column to "
                "datasets.Image()"
            ) from error
        self.rows, self.column, self.split = rows, column, split
        self.positions = np.arange(len(rows))

    def __len__(self) -> int:
        return len(self.positions)

    def called(self, index: int) -> str:
        """Name an image in messages, such as "train 12", its split and its row."""
        return f"{self.split} {self.positions[index]}"

    def read(self, index: int) -> Tensor:
        encoded = self.rows[int(self.positions[index])][self.column]
        content, path = encoded["bytes"], encoded["path"]
        if content is None:
            return read_image(path, self.max_side, self.least_side)
        name = f"{self.called(index)} ({path})" if path else self.called(index)
        return decode_image(content, name, self.max_side, self.least_side)

    def select(self, positions: Tensor, labels: Tensor) -> EncodedImages:
        selected = self._labelled(labels)
        selected.positions = self.positions[positions.numpy()]
        return selected

    def check(self, faults: Faults, first: dict[str, str]) -> None:
        """Note rows without an image, files that do not exist, and files that are listed twice.

        Args:
            faults: Gets the rows.
            first: The first row of each file so far, also of other splits; gets those of this one.
        """
        for row, encoded in enumerate(chain.from_iterable(_batches(self.rows, self.column))):
            path = encoded and encoded["path"]
            if not encoded or (encoded["bytes"] is None and not path):
                faults.add("No image", f"{self.split} {row}")
            elif encoded["bytes"] is None:
                own = f"{self.split} {row}"
                earlier = first.setdefault(os.path.normpath(path), own)
                if earlier != own:
                    faults.add("The same file twice", f"{own} ({shown(path)}), as in {earlier}")
                elif not os.path.isfile(path):
                    faults.add("No such file", f"{self.split} {row} ({shown(path)})")

    def fingerprint(self) -> str:
        """Return a hash of the images' bytes, or of the files' sizes and times, and `max_side`."""
        digest = hashlib.sha256(f"encoded {self.how_read()}".encode())
        rows = self.rows
        if len(self.positions) < len(rows):
            rows = rows.select(self.positions)
        for encoded in chain.from_iterable(_batches(rows, self.column)):
            if encoded["bytes"] is None:
                status = os.stat(encoded["path"])
                digest.update(f"{status.st_size}\0{status.st_mtime_ns}\n".encode())
            else:
                # Hash each image first, so that moving bytes between two images changes the result.
                digest.update(hashlib.sha256(encoded["bytes"]).digest())
        return digest.hexdigest()


def _batches(rows: Any, column: str) -> Iterator[list[Any]]:
    """Yield the values of a column, some rows at a time."""
    plain = rows.select_columns([column]).with_format("arrow")
    with tqdm(
        total=len(plain), desc=f"reading {column}", delay=2, leave=False, disable=None
    ) as progress:
        for batch in plain.iter(batch_size=ROWS):
            yield batch[column].to_pylist()
            progress.update(len(batch))


def _sorted(names: set[str]) -> list[str]:
    """Sort names; numbers by value."""
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def _read(place: str, config: str | None) -> Any:
    """Read a saved folder, or fetch a data set of the hub."""
    with needs("datasets", "--data HuggingFace"):
        import datasets
    folder = Path(local_path(place))
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder) if folder.is_dir() else place, config)
    # A missing network, an unknown name, damaged files: the library raises errors of many kinds.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImprintError(
            f"cannot read the data set {shown(place)} ({reason}): give a folder of save_to_disk, "
            "or a name of the Hugging Face hub where there is a network"
        ) from error


def _of_splits(source: Any, name: str) -> dict[str, Any]:
    """Return the splits by "train", "val" and "test"."""
    given = dict(source) if isinstance(source, Mapping) else {"train": source}
    for split, rows in given.items():
        if type(rows).__name__ == "IterableDataset":
            raise ImprintError(
                f"{name}: {split} is a stream, which has no length: load it without streaming"
            )
        if not (hasattr(rows, "features") and hasattr(rows, "select_columns")):
            raise ImprintError(
                f"{name}: {split} is {type(rows).__name__}: give a datasets.Dataset, or a "
                "DatasetDict of them"
            )
    known: dict[str, Any] = {}
    for split, spellings in SPLIT_NAMES.items():
        found = [key for key in given if str(key).lower() in spellings]
        if len(found) > 1:
            raise ImprintError(f"{name} has the splits {' and '.join(found)}: keep one of them")
        if found:
            known[split] = given.pop(found[0])
    if not known and len(given) == 1:
        # A single split holds all images, whatever it is called.
        return {"train": given.popitem()[1]}
    if "train" not in known:
        raise ImprintError(
            f"{name} has no split train, but {', '.join(map(str, [*known, *given]))}: give a "
            "DatasetDict with a split train"
        )
    if given:
        rank_zero_warn(f"{name}: the splits {', '.join(map(str, given))} are not read")
    return known
