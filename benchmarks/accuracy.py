"""Real tasks: `auto` beside what people train on the same frozen features.

    python benchmarks/accuracy.py [--root ../shared/data] [--cache_dir FOLDER] [--tasks digits …]

Four tasks: TrashNet's photographs (the author's split), CIFAR-10 and Fashion-MNIST (10,000 training
and 3,000 test images at 128 pixels), and scikit-learn's digits. The backbone is EfficientNet-Lite0;
embeddings are kept in a cache, so that a second run takes as long as the heads alone.

The others get the features standardised and the best of their settings by five-fold
cross-validation on the training set: C of five values for the logistic regression and the SVM. All
seconds include that search, and `auto`'s include its own. Test images choose nothing.

Tasks whose data are not below `--root` are left out, with a line.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

from imprint_pl import imprint
from imprint_pl.data import CIFAR10, Digits, FashionMNIST, ImageFolder
from imprint_pl.data.base import ImageDataModule
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone

TASKS: dict[str, tuple[int, Callable[[str], ImageDataModule]]] = {
    "TrashNet": (224, lambda root: ImageFolder(f"{root}/trashnet")),
    "CIFAR-10": (128, lambda root: CIFAR10(root, download=False)),
    "Fashion-MNIST": (128, lambda root: FashionMNIST(root, download=False)),
    "digits": (128, lambda root: Digits()),
}
LAST, ALL = "last layer", "all layers"
REGRESSION_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SVM_C = (0.1, 1.0, 10.0, 100.0, 1000.0)


class Task(NamedTuple):
    """Wide embeddings `(N, Σd)` and labels `(N,)` of a task, and the widths of the layers."""

    x: Tensor
    y: Tensor
    new_x: Tensor
    new_y: Tensor
    widths: list[int]

    def last(self) -> Task:
        """The task on the last layer alone."""
        width = self.widths[-1]
        return self._replace(
            x=self.x[:, -width:].contiguous(),
            new_x=self.new_x[:, -width:].contiguous(),
            widths=[width],
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="../shared/data")
    parser.add_argument("--cache_dir", default="runs/accuracy_cache")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments = parser.parse_args()
    table = Table("task", "head", "features", "accuracy", "ECE", "log loss", "seconds")
    console = Console(width=100)
    for name in arguments.tasks:
        size, data = TASKS[name]
        try:
            task = embedded(data(arguments.root), size, arguments.cache_dir)
        except Exception as error:
            console.print(f"{name} is left out: {error}")
            continue
        for contender, features, fit in CONTENDERS:
            given = task if features == ALL else task.last()
            start = time.perf_counter()
            probabilities = fit(given)
            seconds = time.perf_counter() - start
            figures = scored(probabilities, given.new_y)
            table.add_row(name, contender, features, *figures, f"{seconds:.1f}")
            console.print(f"{name}: {contender}, {features}: {figures[0]}, {seconds:.1f} s")
        table.add_section()
    console.print(table)


def embedded(data: ImageDataModule, size: int, cache_dir: str) -> Task:
    backbone = load_backbone("efficientnet_lite0", image_size=size, layers="all")
    rows = embed(backbone, data, Path(cache_dir))
    assert rows.layer_widths is not None
    return Task(*rows.arrays("train"), *rows.arrays("test"), list(rows.layer_widths))


def scored(probabilities: Tensor | None, labels: Tensor) -> list[str]:
    assert probabilities is not None
    classes = probabilities.shape[1]
    accuracy = (probabilities.argmax(1) == labels).double().mean().item()
    error = multiclass_calibration_error(probabilities, labels, classes, n_bins=15).item()
    own = probabilities[torch.arange(len(labels)), labels].double()
    loss = -own.clamp_min(1e-12).log().mean().item()
    return [f"{100 * accuracy:.1f} %", f"{100 * error:.1f} %", f"{loss:.3f}"]


def imprinted(task: Task) -> Tensor:
    return imprint(task.x, task.y, layer_widths=task.widths)(task.new_x).softmax(1).detach()


def searched(model, grid: dict[str, tuple[float, ...]]) -> Callable[[Task], Tensor]:
    """A scikit-learn classifier on standardised features, its setting found by cross-validation."""

    def fit(task: Task) -> Tensor:
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        step = type(model).__name__.lower()
        search = GridSearchCV(
            make_pipeline(StandardScaler(), model),
            {f"{step}__{name}": values for name, values in grid.items()},
            cv=folds,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            search.fit(task.x.numpy(), task.y.numpy())
            return probabilities_of(search.best_estimator_, task)

    return fit


def neighbours(task: Task) -> Tensor:
    model = KNeighborsClassifier(20, metric="cosine", weights="distance")
    return probabilities_of(model.fit(task.x.numpy(), task.y.numpy()), task)


def probabilities_of(model, task: Task) -> Tensor:
    if hasattr(model, "predict_proba"):
        return torch.from_numpy(np.ascontiguousarray(model.predict_proba(task.new_x.numpy())))
    # An SVM has no probabilities: scikit-learn's own search for some multiplies its time by five.
    return torch.from_numpy(model.decision_function(task.new_x.numpy())).softmax(1)


REGRESSION = searched(LogisticRegression(max_iter=300), {"C": REGRESSION_C})
MACHINE = searched(SVC(), {"C": SVM_C})
CONTENDERS: tuple[tuple[str, str, Callable[[Task], Tensor]], ...] = (
    ("auto", ALL, imprinted),
    ("auto", LAST, imprinted),
    ("logistic regression", LAST, REGRESSION),
    ("logistic regression", ALL, REGRESSION),
    ("RBF SVM", ALL, MACHINE),
    ("20 nearest neighbours", LAST, neighbours),
)


if __name__ == "__main__":
    main()
