"""The one exception that users are meant to read: the commands print it without a traceback."""

import difflib
import sys
import warnings
from collections.abc import Iterable


class ImprintError(ValueError):
    """A wrong value, setting or file; the message names the value, the place and the cure."""


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the known names that are near, or nothing.

    >>> near("robst", ["qi", "robust"])
    "; did you mean 'robust'?"
    """
    found = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def warn(text: str) -> None:
    """Warns, and names as its place the line that called this package, however deep it arose."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "imprint_pl":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
