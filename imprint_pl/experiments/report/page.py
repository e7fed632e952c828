"""The page of a report: one HTML file that needs nothing else, and the sentence that says which
recipe to use. All text from results is escaped by the template.
"""

from __future__ import annotations

import base64
from pathlib import Path

import jinja2
import pandas as pd

from imprint_pl import __version__
from imprint_pl.experiments.report.read import most_samples, whole_tasks
from imprint_pl.experiments.report.statistics import ALPHA, Significance
from imprint_pl.experiments.report.tables import shown
from imprint_pl.files import write_whole

# A longer word is broken into lines, or its column would push the others off the page.
LONG_WORD = 40
# Rows of a table on the page; the CSV has all of them.
MOST_ROWS = 1500

CAPTIONS = {
    "critical_difference": "Left is best. Recipes with a dot on the same bar cannot be told apart "
    "(Wilcoxon signed-rank, Holm, p ≥ 0.05).",
    "critical_difference_settings": "As above, of the settings with the best average ranks; chosen "
    "from these same results, so that their differences look clearer than they are.",
    "accuracy_against_k": "k-means and other choices of k proxies a class, all else equal.",
    "accuracy_against_shots": "How much each method needs: training images a class.",
    "gain_against_nc1": "A dot a task. In the paper several proxies pay where NC1 is high, with a "
    "Spearman correlation of 0.82.",
    "nc1_against_d": "NC1 of tasks whose labels merge d classes each.",
    "gen_seconds": "From embeddings to proxies; embedding the images is not counted.",
}
NOTES = {
    "recipes": "Average rank: 1 is best in every group. Wins: groups in which none is better; "
    "a tie is a win for all. The paper's column is its average over its own four backbones and "
    "twelve tasks: compare the order, not the level, unless yours are the same.",
    "methods": "A name is a recipe and the keywords in which it differs: type it as it stands.",
    "nc1": "The paper's NC1 centres classes otherwise than ours, so that the two differ even on "
    "equal embeddings.",
    "runs": "Filter for a backbone, data set, task or method.",
}


def advice(
    rows: pd.DataFrame, compared: pd.DataFrame | None, tests: Significance | None
) -> list[str]:
    """Which recipe to use and why, in plain sentences, from a comparison of `compare`."""
    if compared is None or len(compared) < 2:
        return ["There are fewer than two methods on whole tasks: nothing to compare."]
    whole = whole_tasks(rows)
    seconds = whole.groupby("method")["gen_seconds"].median()
    groups = whole[whole["method"].isin(compared.index)]["group"].nunique()
    if tests is not None:
        groups = tests.groups
    best, second = compared.index[0], compared.index[1]
    row = compared.loc[best]
    most = compared["accuracy"].idxmax()
    over = f"over {groups} group{'s' * (groups != 1)}"
    sentences = [
        f"Use {best}: it has the best average rank, {row['rank']:.2f} of {len(compared)} "
        f"recipes, {over}, and {100 * row['accuracy']:.2f} % accuracy on average"
        + (
            f"; {most} has more, {100 * compared.loc[most, 'accuracy']:.2f} %, but a worse rank."
            if compared.loc[most, "accuracy"] > row["accuracy"] + 1e-9
            else "."
        )
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
        p = tests.pairs.loc[best]
        alike = [name for name in compared.index[1:] if p[name] >= ALPHA]
        if alike:
            listed = ", ".join(alike[:6]) + (", …" if len(alike) > 6 else "")
            sentences.append(f"It cannot be told apart from {listed} (p ≥ {ALPHA}).")
        else:
            sentences.append(
                f"It is better than each of the others beyond chance; the next is {second}, "
                f"{100 * compared.loc[second, 'accuracy']:.2f} % "
                f"(p {_p(tests.pairs.loc[best, second])})."
            )
    near_best = compared[compared["accuracy"] >= row["accuracy"] - 0.01].index
    timed = seconds.reindex(near_best).dropna()
    fastest = timed.idxmin() if best in timed else best
    if fastest != best:
        sentences.append(
            f"In a hurry, {fastest}: at most one point less, {_seconds(seconds[fastest])} of GEN "
            f"instead of {_seconds(seconds[best])}."
        )
    return sentences


def write_page(path: Path, *, galleries: list[Path], figures: dict, made: dict, **values) -> Path:
    """Writes the page.

    Args:
        path: the HTML file.
        galleries: PNGs.
        figures: name → title and SVG.
        made: name → title and table.
        values: `name, rows, sentences, tests`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    rows = values.pop("rows")
    shots = most_samples(rows)["shots"].max()
    samples = (
        f"up to {shots:,.0f} training samples a class" if shots > 0 else "all training samples"
    )
    page = environment.get_template("page.html.jinja").render(
        **values,
        samples=samples,
        long_word=LONG_WORD,
        version=__version__,
        counts={
            "runs": len(rows),
            "methods": rows["method"].nunique(),
            "backbones": sorted(rows["backbone"].unique()),
            "data sets": sorted(rows["data"].unique()),
        },
        figures=[
            (name, title, CAPTIONS.get(name, ""), _data(svg, "image/svg+xml"))
            for name, (title, svg) in figures.items()
        ],
        galleries=[(gallery.parent.name, _data(gallery, "image/png")) for gallery in galleries],
        tables=[_cells(name, title, table) for name, (title, table) in made.items()],
    )
    return write_whole(path, page.encode())


def _cells(name: str, title: str, table: pd.DataFrame) -> dict:
    numeric = [pd.api.types.is_numeric_dtype(table[column]) for column in table.columns]
    body = [
        [
            # What it is sorted by: the number itself, not what is shown of it.
            (shown(value, column), repr(float(value)) if number and value == value else "")
            for value, column, number in zip(row, table.columns, numeric, strict=True)
        ]
        for row in table.head(MOST_ROWS).itertuples(index=False)
    ]
    note = NOTES.get(name, "")
    if len(table) > MOST_ROWS:
        note += f" The first {MOST_ROWS:,} of {len(table):,} rows; the CSV has all."
    return {
        "name": name,
        "title": title,
        "note": note,
        "columns": list(zip(table.columns, numeric, strict=True)),
        "rows": body,
    }


def _p(value: float) -> str:
    text = shown(value, "p (")
    return text if text.startswith("<") else f"= {text}"


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def _data(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
