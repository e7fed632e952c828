"""The one exception that users are meant to read: the commands print it without a traceback."""

import difflib
from collections.abc import Iterable


class ImprintError(ValueError):
    """A wrong value, setting or file; the message names the value, the place and the cure."""


def near(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?` with the known names that are near, or nothing.

    >>> near("robst", ["qi", "robust"])
    "; did you mean 'robust'?"
    """
    # Without regard to case: CAT shares no letter with cat.
    folded = {str(other).casefold(): other for other in known}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.5)
    found = [folded[other] for other in close]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""
