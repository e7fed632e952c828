"""`auto` and single recipes against scikit-learn's logistic regression, on the same embeddings.

    python benchmarks/auto.py [--data FILE.safetensors] [--repeats 3]

Interleaved in one process; seconds are medians, with the spread. The logistic regression is on
standardised features, in float32 (its faster form), with one C that is told to it: choosing C by
itself would take five fits or more. The file has `train_embeddings`, `train_labels`,
`test_embeddings`, `test_labels`; without one, 10,000 random points of 1,280 numbers are used, on
which only the seconds mean anything.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchmetrics.functional.classification import multiclass_calibration_error

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
    arguments = parser.parse_args()
    try:
        data = load_file(arguments.data)
    except FileNotFoundError:
        print(f"{arguments.data} is not there: random points instead")
        data = random_points()
    x, test = data["train_embeddings"].float(), data["test_embeddings"].float()
    y, labels = data["train_labels"], data["test_labels"]
    classes = int(y.max()) + 1
    contenders = {"logistic regression": lambda: logistic_regression(x, y, test)} | {
        name: lambda name=name: imprint(x, y, name) for name in RECIPES
    }
    imprint(x[:500], y[:500], "kernel")  # what is loaded on first use
    seconds = {name: [] for name in contenders}
    results = {}
    for _ in range(arguments.repeats):
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


if __name__ == "__main__":
    main()
