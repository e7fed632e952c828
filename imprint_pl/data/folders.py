"""Image files of one's own: a folder a class, or any files to predict.

The files are found here, decoded by the workers (files.py, decode.py) and never kept.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from imprint_pl.data import tasks
from imprint_pl.data.base import ImageDataModule, Splits
from imprint_pl.data.decode import extensions
from imprint_pl.data.finding import (
    _but,
    _files_at,
    _has_own_images,
    _holds_images,
    _list,
    _subfolders,
    _tell_left_out,
    _tell_loose,
    find_images,
)
from imprint_pl.data.image_files import SKIP_ADVICE, ImageFileDataset, unreadable
from imprint_pl.errors import ImprintError, shown
from imprint_pl.numerics.labels import check_composition, composed, place_of, warn_of_alike
from imprint_pl.ranks import ranks

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

TEST_SEED = 0
# Of images that cannot be read, named in a message.
UNREADABLE_SHOWN = 10


class ImageFolder(ImageDataModule):
    """Images in a folder a class; the folders' names, sorted, are the classes.

    Either `<root>/train/<class>/` with `<root>/val/`, `<root>/test/` or both (one alone serves as
    validation and test), or `<root>/<class>/` alone: then `test_fraction` of each class is held
    out as validation and test. Beside other folders of images, and without val and test, "train" is
    a class like them. Folders may be nested. What is read is known by the endings of the names, and
    by content where a name has none. Hidden files, texts and folders of systems, such as
    `__MACOSX`, are ignored; a warning counts all else that is left out. A batch's images are a list
    of uint8 `(C, H, W)` of the files' own sizes.

    Args:
        root: The folder.
        test_fraction: Part of each class held out as the test split where the folder has no split
            of its own. It depends on no seed, so that a later test never sees training images.
        max_side: Longest side in pixels; larger images are shrunk in the workers. Left out, images
            keep their size: a photo of 12 megapixels takes 36 MB, a batch of 64 of them 2.3 GB, and
            each worker has two batches under way.
        classes: Classes to keep, as names or as indices into the sorted names (where all names are
            numbers, a number is a name); they become labels 0..C-1 in this order. An inner list is
            merged into one label, as in [[cat, dog], bird]. Or a subset by name: "all", "even",
            "odd", "short" (the first three). All of them where left out.
        d: Makes a d-in-1 task: each label merges d of the classes, drawn with `task_seed`.
        num_labels: Of the d-in-1 task; as many as the classes suffice for where left out.
        task_seed: Of the d-in-1 task.
        shots: Training images a label, drawn at random; all of them where left out. A label with
            fewer is an error.
        val_fraction: Part of each class's training images to hold out for validation, where the
            folder has no `val`; 0 validates on the test split.
        batch_size: Images a batch (and a process); smaller than for sets in memory, since photos
            are large.
        num_workers: Processes that decode image files; where left out, one for each processor core
            that this process has (16 at most).
        seed: Of the shots and of the held-out validation part.
        on_error: "fail" at the first image that cannot be read, or "skip": before anything else,
            each image is decoded once, and those that cannot be read are named in a warning and
            left out, as if they were not there (`unreadable`).
    """

    def __init__(
        self,
        root: str,
        test_fraction: float = 0.2,
        max_side: int | None = None,
        classes: list[int | str | list[int | str]] | str | None = None,
        d: int | None = None,
        num_labels: int | None = None,
        task_seed: int = 0,
        shots: int | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 64,
        num_workers: int | None = None,
        seed: int = 0,
        on_error: str = "fail",
    ) -> None:
        super().__init__(
            root=root,
            classes=classes,
            d=d,
            num_labels=num_labels,
            task_seed=task_seed,
            shots=shots,
            val_fraction=val_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            download=False,
            seed=seed,
        )
        if not 0 < test_fraction < 1:
            raise ImprintError(
                f"test_fraction={test_fraction} is not between 0 and 1: it is the part of each "
                "class to hold out as test, as in test_fraction=0.2"
            )
        _check_max_side(max_side)
        self.name = shown(Path(self.root).resolve().name)
        self.test_fraction = test_fraction
        self.max_side = max_side
        self.on_error = _checked_on_error(on_error)
        # Files that are known to be readable or not.
        self._looked_at: set[str] = set()

    def load(self) -> Splits:
        folders = split_folders(Path(self.root))
        train_folder = folders.get("train", Path(self.root))
        _check_classes(train_folder)
        class_names, train = self._read(train_folder)
        others = {
            split: self._read(folders[split], class_names)[1]
            for split in ("val", "test")
            if split in folders
        }
        if others:
            test = others.get("test", others.get("val"))
            return Splits(class_names, train, test, others.get("val"))
        every_class = range(len(class_names))
        staying, held = tasks.draw(
            train.labels, class_names, every_class, self.test_fraction, seed=TEST_SEED
        )
        rank_zero_info(
            f"{train_folder} has no test split: {len(held)} of its {len(train)} images are held "
            f"out as validation and test (test_fraction={self.test_fraction})"
        )
        return Splits(
            class_names,
            train.select(staying, train.labels[staying]),
            train.select(held, train.labels[held]),
        )

    def _read(
        self, folder: Path, class_names: list[str] | None = None
    ) -> tuple[list[str], ImageFileDataset]:
        found = _subfolders(folder)
        lost = [path for path in folder.iterdir() if not path.exists()]
        if lost:
            rank_zero_warn(f"{lost[0]} is a link that leads nowhere: it is not read")
        if not found:
            raise ImprintError(
                f"{folder} has no class folders: put the images of each class into a folder of "
                "the class's name; images without classes are for ImageFiles (predict)"
            )
        # A class's name is printed and written into checkpoints: never bytes that are no text.
        folder_of = {shown(name): folder / name for name in found}
        if len(folder_of) < len(found):
            raise ImprintError(
                f"{shown(folder)} has class folders whose names look alike in text: rename one"
            )
        found = list(folder_of)
        is_test = class_names is not None
        if class_names is None:
            class_names = [composed(name) for name in found]
        places = [place_of(name, class_names) for name in found]
        for name, place in zip(found, places, strict=True):
            if place is None:
                raise ImprintError(
                    f"the class folder {folder / name} has no counterpart among the training "
                    f"classes ({tasks.near_names(name, class_names)}): rename or remove it, or "
                    "add training images"
                )
        absent = [name for place, name in enumerate(class_names) if place not in places]
        if absent:
            rank_zero_warn(f"{folder} has no folder for {', '.join(absent)}: not evaluated")
        paths: list[str] = []
        labels: list[int] = []
        left_out: dict[str, Counter] = {}
        for name, place in zip(found, places, strict=True):
            left_out[str(folder_of[name])] = counts = Counter()
            images = list(find_images(folder_of[name], counts))
            if not images:
                raise ImprintError(
                    f"the class folder {folder / name} holds no image{_but(counts)}: add images "
                    f"({', '.join(extensions())}) or remove the folder"
                )
            paths += images
            labels += [place] * len(images)
        _tell_left_out(left_out)
        _tell_loose(folder)
        dataset = ImageFileDataset(paths, torch.tensor(labels), self.max_side, advice=SKIP_ADVICE)
        if self.on_error == "skip":
            self._look_at(paths, folder)
            kept = [i for i, path in enumerate(paths) if path not in self.unreadable]
            kept = torch.tensor(kept, dtype=torch.int64)
            dataset = dataset.select(kept, dataset.labels[kept])
            absent = [] if is_test else sorted(set(labels) - set(dataset.labels.tolist()))
            if absent:
                raise ImprintError(
                    f"no image of the class folder {folder / class_names[absent[0]]} can be read: "
                    "replace the images, or remove the folder"
                )
        return class_names, dataset

    def _look_at(self, paths: list[str], folder: Path) -> None:
        """Adds those of `paths` that cannot be read to `unreadable`."""
        new = [path for path in paths if path not in self._looked_at]
        workers = self._free_processors() if self.num_workers is None else self.num_workers
        # Each rank looks at its share. Without a Trainer there may be no other that waits.
        shares = ranks() if self.trainer is not None else 1
        own = new[dist.get_rank() :: shares] if shares > 1 else new
        found = [unreadable(own, self.max_side, workers)] * shares
        if shares > 1:
            dist.all_gather_object(found, found[0])
        faults = {path: reason for share in found for path, reason in share.items()}
        self._looked_at.update(new)
        # In the order of the data set.
        self.unreadable |= {path: faults[path] for path in new if path in faults}
        if faults:
            names = [shown(path) for path in new if path in faults]
            more = len(names) - UNREADABLE_SHOWN
            rank_zero_warn(
                f"{len(names)} of {len(new)} images below {shown(folder)} cannot be read and are "
                f"left out: {', '.join(names[:UNREADABLE_SHOWN])}"
                f"{f' and {more} more' if more > 0 else ''}"
            )


class ImageFiles(ImageDataModule):
    """Image files without labels, to predict.

    A batch is a list of uint8 `(C, H, W)` of the files' own sizes; `paths` names the files in the
    same order.

    Args:
        paths: Files, folders (searched with their subfolders, sorted) and patterns such as
            `photos/*.jpg` or `photos/**/*.png`; each file is taken once, in the order given.
        batch_size: Images a batch (and a process).
        num_workers: Processes that decode image files; where left out, one for each processor core
            that this process has (16 at most).
        max_side: Longest side in pixels; larger images are shrunk in the workers.
        on_error: What to do with a file that cannot be read: "fail", or "skip" and name it.

    A warning counts the files of folders and patterns that are left out, as `ImageFolder` does; a
    file that is given by its own name is read whatever the name.
    """

    name = "files"

    def __init__(
        self,
        paths: list[str] | str,
        batch_size: int = 64,
        num_workers: int | None = None,
        max_side: int | None = None,
        on_error: str = "fail",
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, download=False)
        _check_max_side(max_side)
        given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        left_out: dict[str, Counter] = {}
        found = [path for place in given for path in _files_at(os.fspath(place), left_out)]
        _tell_left_out(left_out)
        if not found:
            raise ImprintError("paths is empty: name image files, folders or patterns")
        self.paths = list(dict.fromkeys(found))
        self.max_side = max_side
        self.on_error = _checked_on_error(on_error)

    def setup(self, stage: str | None = None) -> None:
        self.predict_dataset = ImageFileDataset(
            self.paths, max_side=self.max_side, on_error=self.on_error, advice=SKIP_ADVICE
        )

    def leave_out_unreadable(self) -> str:
        """Takes what cannot be read out of `paths`; returns lines that name it, or nothing.

        Raises:
            ImprintError: nothing is left.
        """
        workers = self._free_processors() if self.num_workers is None else self.num_workers
        self.unreadable = unreadable(self.paths, self.max_side, workers)
        lines = [f"  {reason}\n" for reason in self.unreadable.values()]
        if not lines:
            return ""
        if len(lines) == len(self.paths):
            raise ImprintError(f"none of the {len(lines)} images can be read:{lines[0].rstrip()}")
        self.paths = [path for path in self.paths if path not in self.unreadable]
        return f"skipped {len(lines)} that cannot be read:\n{''.join(lines)}"

    def _dataset(self, split: str) -> ImageFileDataset:
        if split != "predict":
            raise ImprintError(
                f"ImageFiles has no labels and so no {split} split: it serves predict only; "
                "use ImageFolder for images in a folder a class"
            )
        return super()._dataset(split)


def _check_classes(folder: Path) -> None:
    """Raises an `ImprintError` where all images lie in one folder that has class folders of its
    own, or one class is there in two compositions of its name; says so where there is a single
    class, or two names differ in case alone."""
    names = _subfolders(folder)
    check_composition(names)
    warn_of_alike(names, str(folder))
    if len(names) != 1:
        return
    only = folder / names[0]
    inner = [name for name in _subfolders(only) if _holds_images(only / name)]
    if len(inner) > 1 and not _has_own_images(only):
        raise ImprintError(
            f"{folder} has a single class folder, {only}, with {_list(inner)} in it: set root to "
            f"{only} if you mean these; if {names[0]!r} is the one class, put its images into it "
            "without folders"
        )
    rank_zero_info(
        f"{folder} has a single class folder, {only}: every image will be called {names[0]!r}, and "
        "its accuracy says nothing. Put the images of each class into a folder of its own."
    )


def split_folders(root: Path) -> dict[str, Path]:
    """The folders "train", "val" and "test" that a folder has, however they are spelt; empty where
    its folders are classes, one of which may be called "train".

    Raises:
        ImprintError: no train/, or folders that may be either; the message names them.
    """
    folders: dict[str, Path] = {}
    others = []
    for name in _subfolders(root):
        # Without regard to case: "Train" and "Test" taken for two classes would be a bad joke.
        splits = [split for split, names in SPLIT_NAMES.items() if name.lower() in names]
        if not splits:
            others.append(root / name)
        elif splits[0] in folders:
            raise ImprintError(
                f"{root} has {folders[splits[0]].name}/ and {name}/, both of which are taken for "
                f"the {splits[0]} split: rename or remove one of them"
            )
        else:
            folders[splits[0]] = root / name
    # Not deeper, where runs and caches lie.
    others = [
        other
        for other in others
        if folders and any(map(_has_own_images, [other, *map(other.joinpath, _subfolders(other))]))
    ]
    if not folders or (not others and "train" in folders):
        return folders
    names, beside = _list(folders.values()), f" beside {_list(others)}" if others else ""
    if "train" not in folders:
        raise ImprintError(
            f"{root} has {names} but no train/{beside}: add train/<class>/, or rename the folder "
            "if it is a class"
        )
    train = folders["train"]
    holds_classes = bool(_subfolders(train)) and not _has_own_images(train)
    if len(folders) > 1:
        if not holds_classes:
            raise ImprintError(
                f"{root} has {names}{beside}, and {train.name}/ has images but no class folders: "
                "move the class folders into it, or rename it if it is a class"
            )
        rank_zero_warn(f"{root} has {names}: the images of {_list(others)} are not read")
        return folders
    if holds_classes and not (len(others) > 1 and all(map(_has_own_images, others))):
        raise ImprintError(
            f"{root} has {names}, with {_list(_subfolders(train))} in it, beside {_list(others)}: "
            f"if {train.name}/ holds the classes, set root to {train}; if it is a class itself, "
            "rename it"
        )
    rank_zero_info(
        f"{root} has {names}{beside} and neither val/ nor test/: {train.name!r} is taken for a "
        "class like the others"
    )
    return {}


def _checked_on_error(on_error: str) -> str:
    if on_error not in ("fail", "skip"):
        raise ImprintError(f"on_error={on_error!r}: give 'fail' or 'skip'")
    return on_error


def _check_max_side(max_side: int | None) -> None:
    if max_side is not None and max_side < 1:
        raise ImprintError(f"max_side={max_side}: the longest side is at least 1 pixel")
