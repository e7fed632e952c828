"""The page of a comparison: accuracy against time, which backbone to take, and the command."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from imprint_pl import __version__
from imprint_pl.drawing import style
from imprint_pl.drawing.page import Cell, Column, PageTable, cell, data_url, render
from imprint_pl.errors import shown
from imprint_pl.evaluation.intervals import Interval
from imprint_pl.experiments.compare.choice import better_layers, chosen_of, front_of, sentences
from imprint_pl.experiments.compare.run import Comparison, Measured, Round
from imprint_pl.experiments.report.figures import (
    COLOURS,
    MARKERS,
    PERCENT,
    legend_below,
    new_figure,
)
from imprint_pl.files import write_whole

NOTE = (
    "Each row is a backbone with the last layer or all layers, and the recipe that auto chooses. "
    "Intervals of 95 %: Wilson's for accuracy, a bootstrap for balanced accuracy, which is the "
    "mean of the classes' accuracies. Images a second: embedding alone, on this machine, of images "
    "that are decoded. The best of many looks a little better on these images than it is."
)


def table_of(found: Round) -> pd.DataFrame:
    """Return a row for each backbone and its layers, the best first; fractions and numbers."""
    on_front = front_of(better_layers(found))
    rows = []
    for one in found.measured:
        balanced = one.balanced_interval or Interval(float("nan"), float("nan"))
        accuracy = one.accuracy_interval or Interval(float("nan"), float("nan"))
        rows.append(
            {
                "backbone": one.candidate.name,
                "layers": one.layers,
                "accuracy": one.accuracy,
                "accuracy_low": accuracy.low,
                "accuracy_high": accuracy.high,
                "balanced_accuracy": one.balanced_accuracy,
                "balanced_low": balanced.low,
                "balanced_high": balanced.high,
                "images_a_second": one.candidate.images_a_second,
                "parameters": one.candidate.parameters,
                "width": one.width,
                "image_size": one.candidate.image_size,
                "runtime": one.candidate.runtime,
                "pareto_front": one in on_front,
                "training_images": found.trained,
                "images": found.images,
            }
        )
    return pd.DataFrame(rows)


# The headers of the columns, and whether a column holds numbers.
COLUMNS = {
    "backbone": False,
    "layers": False,
    "accuracy": True,
    "interval": False,
    "balanced": True,
    "its interval": False,
    "images/s": True,
    "parameters": True,
    "width": True,
    "front": False,
}


def cells(found: Round) -> list[list[Cell]]:
    """Return the rows of `table_of` as they are shown, with the columns `COLUMNS`."""
    return [
        [
            Cell(shown(row["backbone"])),
            Cell(row["layers"]),
            cell(row["accuracy"], f"{100 * row['accuracy']:.1f} %"),
            Cell(_ends(row["accuracy_low"], row["accuracy_high"])),
            cell(row["balanced_accuracy"], f"{100 * row['balanced_accuracy']:.1f} %"),
            Cell(_ends(row["balanced_low"], row["balanced_high"])),
            cell(row["images_a_second"], f"{row['images_a_second']:,.1f}"),
            cell(row["parameters"], f"{row['parameters'] / 1e6:,.1f} M"),
            cell(row["width"], f"{row['width']:,}"),
            Cell("Pareto" if row["pareto_front"] else ""),
        ]
        for row in table_of(found).to_dict("records")
    ]


def _ends(low: float, high: float) -> str:
    return "" if low != low else f"{100 * low:.1f} to {100 * high:.1f} %"


def draw(found: Round, order: Sequence[str]) -> Figure:
    """Draw accuracy against the time per image, for each backbone with the better of its layers.

    Args:
        found: the round to draw.
        order: the names of backbones, the important ones first: these get the colours.
    """
    measured = better_layers(found)
    front = front_of(measured)
    coloured = list(order)[: len(COLOURS)]
    named = [one for one in measured if one.candidate.name in coloured]
    figure, axes = new_figure(6.0, 4.2)
    axes.plot(
        [_milliseconds(one) for one in front],
        [100 * one.accuracy for one in front],
        color="#888888",
        linewidth=1.2,
        linestyle="--",
        # Between two backbones on the front, more time does not bring more accuracy.
        drawstyle="steps-post",
        label="Pareto front",
        zorder=1,
    )
    others = [one for one in measured if one not in named]
    if others:
        axes.plot(
            [_milliseconds(one) for one in others],
            [100 * one.accuracy for one in others],
            "o",
            color="#bbbbbb",
            markersize=5,
            label="others",
        )
    for one in named:
        number = coloured.index(one.candidate.name)
        low, high = one.accuracy_interval or (one.accuracy, one.accuracy)
        axes.errorbar(
            _milliseconds(one),
            100 * one.accuracy,
            [[100 * max(one.accuracy - low, 0)], [100 * max(high - one.accuracy, 0)]],
            color=COLOURS[number],
            marker=MARKERS[number],
            markersize=8,
            capsize=3,
            linestyle="none",
            label=f"{shown(one.candidate.name)}, {one.layers}",
        )
    axes.set_xscale("log")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _ticks(axes, [_milliseconds(one) for one in measured])
    axes.set_xlabel("milliseconds an image (left is faster)")
    axes.set_ylabel(PERCENT)
    axes.set_title(f"{found.images:,} images, {found.trained:,} to learn from", fontsize=10)
    legend_below(figure, axes)
    return figure


def _ticks(axes: Axes, times: Sequence[float]) -> None:
    """Labels 1, 2 and 5 times powers of ten, so that a narrow range has labels, too."""
    low, high = min(times) / 1.3, max(times) * 1.3
    ticks = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    if len(inside) < 2:
        inside = sorted({float(f"{time:.2g}") for time in (min(times), max(times))})
    axes.set_xticks(inside)
    axes.minorticks_off()
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _milliseconds(one: Measured) -> float:
    return 1000 / one.candidate.images_a_second


def write_comparison(comparison: Comparison) -> Path:
    """Writes `compare.html` and `compare.csv`, the table of the last round, into the results.

    Returns:
        The path of the page.
    """
    question, last = comparison.question, comparison.rounds[-1]
    table_of(last).to_csv(question.folder / "compare.csv", index=False)
    chosen = chosen_of(last).chosen
    first = comparison.rounds[:-1]
    rounds = [("all", f"On all images: {len(better_layers(last))} backbones", last)]
    rounds += [
        ("part", f"First look, on {one.images + one.trained:,} images: all backbones", one)
        for one in first
    ]
    page = render(
        Path(__file__).with_name("page.html.jinja"),
        name=shown(question.name),
        facts=[
            f"{last.trained:,} training images",
            f"{last.images:,} {comparison.on} images",
            f"{len(better_layers(comparison.rounds[0]))} backbones",
        ],
        sentences=sentences(last, comparison.on),
        command=question.command(chosen.candidate, chosen.layers),
        figures=[(id, title, _svg(one, _order(comparison))) for id, title, one in rounds],
        tables=[
            PageTable(
                f"{id}-table",
                title,
                NOTE if id == "all" else "",
                [Column(name, number) for name, number in COLUMNS.items()],
                cells(one),
                filtered=len(one.measured) > 12,
            )
            for id, title, one in rounds
        ],
        missing=[(shown(one.name), shown(one.reason)) for one in comparison.missing],
        version=__version__,
    )
    return write_whole(question.folder / "compare.html", page.encode())


def _order(comparison: Comparison) -> list[str]:
    """Return the names of all backbones: first those on a front, then the others by accuracy."""
    rounds = [better_layers(one) for one in reversed(comparison.rounds)]
    found = [*(one for measured in rounds for one in front_of(measured)), *rounds[-1]]
    return list(dict.fromkeys(one.candidate.name for one in found))


def _svg(found: Round, order: Sequence[str]) -> str:
    content = io.BytesIO()
    with style():
        # Write no date, so that the same results give the same file.
        draw(found, order).savefig(content, format="svg", metadata={"Date": None})
    return data_url(content.getvalue(), "image/svg+xml")
