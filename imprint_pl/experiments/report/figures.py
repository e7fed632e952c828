"""The figures of a report: one function each, from results to a matplotlib figure.

A function returns `None` if the results have nothing to draw. Colours are those of Okabe and Ito,
and markers differ as well, for readers who cannot tell the colours apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterable
from typing import cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from imprint_pl.drawing import width
from imprint_pl.experiments.report import tables
from imprint_pl.experiments.report.read import whole_tasks
from imprint_pl.experiments.report.statistics import Significance

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9", "#8B6D00")
MARKERS = "osD^vPX<"
# Most lines in a figure: one for each colour.
MOST = len(COLOURS)
# Names of methods with more letters are shortened.
LONGEST = 46
# The label of an axis of accuracies.
PERCENT = "accuracy in %"


def critical_difference(compared: pd.DataFrame, tests: Significance) -> Figure:
    """Draws average ranks on an axis, best left; a bar joins methods that cannot be told apart.

    Args:
        compared: the result of `compare` for the methods in `tests`.
        tests: the result of `significance`.
    """
    import scikit_posthocs

    names = _short_names(compared.index)
    # Names are written on both sides of the axis, each with its rank.
    sides = 2 * max(width(f"{name}  10.00 ", 10) for name in names.values())
    figure, axes = new_figure(max(8.0, 4.0 + sides), 1.4 + 0.17 * len(compared))
    ranks = compared["rank"].rename(index=names)
    p = tests.pairs.rename(index=names, columns=names)
    if not tests.some_differ:
        p = p * 0 + 1
    axes.grid(False)
    scikit_posthocs.critical_difference_diagram(
        ranks,
        p,
        ax=axes,
        label_fmt_left="{label}  {rank:.2f} ",
        label_fmt_right=" {rank:.2f}  {label}",
        color_palette=dict.fromkeys(names.values(), "#222222"),
        crossbar_props={"color": "#D55E00", "linewidth": 2.5, "marker": "o", "markersize": 6},
    )
    axes.set_title(f"average rank over {tests.groups} groups (1 is best)", fontsize=10, pad=24)
    return figure


def accuracy_against_k(rows: pd.DataFrame) -> Figure | None:
    """Draws a line for each GEN, averaged over groups."""
    rows = tables.along_k(whole_tasks(rows))
    if not len(rows) or rows["k"].nunique() < 2:
        return None
    table = rows.pivot_table(index="group", columns=["gen", "k"], values="accuracy")
    mean, title = _average(table)
    lines = {gen: mean[gen] for gen in mean.index.get_level_values("gen").unique()}
    lines = {gen: line for gen, line in lines.items() if len(line) > 1}
    return _lines(lines, "k, proxies a class", PERCENT, title) if lines else None


def accuracy_against_shots(rows: pd.DataFrame) -> Figure | None:
    """Draws a line for each method, averaged over groups."""
    rows = rows[rows["shots"].notna()]
    if rows["shots"].nunique() < 2:
        return None
    table = rows.pivot_table(index="group", columns=["method", "shots"], values="accuracy")
    mean, title = _average(table)
    names = mean.index.get_level_values("method").unique()
    lines = {name: mean[name] for name in names if len(mean[name]) > 1}
    if not lines:
        return None
    return _lines(lines, "training images a class", PERCENT, title)


def nc1_against_d(rows: pd.DataFrame) -> Figure | None:
    """Draws a line for each backbone, data set and number of labels."""
    rows = rows[rows["d"].notna() & rows["nc1"].notna()]
    if rows["d"].nunique() < 2:
        return None
    mean = rows.groupby(["backbone", "data", "num_labels", "d"], dropna=False)["nc1"].mean()
    several = rows["num_labels"].nunique(dropna=False) > 1
    lines = {}
    for key, line in mean.groupby(level=[0, 1, 2], dropna=False):
        backbone, data, labels = cast(tuple[str, str, float], key)
        name = f"{backbone}, {data}" + f", {labels:g} labels" * several
        lines[name] = line.droplevel([0, 1, 2])
    return _lines(lines, "d, classes that a label merges", "NC1", "drawings averaged", log=False)


def gain_against_nc1(rows: pd.DataFrame) -> Figure | None:
    """Draws a dot for each group, coloured by backbone and data set."""
    from scipy.stats import spearmanr

    table = tables.gain(rows)
    if len(table) < 3 or table["NC1"].nunique() < 2:
        return None
    sources = rows.drop_duplicates("group").set_index("group")
    labels = [f"{sources.backbone[g]}, {sources.data[g]}" for g in table["group"]]
    figure, axes = new_figure(7.0, 4.2)
    for i, (label, name) in enumerate(_short_names(labels).items()):
        own = table[[label == other for other in labels]]
        # With more than eight names colours repeat, but with another marker.
        color, marker = COLOURS[i % MOST], MARKERS[(i + i // MOST) % MOST]
        axes.scatter(
            own["NC1"],
            own["gain"],
            s=36,
            color=color,
            marker=marker,
            label=name,
            alpha=0.85,
        )
    axes.axhline(0, color="#777777", linewidth=1)
    axes.set_xlabel("NC1 (low: each class huddles around its mean)")
    axes.set_ylabel("accuracy at k = 5 minus k = 1, in points")
    correlation = spearmanr(table["NC1"], table["gain"]).statistic
    axes.set_title(
        # Adding 0 turns −0.0 into 0.0.
        f"{len(table)} groups, Spearman {round(correlation, 2) + 0:.2f}".replace("-", "−"),
        fontsize=10,
    )
    legend_below(figure, axes)
    return figure


def gen_seconds(rows: pd.DataFrame) -> Figure | None:
    """Draws the time of GEN for each named recipe: median, least and most."""
    rows = whole_tasks(rows[rows["method"].isin(tables.named(rows)) & (rows["gen_seconds"] > 0)])
    if not len(rows):
        return None
    seconds = rows.groupby("method")["gen_seconds"].agg(["min", "median", "max"])
    seconds = seconds.sort_values("median").iloc[-20:]
    names = _short_names(seconds.index).values()
    beside = max(width(name, 10) for name in names)
    figure, axes = new_figure(max(7.0, 5.0 + beside), 1.0 + 0.32 * len(seconds))
    places = np.arange(len(seconds))
    axes.hlines(places, seconds["min"], seconds["max"], color="#999999", linewidth=2)
    axes.plot(seconds["median"], places, "o", color=COLOURS[0])
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(seconds) - 0.4)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if seconds["max"].max() < 100 * seconds["min"].min():
        # Label 1, 2 and 5: on less than two decades there may be no power of ten.
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.set_xlabel("GEN in seconds (dot: median, line: least to most)")
    return figure


FIGURES: dict[str, tuple[str, Callable[[pd.DataFrame], Figure | None]]] = {
    "accuracy_against_k": ("Accuracy against k, a line a GEN", accuracy_against_k),
    "accuracy_against_shots": ("Accuracy against shots", accuracy_against_shots),
    "gain_against_nc1": ("Gain of k = 5 against NC1", gain_against_nc1),
    "nc1_against_d": ("NC1 against d", nc1_against_d),
    "gen_seconds": ("Time of GEN", gen_seconds),
}


def _average(table: pd.DataFrame) -> tuple[pd.Series, str]:
    """Returns the average over groups in percent, and a title with the number of groups.

    Groups that lack a point are left out: otherwise the line would also show differences between
    groups. If every group lacks a point, all are kept.
    """
    table = table.dropna() if len(table.dropna()) else table
    return 100 * table.mean(), f"average over {len(table)} group{'s' * (len(table) > 1)}"


def _lines(lines: dict[str, pd.Series], x: str, y: str, title: str, log: bool = True) -> Figure:
    """Draws the best lines, with a marker at each point.

    Args:
        lines: values by x, for each name.
        x: label of the axis.
        y: label of the axis.
        title: the title above the axes.
        log: whether the x axis is logarithmic.
    """
    figure, axes = new_figure(7.0, 4.2)
    # Sort by the values at the right end, so that the legend has the order of the lines.
    best = _short_names(sorted(lines, key=lambda name: -lines[name].iloc[-1])[:MOST])
    for i, (name, shown) in enumerate(best.items()):
        line = lines[name].sort_index()
        axes.plot(
            line.index,
            line.to_numpy(),
            label=shown,
            color=COLOURS[i],
            marker=MARKERS[i],
            markersize=5,
        )
    ticks = sorted({x for name in best for x in lines[name].index})
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    # A label that would touch the one before it is left out.
    places = np.log(ticks) if log else np.asarray(ticks)
    least, labels, last = 0.05 * (places[-1] - places[0]), [], -np.inf
    for tick, at in zip(ticks, places, strict=True):
        apart = at - last > least
        labels.append(f"{tick:g}" if apart else "")
        last = at if apart else last
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if y == PERCENT:
        # The axis must not go beyond 100 %.
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100))
        if high > 100:
            for drawn in axes.lines:
                drawn.set_clip_on(False)
    left_out = len(lines) - len(best)
    axes.set_title(title + (f"; {left_out} lower lines left out" if left_out else ""), fontsize=10)
    legend_below(figure, axes)
    return figure


def new_figure(across: float, high: float) -> tuple[Figure, Axes]:
    """Returns an empty figure of a size in inches, and its axes."""
    # Do not use pyplot, which opens windows and keeps global state.
    figure = Figure(figsize=(across, high), layout="constrained")
    return figure, figure.add_subplot()


def legend_below(figure: Figure, axes: Axes) -> None:
    """Adds the legend below the axes."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max(width(label, 9) for label in labels)
    # Put the legend below the axes: beside them, a long name would leave no room for the lines. The
    # figure grows by the height of the legend.
    columns = next((n for n in (4, 3, 2) if n * (longest + 0.6) < figure.get_figwidth()), 1)
    rows = math.ceil(len(labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * (rows - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def _short_names(names: Iterable[Hashable]) -> dict[str, str]:
    """Shortens names for a figure: words that all long names share become "…".

    If two names would still look the same, all names are numbered.
    """
    every = list(dict.fromkeys(map(str, names)))
    short = [_plain(name) for name in every]
    long = [set(name.split()[1:]) for name in short if len(name) > LONGEST]
    shared = set.intersection(*long) if len(long) > 1 else set()
    short = [_short(name, shared) for name in short]
    if len(set(short)) < len(short):
        short = [f"{i}. {name}" for i, name in enumerate(short, 1)]
    return dict(zip(every, short, strict=True))


def _plain(name: str) -> str:
    # `robust mnn m=1 euclidean` is clear enough in a figure; the tables have the full keywords.
    name = re.sub(r"\b(gen|agg|distance|votes)=", "", " ".join(name.split()))
    return name.replace("weighted_by_distance", "weighted")


def _short(name: str, shared: set[str]) -> str:
    if len(name) <= LONGEST:
        return name
    first, *words = name.split()
    words = ["…" if word in shared else word for word in words]
    kept = [word for i, word in enumerate(words) if word != "…" or words[i - 1 : i] != ["…"]]
    name = " ".join([first, *kept])
    # Keep both ends of a name, since names may differ at either end.
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[:half].rstrip()}…{name[1 - half :].lstrip()}"
