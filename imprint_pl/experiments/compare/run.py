"""Compares backbones on the images of a data set: first on a part of them, then the best on all."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.evaluation.intervals import Interval, bootstrap, wilson
from imprint_pl.evaluation.predictions import Confusion
from imprint_pl.experiments.compare.candidates import (
    Candidate,
    Missing,
    candidates,
    found_backbones,
)
from imprint_pl.experiments.results import USUAL, Results
from imprint_pl.experiments.sweep.embeddings import load_splits
from imprint_pl.experiments.sweep.read import checked_sweep
from imprint_pl.experiments.sweep.run import sweep
from imprint_pl.files import local_path
from imprint_pl.method.recipes import AUTO
from imprint_pl.numerics.measures import measured_by

# A first round on a part of the images is worth it if there are at least this many times as many
# images.
PART_PAYS = 1.5
# Keywords that belong to the task in a sweep, and not to the data set.
OF_TASK = ("classes", "d", "num_labels", "task_seed")


@dataclass(frozen=True)
class Question:
    """The options of a comparison.

    Attributes:
        data: a data set as in a sweep's YAML: `name`, such as "ImageFolder", and keywords.
        backbones: names and patterns; if empty, all backbones whose weights are here.
        images: how many images the first round uses.
        finalists: how many backbones the second round compares on all images.
        name: the name of the folder of results.
        results_dir: the folder of all results.
        cache_dir: the embedding cache.
    """

    data: dict[str, Any]
    backbones: list[str] = field(default_factory=list)
    images: int = 2000
    finalists: int = 3
    name: str = "compare"
    results_dir: str = "results"
    cache_dir: str = "cache"

    @property
    def folder(self) -> Path:
        return Path(local_path(self.results_dir)) / self.name

    def command(self, candidate: Candidate, layers: str) -> str:
        """Return the command that fits a head on a backbone."""
        words = ["python", "-m", "imprint_pl", "fit", "--data", str(self.data["name"])]
        for name, value in self.data.items():
            if name != "name":
                words += [f"--data.{name}", str(value)]
        words += ["--model.backbone", candidate.entry["name"], "--model.layers", layers]
        if "image_size" in candidate.entry:
            words += ["--model.image_size", str(candidate.entry["image_size"])]
        return shlex.join([*words, "--cache_dir", self.cache_dir])


@dataclass(frozen=True, eq=False)
class Measured:
    """A backbone with the last or all layers, measured on images that no head has seen.

    Attributes:
        candidate: the backbone.
        layers: "last" or "all".
        accuracy, balanced_accuracy: fractions.
        accuracy_interval, balanced_interval: the 95 % intervals; the second is `None` if all
            predictions are correct.
        predicted, true: `(N,)`, the predicted and the true labels of the images.
    """

    candidate: Candidate
    layers: str
    accuracy: float
    accuracy_interval: Interval | None
    balanced_accuracy: float
    balanced_interval: Interval | None
    predicted: Tensor
    true: Tensor

    @property
    def width(self) -> int:
        """How many numbers an embedding has."""
        of_all = self.candidate.width_of_all
        return of_all if self.layers == "all" and of_all else self.candidate.width


class Round(NamedTuple):
    """The results of all backbones on the same images.

    Attributes:
        trained: how many training images the heads had.
        measured: the backbones, the best first.
    """

    trained: int
    measured: list[Measured]

    @property
    def images(self) -> int:
        """How many images were measured."""
        return len(self.measured[0].true)


@dataclass(frozen=True)
class Comparison:
    """The rounds of a comparison, the last one on all images.

    Attributes:
        missing: backbones that were not compared.
        on: the name of the split, "validation" or "test".
    """

    question: Question
    rounds: list[Round]
    missing: list[Missing]
    on: str


def compare(question: Question, progress: bool = True) -> Comparison:
    """Compares backbones, the last layer and all, with the recipe that `auto` chooses for each.

    The images are those that a `fit` measures: the validation split, else the test split. Results
    of earlier commands, also of killed ones, are read instead of measured again.

    Args:
        question: what to compare.
        progress: show bars on stderr.

    Returns:
        The rounds, and the backbones that were not compared.

    Raises:
        ImprintError: data that cannot be read; a pattern that matches no backbone; no backbone
            that can be loaded.
    """
    entry, task = _of_sweep(question)
    data, splits = load_splits(entry)
    assert data is not None  # `_of_sweep` refuses embeddings
    asked = found_backbones(question.backbones)
    question.folder.mkdir(parents=True, exist_ok=True)
    found, lost = candidates(asked.names, data, splits, question.folder)
    missing = [*lost, *asked.missing]
    if not found:
        reasons = "; ".join(f"{one.name}: {one.reason}" for one in missing[:5])
        raise ImprintError(f"there is no backbone to compare: {reasons or 'none is installed'}")
    # Read all splits, since `max_images` counts the images of all of them.
    whole = data.load()
    total = sum(len(s.labels) for s in (whole.train, whole.test, whole.val) if s is not None)
    rounds: list[Round] = []
    several = len(found) > question.finalists
    if several and question.images * PART_PAYS <= total:
        part = entry | {"label": f"{entry['name']}, {question.images:,} images"}
        part["max_images"] = question.images
        rounds.append(_round(question, part, task, found, progress))
        best = dict.fromkeys(one.candidate.name for one in rounds[0].measured)
        finalists = list(best)[: question.finalists]
        found = [one for one in found if one.name in finalists]
    rounds.append(_round(question, entry, task, found, progress))
    on = "test" if whole.val is None else "validation"
    return Comparison(question, rounds, missing, on)


def _of_sweep(question: Question) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the entries of the data set and of the task for a sweep."""
    given = dict(question.data)
    if "val_fraction" in given:
        raise ImprintError(
            "compare measures on the validation split, else on the test split: leave out "
            "val_fraction"
        )
    if "max_images" in given:
        raise ImprintError("compare takes a part of the images first by itself: give --images")
    task = {name: given.pop(name) for name in (*OF_TASK, "shots") if name in given}
    return {**given, "split": "val"}, task


