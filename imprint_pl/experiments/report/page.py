"""The page of a report: one self-contained HTML file, with sentences that recommend a recipe. The
template escapes all text from results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from imprint_pl import __version__
from imprint_pl.drawing.page import Cell, Column, PageTable, cell, data_url, render
from imprint_pl.experiments.report.read import most_samples, whole_tasks
from imprint_pl.experiments.report.statistics import ALPHA, Significance
from imprint_pl.experiments.report.tables import are_papers, shown
from imprint_pl.files import write_whole

# Most rows of a table on the page; the CSV has all.
MOST_ROWS = 1500

CAPTIONS = {
    "critical_difference": "Left is best. Recipes with a dot on the same bar cannot be told apart "
    "(Wilcoxon signed-rank, Holm, p ≥ 0.05).",
    "critical_difference_settings": "As above, of the settings with the best average ranks; chosen "
    "from these same results, so that their differences look clearer than they are.",
    "accuracy_against_k": "k-means and other choices of k proxies a class, all else equal.",
    "accuracy_against_shots": "How much each method needs: training images a class.",
    "gain_against_nc1": "A dot a task.",
    "nc1_against_d": "NC1 of tasks whose labels merge d classes each.",
    "gen_seconds": "From embeddings to proxies; embedding the images is not counted.",
}
NOTES = {
    "recipes": "Average rank: 1 is best in every group. Wins: groups in which none is better; "
    "a tie is a win for all.",
    "methods": "A name is a recipe and the keywords in which it differs: type it as it stands.",
    "runs": "Filter for a backbone, data set, task or method.",
}
# Notes that are added to tables which show the paper's numbers.
BESIDE_PAPER = {
    "gain_against_nc1": " In the paper several proxies pay where NC1 is high, with a Spearman "
    "correlation of 0.82.",
    "recipes": " The paper's column is its average over its own four backbones and twelve tasks: "
    "compare the order, not the level, unless yours are the same.",
    "nc1": "The paper's NC1 centres classes otherwise than ours, so that the two differ even on "
    "equal embeddings.",
}


def advice(
    rows: pd.DataFrame, compared: pd.DataFrame | None, tests: Significance | None
) -> list[str]:
    """Recommends a recipe and says why.

    Args:
        rows: the result of `read_results`.
        compared: the result of `compare` for the methods to choose from; `None` without any.
        tests: the result of `significance` for them.

    Returns:
        Sentences, the recommendation first.
    """
    if compared is None or len(compared) < 2:
        return ["There are fewer than two methods on whole tasks: nothing to compare."]
    whole = whole_tasks(rows)
    seconds = _numbers(whole.groupby("method")["gen_seconds"].median())
    accuracy = _numbers(compared["accuracy"])
    groups = whole[whole["method"].isin(compared.index)]["group"].nunique()
    if tests is not None:
        groups = tests.groups
    best, second, *_ = accuracy
    alone = [name for name in accuracy if _same(compared, name, best)]
    backbone, others = _backbone(whole, best)
    on = f" on {backbone}" if backbone else ""
    most = max(accuracy, key=lambda name: accuracy[name])
    over = f"over {groups} group{'s' * (groups != 1)}"
    rank = f"{compared['rank'].iloc[0]:.2f} of {len(compared)} recipes"
    figures = f"{rank}, {over}, and {100 * accuracy[best]:.2f} % accuracy on average"
    sentences = [
        f"It is a tie{on}: {_and(alone)} have the same average rank, {figures}."
        if len(alone) > 1
        else f"Use {best}{on}: it has the best average rank, {figures}"
        + (
            f"; {most} has more, {100 * accuracy[most]:.2f} %, but a worse rank."
            if accuracy[most] > accuracy[best] + 1e-9
            else "."
        ),
        *([f"With {best}, {others}."] if others else []),
    ]
    if tests is None:
        sentences.append(
            f"With {groups} group{'s' * (groups > 1)} no test can tell whether that is chance: six "
            "or more are needed."
        )
    elif not tests.some_differ:
        sentences.append(
            f"That may be chance: over {groups} groups the recipes cannot be told apart (Friedman, "
            f"p = {shown(tests.friedman, 'p (')})."
        )
    else:
        p = _numbers(tests.pairs[best])
        alike = [name for name in accuracy if name != best and p[name] >= ALPHA]
        if alike:
            listed = ", ".join(alike[:6]) + (", …" if len(alike) > 6 else "")
            sentences.append(f"It cannot be told apart from {listed} (p ≥ {ALPHA}).")
        else:
            sentences.append(
                f"It is better than each of the others beyond chance; the next is {second}, "
                f"{100 * accuracy[second]:.2f} % (p {_p(p[second])})."
            )
    timed = [
        name
        for name in accuracy
        if accuracy[name] >= accuracy[best] - 0.01 and not math.isnan(seconds.get(name, math.nan))
    ]
    fastest = min(timed, key=lambda name: seconds[name]) if best in timed else best
    if fastest != best:
        sentences.append(
            f"In a hurry, {fastest}: at most one point less, {_seconds(seconds[fastest])} of GEN "
            f"instead of {_seconds(seconds[best])}."
        )
    return sentences


def _same(compared: pd.DataFrame, name: str, other: str) -> bool:
    """Returns whether two methods tie, in rank and accuracy."""
    columns = ["rank", "accuracy"]
    apart = compared.loc[name, columns].astype(float) - compared.loc[other, columns].astype(float)
    return bool((apart.abs() < 1e-9).all())


def _backbone(rows: pd.DataFrame, method: str) -> tuple[str, str]:
    """Returns the backbone with the best accuracy of a method, and a text on the others.

    Only data sets and tasks that every backbone has are compared. Without any the backbone is "".
    """
    rows = rows[rows["method"] == method]
    tasks = ["data", "task"]
    table = rows.pivot_table(index=tasks, columns="backbone", values="accuracy").dropna()
    if not len(table):
        return "", ""
    # Round, so that accuracies that differ in the last bit are equal.
    mean = table.mean().round(9).sort_values(ascending=False, kind="stable")
    first = [str(name) for name in mean.index[mean == mean.iloc[0]]]
    accuracy = f"{100 * mean.iloc[0]:.2f} %"
    if len(mean) == 1:
        return first[0], ""
    if len(first) > 1:
        return "", f"the backbones {_and(first)} are a tie, {accuracy} each"
    rest = [f"{name} {100 * value:.2f} %" for name, value in mean.items() if name != first[0]]
    listed = ", ".join(rest[:4]) + (", …" if len(rest) > 4 else "")
    return first[0], f"{first[0]} has {accuracy}, {listed}"


def _and(names: Sequence[str]) -> str:
    names = [*names[:4], f"{len(names) - 4} more"] if len(names) > 5 else list(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


class PageFigure(NamedTuple):
    """A figure for the template; `source` is a data URL."""

    id: str
    title: str
    caption: str
    source: str


def write_page(
    path: Path,
    *,
    name: str,
    rows: pd.DataFrame,
    sentences: Sequence[str],
    tests: Significance | None,
    made: Mapping[str, tuple[str, pd.DataFrame]],
    figures: Mapping[str, tuple[str, Path]],
    galleries: Sequence[Path],
) -> Path:
    """Writes the page.

    Args:
        path: the HTML file.
        name: the name of the sweep, for the title.
        rows: the result of `read_results`.
        sentences: the result of `advice`.
        tests: the result of `significance`.
        made: title and table, by name.
        figures: title and SVG, by name.
        galleries: PNGs.
    """
    shots = most_samples(rows)["shots"].max()
    samples = (
        f"up to {shots:,.0f} training samples a class" if shots > 0 else "all training samples"
    )
    page = render(
        Path(__file__).with_name("page.html.jinja"),
        name=name,
        sentences=sentences,
        tests=tests,
        samples=samples,
        version=__version__,
        counts={
            "runs": len(rows),
            "methods": rows["method"].nunique(),
            "backbones": sorted(rows["backbone"].unique()),
            "data sets": sorted(rows["data"].unique()),
        },
        figures=[
            PageFigure(id, title, _caption(id, rows), data_url(svg.read_bytes(), "image/svg+xml"))
            for id, (title, svg) in figures.items()
        ],
        galleries=[
            (gallery.parent.name, data_url(gallery.read_bytes(), "image/png"))
            for gallery in galleries
        ],
        tables=[_cells(id, title, table) for id, (title, table) in made.items()],
    )
    return write_whole(path, page.encode())


def _caption(name: str, rows: pd.DataFrame) -> str:
    beside = BESIDE_PAPER.get(name, "") if are_papers(rows) else ""
    return CAPTIONS.get(name, "") + beside


def _numbers(values: pd.Series) -> dict[str, float]:
    """Returns a column as numbers by name."""
    return {str(name): float(value) for name, value in values.items()}


def _cells(name: str, title: str, table: pd.DataFrame) -> PageTable:
    """Returns a table for the template."""
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in table.columns]
    body = [
        [
            cell(value, shown(value, column)) if number else Cell(shown(value, column))
            for value, column, number in zip(row, table.columns, numeric, strict=True)
        ]
        for row in table.head(MOST_ROWS).itertuples(index=False)
    ]
    has_papers = any(str(column).startswith("paper ") for column in table.columns)
    note = NOTES.get(name, "") + (BESIDE_PAPER.get(name, "") if has_papers else "")
    if len(table) > MOST_ROWS:
        note += f" The first {MOST_ROWS:,} of {len(table):,} rows; the CSV has all."
    columns = [Column(str(n), number) for n, number in zip(table.columns, numeric, strict=True)]
    return PageTable(name, title, note, columns, body)


def _p(value: float) -> str:
    text = shown(value, "p (")
    return text if text.startswith("<") else f"= {text}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"
