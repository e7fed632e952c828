"""Errors and warnings for users; commands print an `ImprintError` without a traceback."""

import difflib
import os
import sys
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ImprintError(ValueError):
    """A wrong value, setting or file; the message names the value, the place and the cure."""


def install(extra: str) -> str:
    """Return the command that installs an extra of this package."""
    return f"pip install 'imprint-pl[{extra}]'"


@contextmanager
def needs(extra: str, what: str, otherwise: str = "") -> Iterator[None]:
    """Wrap imports of packages that only an extra installs; a missing one gives a one-line error.

    Args:
        extra: its name in pyproject.toml.
        what: what the packages are needed for.
        otherwise: what to do instead of installing them.

    Raises:
        ImprintError: a package cannot be imported; the message has the command that installs it.

    >>> with needs("sweep", "report"):
    ...     import a_package_that_nobody_has
    Traceback (most recent call last):
    imprint_pl.errors.ImprintError: report needs the package a_package_that_nobody_has, which does \
not import here: pip install 'imprint-pl[sweep]'
    """
    try:
        yield
    except ImportError as error:
        cure = f"{install(extra)}, {otherwise}" if otherwise else install(extra)
        raise ImprintError(
            f"{what} needs the package {error.name or error}, which does not import here: {cure}"
        ) from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean …?` with the known names that are near, or an empty text.

    >>> did_you_mean("robst", ["qi", "robust"])
    "; did you mean 'robust'?"
    """
    # Ignore case: CAT shares no letter with cat.
    folded = {str(other).casefold(): other for other in known}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=3, cutoff=0.5)
    found = [folded[other] for other in close]
    return f"; did you mean {' or '.join(map(repr, found))}?" if found else ""


def shown(path: str | os.PathLike) -> str:
    r"""Return a file's name for a message, with backslash escapes for unprintable characters.

    Python keeps bytes of a name that are not UTF-8 as surrogates (`surrogateescape`), which cannot
    be printed. A line break or an escape in a name would break the message.

    >>> shown("caf\udce9\n.png")
    'caf\\xe9\\n.png'
    """
    text = os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(
        sign.encode("unicode_escape").decode() if unicodedata.category(sign) == "Cc" else sign
        for sign in text
    )


def warn(text: str) -> None:
    """Warn at the line that called this package, however deep in the package the cause is."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] == "imprint_pl":
        frame, level = frame.f_back, level + 1
    warnings.warn(text, stacklevel=level)