def _round(
    question: Question,
    entry: dict[str, Any],
    task: dict[str, Any],
    found: Sequence[Candidate],
    progress: bool,
) -> Round:
    """Measures backbones on the images of a data entry."""
    of_task = {name: value for name, value in task.items() if name in OF_TASK}
    if of_task:
        of_task["name"] = ", ".join(f"{name} {value}" for name, value in of_task.items())
    grid: dict[str, Any] = {"recipe": AUTO}
    if task.get("shots") is not None:
        grid["shots"] = task["shots"]
    plan = checked_sweep(
        {
            "name": question.name,
            "backbones": [
                # Use the runtime "auto" as a fit does, so that the results are those of a fit.
                {**one.entry, "layers": _layers(one), "runtime": "auto"}
                for one in found
            ],
            "data": [entry],
            "tasks": [of_task or "all"],
            "grid": [grid],
        },
        "compare",
    )
    table = sweep(
        plan, question.results_dir, question.cache_dir, progress=progress, keep_labels=True
    )
    label = entry.get("label", entry["name"])
    rows = table[(table["data"] == label) & (table["task"] == plan.tasks[0].name)]
    shots = task.get("shots")
    rows = rows[rows["shots"].isna() if shots is None else rows["shots"] == shots]
    results, measured, trained = Results(question.folder), [], 0
    by_name = {one.name: one for one in found}
    for row in rows.to_dict("records"):
        layers = row.get("layers")
        layers = layers if isinstance(layers, str) else USUAL["layers"]
        candidate = by_name.get(row["backbone"])
        if candidate is None or layers not in _layers(candidate):
            continue  # from an earlier command with other backbones
        trained = int(row["num_train"])
        measured.append(_measured(candidate, layers, *results.labels(row["id"])))
    # Break ties, so that the order is always the same: the faster one, then the narrower one, comes
    # first.
    measured.sort(key=lambda one: (-one.accuracy, -one.candidate.images_a_second, one.width))
    return Round(trained, measured)


def _layers(candidate: Candidate) -> list[str]:
    return ["last"] if candidate.width_of_all is None else ["last", "all"]


def _measured(candidate: Candidate, layers: str, predicted: Any, true: Any) -> Measured:
    predicted, true = (torch.from_numpy(labels).long() for labels in (predicted, true))
    classes = int(torch.maximum(predicted.max(), true.max())) + 1
    pairs, counts = torch.unique(true * classes + predicted, return_counts=True)
    confusion = Confusion(pairs // classes, pairs % classes, counts, classes)
    right = int((predicted == true).sum())
    return Measured(
        candidate,
        layers,
        right / len(true),
        wilson(right, len(true)),
        measured_by("balanced_accuracy", predicted, true),
        bootstrap(confusion).balanced_accuracy,
        predicted,
        true,
    )
