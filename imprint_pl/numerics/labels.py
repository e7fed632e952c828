"""Labels and class names, compared by value and not by spelling.

pandas' 1 is NumPy's 1 but not the text "1", and "é" is one letter, whether it is written as one
character or as two.
"""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from imprint_pl.errors import ImprintError


def composed(name: str) -> str:
    """Return a name with each letter and its accent as one character (NFC).

    File systems and archives of macOS write them as two characters.
    """
    return unicodedata.normalize("NFC", name)


def place_of(name: str, names: Sequence[str]) -> int | None:
    """Return the index of a name among others, as people read them, or None.

    >>> place_of("cafe\\u0301", ["bar", "caf\\u00e9"])
    1
    """
    if name in names:
        return names.index(name)
    if not isinstance(name, str):
        return None
    spelt = composed(name)
    return next((place for place, other in enumerate(names) if composed(other) == spelt), None)


def checked_names(names: Any) -> list[str]:
    """Return class names as a list.

    Raises:
        ImprintError: If they are not a collection of texts.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ImprintError(f"class_names={names!r}: give a list of names")
    names = list(names)
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ImprintError(f"class_names has {wrong[0]!r}: names are texts")
    return names


def names_of(data: Any) -> list[str]:
    """Return the class names that a DataModule knows, as a list; empty where it knows none."""
    names = getattr(data, "class_names", None)
    if isinstance(names, Mapping):
        names = [names[label] for label in sorted(names)]
    return [] if names is None else checked_names(names)


def check_name(name: Any) -> None:
    """Raise an `ImprintError` if a value cannot be a class's name."""
    if not isinstance(name, str) or not name.strip():
        raise ImprintError(f"class name {name!r}: give a text, such as 'fox'")


def check_composition(names: Sequence[str]) -> None:
    """Raise an `ImprintError` if two names differ in their Unicode composition alone."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(composed(name), name)
        if other != name:
            raise ImprintError(
                f"{other!r} ({other!a}) and {name!r} ({name!a}) are one name, composed "
                "in two ways: give it in one spelling, as unicodedata.normalize('NFC', name) does"
            )


def warn_of_alike(names: Sequence[str], place: str) -> None:
    """Warn of classes whose names differ in case or spaces alone.

    Args:
        names: The class names.
        place: Where they come from; the message begins with it.
    """
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(" ".join(composed(name).casefold().split()), name)
        if other != name:
            warnings.warn(
                f"{place}: {other!r} and {name!r} differ in case or spaces alone, and are two "
                "classes; give them one name if they are one",
                stacklevel=3,
            )


def plain_labels(y: Any) -> Any:
    """Turn labels that are objects into NumPy's own types.

    Such labels come from lists and from pandas' `Int64` or `boolean`. All others are returned as
    they are.

    Raises:
        ImprintError: If a label is missing, or texts are mixed with numbers, which NumPy would turn
            into texts, too.
    """
    if isinstance(y, Tensor):
        return y
    try:
        values = np.asarray(y)
        if isinstance(y, list | tuple) and values.dtype.kind in "SU":
            values = np.asarray(y, dtype=object)
    except (TypeError, ValueError):
        return y  # ragged: a later check of the shape reports it
    if values.ndim == 0 or not values.size:
        return y
    if values.dtype.kind == "M" and np.isnat(values).any():
        values = values.astype(object)
    if values.dtype != object:
        return values if values.dtype.kind in "biuf" else y
    flat = values.ravel().tolist()
    for sample, label in enumerate(flat):
        if _is_missing(label):
            raise ImprintError(
                f"the label of sample {sample} is missing ({label!r}): leave such samples out, or "
                "give them a label of their own"
            )
    texts = [isinstance(label, str) for label in flat]
    if any(texts) and not all(texts):
        text, other = texts.index(True), texts.index(False)
        raise ImprintError(
            f"label {flat[text]!r} of sample {text} is a text, {flat[other]!r} of sample {other} "
            "is not: give labels of one type"
        )
    for kind, dtype in ((bool | np.bool_, bool), (Integral, np.int64), (Real, np.float64)):
        if all(isinstance(label, kind | bool | np.bool_) for label in flat):
            try:
                return values.astype(dtype)
            except OverflowError:
                return y
    return y


def find_label(label: Any, known: np.ndarray) -> tuple[Any, int | None]:
    """Find a label among others.

    Numbers are compared by value, so that 1, 1.0 and True are one label; a text is never a number.

    Args:
        label: A label of any type, also NumPy's.
        known: All labels so far, `(C,)`.

    Returns:
        The label in the type of `known`, and its index there, or None where it is new.

    Raises:
        ImprintError: If the label is missing, or of another type than the known ones.
    """
    value = label.item() if getattr(label, "ndim", None) == 0 else label
    if _is_missing(value):
        raise ImprintError(
            f"label {value!r} is missing: give one such as {known[:1].tolist()[0]!r}"
        )
    given, kind, is_number = value, known.dtype.kind, isinstance(value, Real)
    if kind in "OU":
        if isinstance(value, str):
            return str(value), place_of(str(value), known.tolist())
    elif kind == "M":
        try:
            value = np.datetime64(label).astype(known.dtype)
        except ValueError:
            value = None
    elif kind == "b":
        value = bool(value) if is_number and value in (0, 1) else None
    elif kind in "iu":
        value = int(value) if is_number and value % 1 == 0 else None
    elif not is_number:
        value = None
    if value is None or kind in "OU":
        raise ImprintError(
            f"label {given!r} is of another type than those known so far, {some(known)}: give one "
            "of their type"
        )
    places = (known == value).nonzero()[0]
    return value, int(places[0]) if len(places) else None


def with_label(known: np.ndarray, label: Any) -> np.ndarray:
    """Return `known (C,)` with one more label of its type, sorted."""
    try:
        dtype = known.dtype if known.dtype.kind in "biuf" else None
        return np.sort(np.append(known, np.array([label], dtype)))
    except OverflowError:  # such as 300 beside labels of one byte
        return np.sort(np.array([*known.tolist(), label]))


def some(labels: np.ndarray) -> str:
    """Return the first ten labels, for messages."""
    more = f" and {len(labels) - 10} more" if len(labels) > 10 else ""
    return f"{labels[:10].tolist()}{more}"


def _is_missing(label: Any) -> bool:
    if label is None or type(label).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(label, np.datetime64):
        return bool(np.isnat(label))
    return isinstance(label, float) and label != label
