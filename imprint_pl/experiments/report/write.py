"""Reads results, and writes tables, figures and the page beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from imprint_pl.drawing import style
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.report import figures, tables
from imprint_pl.experiments.report.page import advice, write_page
from imprint_pl.experiments.report.read import find_results, read_results, whole_tasks
from imprint_pl.experiments.report.statistics import accuracy_by_group, compare, significance
from imprint_pl.files import local_path

# Most methods in a critical-difference diagram; with more it cannot be read.
MOST_IN_DIAGRAM = 15


def write_report(
    results: str | Path, output: str | Path | None = None, galleries: Sequence[str | Path] = ()
) -> Path:
    """Writes `report.html`, and the folder `report/` with tables as CSV, figures as PNG and SVG.

    Args:
        results: a results file, or the folder of a sweep.
        output: the folder to write into; the results' own by default.
        galleries: PNGs of `fit --gallery`, or folders of runs that have them; those beside the
            results are always shown.

    Returns:
        The path of the page.

    Raises:
        ImprintError: the results cannot be read, see `read_results`, or a gallery is missing.
    """
    path = find_results(results)
    rows = read_results(path)
    output = path.parent if output is None else Path(local_path(output))
    folder = output / "report"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImprintError(f"{folder} cannot be made ({error}): give --output FOLDER") from error

    made = {name: (title, table(rows)) for name, (title, table) in tables.TABLES.items()}
    whole = whole_tasks(rows)
    drawn, tests, compared = {}, None, None
    if len(whole):
        named = whole[whole["method"].isin(tables.named(whole))]
        diagrams = {"critical_difference": ("Recipes, critical difference", named)}
        if len(named["method"].unique()) < len(whole["method"].unique()):
            title = f"Best {MOST_IN_DIAGRAM} settings, critical difference"
            diagrams["critical_difference_settings"] = (title, whole)
        for name, (title, own) in diagrams.items():
            table = accuracy_by_group(own)
            if not len(table):
                continue
            best = compare(table).head(MOST_IN_DIAGRAM)
            table = table[list(best.index)]
            found = significance(table)
            if name == "critical_difference":
                tests, compared = found, compare(table)
            if found is not None:
                with style():
                    drawn[name] = (title, figures.critical_difference(compare(table), found))
    if tests is not None:
        made["pairs"] = ("Recipes in pairs, Wilcoxon–Holm", tables.pairs(tests))
    with style():
        for name, (title, draw) in figures.FIGURES.items():
            if (figure := draw(rows)) is not None:
                drawn[name] = (title, figure)
        for name, (_, figure) in drawn.items():
            for kind in ("png", "svg"):
                # Write no date, so that the same results give the same file.
                metadata = {"Date": None} if kind == "svg" else {}
                figure.savefig(folder / f"{name}.{kind}", dpi=160, metadata=metadata)
    made = {name: (title, table) for name, (title, table) in made.items() if len(table)}
    for name, (_, table) in made.items():
        tables.safe_for_csv(table).to_csv(folder / f"{name}.csv", index=False)
    return write_page(
        output / "report.html",
        name=path.parent.resolve().name,
        rows=rows,
        sentences=advice(rows, compared, tests),
        tests=tests,
        made=made,
        figures={name: (title, folder / f"{name}.svg") for name, (title, _) in drawn.items()},
        galleries=_pictures([path.parent, *galleries]),
    )


def _pictures(places: Sequence[str | Path]) -> list[Path]:
    """Returns the named PNGs and the galleries in the named folders. The first folder, that of the
    results, may have none."""
    pictures: list[Path] = []
    for i, place in enumerate(map(Path, places)):
        found = sorted(place.glob("gallery*.png")) if place.is_dir() else [place]
        if i and not (found and all(path.is_file() for path in found)):
            raise ImprintError(
                f"--gallery {place}: no gallery there; `fit --gallery file` writes gallery.png "
                "into the run's folder"
            )
        pictures += found
    return list(dict.fromkeys(pictures))
