"""The tables of a report: one function each, from results to a DataFrame.

A column whose name ends in % is in percent. If the paper published a figure, it is shown beside
ours.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from imprint_pl.experiments.report.read import most_samples, whole_tasks
from imprint_pl.experiments.report.statistics import Significance, accuracy_by_group, compare
from imprint_pl.method.recipes import RECIPES

# The data sets of the paper's Section 5.1. Its averages are shown only beside averages over these.
PAPERS_DATA = {"mnist", "fashionmnist", "cifar10", "imagenet"}
PAPER, OURS_MINUS = "paper %", "ours − paper"
FAMILY = [
    "norm_pre",
    "norm_post",
    "norm_inf",
    "agg",
    "m",
    "distance",
    "votes",
    "temperature",
    "as_published",
    "weibull",
]


@cache
def published(table: str) -> pd.DataFrame:
    """Returns the paper's numbers for a table, in its units (percent; NC1 as it is).

    Source: Westerhoff et al. 2025: Tables of Section 5.1, Figures 4 to 6; NC1 by the paper's own
    formula, which centres classes differently.
    """
    rows = pd.read_csv(Path(__file__).with_name("published.csv"))
    return rows[rows["table"] == table]


def methods(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns every method on whole tasks, best first: average accuracy, rank, wins, GEN time."""
    rows = whole_tasks(rows)
    if not len(rows):
        return pd.DataFrame()
    table = accuracy_by_group(rows)
    if not len(table):
        return pd.DataFrame()
    compared = compare(table).reset_index(names="method")
    seconds = rows.groupby("method")["gen_seconds"].median()
    known = published("methods").set_index("method")["value"]
    table = pd.DataFrame(
        {
            "method": compared["method"],
            "accuracy %": 100 * compared["accuracy"],
            "average rank": compared["rank"],
            "wins": compared["wins"],
            "GEN s": compared["method"].map(seconds),
        }
    )
    if not are_papers(rows):
        return table
    return _beside(table, compared["method"].map(known), "accuracy %")


def are_papers(rows: pd.DataFrame) -> bool:
    """Returns whether all rows are on data sets of the paper."""
    return set(_plain_names(rows["data"])) <= PAPERS_DATA


