"""Checks of data sets that have a row for each image: all bad rows are named at once."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

from imprint_pl.errors import ImprintError, shown
from imprint_pl.numerics.labels import composed

# How many rows of one fault a message names.
ROWS_SHOWN = 20
ONE_LABEL = "an image has one label here, and several of them (multi-label) are not supported"


class Row(NamedTuple):
    """A row that can be used.

    Attributes:
        place: What messages call it, such as "line 7".
        name: The file.
        label: The class.
        split: "train", "val" or "test".
    """

    place: str
    name: str
    label: str
    split: str


class Faults:
    """Collects rows that cannot be used, grouped by fault.

    Args:
        where: Names the data set in the message.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._rows: dict[str, list[str]] = {}

    def add(self, fault: str, row: str) -> None:
        """Note a row, such as "line 7 (a.jpg)", under a fault, such as "no such file"."""
        self._rows.setdefault(fault, []).append(row)

    def check_none(self) -> None:
        """Raise an `ImprintError` that names the rows, if there are any."""
        if not self._rows:
            return
        count = sum(map(len, self._rows.values()))
        parts = []
        for fault, rows in self._rows.items():
            more = len(rows) - ROWS_SHOWN
            named = ", ".join(rows[:ROWS_SHOWN]) + (f" and {more} more" if more > 0 else "")
            parts.append(f"{fault}: {named}")
        raise ImprintError(
            f"{self.where} has {count} row{'s' * (count > 1)} that cannot be used. "
            f"{'. '.join(parts)}. Correct or remove {'them' if count > 1 else 'it'}."
        )


def label_of(value: Any) -> str | None:
    """Return a label as the class's name; None where it is missing.

    Raises:
        ImprintError: If it is a list of labels, or a number with a fraction.

    >>> label_of(" cat "), label_of(3.0), label_of(float("nan"))
    ('cat', '3', None)
    """
    if value is None or value != value:
        return None
    if isinstance(value, list | tuple | set | dict):
        raise ImprintError(f"the label {value!r} is a collection: {ONE_LABEL}")
    if isinstance(value, Real) and not isinstance(value, Integral):
        number = float(value)
        if not number.is_integer():
            raise ImprintError(
                f"the label {value!r} is a number with a fraction: labels are classes, not amounts"
            )
        value = int(number)
    return composed(shown(str(value).strip())) or None


def check_single_labels(labels: Sequence[str], where: str) -> None:
    """Raise an `ImprintError` if cells hold several labels, such as "cat;dog" among "cat", "dog".

    Args:
        labels: The label of each row.
        where: Names the column in the message.
    """
    names = set(labels)
    for name in sorted(names):
        if name.startswith("[") and name.endswith("]"):
            raise ImprintError(f"{where} has {shown(name)!r}, a list of labels: {ONE_LABEL}")
        for sign in ";|,":
            parts = [part.strip() for part in name.split(sign)]
            if len(parts) > 1 and all(part in names for part in parts):
                raise ImprintError(
                    f"{where} has {shown(name)!r}, which lists other labels: {ONE_LABEL}"
                )
