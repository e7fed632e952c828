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

# Longest word in characters. A longer one is broken, since its column would push the others off the
# page.
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
    """A table for the template.

    Attributes:
        name: the anchor of the table on the page.
        title: the heading above the table.
        note: an explanation; may be empty.
        columns: the columns.
        rows: the rows, each with one cell per column.
        filtered: whether the table has a search field.
    """

    name: str
    title: str
    note: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    filtered: bool = True


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
    # Escape surrogates, which stand for bytes of file names that are not UTF-8.
    return page.encode("utf-8", "backslashreplace").decode()


def cell(value: float | None, text: str) -> Cell:
    """Returns the cell of a number; the table is sorted by `value`, not by the shown `text`."""
    return Cell(text, "" if value is None or value != value else repr(float(value)))


def data_url(content: bytes, kind: str) -> str:
    """Returns a picture as a data URL; `kind` is its media type, such as "image/png"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def enumerated(items: Iterable[str], most: int) -> str:
    """Returns the first of some texts, and how many are left out.

    >>> enumerated(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
