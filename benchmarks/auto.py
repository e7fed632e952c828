"""`auto` and single recipes against scikit-learn's logistic regression, on the same embeddings.

    python benchmarks/auto.py [--data FILE.safetensors] [--repeats 3]
    python benchmarks/auto.py --tasks TrashNet digits [--samples 300 1000] [--draws 3]

The first form prints one table. Fits are interleaved in one process; seconds are medians, with the
spread. The logistic regression is on standardised features, in float32 (its faster form), with one
C that is told to it. The file has `train_embeddings`, `train_labels`, `test_embeddings`,
`test_labels`; without one, 10,000 random points of 1,280 numbers are used, on which only the
seconds mean anything.

The second form prints two tables on real rows: the embeddings of the file, or those of tasks of
`accuracy.py` on all layers, which are computed on first use and kept in `--cache_dir`. Each is
taken whole, or in random subsets of so many `--samples`, drawn `--draws` times. The first table has
the CPU seconds of `auto` and of a regression that searches five C by five-fold cross-validation.
The second has the recipe that `auto` chose, what each of its candidates has on the test split, and
the p of McNemar's test between the choice and the best of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from accuracy import TASKS, Task, embedded, regression
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from imprint_pl.errors import ImprintError
from imprint_pl.method.auto import ONE_LAYER, SEVERAL_LAYERS
from imprint_pl.method.imprinting import imprint

RECIPES = ("auto", "kernel", "ridge", "whitened", "lda", "robust")


def random_points() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 1280, generator=generator)
    data = {}
    for split, samples in (("train", 10_000), ("test", 5_000)):
        labels = torch.arange(samples) % 10
        noise = torch.randn(samples, 1280, generator=generator)
        data[f"{split}_embeddings"] = (centres[labels] + 8 * noise).relu()
        data[f"{split}_labels"] = labels
    return data


def logistic_regression(x, y, test):
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    model.fit(x.numpy(), y.numpy())
    return torch.from_numpy(model.predict_proba(test.numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data", default="../shared/acceptance/fashion_mnist_efficientnet_lite0.safetensors"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", default=[], choices=list(TASKS))
    parser.add_argument("--root", default="../shared/data")
    parser.add_argument("--cache_dir", default="runs/accuracy_cache")
    parser.add_argument("--samples", nargs="*", type=int, default=[])
    parser.add_argument("--draws", type=int, default=1)
    arguments = parser.parse_args()
    try:
        data = load_file(arguments.data)
    except FileNotFoundError:
        print(f"{arguments.data} is not there: random points instead")
        data = random_points()
    x, test = data["train_embeddings"].float(), data["test_embeddings"].float()
    file = Task(x, data["train_labels"], test, data["test_labels"], [x.shape[1]])
    imprint(x[:500], file.y[:500], "kernel")  # what is loaded on first use
    if arguments.tasks or arguments.samples:
        on_real_rows(arguments, file)
    else:
        beside_a_told_regression(file, arguments.repeats)


def beside_a_told_regression(data: Task, repeats: int) -> None:
    x, y, test, labels = data.x, data.y, data.new_x, data.new_y
    classes = int(y.max()) + 1
    contenders = {"logistic regression": lambda: logistic_regression(x, y, test)} | {
        name: lambda name=name: imprint(x, y, name) for name in RECIPES
    }
    seconds = {name: [] for name in contenders}
    results = {}
    for _ in range(repeats):
        for name, fit in contenders.items():
            start = time.perf_counter()
            results[name] = fit()
            seconds[name].append(time.perf_counter() - start)
    probe = seconds["logistic regression"]
    table = Table("", "accuracy", "ECE", "seconds", "of the regression's", "spread")
    for name, result in results.items():
        probabilities = result if name == "logistic regression" else result(test).softmax(1)
        accuracy = (probabilities.argmax(1) == labels).double().mean().item()
        error = multiclass_calibration_error(probabilities, labels, classes, n_bins=15).item()
        ratios = [own / other for own, other in zip(seconds[name], probe, strict=True)]
        table.add_row(
            name,
            f"{100 * accuracy:.2f} %",
            f"{100 * error:.2f} %",
            f"{statistics.median(seconds[name]):.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
        )
    Console(width=100).print(table)


class Timed(NamedTuple):
    """A result and the CPU seconds that it took."""

    result: Any
    seconds: float


def timed(function: Callable[[], Any]) -> Timed:
    start = time.process_time()
    result = function()
    return Timed(result, time.process_time() - start)


def on_real_rows(arguments: argparse.Namespace, file: Task) -> None:
    times = Table("rows", "samples", "auto", "CPU s", "regression", "CPU s", "ratio")
    choices = Table("rows", "samples", "auto chose", "right", "candidates", "below best", "p")
    console = Console(width=130)
    for name, whole in real_rows(arguments, file):
        for task in subsets(whole, arguments.samples, arguments.draws):
            head, seconds = timed(lambda task=task: fitted(task))
            scores, searched = timed(lambda task=task: regression(task))
            chosen, given = right(head(task.new_x), task), right(scores, task)
            samples = f"{len(task.y):,}"
            times.add_row(
                name,
                samples,
                f"{percent(chosen)} %",
                f"{seconds:.2f}",
                f"{percent(given)} %",
                f"{searched:.2f}",
                f"{seconds / searched:.2f}",
            )
            tried = [right_by(candidate, task) for candidate in candidates(task)]
            best = max(tried, key=percent_of)
            below = percent_of(best) - percent_of(chosen)
            choices.add_row(
                name,
                samples,
                f"{head.settings['recipe']} {head.settings['norm_pre']}",
                percent(chosen),
                ", ".join(map(percent, tried)),
                f"{below:.1f}",
                f"{mcnemar(chosen, best):.3f}",
            )
            console.print(f"{name}, {samples}: {seconds:.2f} s of {searched:.2f} s", style="dim")
    console.print(times)
    console.print(choices)


def real_rows(arguments: argparse.Namespace, file: Task) -> Iterator[tuple[str, Task]]:
    if not arguments.tasks:
        yield "file, last layer", file
    for name in arguments.tasks:
        size, data = TASKS[name]
        yield name, embedded(data(arguments.root), size, arguments.cache_dir)


def subsets(task: Task, sizes: list[int], draws: int) -> Iterator[Task]:
    """The task with so many of its training samples, drawn anew each time; whole without sizes."""
    if not sizes:
        yield task
    for size in sizes:
        for draw in range(draws):
            generator = torch.Generator().manual_seed(draw)
            rows = torch.randperm(len(task.y), generator=generator)[:size]
            yield task._replace(x=task.x[rows], y=task.y[rows])


def candidates(task: Task) -> tuple[dict[str, Any], ...]:
    return SEVERAL_LAYERS if len(task.widths) > 1 else ONE_LAYER


def fitted(task: Task, recipe: str = "auto", **keywords: Any):
    widths = task.widths if len(task.widths) > 1 else None
    return imprint(task.x, task.y, recipe, layer_widths=widths, **keywords)


def right_by(candidate: dict[str, Any], task: Task) -> Tensor:
    """Which test samples the candidate labels right, `(n,)`; none if it cannot be imprinted."""
    try:
        return right(fitted(task, calibrate=False, **candidate)(task.new_x), task)
    except ImprintError:
        return torch.zeros(len(task.new_y), dtype=torch.bool)


def right(scores: Tensor, task: Task) -> Tensor:
    return scores.argmax(1) == task.new_y


def percent_of(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def percent(right: Tensor) -> str:
    return f"{percent_of(right):.1f}"


def mcnemar(one: Tensor, other: Tensor) -> float:
    """The p of McNemar's exact test between the samples `(n,)` that two heads label right."""
    alone, differ = int((one & ~other).sum()), int((one != other).sum())
    return binomtest(alone, differ).pvalue if differ else 1.0


if __name__ == "__main__":
    main()
