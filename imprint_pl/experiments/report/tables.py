"""The tables of a report: one function each, from results to a DataFrame; in percent where the
column says %. The paper's figures stand beside ours where the paper published one.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd

from imprint_pl.experiments.report.read import most_samples, whole_tasks
from imprint_pl.experiments.report.statistics import Significance, accuracy_by_group, compare
from imprint_pl.method.recipes import RECIPES

PAPER, OURS_MINUS = "paper %", "ours − paper"
FAMILY = ["norm_pre", "norm_post", "norm_inf", "agg", "m", "distance", "votes"]
FAMILY += ["temperature", "as_published", "weibull"]


@cache
def published(table: str) -> pd.DataFrame:
    """The paper's numbers for a table, in its units (percent; NC1 as it is).

    Source: Westerhoff et al. 2025: Tables of Section 5.1, Figures 4 to 6; NC1 by the paper's own
    formula, which centres classes otherwise than ours.
    """
    rows = pd.read_csv(Path(__file__).with_name("published.csv"))
    return rows[rows["table"] == table]


def methods(rows: pd.DataFrame) -> pd.DataFrame:
    """Every method on whole tasks, best first: average accuracy, average rank, wins, GEN's time."""
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
    return _beside(table, compared["method"].map(known), "accuracy %")


def recipes(rows: pd.DataFrame) -> pd.DataFrame:
    """As `methods`, of the named recipes as they stand."""
    rows = rows[rows["method"].isin(named(rows))]
    return methods(rows)


def named(rows: pd.DataFrame) -> list[str]:
    """The methods that are a recipe, or one in which the paper's table differs from a recipe."""
    known = [*RECIPES, "auto"]
    own = [m for m in rows["method"].unique() if m in known or m.startswith("knn m=5 ")]
    # A recipe that was changed in every row still stands for itself.
    return own if len(own) >= 2 else list(rows["method"].unique())


def groups(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of the named recipes in each group, seeds averaged."""
    rows = whole_tasks(rows[rows["method"].isin(named(rows))])
    if not len(rows):
        return pd.DataFrame()
    table = 100 * rows.pivot_table(index="group", columns="method", values="accuracy")
    order = table.mean().sort_values(ascending=False).index
    table = table[order].add_suffix(" %").rename_axis(columns=None)
    return table.reset_index()


def pairs(tests: Significance | None) -> pd.DataFrame:
    """Holm-corrected p of every two methods."""
    if tests is None:
        return pd.DataFrame()
    names = list(tests.pairs.index)
    rows = [
        (a, b, tests.pairs.loc[a, b]) for i, a in enumerate(names) for b in names[i + 1 :] if a != b
    ]
    return pd.DataFrame(rows, columns=["method", "against", "p (Holm)"]).sort_values("p (Holm)")


def along_k(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with a k that differ in GEN and k alone: of the most frequent other parts."""
    rows = rows[rows["k"].notna()]
    if not len(rows):
        return rows
    family = rows[FAMILY].map(str).agg("|".join, axis=1)
    return rows[family == family.mode()[0]]


def k(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of k-means against k on each whole task, beside the paper's Figure 6."""
    rows = along_k(whole_tasks(rows))
    rows = rows[rows["gen"] == "kmeans"]
    if not len(rows):
        return pd.DataFrame()
    keys = ["backbone", "data", "task", "k"]
    table = rows.groupby(keys)["accuracy"].mean().mul(100).rename("accuracy %").reset_index()
    return _joined(table, "k", keys) if rows["shots"].isna().all() else table


def d_in_1(rows: pd.DataFrame) -> pd.DataFrame:
    """Accuracy of k-means on tasks that merge d classes a label, drawings averaged."""
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
    """Accuracy against shots, a column a number of shots, groups and draws averaged."""
    rows = rows[rows["shots"].notna()]
    if rows["shots"].nunique() < 2:
        return pd.DataFrame()
    rows = rows.assign(shots=rows["shots"].astype(int))
    table = 100 * rows.pivot_table(
        index=["backbone", "data", "task", "method"], columns="shots", values="accuracy"
    )
    table.columns = [f"{n} shots %" for n in table.columns]
    return table.reset_index()


def nc1(rows: pd.DataFrame) -> pd.DataFrame:
    """NC1 of each task, beside the paper's, whose formula centres classes otherwise."""
    rows = whole_tasks(rows)
    rows = rows[rows["nc1"].notna()]
    if not len(rows):
        return pd.DataFrame()
    keys = ["backbone", "data", "task"]
    table = rows.groupby(keys)["nc1"].mean().rename("NC1").reset_index()
    return _joined(table, "nc1", keys, "NC1", "paper NC1")


def gain(rows: pd.DataFrame, more: int = 5) -> pd.DataFrame:
    """What k = 5 proxies of k-means gain over one, in points, with the group's NC1."""
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
    """Everything: accuracy and time of each method in each group and number of shots."""
    keys = ["backbone", "data", "task", "num_labels", "shots", "method"]
    grouped = rows.groupby(keys, dropna=False)
    table = pd.DataFrame(
        {
            "runs": grouped.size(),
            "accuracy %": 100 * grouped["accuracy"].mean(),
            "macro F1 %": 100 * grouped["macro_f1"].mean(),
            "NC1": grouped["nc1"].mean(),
            "GEN s": grouped["gen_seconds"].median(),
            "inference s": grouped["inference_seconds"].median(),
        }
    )
    return table.reset_index().dropna(axis=1, how="all")


# Name on the command line → title, function.
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
    """A cell as people read it: percent to 2 places, seconds to 3 significant, empty for none."""
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
    """The table with text that a spreadsheet would run as a formula made plain text."""

    def plain(value):
        if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r", "\n"):
            return "'" + value
        return value

    safe = table.map(plain)
    return safe.set_axis([plain(name) for name in safe.columns], axis=1)


def _joined(
    table: pd.DataFrame, name: str, keys: list[str], ours: str = "accuracy %", paper: str = PAPER
) -> pd.DataFrame:
    known = published(name)
    keys = [key for key in keys if key in known and known[key].notna().all()]
    # `FashionMNIST` as one types it, `fashion_mnist` as its module calls it.
    known, own = (
        part[keys].assign(data=part["data"].str.lower().str.replace("_", "")).apply(tuple, axis=1)
        for part in (known, table)
    )
    found = own.map(dict(zip(known, published(name)["value"], strict=True)))
    return _beside(table, found, ours, paper)


def _beside(table: pd.DataFrame, paper: pd.Series, ours: str, name: str = PAPER) -> pd.DataFrame:
    """With the paper's column and the difference, where there is any."""
    if paper.notna().any():
        table[name] = paper.astype(float)
        table[OURS_MINUS] = table[ours] - table[name]
    return table
