"""The results of a sweep on disk: a row for each configuration, which survives a killed process.

New rows are appended to a journal, one line each. From time to time they go into `results.parquet`
and `results.csv`, which are replaced as a whole. An incomplete line of a killed process is ignored.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pandas as pd
from pandas.api.types import infer_dtype

from imprint_pl.errors import ImprintError
from imprint_pl.files import damaged, local_path, write_whole
from imprint_pl.method.recipes import KEYWORDS, UNNAMED

TEXT, WHOLE, NUMBER, TRUTH = "string", "Int64", "Float64", "boolean"


def _dtype(kind: Any) -> str:
    """Return the type of a keyword's column: text if a value may be text, such as λ = "gcv"."""
    kinds = [part for part in get_args(kind) if part is not type(None)]
    return {int: WHOLE, float: NUMBER, bool: TRUTH}.get(kinds[0], TEXT) if len(kinds) == 1 else TEXT


# Usual values that a backbone's entry leaves out, so that rows and ids are the same as before these
# settings existed. If a row has others, the columns `layers` and `views` are added at the end.
USUAL = {"layers": "last", "views": "none"}
# Columns and their types. A cell is empty if a keyword is not used. Keywords of users' own parts
# have further columns at the end, of the type of their values.
COLUMNS: dict[str, str] = {
    "backbone": TEXT,
    "data": TEXT,
    "task": TEXT,
    "d": WHOLE,
    "num_labels": WHOLE,
    "task_seed": WHOLE,
    "shots": WHOLE,
    "recipe": TEXT,
    # The widths of layers belong to the backbone, so they are not a keyword of the method. `metric`
    # and `class_weight` are added at the end if a row has them.
    **{
        name: _dtype(kind)
        for name, kind in KEYWORDS.items()
        if name not in ("layer_widths", *UNNAMED)
    },
    "seed": WHOLE,
    "num_classes": WHOLE,
    "num_train": WHOLE,
    "num_test": WHOLE,
    "accuracy": NUMBER,
    "balanced_accuracy": NUMBER,
    "macro_f1": NUMBER,
    "nc1": NUMBER,
    "vci": NUMBER,
    "gen_seconds": NUMBER,
    "inference_seconds": NUMBER,
    "id": TEXT,
}
# Columns that files of earlier versions may lack.
LATER = ("balanced_accuracy",)
TIMES = ("gen_seconds", "inference_seconds")


class Results:
    """The rows in a folder; one process writes at a time.

    Args:
        folder: the folder; made if it does not exist.

    Attributes:
        ids: the ids of the rows in the folder.

    Raises:
        ImprintError: a file that is not a results file, a folder that cannot be written to.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(local_path(folder))
        self.journal = self.folder / "journal.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._rows = {row["id"]: row for row in self._saved() + self._journalled()}
        except OSError as error:
            raise _not_writable(self.folder, error) from error
        if self.journal.exists():
            self.save()

    @property
    def ids(self) -> set[str]:
        return set(self._rows)

    def has(self, **values: str | None) -> bool:
        """Whether a row has these values; `None` stands for an empty cell or no such column."""
        return any(all(row.get(n) == v for n, v in values.items()) for row in self._rows.values())

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows to the journal; after this they survive if the process is killed."""
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            with open(self.journal, "ab") as file:
                file.write(text.encode())
        except OSError as error:
            raise _not_writable(self.folder, error) from error
        self._rows |= {row["id"]: row for row in rows}

    def keep_labels(self, id: str, predicted: np.ndarray, true: np.ndarray) -> None:
        """Writes the labels `(N_test,)` of a row; call it before the row is appended."""
        content = io.BytesIO()
        np.savez(content, predicted=predicted.astype(np.int32), true=true.astype(np.int32))
        try:
            self._labels_at(id).parent.mkdir(exist_ok=True)
        except OSError as error:
            raise _not_writable(self.folder, error) from error
        write_whole(self._labels_at(id), content.getvalue())

    def labels(self, id: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the predicted and the true labels of a row, `(N_test,)` int32 each."""
        path = self._labels_at(id)
        with damaged(path, "the labels of a row"), np.load(path, allow_pickle=False) as file:
            return file["predicted"], file["true"]

    def _labels_at(self, id: str) -> Path:
        return self.folder / "labels" / f"{id}.npz"

    def table(self, order: list[str] | None = None) -> pd.DataFrame:
        """Returns all rows, with `COLUMNS` and the keywords of users' own parts.

        Args:
            order: ids of the rows that come first, in this order.
        """
        known = [i for i in order or [] if i in self._rows]
        ids = [*known, *sorted(self.ids - set(known))]
        more = {n for row in self._rows.values() for n, v in row.items() if v is not None}
        columns = [*COLUMNS, *sorted(more - set(COLUMNS))]
        # Use objects, so that whole numbers and booleans beside empty cells keep their type.
        frame = pd.DataFrame([self._rows[i] for i in ids], columns=columns, dtype=object)
        return frame.astype({name: COLUMNS.get(name) or _type_of(frame[name]) for name in columns})

    def save(self, order: list[str] | None = None) -> None:
        """Writes `results.parquet` and `results.csv`, and empties the journal."""
        table = self.table(order)
        try:
            self._replace("results.csv", lambda path: table.to_csv(path, index=False))
            self._replace("results.parquet", lambda path: table.to_parquet(path, index=False))
            # Remove the journal last. Until then its rows are in both places, with the same ids.
            self.journal.unlink(missing_ok=True)
        except OSError as error:
            raise _not_writable(self.folder, error) from error

    def _replace(self, name: str, write: Callable[[Path], None]) -> None:
        temporary = self.folder / f"unfinished-{name}"
        write(temporary)
        os.replace(temporary, self.folder / name)

    def _saved(self) -> list[dict[str, Any]]:
        path = self.folder / "results.parquet"
        if not path.exists():
            return []
        try:
            table = pd.read_parquet(path)
            records = table.astype(object).where(table.notna(), None).to_dict("records")
            rows = cast("list[dict[str, Any]]", records)
            # A missing column raises a KeyError; columns of further keywords are kept.
            older = dict.fromkeys(LATER)
            return [older | row | {n: row[n] for n in COLUMNS if n not in LATER} for row in rows]
        # Damaged metadata of pandas may name unknown types, which raises a TypeError.
        except (ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ImprintError(
                f"{path} was not written by a sweep of this version ({reason}): move it away, or "
                "give another --results_dir"
            ) from error

    def _journalled(self) -> list[dict[str, Any]]:
        if not self.journal.exists():
            return []
        *lines, cut = self.journal.read_bytes().split(b"\n")
        if cut:
            os.truncate(self.journal, self.journal.stat().st_size - len(cut))
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append(dict.fromkeys(COLUMNS) | row | {"id": str(row["id"])})
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ImprintError(
                    f"{self.journal}: line {number} is damaged ({type(error).__name__}): remove "
                    "it, and the sweep makes its row again"
                ) from error
        return rows


def _type_of(column: pd.Series) -> str:
    """Return the type of a column that is not in `COLUMNS`, by its values."""
    kind = infer_dtype(column, skipna=True)
    numbers = {"integer": WHOLE, "floating": NUMBER, "mixed-integer-float": NUMBER}
    return ({"boolean": TRUTH} | numbers).get(kind, TEXT)


def _not_writable(folder: Path, error: Exception) -> ImprintError:
    return ImprintError(
        f"cannot write results into {folder} ({error}): give a --results_dir where you may write"
    )
