"""Image files that a table lists, one in a row, wherever they lie: CSV or Parquet."""

from __future__ import annotations

import csv
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from tqdm import tqdm

from imprint_pl.data import tasks
from imprint_pl.data.exclude import Excluded
from imprint_pl.data.folders import SPLIT_NAMES, ImageFolder
from imprint_pl.data.image_files import SKIP_ADVICE, ImageFileDataset
from imprint_pl.data.rows import ONE_LABEL, Faults, Row, check_single_labels, label_of
from imprint_pl.data.splits import Splits
from imprint_pl.errors import ImprintError, did_you_mean, needs, shown
from imprint_pl.files import local_path
from imprint_pl.numerics.labels import composed, warn_of_alike

# Characters that may separate the cells of a line.
DELIMITERS = ",;\t|"
PARQUET = (".parquet", ".pq")
SPLIT_OF = {name: split for split, names in SPLIT_NAMES.items() for name in names}


class CSV(ImageFolder):
    """Images that a table lists: a row for each file, with its label and perhaps its split.

    The table is a CSV with a header (cells separated by a comma, semicolon, tab or bar) or a
    Parquet file. Without a column of splits, `test_fraction` of each class is held out as
    validation and test, the same images whatever the order of the rows. The labels of the training
    images, sorted as text, are the classes. All rows that cannot be used are named at once: files
    that do not exist, empty labels, files that are listed twice, unknown splits.

    Args:
        table: The table.
        root: The folder that file names are relative to. Default: the table's folder.
        file_column: The column of the files.
        label_column: The column of the labels; an image has one label.
        split_column: The column of the splits: train, val (valid, validation) or test. Default:
            "split", if there is such a column.
        options: Further keywords of `ImageFolder`.
    """

    def __init__(
        self,
        table: str,
        root: str | None = None,
        file_column: str = "file",
        label_column: str = "label",
        split_column: str | None = None,
        **options: Any,
    ) -> None:
        self.table = local_path(table)
        super().__init__(root=root or os.path.dirname(self.table) or ".", **options)
        self.name = shown(Path(self.table).stem)
        self.file_column = file_column
        self.label_column = label_column
        self.split_column = split_column

    def load(self) -> Splits:
        table = shown(self.table)
        self._excluded = Excluded(self.exclude, self.root)
        rows = self._checked(_cells(self.table, self._columns))
        paths = {row: os.path.join(self.root, row.name) for row in rows}
        kept = set(self._excluded.without(paths.values()))
        self._excluded.check_all_found()
        # Random draws depend on the order. Sort the files so that the draws are the same as for
        # these images in folders.
        rows = sorted((r for r in rows if paths[r] in kept), key=lambda row: _as_found(row.name))
        of_split = {split: [row for row in rows if row.split == split] for split in SPLIT_NAMES}
        if not of_split["train"]:
            raise ImprintError(f"{table} has no row of the split train: add training images")
        class_names = sorted({row.label for row in of_split["train"]})
        warn_of_alike(class_names, table)
        if len(class_names) == 1:
            rank_zero_info(
                f"{table} has a single class, {class_names[0]!r}: every image will be called that, "
                "and its accuracy says nothing"
            )
        _check_known(rows, class_names, table)
        splits = {split: self._images(own, class_names) for split, own in of_split.items() if own}
        if len(splits) == 1:
            return self._hold_out(class_names, splits["train"], table)
        test = splits["test"] if "test" in splits else splits["val"]
        return Splits(class_names, splits["train"], test, splits.get("val"))

    def _columns(self, names: list[str]) -> Columns:
        """Find the columns among the names of all columns."""
        for option in ("file_column", "label_column", "split_column"):
            wanted = getattr(self, option)
            if wanted is not None and wanted not in names:
                raise ImprintError(
                    f"{shown(self.table)} has no column {shown(wanted)!r}"
                    f"{did_you_mean(wanted, names)} (its columns: "
                    f"{', '.join(map(shown, names))}): give {option}"
                )
        split = self.split_column or ("split" if "split" in names else None)
        return Columns(self.file_column, self.label_column, split)

    def _checked(self, cells: Iterator[Cells]) -> list[Row]:
        """Return the rows, or name all those that cannot be used."""
        table, faults, rows = shown(self.table), Faults(shown(self.table)), []
        first: dict[str, Cells] = {}
        lost: dict[str, str] = {}
        labels: dict[str, str | None] = {}
        for row in tqdm(cells, desc="looking for files", delay=2, leave=False, disable=None):
            name = "" if row.file is None else os.fspath(row.file)
            place = f"{row.place} ({shown(name)})" if name else row.place
            try:
                label = label_of(row.label)
            except ImprintError as error:
                raise ImprintError(f"{table}, {row.place}: {error}") from None
            split = None if row.split is ... else SPLIT_OF.get(str(row.split or "").strip().lower())
            usable = True
            if row.split is not ... and split is None:
                given = "empty" if row.split in (None, "") else repr(shown(str(row.split)))
                faults.add("Unknown split (give train, val or test)", f"{row.place} ({given})")
                usable = False
            if label is None:
                faults.add("No label", place)
                usable = False
            if not name:
                faults.add("No file", row.place)
                continue
            path = os.path.normpath(os.path.join(self.root, name))
            earlier = first.setdefault(path, row)
            if earlier is not row:
                if None not in (label, labels[path]) and label != labels[path]:
                    both = f"{labels[path]!r} in {earlier.place}, {label!r} in {row.place}"
                    faults.add(f"Several labels ({ONE_LABEL})", f"{shown(name)} ({both})")
                else:
                    faults.add("The same file twice", f"{place}, as in {earlier.place}")
                continue
            labels[path] = label
            if not os.path.isfile(path):
                if self.on_error == "skip":
                    lost[path] = f"there is no file {shown(path)}"
                    continue
                faults.add("No such file", place)
                usable = False
            if usable and label is not None:
                rows.append(Row(row.place, name, label, split or "train"))
        faults.check_none()
        check_single_labels([row.label for row in rows], f"{table}, {shown(self.label_column)}")
        new = [shown(path) for path in lost if path not in self.unreadable]
        self.unreadable |= lost
        if new:
            more = f" and {len(new) - 10} more" if len(new) > 10 else ""
            rank_zero_warn(
                f"{len(new)} files of {table} do not exist and are left out: "
                f"{', '.join(new[:10])}{more}"
            )
        if not rows:
            raise ImprintError(f"{table} lists no image that can be read: add rows")
        return rows

    def _images(self, rows: list[Row], class_names: list[str]) -> ImageFileDataset:
        paths = [os.path.join(self.root, row.name) for row in rows]
        place = {name: number for number, name in enumerate(class_names)}
        labels = torch.tensor([place[row.label] for row in rows])
        images = ImageFileDataset(paths, labels, self.max_side, advice=SKIP_ADVICE)
        readable = self._readable(images, paths, f"images of {shown(self.table)}")
        lost = sorted(set(labels.tolist()) - set(readable.labels.tolist()))
        if lost and rows[0].split == "train":
            raise ImprintError(
                f"no image of the class {class_names[lost[0]]!r} in {shown(self.table)} can be "
                "read: replace the images, or remove the rows"
            )
        return readable


