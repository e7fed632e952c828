"""ImageNet-1k from the folders that its archives unpack to."""

import json
from pathlib import Path

import torch

from imprint_pl.data.base import Splits
from imprint_pl.data.folders import ImageFolder, split_folders
from imprint_pl.errors import ImprintError, did_you_mean

INDEX_FILE = "imagenet_class_index.json"


class ImageNet(ImageFolder):
    """ImageNet (ILSVRC 2012), 1,281,167 train and 50,000 validation images of 1,000 classes.

    Reads `<root>/train/<synset>/` and `<root>/val/<synset>/`, with synsets such as `n01440764`; as
    in the paper, the validation images measure. Class numbers are ImageNet's 0..999, also where
    only some of the folders are there, so that a task needs no more than its own classes. Names are
    those of `<root>/imagenet_class_index.json` where there is one (`{"0": ["n01440764", "tench"],
    ...}`), else torchvision's. Nothing is fetched: the images are given out by image-net.org only.

    Args:
        root: The folder that holds train/ and val/.
        max_side: Longest side in pixels; larger images are shrunk in the workers.
        classes: Classes to keep, as numbers or names; they become labels 0..C-1 in this order. An
            inner list is merged into one label. Or by name: "all", "even", "odd", "short", or one
            of the paper's hundred d-in-1 tasks, "paper-1in1-0" to "paper-10in1-9" (d, then the
            shuffle). All of them where left out.
        d: Makes a d-in-1 task: each label merges d of the classes, drawn with `task_seed`.
        num_labels: Of the d-in-1 task; as many as the classes suffice for where left out.
        task_seed: Of the d-in-1 task.
        shots: Training images a label, drawn at random; all of them where left out. A label with
            fewer is an error.
        val_fraction: Part of each class's training images to hold out for validation; 0 validates
            on the validation images, which are also the test.
        batch_size: Images a batch (and a process).
        num_workers: Processes that decode image files; where left out, one for each processor core
            that this process has (16 at most).
        seed: Of the shots and of the held-out validation part.
        on_error: "fail" at the first image that cannot be read, or "skip", as for `ImageFolder`.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
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
            max_side=max_side,
            classes=classes,
            d=d,
            num_labels=num_labels,
            task_seed=task_seed,
            shots=shots,
            val_fraction=val_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            on_error=on_error,
        )
        self.name = "imagenet"

    def load(self) -> Splits:
        folders = split_folders(Path(self.root))
        if "train" not in folders or "val" not in folders:
            raise ImprintError(
                f"{self.root} needs train/<synset>/ and val/<synset>/ (n01440764, ...): unpack "
                "ImageNet's archives there, the validation images sorted into folders by class"
            )
        synsets, names = _class_index(Path(self.root))
        found, train = self._read(folders["train"])
        _, val = self._read(folders["val"], found)
        for name in found:
            if name not in synsets:
                raise ImprintError(
                    f"{folders['train'] / name} is no class of ImageNet"
                    f"{did_you_mean(name, synsets)}: remove it, list it in {INDEX_FILE}, or read "
                    "the folder with ImageFolder"
                )
        numbers = torch.tensor([synsets.index(name) for name in found])
        train, val = (
            split.select(torch.arange(len(split)), numbers[split.labels]) for split in (train, val)
        )
        return Splits(names, train, val)


def _class_index(root: Path) -> tuple[list[str], list[str]]:
    """The synsets and the names in the order of the class numbers."""
    path = root / INDEX_FILE
    if not path.is_file():
        from timm.data import ImageNetInfo
        from torchvision.models import ResNet18_Weights

        return ImageNetInfo().label_names(), ResNet18_Weights.DEFAULT.meta["categories"]
    try:
        index = json.loads(path.read_text())
        rows = [tuple(map(str, index[str(number)])) for number in range(len(index))]
        synsets, names = (list(column) for column in zip(*rows, strict=True))
    # Any JSON may stand there.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImprintError(
            f"cannot read {path} ({type(error).__name__}: {error}): expected "
            '{"0": ["n01440764", "tench"], "1": …} with numbers from 0 without a gap'
        ) from error
    # The usual index has two cranes and two maillots.
    names = [
        f"{name} ({synset})" if names.count(name) > 1 else name
        for synset, name in zip(synsets, names, strict=True)
    ]
    return synsets, names
