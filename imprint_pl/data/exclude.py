"""The files of a folder that a user leaves out: a list of names, or a file that holds one."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from imprint_pl.errors import ImprintError, did_you_mean, shown
from imprint_pl.files import local_path

# The column of a fix list that holds the names.
COLUMN = "file"


class Excluded:
    """The files to leave out of a folder.

    Args:
        names: Names of files, below `root` or whole paths; or the path of a CSV whose column `file`
            holds them; or None.
        root: The folder.

    Raises:
        ImprintError: If the CSV is missing or has no such column.
    """

    def __init__(self, names: str | Sequence[str] | None, root: str) -> None:
        self.root = root
        if names is None:
            names = []
        elif isinstance(names, str | os.PathLike):
            names = read_names(local_path(names))
        # Normalise paths (`..`, doubled slashes), so that two spellings of a path are one file.
        self._names = {os.path.normpath(os.path.join(root, name)): name for name in names}
        self._found: set[str] = set()
        self._seen: list[str] = []

    def without(self, paths: Iterable[str]) -> list[str]:
        """Return the paths that are not to be left out."""
        if not self._names:
            return list(paths)
        kept = []
        for path in paths:
            place = os.path.normpath(path)
            self._seen.append(place)
            if place in self._names:
                self._found.add(place)
            else:
                kept.append(path)
        return kept

    def check_all_found(self) -> None:
        """Raise an `ImprintError` if a name was none of the paths so far."""
        missing = [name for place, name in self._names.items() if place not in self._found]
        if missing:
            known = [os.path.relpath(path, self.root) for path in self._seen]
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ImprintError(
                f"exclude names {shown(missing[0])!r}{more}, which is no image below "
                f"{shown(self.root)}{did_you_mean(missing[0], known)}: give names as they are "
                "below the folder, or run audit again if files have moved"
            )


def read_names(path: str) -> list[str]:
    """Read the column `file` of a CSV.

    Args:
        path: The CSV; bytes that are not UTF-8 stay as they are.

    Raises:
        ImprintError: If the file cannot be read, or has no such column.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            if COLUMN not in (reader.fieldnames or ()):
                raise ImprintError(
                    f"exclude {shown(path)} has no column {COLUMN!r}: give a CSV that begins with "
                    "it, as `audit --fix_list` writes one, or a list of names"
                )
            return [row[COLUMN] for row in reader if row[COLUMN]]
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImprintError(
            f"exclude {shown(path)} cannot be read ({reason}): give a list of file names, or a "
            f"CSV with a column {COLUMN!r}"
        ) from error


def write_names(path: str | os.PathLike, rows: Iterable[tuple[str, str]]) -> Path:
    """Write a CSV for `read_names`; return its path.

    Args:
        path: The file.
        rows: A file's name, and why it is left out.

    Raises:
        ImprintError: If the file cannot be written.
    """
    path = Path(local_path(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows([(COLUMN, "reason"), *rows])
    except OSError as error:
        raise ImprintError(
            f"{shown(path)} cannot be written ({error.strerror}): give a place where you may write"
        ) from error
    return path
