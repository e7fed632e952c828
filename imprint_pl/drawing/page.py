"""Pages that are one HTML file each: the template that all of them extend, and their tables.

A page may show names from strangers: all text is escaped, and the page forbids itself to load
anything.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

# A longer word is broken, since its column would push the others off the page.
LONG_WORD = 40


class Column(NamedTuple):
    """A column of a table; `number` columns are aligned to the right and sorted as numbers."""

    name: str
    number: bool


class Cell(NamedTuple):
    """A cell of a table: the text to show, and the number to sort by, empty where there is none."""

    text: str
    value: str = ""


class PageTable(NamedTuple):
    """A table as the template takes it.

    Attributes:
        name: is in the address of the table on the page.
        title: stands above it.
        note: explains it; may be empty.
        columns: of the table.
        rows: a cell for each column.
    """

    name: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]


def render(template: Path, **values: Any) -> str:
    """Returns the page of a template that extends `base.html.jinja`, with all values escaped.

    Args:
        template: the file.
        values: the template's names.
    """
    folders = [template.parent, Path(__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    page = environment.get_template(template.name).render(long_word=LONG_WORD, **values)
    # A byte of a file name that is not text is a surrogate, which no page can hold.
    return page.encode("utf-8", "backslashreplace").decode()


def cell(value: float | None, text: str) -> Cell:
    """Returns the cell of a number: a click on the header sorts by the number itself, not by the
    digits that are shown."""
    return Cell(text, "" if value is None or value != value else repr(float(value)))


def data_url(content: bytes, kind: str) -> str:
    """Returns the content of a picture as an address, `kind` such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def enumerated(items: Iterable[str], most: int) -> str:
    """Returns the first of some texts, and how many are left out.

    >>> enumerated(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
