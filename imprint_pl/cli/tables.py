"""Tables in the terminal, the same for all commands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Screen width at which every table fits.
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
        columns: headers, and the side to which their cells are aligned.
        rows: cells; `None` is an empty cell.
        title: the title above the table.
        width: screen width in characters; by default that of the terminal.
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
        # Save space on a narrow screen, where lines would break between a number and its unit.
        table.padding = (0, 0)
    console.print(table)
