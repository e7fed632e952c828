"""Your own image files: a folder for each class, or any files to predict.

The workers decode the files (image_files.py, decode.py) for each batch; images are never kept.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from imprint_pl.data import tasks
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.decode import extensions
from imprint_pl.data.exclude import Excluded
from imprint_pl.data.finding import (
    files_at,
    find_images,
    has_own_images,
    holds_images,
    listed,
    other_kinds,
    subfolders,
    tell_loose_images,
    warn_of_left_out,
)
from imprint_pl.data.image_files import (
    SKIP_ADVICE,
    DecodedDataset,
    ImageFileDataset,
    unreadable,
    unreadable_at,
)
from imprint_pl.data.splits import SplitDataset, Splits
from imprint_pl.errors import ImprintError, shown
from imprint_pl.numerics.labels import check_composition, composed, place_of, warn_of_alike
from imprint_pl.ranks import ranks

SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

TEST_SEED = 0
# How many unreadable images a message names.
UNREADABLE_SHOWN = 10
Decoded = TypeVar("Decoded", bound=DecodedDataset)


class ImageFolder(ImageDataModule):
    """Images in a folder for each class; the folders' names, sorted, are the classes.

    Reads `<root>/train/<class>/` with `<root>/val/`, `<root>/test/` or both (one alone serves as
    validation and test), or `<root>/<class>/` alone: then `test_fraction` of each class is held
    out as validation and test. A folder "train" beside other folders of images, without val and
    test, is a class. Folders may be nested. Images are recognised by the endings of their names,
    and by content where a name has none. Hidden files, texts and system folders such as `__MACOSX`
    are ignored; a warning counts all other files that are left out. The images of a batch are a
    list of uint8 `(C, H, W)` of the files' own sizes.

    Args:
        root: The folder.
        test_fraction: Part of each class held out as the test split where the folder has no split
            of its own. It depends on no seed, so that a later test never sees training images.
        max_side: Longest side in pixels; larger images are shrunk in the workers, and JPEG files
            are then decoded several times faster. The shorter side keeps what the backbone needs.
            A checkpoint keeps `max_side`, and later images are read likewise. By default images
            keep their size: a photo of 12 megapixels takes 36 MB, a batch of 64 of them 2.3 GB, and
            each worker has two batches under way.
        batch_size: Images in a batch (of each process); smaller than for sets in memory, since
            photos are large.
        on_error: "fail" at the first image that cannot be read, or "skip": before anything else,
            each image is decoded once, and those that cannot be read are named in a warning and
            left out, as if they were not there (`unreadable`).
        exclude: Files that are not read: their names below `root`, or one name, a CSV with a column
            `file`, such as the fix list of `audit`. A name that is no image below `root` is an
            error.
        task: Further keywords of `ImageDataModule` but `download`.
    """

    def __init__(
        self,
        root: str,
        test_fraction: float = 0.2,
        max_side: int | None = None,
        batch_size: int = 64,
        on_error: str = "fail",
        exclude: str | list[str] | None = None,
        **task: Any,
    ) -> None:
        super().__init__(root=root, batch_size=batch_size, download=False, **task)
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
        self.exclude = exclude
        # Files that were decoded once, to see whether they can be read.
        self._looked_at: set[str] = set()

    def load(self) -> Splits:
        folders = split_folders(Path(self.root))
        self._excluded = Excluded(self.exclude, self.root)
        train_folder = folders.get("train", Path(self.root))
        _check_classes(train_folder)
        class_names, train = self._read(train_folder)
        others = {
            split: self._read(folders[split], class_names)[1]
            for split in ("val", "test")
            if split in folders
        }
        self._excluded.check_all_found()
        if others:
            test = others["test"] if "test" in others else others["val"]
            return Splits(class_names, train, test, others.get("val"))
        return self._hold_out(class_names, train, str(train_folder))

    def _hold_out(self, class_names: list[str], train: SplitDataset, where: str) -> Splits:
        """Hold a part of each class out as validation and test; `where` names the images."""
        every_class = range(len(class_names))
        staying, held = tasks.draw(
            train.labels, class_names, every_class, self.test_fraction, seed=TEST_SEED
        )
        rank_zero_info(
            f"{where} has no test split: {len(held)} of its {len(train)} images are held "
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
        found = subfolders(folder)
        lost = [path for path in folder.iterdir() if not path.exists()]
        if lost:
            rank_zero_warn(f"{lost[0]} is a link that leads nowhere: it is not read")
        if not found:
            raise ImprintError(
                f"{folder} has no class folders: put the images of each class into a folder of "
                "the class's name; images without classes are for ImageFiles (predict)"
            )
        # A class's name is printed and written into checkpoints, so it must be text.
        folder_of = {shown(name): folder / name for name in found}
        if len(folder_of) < len(found):
            raise ImprintError(
                f"{shown(folder)} has class folders whose names look alike in text: rename one"
            )
        found = list(folder_of)
        is_test = class_names is not None
        if class_names is None:
            class_names = [composed(name) for name in found]
        places = []
        for name in found:
            place = place_of(name, class_names)
            if place is None:
                raise ImprintError(
                    f"the class folder {folder / name} has no counterpart among the training "
                    f"classes ({tasks.near_names(name, class_names)}): rename or remove it, or "
                    "add training images"
                )
            places.append(place)
        absent = [name for place, name in enumerate(class_names) if place not in places]
        if absent:
            rank_zero_warn(f"{folder} has no folder for {', '.join(absent)}: not evaluated")
        paths: list[str] = []
        labels: list[int] = []
        left_out: dict[str, Counter] = {}
        for name, place in zip(found, places, strict=True):
            counts: Counter[str] = Counter()
            left_out[str(folder_of[name])] = counts
            images = list(find_images(folder_of[name], counts))
            if not images:
                raise ImprintError(
                    f"the class folder {folder / name} holds no image{other_kinds(counts)}: add "
                    f"images ({', '.join(extensions())}) or remove the folder"
                )
            images = self._excluded.without(images)
            if not images and not is_test:
                raise ImprintError(
                    f"exclude leaves no image of the class folder {folder / name}: exclude fewer, "
                    "or remove the folder"
                )
            paths += images
            labels += [place] * len(images)
        warn_of_left_out(left_out)
        tell_loose_images(folder)
        whole = ImageFileDataset(paths, torch.tensor(labels), self.max_side, advice=SKIP_ADVICE)
        dataset = self._readable(whole, paths, f"images below {shown(folder)}")
        empty = [] if is_test else sorted(set(labels) - set(dataset.labels.tolist()))
        if empty:
            raise ImprintError(
                f"no image of the class folder {folder / class_names[empty[0]]} can be read: "
                "replace the images, or remove the folder"
            )
        return class_names, dataset

    def _readable(self, images: Decoded, names: list[str], what: str) -> Decoded:
        """Leave out the images that cannot be read, if `on_error` says so.

        Args:
            images: The images of a split.
            names: Their names; those of images that cannot be read are added to `unreadable`.
            what: Names all of them in the warning.
        """
        if self.on_error != "skip":
            return images
        new = [place for place, name in enumerate(names) if name not in self._looked_at]
        workers = self._free_processors() if self.num_workers is None else self.num_workers
        # Each rank decodes a share. Without a Trainer the other ranks may not be here to take part.
        shares = ranks() if self.trainer is not None else 1
        own = torch.tensor(new[dist.get_rank() :: shares] if shares > 1 else new, dtype=torch.int64)
        reasons = unreadable_at(images.select(own, images.labels[own]), workers)
        found = [{names[own[place]]: reason for place, reason in reasons.items()}] * shares
        if shares > 1:
            dist.all_gather_object(found, found[0])
        faults = {name: reason for share in found for name, reason in share.items()}
        self._looked_at.update(names[place] for place in new)
        # Keep the order of the data set.
        faulty = [names[place] for place in new if names[place] in faults]
        self.unreadable |= {name: faults[name] for name in faulty}
        if faulty:
            more = len(faulty) - UNREADABLE_SHOWN
            rank_zero_warn(
                f"{len(faulty)} of {len(new)} {what} cannot be read and are left out: "
                f"{', '.join(map(shown, faulty[:UNREADABLE_SHOWN]))}"
                f"{f' and {more} more' if more > 0 else ''}"
            )
        readable = [place for place, name in enumerate(names) if name not in self.unreadable]
        kept = torch.tensor(readable, dtype=torch.int64)
        return images.select(kept, images.labels[kept])


class LabelledFolder(ImageFolder):
    """Images to measure a classifier on, in a folder for each class; none of them is trained on.

    All images below `<root>/<class>/` are the test and the validation split, or those of
    `<root>/test/<class>/`, else `<root>/val/<class>/`, where the folder has such splits. Classes
    are those of the classifier by name, whatever their order; not all of them need be there.

    Args:
        root: The folder.
        options: Further keywords of `ImageFolder` but `test_fraction`.
    """

    def __init__(self, root: str, **options: Any) -> None:
        # All images are measured, so the fraction is not used.
        super().__init__(root=root, test_fraction=0.2, **options)

    def load(self) -> Splits:
        folders = {
            split: folder
            for split, names in SPLIT_NAMES.items()
            for folder in map(Path(self.root).joinpath, subfolders(Path(self.root)))
            if folder.name.lower() in names and subfolders(folder)
        }
        folder = folders.get("test", folders.get("val", Path(self.root)))
        self._excluded = Excluded(self.exclude, self.root)
        class_names, images = self._read(folder)
        self._excluded.check_all_found()
        return Splits(class_names, images, images)


class ImageFiles(ImageDataModule):
    """Image files without labels, to predict.

    A batch is a list of uint8 `(C, H, W)` of the files' own sizes; `paths` names the files in the
    same order.

    Args:
        paths: Files, folders (searched with their subfolders, sorted) and patterns such as
            `photos/*.jpg` or `photos/**/*.png`; each file is taken once, in the order given.
        batch_size: Images in a batch (of each process).
        num_workers: Processes that decode image files. Default: as for `ImageDataModule`.
        max_side: Longest side in pixels; larger images are shrunk in the workers. Default: as in
            the fit of the classifier that predicts. A number beyond the images' sides reads them
            whole.
        on_error: What to do with a file that cannot be read: "fail", or "skip" and name it.

    A warning counts the files of folders and patterns that are left out, as for `ImageFolder`. A
    file that is given by its own name is read whatever its ending.
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
        found = [path for place in given for path in files_at(os.fspath(place), left_out)]
        warn_of_left_out(left_out)
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
        """Remove the files that cannot be read from `paths`.

        Returns:
            Lines that name these files; empty where all can be read.

        Raises:
            ImprintError: If no file can be read.
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

    def _dataset(self, split: str) -> SplitDataset:
        if split != "predict":
            raise ImprintError(
                f"ImageFiles has no labels and so no {split} split: it serves predict only; "
                "use ImageFolder for images in a folder a class"
            )
        return super()._dataset(split)


def _check_classes(folder: Path) -> None:
    """Check the class folders of a folder.

    A single class is reported, and names that differ in case alone cause a warning.

    Raises:
        ImprintError: If all images lie in one folder that has class folders itself, or two names
            differ in Unicode composition alone.
    """
    names = subfolders(folder)
    check_composition(names)
    warn_of_alike(names, str(folder))
    if len(names) != 1:
        return
    only = folder / names[0]
    inner = [name for name in subfolders(only) if holds_images(only / name)]
    if len(inner) > 1 and not has_own_images(only):
        raise ImprintError(
            f"{folder} has a single class folder, {only}, with {listed(inner)} in it: set root to "
            f"{only} if you mean these; if {names[0]!r} is the one class, put its images into it "
            "without folders"
        )
    rank_zero_info(
        f"{folder} has a single class folder, {only}: every image will be called {names[0]!r}, and "
        "its accuracy says nothing. Put the images of each class into a folder of its own."
    )


def split_folders(root: Path) -> dict[str, Path]:
    """Find the folders of the splits "train", "val" and "test", in any of their spellings.

    Returns:
        The folder of each split; empty where the folders are classes, one of which may be called
        "train".

    Raises:
        ImprintError: If there is no train/, or folders may be splits or classes; the message names
            them.
    """
    folders: dict[str, Path] = {}
    others = []
    for name in subfolders(root):
        # Ignore case, so that "Train" and "Test" are not taken for two classes.
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
    # Do not look deeper, since runs and caches hold images there.
    others = [
        other
        for other in others
        if folders and any(map(has_own_images, [other, *map(other.joinpath, subfolders(other))]))
    ]
    if not folders or (not others and "train" in folders):
        return folders
    names, beside = (
        listed(folders.values()),
        f" beside {listed(others)}" if others else "",
    )
    if "train" not in folders:
        raise ImprintError(
            f"{root} has {names} but no train/{beside}: add train/<class>/, or rename the folder "
            "if it is a class"
        )
    train = folders["train"]
    holds_classes = bool(subfolders(train)) and not has_own_images(train)
    if len(folders) > 1:
        if not holds_classes:
            raise ImprintError(
                f"{root} has {names}{beside}, and {train.name}/ has images but no class folders: "
                "move the class folders into it, or rename it if it is a class"
            )
        rank_zero_warn(f"{root} has {names}: the images of {listed(others)} are not read")
        return folders
    if holds_classes and not (len(others) > 1 and all(map(has_own_images, others))):
        raise ImprintError(
            f"{root} has {names}, with {listed(subfolders(train))} in it, beside {listed(others)}: "
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
