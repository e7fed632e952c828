"""How imprinting grows with the number of samples, classes, dimensions and proxies.

    python benchmarks/growth.py growth.png

CPU seconds of `imprint` without calibration on Gaussian classes, l2-normalised ReLU features; from
10,000 samples of 10 classes, 512 numbers each, k = 20, one of the four is varied. Prints the slope
of log seconds against the log of what varies, over the last doubling.
"""

import argparse
import math
import time

import matplotlib
import torch
from rich.console import Console
from rich.table import Table

from imprint_pl import imprint

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FIXED = dict(N=10_000, C=10, d=512, k=20)
VARIED = {
    "N": [2_500, 5_000, 10_000, 20_000, 40_000],
    "C": [10, 30, 100, 300, 1000],
    "d": [128, 256, 512, 1024, 2048],
    "k": [1, 5, 10, 20, 40, 80],
}
NAMES = {"N": "samples N", "C": "classes C", "d": "dimensions d", "k": "proxies a class k"}
RECIPES = {"qi": "o-", "robust": "s--", "ridge": "^-.", "lda": "v:", "kernel": "D-"}


def seconds(recipe: str, N: int, C: int, d: int, k: int, repeats: int) -> float:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N) % C
    centres = torch.randn(C, d, generator=generator)
    x = (torch.randn(N, d, generator=generator) + centres[y]).relu_()
    options = {"k": min(k, N // C)} if recipe == "robust" else {}
    best = math.inf
    for _ in range(repeats):
        start = time.process_time()
        imprint(x, y, recipe, calibrate=False, **options)
        best = min(best, time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", nargs="?", help="PNG; none by default")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seconds("qi", **FIXED, repeats=1)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.7), sharey=True, layout="constrained")
    table = Table("recipe", *(f"slope in {name}" for name in VARIED))
    slopes = {recipe: [] for recipe in RECIPES}
    for axis, (name, values) in zip(axes, VARIED.items(), strict=True):
        for recipe in RECIPES:
            if name == "k" and recipe != "robust":
                slopes[recipe].append("")
                continue
            times = [
                seconds(recipe, **(FIXED | {name: value}), repeats=arguments.repeats)
                for value in values
            ]
            colour = f"C{list(RECIPES).index(recipe)}"
            style = dict(color=colour, label=recipe, markersize=4)
            axis.loglog(values, times, RECIPES[recipe], **style)
            rise = math.log(times[-1] / times[-2]) / math.log(values[-1] / values[-2])
            slopes[recipe].append(f"{rise:.1f}")
        axis.set_xlabel(NAMES[name])
        axis.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("CPU seconds of imprint")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    if arguments.figure:
        figure.savefig(arguments.figure, dpi=90)
    for recipe, row in slopes.items():
        table.add_row(recipe, *row)
    Console().print(table)


if __name__ == "__main__":
    main()
