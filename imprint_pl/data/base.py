"""The base of the image data modules: classes, shots, held-out validation, and the loaders.

A data set only says how its splits are read (`load`); this file does all that a task needs. Batches
are `(images, labels)` with uint8 images at their native size, in the data set's own order.
"""

import math
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from imprint_pl.data import tasks
from imprint_pl.data.image_files import ImageFileLoader, pack
from imprint_pl.data.splits import SplitDataset, Splits
from imprint_pl.errors import ImprintError
from imprint_pl.files import local_path

MOST_WORKERS = 16
INDICES_SHOWN = 10


def as_it_is(batch: Any) -> Any:
    """Collate nothing: the data sets return whole batches."""
    return batch


class ImageDataModule(LightningDataModule):
    """Images and labels of a task, ready for one pass in a fixed order.

    Train batches are neither shuffled nor dropped: imprinting looks at each image once. Validation
    is the test split, as in the paper, unless the data set has a validation split or `val_fraction`
    holds out a part of train.

    A subclass sets `name` and writes `load`, and `prepare_data` where files have to be fetched
    first. A constructor of its own passes what it does not know on to this one, as `**task`.

    After `setup` there are `train_dataset`, `val_dataset` and `test_dataset`, each with `labels`
    `(N,)`, int64 in 0..C-1, and `original_labels` `(N,)`, the classes before they were merged.

    Args:
        root: Folder that holds the data set's files.
        classes: Classes to keep, as indices or names (where all names are numbers, a number is a
            name); they become labels 0..C-1 in this order. An inner list is merged into one label,
            as in [[0, 3], 1] or [[cat, dog], bird]. Or a subset by name: "all", "even", "odd",
            "short" (the first three); for ImageNet also one of the paper's hundred d-in-1 tasks,
            "paper-1in1-0" to "paper-10in1-9" (d, then the shuffle). Default: all classes.
        d: Makes a d-in-1 task: each label merges d of the classes, drawn with `task_seed`.
        num_labels: Number of labels of the d-in-1 task. Default: as many as the classes suffice
            for.
        task_seed: Seed of the d-in-1 task.
        shots: Training images for each label, drawn at random. A label with fewer is an error. With
            the same seed fewer shots are a subset of more. Default: all training images.
        val_fraction: Part of each class's training images to hold out for validation (at least one
            image), for data sets without a validation split; 0 validates on the test split, as in
            the paper.
        batch_size: Images in a batch (of each process).
        num_workers: Processes that decode image files. Default: one for each processor core that
            this process may use, within the limits of its container (16 at most), but no more than
            there are batches, and none for a single batch and for data sets in memory.
        download: Whether to fetch missing files.
        seed: Seed of the shots and of the held-out part.
        max_images: Images to take of all splits together, the same part of each class (two at
            least), for a quick look. Default: all.

    Attributes:
        class_names: Names of the chosen classes, in the order given; names of merged classes are
            joined, as in `"0+3"`.
        num_classes: Number of labels, C.
        original_class_names: Names of `original_labels`.
        task: Short name, such as `"mnist"` or `"mnist (classes 0,1,2)"`.
        unreadable: Files that `on_error="skip"` left out, each with the reason.
        max_side: Longest side in pixels to which image files are shrunk, where it is set.
    """

    name = "images"
    max_side: int | None = None

    def __init__(
        self,
        root: str = "data",
        classes: list[int | str | list[int | str]] | str | None = None,
        d: int | None = None,
        num_labels: int | None = None,
        task_seed: int = 0,
        shots: int | None = None,
        val_fraction: float = 0.0,
        batch_size: int = 256,
        num_workers: int | None = None,
        download: bool = True,
        seed: int = 0,
        max_images: int | None = None,
    ) -> None:
        super().__init__()
        if shots is not None and shots < 1:
            raise ImprintError(f"shots={shots}: a class needs at least 1 training image")
        if max_images is not None and max_images < 1:
            raise ImprintError(f"max_images={max_images}: take at least 1 image")
        if not 0 <= val_fraction < 1:
            raise ImprintError(
                f"val_fraction={val_fraction} is not in [0, 1): it is the part of the training "
                "images to hold out, as in val_fraction=0.1"
            )
        if batch_size < 1:
            raise ImprintError(f"batch_size={batch_size}: a batch holds at least 1 image")
        if num_workers is not None and num_workers < 0:
            raise ImprintError(f"num_workers={num_workers} is negative: 0 decodes without workers")
        self.root = local_path(root)
        self.classes = classes
        self.d = d
        self.num_labels = num_labels
        self.task_seed = task_seed
        self.shots = shots
        self.max_images = max_images
        self.val_fraction = val_fraction
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.download = download
        self.seed = seed
        self.unreadable: dict[str, str] = {}
        self._is_set_up = False
        self._wanted: tuple[int | None, int | None] = (None, None)

    def shrink_for(self, max_side: int | None, least_side: int | None) -> None:
        """Read image files as a model wants them, in loaders that are made from now on.

        Args:
            max_side: Longest side in pixels, as in the fit of the model, where this data module has
                no `max_side` of its own.
            least_side: Pixels that the model's preprocessing needs: `max_side` does not shrink the
                shorter side below them.
        """
        self._wanted = max_side, least_side

    def sized(self, dataset: SplitDataset) -> SplitDataset:
        """Return a data set of `load` or `setup` that reads image files as `shrink_for` says."""
        sized = getattr(dataset, "sized", None)
        return dataset if sized is None else sized(*self._wanted)

    def load(self) -> Splits:
        """Read the whole splits from disk, without a network."""
        raise NotImplementedError(f"{type(self).__name__} must say how its splits are read: load()")

    def setup(self, stage: str | None = None) -> None:
        """Read the splits and select the task's samples; further calls do nothing.

        Args:
            stage: Ignored: each stage needs train for the classes, and validation may be the test
                split.
        """
        if self._is_set_up:
            return
        if self.trainer is None:
            # Without a Trainer nobody else calls it, and calling `setup` alone should be enough.
            self.prepare_data()
        splits = self.load()
        names = splits.class_names
        chosen = tasks.resolve_task(self.classes, names, self.d, self.num_labels, self.task_seed)

        if self.val_fraction and splits.val is not None:
            raise ImprintError(
                f"val_fraction={self.val_fraction}, but {self.name!r} has a validation split of "
                "its own: leave out either of the two"
            )
        drawn, held = tasks.draw(
            splits.train.labels, names, chosen, self.val_fraction, self.shots, self.seed
        )
        counts = torch.bincount(splits.train.labels, minlength=len(names))
        for index in (index for group in chosen for index in group):
            if counts[index] == 0:
                raise ImprintError(
                    f"class {index} ({names[index]!r}) of {self.name!r} has no "
                    "training image: add images or leave the class out with classes=[...]"
                )
        self.class_names = [tasks.merged_name(group, names) for group in chosen]
        self.original_class_names = splits.original_class_names or names

        def select(dataset: SplitDataset, positions: Tensor | None = None) -> SplitDataset:
            if positions is None:
                positions, _ = tasks.relabel(dataset.labels, chosen)
            return _select(dataset, chosen, self.sample_of(splits, dataset, positions))

        self.train_dataset = select(splits.train, drawn)
        self.test_dataset = select(splits.test)
        if self.val_fraction:
            self.val_dataset = select(splits.train, held)
        elif splits.val is not None:
            self.val_dataset = select(splits.val)
        else:
            self.val_dataset = self.test_dataset
        self.predict_dataset = self.test_dataset
        for split, dataset in (("test", self.test_dataset), ("validation", self.val_dataset)):
            if len(dataset) == 0:
                raise ImprintError(
                    f"the {split} split of {self.name!r} has no image of the classes "
                    f"{self.class_names}: add images or choose other classes"
                )
        self.num_classes = len(chosen)
        self.task = self._task_name(chosen, names)
        self._is_set_up = True

    def sample_of(self, splits: Splits, dataset: SplitDataset, positions: Tensor) -> Tensor:
        """Return the positions in a split that remain under `max_images`.

        Args:
            splits: What `load` returned.
            dataset: One of them.
            positions: `(M,)`, those of the task, ascending.
        """
        if self.max_images is None:
            return positions
        every = [one for one in (splits.train, splits.test, splits.val) if one is not None]
        share = self.max_images / sum(len(one.labels) for one in every)
        labels = dataset.labels[positions]
        return positions[tasks.part(labels, len(splits.class_names), share, self.seed)]

    def _task_name(self, chosen: list[list[int]], names: list[str]) -> str:
        what = []
        if isinstance(self.classes, str):
            what += [self.classes] if self.classes != "all" else []
        elif self.classes is not None:
            whole = tasks.resolve_task(self.classes, names)
            what.append(_summary(whole, len(names)))
        if self.d is not None:
            what.append(f"{self.d}-in-1, seed {self.task_seed}")
        return f"{self.name} ({', '.join(what)})" if what else self.name

    def train_dataloader(self) -> DataLoader:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader:
        """Load the test split, with its labels."""
        return self._loader("predict")

    @property
    def class_counts(self) -> Tensor:
        """Number of training images of each class, `(C,)` int64, known before any is read."""
        return torch.bincount(self.train_dataset.labels, minlength=self.num_classes)

    def sample_names(self, split: str = "predict") -> list[str] | None:
        """Name the samples of a split, in the order of its loader.

        Args:
            split: `train`, `val`, `test` or `predict` (the test split).

        Returns:
            One path for each sample, or None where the images come from arrays.
        """
        return getattr(self._dataset(split), "paths", None)

    def _dataset(self, split: str) -> SplitDataset:
        if split not in ("train", "val", "test", "predict"):
            raise ImprintError(f"unknown split {split!r}: it is train, val, test or predict")
        self.setup()
        return getattr(self, f"{split}_dataset")

    def _loader(self, split: str) -> DataLoader:
        dataset = self._dataset(split)
        sampler: DistributedSampler | None = None
        if self.trainer is not None and self.trainer.world_size > 1:
            # Lightning's own sampler would shuffle; Lightning does not replace this one.
            sampler = DistributedSampler(
                dataset, self.trainer.world_size, self.trainer.global_rank, shuffle=False
            )
        return self.loader(dataset, sampler)

    def loader(
        self, dataset: SplitDataset, sampler: DistributedSampler | None = None
    ) -> DataLoader:
        """Load batches of a data set of `load` or `setup`, in its order or the sampler's."""
        from_files = getattr(dataset, "from_files", False)
        dataset = self.sized(dataset)
        workers = self.num_workers
        if workers is None:
            samples = len(dataset if sampler is None else sampler)
            batches = math.ceil(samples / self.batch_size)
            # A single batch is decoded no faster in another process.
            workers = min(self._free_processors(), batches) if from_files and batches > 1 else 0
        loader_class = ImageFileLoader if from_files else DataLoader
        return loader_class(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=pack if from_files else as_it_is,
            # A copy from unpinned memory waits until the GPU has finished all earlier work.
            pin_memory=torch.cuda.is_available() and self._device_type() != "cpu",
            # Without a generator each pass over a loader draws from the global one.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _device_type(self) -> str:
        return "cuda" if self.trainer is None else self.trainer.strategy.root_device.type

    def _free_processors(self) -> int:
        # joblib knows the limits of affinity and of a container (cgroups), which Python does not.
        from joblib import cpu_count

        processes = self.trainer.num_devices if self.trainer is not None else 1
        return min(max(cpu_count() // processes, 1), MOST_WORKERS)


def _select(dataset: SplitDataset, chosen: list[list[int]], positions: Tensor) -> SplitDataset:
    kept, labels = tasks.relabel(dataset.labels[positions], chosen)
    selected = dataset.select(positions[kept], labels)
    original = getattr(dataset, "original_labels", dataset.labels)
    selected.original_labels = original[positions[kept]]
    return selected


def _summary(chosen: list[list[int]], num_classes: int) -> str:
    if sum(map(len, chosen)) > INDICES_SHOWN:
        return f"{sum(map(len, chosen))} of {num_classes} classes"
    shown = ",".join("+".join(map(str, group)) for group in chosen)
    return f"class{'es' * (len(chosen) > 1)} {shown}"
