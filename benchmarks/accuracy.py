"""Real tasks: `auto` beside what people train on the same frozen features.

    python benchmarks/accuracy.py [--root ../shared/data] [--cache_dir FOLDER] [--tasks digits …]

Four tasks: TrashNet's photographs (the author's split), CIFAR-10 and Fashion-MNIST (10,000 training
images at 128 pixels, 3,000 and 10,000 test images), and scikit-learn's digits. The backbone is
EfficientNet-Lite0; embeddings are kept in a cache, so that a second run takes as long as the heads
alone.

The others get the features standardised, and the best of five values of C by five-fold
cross-validation on the training set (the SVM on 3,000 random samples of it at most, as more would
take hours). All times include that search, and `auto`'s include its own; they are processor
seconds, which a busy machine changes less, above all with OMP_NUM_THREADS=1. Test images choose
nothing.

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
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
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
    "Fashion-MNIST": (128, lambda root: FashionMNIST(root, download=False, shots=1000)),
    "digits": (128, lambda root: Digits()),
}
LAST, ALL = "last layer", "all layers"
REGRESSION_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
SVM_C = (0.1, 1.0, 10.0, 100.0, 1000.0)
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)
SEARCHED = 3000


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
    table = Table("task", "head", "features", "accuracy", "ECE", "log loss", "processor s")
    console = Console(width=100)
    for name in arguments.tasks:
        size, data = TASKS[name]
        try:
            task = embedded(data(arguments.root), size, arguments.cache_dir)
        except Exception as error:
            console.print(f"{name} is left out: {error}")
            continue
        for contender in CONTENDERS:
            given = task if contender.features == ALL else task.last()
            start = time.process_time()
            scores = contender.scores(given)
            seconds = time.process_time() - start
            figures = figures_of(scores, given.new_y, contender.sure)
            table.add_row(name, contender.name, contender.features, *figures, f"{seconds:.1f}")
            head = f"{contender.name}, {contender.features}"
            console.print(f"{name}: {head}: {figures[0]}, {seconds:.1f} s")
        table.add_section()
    console.print(table)


def embedded(data: ImageDataModule, size: int, cache_dir: str) -> Task:
    backbone = load_backbone("efficientnet_lite0", image_size=size, layers="all")
    rows = embed(backbone, data, Path(cache_dir))
    assert rows.layer_widths is not None
    return Task(*rows.arrays("train"), *rows.arrays("test"), list(rows.layer_widths))


def figures_of(scores: Tensor, labels: Tensor, sure: bool) -> list[str]:
    """Accuracy, expected calibration error and log loss, of probabilities or of mere scores."""
    accuracy = (scores.argmax(1) == labels).double().mean().item()
    if not sure:
        return [f"{100 * accuracy:.1f} %", "–", "–"]
    error = multiclass_calibration_error(scores, labels, scores.shape[1], n_bins=15).item()
    own = scores[torch.arange(len(labels)), labels].double()
    loss = -own.clamp_min(1e-12).log().mean().item()
    return [f"{100 * accuracy:.1f} %", f"{100 * error:.1f} %", f"{loss:.3f}"]


def imprinted(task: Task) -> Tensor:
    return imprint(task.x, task.y, layer_widths=task.widths)(task.new_x).softmax(1).detach()


def regression(task: Task) -> Tensor:
    scaler = StandardScaler().fit(task.x.numpy())
    x, new_x = scaler.transform(task.x.numpy()), scaler.transform(task.new_x.numpy())
    search = GridSearchCV(LogisticRegression(max_iter=300), {"C": REGRESSION_C}, cv=FOLDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(x, task.y.numpy())
    return torch.from_numpy(search.predict_proba(new_x))


def machine(task: Task) -> Tensor:
    """An SVM with the kernel exp(−‖x − z‖² / d), which is scikit-learn's default width.

    The kernel is computed beforehand, which takes a tenth of the time. The SVM gives no
    probabilities: fitting some would multiply the time by five.
    """
    scaler = StandardScaler().fit(task.x.numpy())
    x, new_x = scaler.transform(task.x.numpy()), scaler.transform(task.new_x.numpy())
    y, gamma = task.y.numpy(), 1 / x.shape[1]
    some = np.random.default_rng(0).permutation(len(x))[:SEARCHED]
    search = GridSearchCV(SVC(kernel="precomputed"), {"C": SVM_C}, cv=FOLDS, refit=False)
    search.fit(rbf_kernel(x[some], gamma=gamma), y[some])
    model = SVC(kernel="precomputed", **search.best_params_)
    model.fit(rbf_kernel(x, gamma=gamma), y)
    return torch.from_numpy(model.decision_function(rbf_kernel(new_x, x, gamma=gamma)))


def neighbours(task: Task) -> Tensor:
    model = KNeighborsClassifier(20, metric="cosine", weights="distance")
    model.fit(task.x.numpy(), task.y.numpy())
    return torch.from_numpy(model.predict_proba(task.new_x.numpy()))


class Contender(NamedTuple):
    """A head: its name, the features that it gets, whether it gives probabilities, and how its
    scores of the test samples come about."""

    name: str
    features: str
    sure: bool
    scores: Callable[[Task], Tensor]


CONTENDERS = (
    Contender("auto", ALL, True, imprinted),
    Contender("auto", LAST, True, imprinted),
    Contender("logistic regression", LAST, True, regression),
    Contender("logistic regression", ALL, True, regression),
    Contender("RBF SVM", ALL, False, machine),
    Contender("20 nearest neighbours", LAST, True, neighbours),
)


if __name__ == "__main__":
    main()
