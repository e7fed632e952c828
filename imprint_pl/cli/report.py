"""The command `report`: options and output; `experiments/report/` makes the files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from imprint_pl.cli.arguments import PROGRAM, ArgumentParser
from imprint_pl.cli.tables import print_table
from imprint_pl.errors import ImprintError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd


def run(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: its arguments, without its name.
    """
    parser = ArgumentParser(
        prog=f"{PROGRAM} report",
        description="Write report.html, tables as CSV and figures as PNG and SVG beside results.",
    )
    parser.add_argument("results", help="the folder of a sweep, or its results file")
    parser.add_argument("--output", help="folder to write into (default: beside the results)")
    parser.add_argument(
        "--table", help="print this table alone, write nothing; an unknown name lists all names"
    )
    parser.add_argument(
        "--gallery",
        nargs="+",
        default=[],
        help="galleries of `fit --gallery` to show: PNGs, or folders of runs",
    )
    given = parser.parse_args(argv)
    # Import here, so that `--help` works without the packages of the extra `sweep`.
    from imprint_pl.experiments.report import tables, write_report
    from imprint_pl.experiments.report.read import read_results

    if given.table is not None:
        if given.table not in tables.TABLES:
            known = ", ".join(tables.TABLES)
            hint = did_you_mean(given.table, tables.TABLES)
            raise ImprintError(f"--table {given.table}{hint}: one of {known}")
        title, table = tables.TABLES[given.table]
        _print(title, table(read_results(given.results)))
        return
    page = write_report(given.results, given.output, given.gallery)
    files = sorted(path.suffix[1:].upper() for path in (page.parent / "report").iterdir())
    counts = ", ".join(f"{files.count(kind)} {kind}" for kind in dict.fromkeys(files))
    print(f"report: {page}\ntables and figures: {page.parent / 'report'} ({counts})")


def _print(title: str, table: pd.DataFrame) -> None:
    from pandas.api.types import is_numeric_dtype

    from imprint_pl.experiments.report.tables import shown

    if not len(table):
        raise ImprintError(f"the results have nothing for the table {title!r}")
    names = [str(name) for name in table.columns]
    print_table(
        {name: "right" if is_numeric_dtype(table[name]) else "left" for name in names},
        (
            [shown(value, name) for value, name in zip(row, names, strict=True)]
            for row in table.itertuples(index=False)
        ),
        title,
    )
