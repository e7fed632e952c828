"""Tables in the terminal, the same for all commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Columns of a screen on which every table fits.
WIDEST = 10_000
Side = Literal["left", "right"]


def print_table(
    columns: Mapping[str, Side],
    rows: Iterable[Iterable[str | None]],
    title: str | None = None,
    width: int | None = None,
) -> None:
    """Prints a table.

    Args:
        columns: headers, and the side that their cells are aligned to.
        rows: cells; `None` is an empty one.
        title: stands above the table.
        width: columns of the screen; those of the terminal by default.
    """
    table = Table(box=box.ROUNDED, title=title)
    for name, side in columns.items():
        table.add_column(name, justify=side)
    for row in rows:
        table.add_row(*row)
    # Names from strangers may look like rich's markup or emoji codes.
    console = Console(markup=False, emoji=False, width=width)
    wide = console.options.update(width=WIDEST)
    if Measurement.get(console, wide, table).maximum > console.width:
        # On a narrow screen, numbers would be broken into lines before their units.
        table.padding = (0, 0)
    console.print(table)
