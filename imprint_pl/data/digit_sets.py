"""USPS, SVHN and MNIST-M: with MNIST they are the paper's CombiDigits.

Each class reads the files in which its data set is published, and executes nothing in them.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from imprint_pl.data.arrays import ArrayDataset, fetch, missing_files
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.image_files import ImageFileDataset
from imprint_pl.data.splits import SplitDataset, Splits
from imprint_pl.errors import ImprintError

DIGITS = [str(digit) for digit in range(10)]

# Released with the conversion of MNIST-M to torch tensors; torchvision has no MNIST-M.
MNIST_M_ARCHIVES = {
    "mnist_m_train.pt": "191ed53db9933bd85cc9700558847391",
    "mnist_m_test.pt": "e11cb4d7fff76d7ec588b1134907db59",
}
MNIST_M_ADDRESS = "https://github.com/liyxi/mnist-m/releases/download/data"


class USPS(ImageDataModule):
    """USPS, 1 x 16 x 16: 7,291 train and 2,007 test images of digits on envelopes.

    Reads torchvision's layout, `<root>/usps.bz2` and `<root>/usps.t.bz2` (text in libsvm's format);
    a file that is there is used as it is, and only a missing one is fetched.
    """

    name = "usps"
    files = ("usps.bz2", "usps.t.bz2")

    def prepare_data(self) -> None:
        for file, train in zip(self.files, (True, False), strict=True):
            if self.download and file in _missing(self.root, self.files):
                reason = fetch("USPS", self.root, train=train)
                if file in _missing(self.root, self.files):
                    raise missing_files(self.root, "", [file], reason)

    def load(self) -> Splits:
        from torchvision import datasets

        if _missing(self.root, self.files):
            raise missing_files(self.root, "", _missing(self.root, self.files))
        splits = []
        for file, train in zip(self.files, (True, False), strict=True):
            try:
                read = datasets.USPS(self.root, train=train)
                images, labels = torch.from_numpy(read.data), torch.tensor(read.targets)
                splits.append(_digits(images.unsqueeze(1), labels))
            # torchvision's parser raises errors of many kinds for damaged files.
            except Exception as error:
                raise _damaged(Path(self.root, file), error) from error
        return Splits(DIGITS, train=splits[0], test=splits[1])


class SVHN(ImageDataModule):
    """SVHN, cropped digits, 3 x 32 x 32: 73,257 train and 26,032 test images of house numbers.

    Reads torchvision's layout, `<root>/train_32x32.mat` and `<root>/test_32x32.mat`; a file that is
    there is used as it is, and only a missing one is fetched. In the files the digit 0 has the
    label 10; here it has the label 0.
    """

    name = "svhn"
    files = ("train_32x32.mat", "test_32x32.mat")

    def prepare_data(self) -> None:
        for file, split in zip(self.files, ("train", "test"), strict=True):
            if self.download and file in _missing(self.root, self.files):
                reason = fetch("SVHN", self.root, split=split)
                if file in _missing(self.root, self.files):
                    raise missing_files(self.root, "", [file], reason)

    def load(self) -> Splits:
        from scipy.io import loadmat

        if _missing(self.root, self.files):
            raise missing_files(self.root, "", _missing(self.root, self.files))
        splits = []
        for file in self.files:
            try:
                read = loadmat(Path(self.root, file), variable_names=("X", "y"))
                # Matlab's order is (height, width, channel, image).
                images = np.ascontiguousarray(read["X"].transpose(3, 2, 0, 1))
                labels = torch.from_numpy(read["y"].astype(np.int64).reshape(-1)) % 10
                splits.append(_digits(torch.from_numpy(images), labels))
            # SciPy's parser raises errors of many kinds for damaged files.
            except Exception as error:
                raise _damaged(Path(self.root, file), error) from error
        return Splits(DIGITS, train=splits[0], test=splits[1])


class MNISTM(ImageDataModule):
    """MNIST-M, MNIST's digits blended with patches of photos (Ganin et al. 2016), in colour.

    Reads either of its two usual forms from `<root>/mnist_m/` or `<root>/`: images as files in
    `mnist_m_train/` and `mnist_m_test/`, with `mnist_m_train_labels.txt` and
    `mnist_m_test_labels.txt`, a line for each image with its name and label (59,001 and 9,001
    images, 3 x 32 x 32); or tensors in `mnist_m_train.pt` and `mnist_m_test.pt` (60,000 and 10,000
    images, 3 x 28 x 28), which are fetched where neither form is there. Pickled arrays are not
    read: they could run any code.
    """

    name = "mnist_m"

    def prepare_data(self) -> None:
        if self._find() is None and self.download:
            reason = self._fetch()
            if self._find() is None:
                raise self._missing(reason)

    def load(self) -> Splits:
        found = self._find()
        if found is None:
            raise self._missing("no such file")
        folder, read = found
        return Splits(DIGITS, read(folder, "train"), read(folder, "test"))

    def _find(self) -> tuple[Path, Callable[[Path, str], SplitDataset]] | None:
        for folder in (Path(self.root, "mnist_m"), Path(self.root)):
            if (folder / "mnist_m_train_labels.txt").is_file():
                return folder, _read_listed
            if (folder / "mnist_m_train.pt").is_file():
                return folder, _read_tensors
        return None

    def _missing(self, reason: str) -> ImprintError:
        names = ["mnist_m_train_labels.txt with mnist_m_train/", "or mnist_m_train.pt"]
        return missing_files(self.root, "mnist_m", names, reason)

    def _fetch(self) -> str:
        from torchvision.datasets.utils import download_and_extract_archive

        try:
            for file, md5 in MNIST_M_ARCHIVES.items():
                folder = str(Path(self.root, "mnist_m"))
                address = f"{MNIST_M_ADDRESS}/{file}.tar.gz"
                download_and_extract_archive(address, folder, md5=md5, remove_finished=True)
        # No network, a full disk, a read-only folder, a wrong checksum: the caller says what to do.
        except Exception as error:
            return f"the download failed: {' '.join(str(error).split()) or type(error).__name__}"
        return "the archive does not hold it"


def _read_listed(folder: Path, split: str) -> ImageFileDataset:
    listing = folder / f"mnist_m_{split}_labels.txt"
    paths, labels = [], []
    try:
        for line in listing.read_text().splitlines():
            name, label = line.split()
            paths.append(str(folder / f"mnist_m_{split}" / name))
            labels.append(int(label))
        return ImageFileDataset(paths, _checked(torch.tensor(labels), len(paths)))
    except (OSError, ValueError) as error:
        raise _damaged(listing, error) from error


def _read_tensors(folder: Path, split: str) -> ArrayDataset:
    path = folder / f"mnist_m_{split}.pt"
    try:
        images, labels = torch.load(path, map_location="cpu", weights_only=True)
        # Usually stored (image, height, width, channel).
        images = images.permute(0, 3, 1, 2) if images.shape[-1] == 3 else images
        return _digits(images.contiguous(), labels.long())
    except Exception as error:
        raise _damaged(path, error) from error


def _digits(images: torch.Tensor, labels: torch.Tensor) -> ArrayDataset:
    """Return the data set, or raise `ValueError` where the arrays are not images and digits."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}")
    return ArrayDataset(images, _checked(labels, len(images)))


def _checked(labels: torch.Tensor, num_images: int) -> torch.Tensor:
    if len(labels) != num_images or num_images == 0:
        raise ValueError(f"{num_images} images, {len(labels)} labels")
    if labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"labels run from {int(labels.min())} to {int(labels.max())}")
    return labels


def _missing(root: str, files: tuple[str, ...]) -> list[str]:
    return [file for file in files if not Path(root, file).is_file()]


def _damaged(path: Path, error: Exception) -> ImprintError:
    return ImprintError(
        f"cannot read {path.absolute()} ({type(error).__name__}: {str(error) or 'no more is known'}"
        "): it is damaged, cut short or of another format; remove it and fetch it again"
    )
