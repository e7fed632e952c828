"""The embeddings that a sweep works on, and the positions of the classes in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import imprint_pl.data
from imprint_pl.data import ArrayDataset, ImageDataModule, Splits
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.experiments.sweep.grid import Task
from imprint_pl.files import local_path
from imprint_pl.method.inputs import checked
from imprint_pl.numerics.order import in_order
from imprint_pl.numerics.values import check_size, check_values

ARRAYS = ("train_embeddings", "train_labels", "test_embeddings", "test_labels")


@dataclass
class Embeddings:
    """Embeddings and original labels of both splits, for the classes of the tasks.

    They are NumPy arrays, so that joblib shares them among processes instead of copying them.

    Attributes:
        train_x, test_x: float32 `(N, d)`. The training rows are sorted by class, so that a class is
            a slice; within a class they have the order of `in_order`, as in `imprint`.
        train_y, test_y: int64 `(N,)`, indices into `class_names`.
        order: int64 `(N,)`, the indices of the training rows in the data set.
        rank: int64 `(N,)`, their positions in the order in which `imprint` processes them.
        layer_widths: the widths of the layers in an embedding; `None` for one layer.
        classifier: `(·, d)`, the backbone's original classifier, for NORM_post quantile.
    """

    class_names: list[str]
    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray
    order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    rank: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    layer_widths: list[int] | None = None
    classifier: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not len(self.order):
            rows = in_order(tensor(self.train_x), tensor(self.train_y)).numpy()
            by_class = np.argsort(self.train_y[rows], kind="stable")
            self.order, self.rank = rows[by_class], by_class
            if not np.array_equal(self.order, np.arange(len(self.order))):
                self.train_x, self.train_y = self.train_x[self.order], self.train_y[self.order]
                # Copy: an array from a file is a view that would keep the whole file in memory.
                self.test_x = self.test_x.copy()


def load_splits(entry: dict[str, Any]) -> tuple[ImageDataModule | None, Splits]:
    """Load a data set before embedding, with its data module (`None` for embeddings)."""
    if "embeddings" in entry:
        return None, _from_file(entry)
    arguments = {n: v for n, v in entry.items() if n not in ("name", "label", "split")}
    data = getattr(imprint_pl.data, entry["name"], None)
    known = [n for n in imprint_pl.data.__all__ if n not in ("Splits", "ArrayDataset")]
    of_images = isinstance(data, type) and issubclass(data, ImageDataModule)
    if data is None or entry["name"] not in known or not of_images:
        raise ImprintError(f"unknown data {entry['name']!r}{did_you_mean(entry['name'], known)}")
    task_options = {"classes", "d", "num_labels", "task_seed", "shots", "val_fraction"}
    if task_options & set(arguments):
        raise ImprintError(
            f"data {entry['name']!r}: {min(task_options & set(arguments))} belongs to tasks or grid"
        )
    try:
        module = data(**arguments)
    except TypeError as error:
        raise ImprintError(f"data {entry['name']!r}: {error}") from error
    module.prepare_data()
    return module, _measured_on(module.load(), entry)


def _measured_on(splits: Splits, entry: dict[str, Any]) -> Splits:
    """Return the splits with the images to measure on as test split: with `split: val` those of the
    validation split, if there is one."""
    split = entry.get("split", "test")
    if split not in ("test", "val"):
        raise ImprintError(f"data {entry['name']!r}: split={split!r}: give test or val")
    if split == "val" and splits.val is not None:
        return replace(splits, test=splits.val)
    return splits


def load_embeddings(
    source: tuple[dict | None, dict], tasks: list[Task], cache_dir: str | Path
) -> Embeddings:
    """Embed a data set by a backbone, through the cache; only the classes that a task needs."""
    backbone_entry, entry = source
    module, splits = load_splits(entry)
    needed = sorted({c for t in tasks for g in t.groups(splits.class_names) for c in g})
    classifier, widths = None, entry.get("layer_widths")
    if module is not None:
        assert backbone_entry is not None
        arguments = dict(backbone_entry)
        # Use torch unless the grid says otherwise, as for all results of the paper's recipes.
        arguments.setdefault("runtime", "torch")
        try:
            backbone = load_backbone(arguments.pop("name"), **arguments)
        except TypeError as error:
            raise ImprintError(f"backbone {backbone_entry['name']!r}: {error}") from error
        if len(needed) < len(splits.class_names):
            module.classes = [splits.class_names[c] for c in needed]
        whole = embed(backbone, module, cache_dir).splits
        splits = _measured_on(whole, entry)
        widths = backbone.layer_widths
        if backbone.classifier is not None:
            classifier = backbone.classifier.float().cpu().numpy()
    arrays: list[np.ndarray] = []
    sets: list[tuple[str, Any]] = [("training", splits.train), ("test", splits.test)]
    for split, dataset in sets:
        kept = torch.isin(dataset.labels, torch.tensor(needed)).nonzero().flatten()
        if module is not None:
            kept = module.sample_of(whole, dataset, kept)
        selected = dataset.select(kept, dataset.labels[kept])
        largest = check_values(selected.images, f"data {entry['name']!r}, {split}: ")
        if dataset is splits.train:
            check_size(largest)
        arrays += [selected.images.numpy(), selected.labels.numpy()]
    for name, labels in (("training", arrays[1]), ("test", arrays[3])):
        missing = set(needed) - set(labels.tolist())
        if missing and name == "training":
            raise ImprintError(
                f"data {entry['name']!r}: class {splits.class_names[min(missing)]!r} has no "
                f"{name} sample: leave it out of the tasks"
            )
    train_x, train_y, test_x, test_y = arrays
    if widths is not None and sum(widths) != train_x.shape[1]:
        raise ImprintError(
            f"data {entry['name']!r}: layer_widths={widths} add up to {sum(widths)}, and the "
            f"embeddings have {train_x.shape[1]} numbers: give the width of every layer"
        )
    return Embeddings(
        splits.class_names,
        train_x,
        train_y,
        test_x,
        test_y,
        layer_widths=widths,
        classifier=classifier,
    )


def _from_file(entry: dict[str, Any]) -> Splits:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = local_path(entry["embeddings"])
    try:
        file = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ImprintError(f"data {entry['name']!r}: {path}: {error}") from error
    missing = [name for name in ARRAYS if name not in file]
    if missing:
        raise ImprintError(
            f"data {entry['name']!r}: {path} has no {missing[0]!r}: it needs {', '.join(ARRAYS)}"
        )
    parts, size = [], 0
    for split, place in (("train", "training"), ("test", "test")):
        x, y = file[f"{split}_embeddings"], file[f"{split}_labels"]
        x = x if x.is_floating_point() else x.float()
        y = y.long() if y.is_floating_point() and bool((y == y.round()).all()) else y
        try:
            x, y, classes = checked(x, y, None, None, allow_empty=True)
        except ImprintError as error:
            raise ImprintError(f"data {entry['name']!r}, {place}: {error}") from error
        parts.append(ArrayDataset(x, y))
        size = max(size, classes)
    widths = [part.images.shape[1] for part in parts]
    if widths[0] != widths[1]:
        raise ImprintError(
            f"data {entry['name']!r}: {path}: train_embeddings have {widths[0]} numbers a sample, "
            f"test_embeddings {widths[1]}: give embeddings of one backbone"
        )
    names = entry.get("class_names") or [str(c) for c in range(size)]
    if not isinstance(names, list | tuple):
        raise ImprintError(f"data {entry['name']!r}: class_names={names!r}: give a list of names")
    if len(names) < size:
        raise ImprintError(f"data {entry['name']!r}: {len(names)} class_names for {size} classes")
    return Splits([str(name) for name in names], parts[0], parts[1])


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)