class Columns(NamedTuple):
    """The names of the columns; `split` is None where there is none."""

    file: str
    label: str
    split: str | None


class Cells(NamedTuple):
    """The cells of a row as they were read; `split` is `...` without such a column."""

    place: str
    file: Any
    label: Any
    split: Any


def _cells(path: str, columns: Any) -> Iterator[Cells]:
    """Yield the rows of a table.

    Args:
        path: The table.
        columns: A function from the names of all columns to `Columns`.
    """
    parquet = path.lower().endswith(PARQUET)
    try:
        yield from _parquet_cells(path, columns) if parquet else _csv_cells(path, columns)
    except (OSError, csv.Error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise ImprintError(
            f"{shown(path)} cannot be read ({reason}): give a CSV with a header, or a Parquet "
            "file, as table"
        ) from error


def _csv_cells(path: str, columns: Any) -> Iterator[Cells]:
    # Bytes of a file name that are not UTF-8 stay as they are.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        header = file.readline()
        # Take the delimiter that is most frequent in the header.
        delimiter = max(DELIMITERS, key=header.count)
        file.seek(0)
        reader = csv.reader(file, delimiter=delimiter)
        names = [name.strip() for name in next(reader, [])]
        found = columns(names)
        places = [None if name is None else names.index(name) for name in found]
        for line in reader:
            if not any(cell.strip() for cell in line):
                continue
            file_name, label, split = (
                ... if place is None else line[place] if place < len(line) else ""
                for place in places
            )
            yield Cells(f"line {reader.line_num}", file_name, label or None, split)


def _parquet_cells(path: str, columns: Any) -> Iterator[Cells]:
    with needs("datasets", "a Parquet file"):
        import pyarrow
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            found = columns(file.schema_arrow.names)
            wanted = [name for name in found if name is not None]
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    split = ... if found.split is None else row[found.split]
                    yield Cells(f"row {number}", row[found.file], row[found.label], split)
    except pyarrow.ArrowException as error:
        raise OSError(0, " ".join(str(error).split())) from error


def _as_found(name: str) -> tuple[tuple[int, str], ...]:
    """Return a sort key that puts files into the order in which a search would find them."""
    *folders, file = Path(name).parts
    return (*((1, composed(folder)) for folder in folders), (0, composed(file)))


def _check_known(rows: list[Row], class_names: list[str], table: str) -> None:
    """Raise an `ImprintError` if other splits have labels that the training split does not have."""
    known = set(class_names)
    lost: Counter[str] = Counter(row.label for row in rows if row.label not in known)
    if lost:
        first = next(iter(lost))
        place = next(row.place for row in rows if row.label == first)
        named = ", ".join(f"{label!r} ({count})" for label, count in lost.most_common(20))
        raise ImprintError(
            f"{table} has labels without training images: {named}, first in {place} "
            f"({tasks.near_names(first, class_names)}): correct them, or add training images"
        )
    for split in ("val", "test"):
        there = {row.label for row in rows if row.split == split}
        if there and len(there) < len(class_names):
            absent = [name for name in class_names if name not in there]
            rank_zero_warn(f"{table} has no {split} image of {', '.join(absent)}: not evaluated")
