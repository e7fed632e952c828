"""Reads and checks the results for a report: a row for each run.

A method is a recipe with the keywords in which the row differs from it, written as a user would
type them. Methods are compared on groups: a group is a backbone, a data set and a task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pandas as pd

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.experiments.results import COLUMNS, USUAL
from imprint_pl.files import local_path
from imprint_pl.method.recipes import KEYWORDS, RECIPES, resolve
from imprint_pl.parts.by_name import SLOTS, every_parameter

NEEDED = ("backbone", "data", "task", "recipe", "accuracy")
GROUP = ("backbone", "data", "task", "d", "num_labels", "task_seed")
# A task of the paper with ten labels, see `data.tasks.paper_d_in_1`.
PAPER_TASK = r"paper-(?P<d>\d+)in1-(?P<task_seed>\d+)"
NUMBERS = (
    "d",
    "num_labels",
    "task_seed",
    "shots",
    "k",
    "m",
    "seed",
    "num_classes",
    "accuracy",
    "balanced_accuracy",
    "macro_f1",
    "nc1",
    "vci",
    "gen_seconds",
    "inference_seconds",
)


def find_results(path: str | Path) -> Path:
    """Returns the results file: `path` itself, or `results.parquet`, else `results.csv`, in it.

    Raises:
        ImprintError: there is none.
    """
    path = Path(local_path(path))
    if path.is_dir():
        for name in ("results.parquet", "results.csv"):
            if (path / name).is_file():
                return path / name
        raise ImprintError(
            f"{path} has neither results.parquet nor results.csv: give the folder that a sweep "
            "wrote, or a results file"
        )
    if not path.is_file():
        raise ImprintError(f"{path}: there is no such file or folder")
    if path.suffix not in (".parquet", ".csv"):
        raise ImprintError(f"{path}: a results file ends in .parquet or .csv")
    return path


def read_results(path: str | Path) -> pd.DataFrame:
    """Returns the rows of a results file, with the columns `method` and `group` added.

    If a row has layers or views, they become a part of the backbone's name. Accuracy, balanced
    accuracy and macro F1 are fractions. A missing column is added empty. Rows without an accuracy
    are left out.

    Args:
        path: the file, or its folder, as for `find_results`.

    Raises:
        ImprintError: there is no file, it cannot be read, a needed column is missing, an accuracy
            is not a fraction, or no row has an accuracy.
    """
    path = find_results(path)
    try:
        rows = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except Exception as error:
        raise ImprintError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}): it is "
            "damaged, or not a results file"
        ) from error
    for column in NEEDED:
        if column not in rows:
            raise ImprintError(
                f"{path} has no column {column!r}{did_you_mean(column, rows.columns)}: a report "
                f"needs {', '.join(NEEDED)}"
            )
    keywords = parameters(rows)
    for column in (*GROUP, *keywords, *NUMBERS):
        if column not in rows:
            rows[column] = None
    for column in NUMBERS:
        numbers = pd.to_numeric(rows[column], errors="coerce")
        wrong = numbers.isna() & rows[column].notna() & (rows[column] != "")
        if wrong.any():
            raise ImprintError(
                f"{path}: row {int(wrong.to_numpy().nonzero()[0][0])} has "
                f"{column}={rows[column][wrong].iloc[0]!r}, which is no number"
            )
        rows[column] = numbers.astype("float64")
    papers = rows["task"].astype(str).str.fullmatch(PAPER_TASK)
    if papers.any():
        named = rows.loc[papers, "task"].str.extract(PAPER_TASK).astype("float64")
        rows.loc[papers, ["d", "num_labels", "task_seed"]] = named.assign(num_labels=10.0)
    for column in keywords:
        # Make empty cells None, since pandas has a different value in each type of column.
        if column not in NUMBERS:
            rows[column] = rows[column].astype(object).where(rows[column].notna(), None)
    rows = rows[rows["accuracy"].notna()].reset_index(drop=True)
    if not len(rows):
        raise ImprintError(f"{path} has no row with an accuracy: nothing to report")
    outside = (rows["accuracy"] < 0) | (rows["accuracy"] > 1)
    if outside.any():
        raise ImprintError(
            f"{path}: accuracy {rows['accuracy'][outside].iloc[0]} is not in [0, 1]: accuracies "
            "are fractions in files"
        )
    for column in ("backbone", "data", "task", "recipe"):
        rows[column] = rows[column].astype(object).where(rows[column].notna(), "").map(str)
    for column in (name for name in USUAL if name in rows):
        # Treat a backbone with other layers or views as another backbone.
        given = rows[column].notna().to_list()
        texts = [
            f" {column}={value}" if there else ""
            for value, there in zip(rows[column].to_list(), given, strict=True)
        ]
        rows["backbone"] = rows["backbone"].str.cat(texts)
    records = cast("list[dict[str, Any]]", rows[["recipe", *keywords]].to_dict("records"))
    rows["method"] = [method_of(row, keywords) for row in records]
    rows["group"] = rows[list(GROUP)].apply(
        lambda row: " · ".join(_plain(value) for value in row if _given(value)), axis=1
    )
    return rows


def parameters(rows: pd.DataFrame | None = None) -> list[str]:
    """Returns the keywords of a method.

    If `rows` have a user's own parts, named by import paths, all columns that a sweep does not have
    otherwise are keywords of these parts.
    """
    ours = [*SLOTS, *(name for name in KEYWORDS if name not in SLOTS), "weibull"]
    more = every_parameter()
    if rows is not None and any(
        rows[slot].astype("string").str.contains(".", regex=False).any()
        for slot in SLOTS
        if slot in rows
    ):
        more |= {str(name) for name in rows} - set(COLUMNS) - set(USUAL)
    return [*ours, *sorted(more - set(ours))]


def method_of(row: dict[Any, Any], keywords: list[str] | None = None) -> str:
    """Names a row's method: its recipe and the keywords in which it differs, as in `robust k=5`.

    Without a recipe the name begins with the five parts. `keywords` are those of `parameters`.

    >>> method_of({"recipe": "robust", "gen": "kmeans", "k": 5.0, "norm_pre": "l2"})
    'robust k=5'
    >>> parts = dict(norm_pre="l2", gen="kmeans", norm_post="none", norm_inf="l2", agg="max")
    >>> method_of({"recipe": "", "k": 3.0} | parts)
    'l2/kmeans/none/l2/max k=3'
    """
    recipe = row["recipe"]
    own = resolve(recipe).parameters if recipe in RECIPES else {}
    if not recipe:
        own = {name: row[name] for name in SLOTS}
        recipe = "/".join(map(_plain, own.values()))
    # The engine of k-means only changes the time, so it is not part of the method.
    differing = [
        f"{name}={_plain(row[name])}"
        # `auto` chooses the parts itself, so its rows differ only in how samples were selected.
        for name in (keywords or parameters() if recipe != "auto" else ["weibull"])
        if name != "engine"
        and _given(row.get(name))
        and _plain(row[name]) != _plain(own.get(name, False if name == "as_published" else None))
    ]
    return " ".join([recipe, *differing])


def _given(value: Any) -> bool:
    return not (value is None or value == "" or (isinstance(value, float) and value != value))


def _plain(value: Any) -> str:
    """Returns one spelling for 20, 20.0 and "20"."""
    if isinstance(value, bool):
        return str(value)
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        return str(value)


def whole_tasks(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows on tasks that merge no classes, with the most samples (Section 5.1)."""
    return most_samples(rows[rows["d"].isna()])


def most_samples(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows on all training samples; where there are none, those on the most shots."""
    all_samples = rows["shots"].isna()
    return rows[all_samples] if all_samples.any() else rows[rows["shots"] == rows["shots"].max()]
