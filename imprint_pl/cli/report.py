"""The command `report`: what it takes and prints; `experiments/report/` makes the files."""

from __future__ import annotations

from imprint_pl.cli.arguments import ArgumentParser
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.experiments.report import tables
from imprint_pl.experiments.report.read import read_results
from imprint_pl.experiments.report.write import print_table, write_report


def run(argv: list[str]) -> None:
    """The command, its arguments without its name."""
    parser = ArgumentParser(
        prog="python -m imprint_pl report",
        description="Write report.html, tables as CSV and figures as PNG and SVG beside results.",
    )
    parser.add_argument("results", help="the folder of a sweep, or its results file")
    parser.add_argument("--output", help="folder to write into (default: beside the results)")
    parser.add_argument(
        "--table", help=f"print this table alone, write nothing: {', '.join(tables.TABLES)}"
    )
    parser.add_argument(
        "--gallery",
        nargs="+",
        default=[],
        help="galleries of `fit --gallery` to show: PNGs, or folders of runs",
    )
    given = parser.parse_args(argv)
    if given.table is not None:
        if given.table not in tables.TABLES:
            known = ", ".join(tables.TABLES)
            hint = did_you_mean(given.table, tables.TABLES)
            raise ImprintError(f"--table {given.table}{hint}: one of {known}")
        title, table = tables.TABLES[given.table]
        print_table(title, table(read_results(given.results)))
        return
    page = write_report(given.results, given.output, given.gallery)
    files = sorted(path.suffix[1:].upper() for path in (page.parent / "report").iterdir())
    counts = ", ".join(f"{files.count(kind)} {kind}" for kind in dict.fromkeys(files))
    print(f"report: {page}\ntables and figures: {page.parent / 'report'} ({counts})")
