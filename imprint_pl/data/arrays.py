"""Data sets that fit into memory: scikit-learn's handwritten digits, MNIST and Fashion-MNIST.

A batch is one indexing operation on the whole array, so reading the data takes hardly any time
beside the backbone.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.splits import SplitDataset, Splits
from imprint_pl.errors import ImprintError
from imprint_pl.numerics.large import as_tensor, taken

DIGITS_TRAIN = 1437


class ArrayDataset(SplitDataset):
    """Images of one size, or embeddings, in memory.

    A batch, `__getitems__(indices)`, is `(images, labels)`: uint8 `(B, C, H, W)` or float32
    `(B, d)`, int64 `(B,)`.

    Args:
        images: uint8 `(N, C, H, W)`, or embeddings, float32 `(N, d)`.
        labels: int64 `(N,)`.

    Both may be NumPy arrays, mapped files among them (`np.load(path, mmap_mode="r")`), which are
    not copied.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = as_tensor(images), as_tensor(labels)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        positions = np.asarray(indices)
        # NumPy is faster here: torch wakes all its threads for these few bytes, and on a busy
        # machine each of them waits for a time slice (60,000 images of 28 x 28: 1.8 s, not 0.02 s).
        images, labels = self.images.numpy()[positions], self.labels.numpy()[positions]
        return torch.from_numpy(images), torch.from_numpy(labels)

    def select(self, positions: Tensor, labels: Tensor) -> "ArrayDataset":
        """Return the samples at `positions` `(M,)`, ascending, with new labels `(M,)`."""
        # Ascending positions, as many as there are images, are all of them: no copy is needed.
        everything = len(positions) == len(self)
        return ArrayDataset(self.images if everything else taken(self.images, positions), labels)

    def fingerprint(self) -> str:
        """Return a hash of the images' shape, type and bytes.

        The labels are left out, since embeddings do not depend on them.
        """
        digest = hashlib.sha256(f"array {self.images.dtype} {tuple(self.images.shape)}".encode())
        digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()


class Digits(ImageDataModule):
    """scikit-learn's handwritten digits, 1 x 8 x 8: real scans that need no download.

    The pixels 0..16 become 0..255; the first 1,437 images are train, the last 360 test. `root` and
    `download` are not used.
    """

    name = "digits"

    def load(self) -> Splits:
        from sklearn.datasets import load_digits

        digits = load_digits()
        pixels = torch.from_numpy(digits.images) * (255 / 16)
        images = pixels.round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        return Splits(
            class_names=[str(name) for name in digits.target_names],
            train=ArrayDataset(images[:DIGITS_TRAIN], labels[:DIGITS_TRAIN]),
            test=ArrayDataset(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]),
        )


class MNIST(ImageDataModule):
    """MNIST, 1 x 28 x 28: 60,000 train and 10,000 test images.

    Reads torchvision's layout, `<root>/MNIST/raw/`; files that are there are used as they are, and
    only missing ones are fetched. The class names are torchvision's, such as `"0 - zero"`.
    """

    name = "mnist"
    source = "MNIST"

    def prepare_data(self) -> None:
        if self._missing() and self.download:
            reason = fetch(self.source, self.root)
            if self._missing():
                raise missing_files(self.root, f"{self.source}/raw", self._missing(), reason)

    def load(self) -> Splits:
        from torchvision import datasets

        if self._missing():
            raise missing_files(self.root, f"{self.source}/raw", self._missing())
        source = getattr(datasets, self.source)
        splits = {}
        for split in ("train", "test"):
            try:
                read = source(self.root, train=split == "train")
                if len(read.data) != len(read.targets):
                    raise ValueError(f"{len(read.data)} images, {len(read.targets)} labels")
            # torchvision's parser raises errors of many kinds for damaged files.
            except Exception as error:
                raise ImprintError(
                    f"cannot read the {split} files of {self.source} in {self._folder()} "
                    f"({type(error).__name__}: {error}): they are damaged or cut short; remove "
                    "them and fetch them again"
                ) from error
            splits[split] = ArrayDataset(read.data.unsqueeze(1), read.targets.long())
        return Splits(list(source.classes), splits["train"], splits["test"])

    def _folder(self) -> Path:
        return Path(self.root, self.source, "raw").absolute()

    def _missing(self) -> list[str]:
        names = [
            f"{split}-{kind}-ubyte"
            for split in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        ]
        return [name for name in names if not (self._folder() / name).is_file()]


class FashionMNIST(MNIST):
    """Fashion-MNIST, 1 x 28 x 28: 60,000 train and 10,000 test images of ten kinds of clothes.

    Reads torchvision's layout, `<root>/FashionMNIST/raw/`; files that are there are used as they
    are, and only missing ones are fetched.
    """

    name = "fashion_mnist"
    source = "FashionMNIST"


def fetch(source: str, root: str, **split: Any) -> str:
    """Download a data set through torchvision.

    Args:
        source: torchvision's name of the data set.
        root: The folder to put the files into.
        split: torchvision's keyword for the split, where it fetches one split at a time.

    Returns:
        Why the download failed, or an empty string.
    """
    from torchvision import datasets

    try:
        getattr(datasets, source)(root, download=True, **split)
    # No network, a full disk, a read-only folder, a wrong checksum: the caller says what to do.
    except Exception as error:
        return f"the download failed: {' '.join(str(error).split()) or type(error).__name__}"
    return ""


def missing_files(
    root: str, subfolder: str, names: Sequence[str], reason: str = "no such file"
) -> ImprintError:
    """Return the error that says which files go into which folder."""
    return ImprintError(
        f"{', '.join(names)} missing in {Path(root, subfolder).absolute()} ({reason}). Put the "
        f"unpacked files there, or set root to the folder that holds {subfolder}/; "
        "download=True fetches them where there is a network"
    )