def recipes(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the table `methods` for the named recipes without changed keywords."""
    rows = rows[rows["method"].isin(named(rows))]
    return methods(rows)


def named(rows: pd.DataFrame) -> list[str]:
    """Returns the methods that are a recipe, or a variant of one in the paper's table."""
    known = [*RECIPES, "auto"]
    own = [m for m in rows["method"].unique() if m in known or m.startswith("knn m=5 ")]
    # If every row changes its recipe, compare all methods.
    return own if len(own) >= 2 else list(rows["method"].unique())


def groups(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the accuracy of the named recipes in each group, averaged over seeds."""
    rows = whole_tasks(rows[rows["method"].isin(named(rows))])
    if not len(rows):
        return pd.DataFrame()
    table = 100 * rows.pivot_table(index="group", columns="method", values="accuracy")
    order = table.mean().sort_values(ascending=False).index
    table = table[order].add_suffix(" %").rename_axis(columns=None)
    return table.reset_index()


def pairs(tests: Significance | None) -> pd.DataFrame:
    """Returns the Holm-corrected p of each pair of methods."""
    if tests is None:
        return pd.DataFrame()
    names = list(tests.pairs.index)
    rows = [
        (a, b, tests.pairs.loc[a, b]) for i, a in enumerate(names) for b in names[i + 1 :] if a != b
    ]
    return pd.DataFrame(rows, columns=["method", "against", "p (Holm)"]).sort_values("p (Holm)")


def along_k(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the rows with a k and the most frequent other parts: they differ in GEN and k."""
    rows = rows[rows["k"].notna()]
    if not len(rows):
        return rows
    family = rows[FAMILY].map(str).agg("|".join, axis=1)
    return rows[family == family.mode()[0]]


def k(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the accuracy of k-means against k on each whole task, beside the paper's Figure 6."""
    rows = along_k(whole_tasks(rows))
    rows = rows[rows["gen"] == "kmeans"]
    if not len(rows):
        return pd.DataFrame()
    keys = ["backbone", "data", "task", "k"]
    table = rows.groupby(keys)["accuracy"].mean().mul(100).rename("accuracy %").reset_index()
    return _joined(table, "k", keys) if rows["shots"].isna().all() else table


def d_in_1(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns the accuracy of k-means on d-in-1 tasks, averaged over their draws of classes."""
    rows = along_k(most_samples(rows[rows["d"].notna()]))
    rows = rows[rows["gen"] == "kmeans"] if len(rows) else rows
    if not len(rows):
        return pd.DataFrame()
    keys = ["backbone", "data", "d", "num_labels", "k"]
    grouped = rows.groupby(keys, dropna=False)
    table = grouped["accuracy"].mean().mul(100).rename("accuracy %").reset_index()
    table["NC1"] = grouped["nc1"].mean().to_numpy()
    table = table.dropna(axis=1, how="all")
    return _joined(table, "d_in_1", keys) if rows["shots"].isna().all() else table


def shots(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns accuracy against shots, a column for each number of shots, averaged over seeds."""
    rows = rows[rows["shots"].notna()]
    if rows["shots"].nunique() < 2:
        return pd.DataFrame()
    rows = rows.assign(shots=rows["shots"].astype(int))
    table = 100 * rows.pivot_table(
        index=["backbone", "data", "task", "method"], columns="shots", values="accuracy"
    )
    return table.set_axis([f"{n} shots %" for n in table.columns], axis=1).reset_index()


def nc1(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns NC1 of each task beside the paper's, whose formula centres classes differently."""
    rows = whole_tasks(rows)
    rows = rows[rows["nc1"].notna()]
    if not len(rows):
        return pd.DataFrame()
    keys = ["backbone", "data", "task"]
    table = rows.groupby(keys)["nc1"].mean().rename("NC1").reset_index()
    return _joined(table, "nc1", keys, "NC1", "paper NC1")


def gain(rows: pd.DataFrame, more: int = 5) -> pd.DataFrame:
    """Returns the gain of k = 5 proxies of k-means over one, in points, with the group's NC1."""
    rows = along_k(most_samples(rows))
    rows = rows[rows["gen"] == "kmeans"] if len(rows) else rows
    if not len(rows) or not {1, more} <= set(rows["k"]):
        return pd.DataFrame()
    wide = 100 * rows.pivot_table(index="group", columns="k", values="accuracy")
    table = pd.DataFrame(
        {
            "NC1": rows.groupby("group")["nc1"].mean(),
            "k=1 %": wide[1.0],
            f"k={more} %": wide[float(more)],
            "gain": wide[float(more)] - wide[1.0],
        }
    )
    return table.dropna().sort_values("gain", ascending=False).reset_index(names="group")


def runs(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns accuracy and time of each method in each group and for each number of shots."""
    keys = ["backbone", "data", "task", "num_labels", "shots", "method"]
    grouped = rows.groupby(keys, dropna=False)
    table = pd.DataFrame(
        {
            "runs": grouped.size(),
            "accuracy %": 100 * grouped["accuracy"].mean(),
            "balanced %": 100 * grouped["balanced_accuracy"].mean(),
            "macro F1 %": 100 * grouped["macro_f1"].mean(),
            "NC1": grouped["nc1"].mean(),
            "GEN s": grouped["gen_seconds"].median(),
            "inference s": grouped["inference_seconds"].median(),
        }
    )
    return table.reset_index().dropna(axis=1, how="all")


# For each name on the command line: the title, and the function.
TABLES = {
    "recipes": ("Recipes", recipes),
    "methods": ("All settings on whole tasks", methods),
    "groups": ("Recipes in each group", groups),
    "k": ("Accuracy of k-means against k", k),
    "shots": ("Accuracy against shots", shots),
    "d_in_1": ("Labels that merge d classes", d_in_1),
    "nc1": ("NC1 of the tasks", nc1),
    "gain": ("Gain of k = 5 over k = 1, in points", gain),
    "runs": ("All results", runs),
}


def shown(value: object, column: str) -> str:
    """Formats a cell: percent to 2 places, seconds to 3 significant digits, "" for no value."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if not isinstance(value, float):
        return str(value)
    if column == OURS_MINUS or column == "gain":
        return f"{value:+.2f}".replace("-", "−")
    if column.endswith("%") or column == "average rank":
        return f"{value:.2f}"
    if column.startswith("p ("):
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    if value.is_integer() and not column.endswith(" s"):
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def safe_for_csv(table: pd.DataFrame) -> pd.DataFrame:
    """Returns the table with an apostrophe before text that a spreadsheet would run."""

    def plain(value: Any) -> Any:
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n"):
            return "'" + value
        return value

    safe = table.map(plain)
    return safe.set_axis([plain(name) for name in safe.columns], axis=1)


def _joined(
    table: pd.DataFrame, name: str, keys: list[str], ours: str = "accuracy %", paper: str = PAPER
) -> pd.DataFrame:
    """Puts the paper's numbers beside the rows of a table that have the same keys."""
    known = published(name)
    keys = [key for key in keys if key in known and known[key].notna().all()]
    values = dict(zip(_keys(known, keys), known["value"], strict=True))
    found = pd.Series([values.get(key) for key in _keys(table, keys)], table.index, dtype=float)
    return _beside(table, found, ours, paper)


def _keys(table: pd.DataFrame, names: list[str]) -> list[tuple[Any, ...]]:
    """Returns the values of some columns, a tuple for each row."""
    # The command line says `FashionMNIST` where the data set's own `name` is `fashion_mnist`.
    data = _plain_names(table["data"])
    return list(table[names].assign(data=data).itertuples(index=False, name=None))


def _plain_names(data: pd.Series) -> pd.Series:
    return data.str.lower().str.replace("_", "")


def _beside(table: pd.DataFrame, paper: pd.Series, ours: str, name: str = PAPER) -> pd.DataFrame:
    """Adds the paper's numbers and the differences, where there are any."""
    if paper.notna().any():
        table[name] = paper.astype(float)
        table[OURS_MINUS] = table[ours] - table[name]
    return table
