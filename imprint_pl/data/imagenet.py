"""ImageNet-1k from the folders that its archives unpack to."""

import json
from pathlib import Path
from typing import Any

import torch

from imprint_pl.data.exclude import Excluded
from imprint_pl.data.folders import ImageFolder, split_folders
from imprint_pl.data.splits import Splits
from imprint_pl.errors import ImprintError, did_you_mean

INDEX_FILE = "imagenet_class_index.json"


class ImageNet(ImageFolder):
    """ImageNet (ILSVRC 2012), 1,281,167 train and 50,000 validation images of 1,000 classes.

    Reads `<root>/train/<synset>/` and `<root>/val/<synset>/`, with synsets such as `n01440764`. The
    validation images are validation and test, as in the paper. Class numbers are ImageNet's 0..999,
    also where some folders are missing, so a task needs the folders of its own classes only. Names
    come from `<root>/imagenet_class_index.json` where there is one (`{"0": ["n01440764", "tench"],
    ...}`), else from torchvision. Nothing is fetched: only image-net.org gives the images out.

    Args:
        root: The folder that holds train/ and val/.
        options: Further keywords of `ImageFolder` but `test_fraction`.
    """

    def __init__(self, root: str = "data/imagenet", **options: Any) -> None:
        # ImageNet has a test split, so the fraction is not used.
        super().__init__(root=root, test_fraction=0.2, **options)
        self.name = "imagenet"

    def load(self) -> Splits:
        folders = split_folders(Path(self.root))
        if "train" not in folders or "val" not in folders:
            raise ImprintError(
                f"{self.root} needs train/<synset>/ and val/<synset>/ (n01440764, ...): unpack "
                "ImageNet's archives there, the validation images sorted into folders by class"
            )
        synsets, names = _class_index(Path(self.root))
        self._excluded = Excluded(self.exclude, self.root)
        found, train = self._read(folders["train"])
        _, val = self._read(folders["val"], found)
        self._excluded.check_all_found()
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
    """Return the synsets and the names in the order of the class numbers."""
    path = root / INDEX_FILE
    if not path.is_file():
        from timm.data import ImageNetInfo
        from torchvision.models import ResNet18_Weights

        return ImageNetInfo().label_names(), ResNet18_Weights.DEFAULT.meta["categories"]
    try:
        index = json.loads(path.read_text())
        rows = [tuple(map(str, index[str(number)])) for number in range(len(index))]
        synsets, names = (list(column) for column in zip(*rows, strict=True))
    # The file may hold any JSON.
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ImprintError(
            f"cannot read {path} ({type(error).__name__}: {error}): expected "
            '{"0": ["n01440764", "tench"], "1": …} with numbers from 0 without a gap'
        ) from error
    # The usual index has two classes named crane and two named maillot.
    names = [
        f"{name} ({synset})" if names.count(name) > 1 else name
        for synset, name in zip(synsets, names, strict=True)
    ]
    return synsets, names
