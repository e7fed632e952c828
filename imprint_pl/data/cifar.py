"""CIFAR-10 and CIFAR-100 from the "python version" of their files, which are pickles.

torchvision checks the published checksums and then unpickles without restriction. This reader takes
any files of the format, and unpickles only arrays of numbers, lists and strings.
"""

import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from imprint_pl.data.arrays import ArrayDataset, fetch, missing_files
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.splits import Splits
from imprint_pl.errors import ImprintError

SHAPE = (3, 32, 32)


class CIFAR10(ImageDataModule):
    """CIFAR-10, 3 x 32 x 32: 50,000 train and 10,000 test images.

    Reads `<root>/cifar-10-batches-py/`: `data_batch_1` to `data_batch_5`, `test_batch` and
    `batches.meta`, each with any number of images. The published archive is fetched only where none
    of these files is there, so your own files are never overwritten.
    """

    name = "cifar10"
    source = "CIFAR10"
    folder = "cifar-10-batches-py"
    train_files = tuple(f"data_batch_{number}" for number in range(1, 6))
    test_file = "test_batch"
    names_file = "batches.meta"
    names_key, labels_key = "label_names", "labels"

    def prepare_data(self) -> None:
        missing = self._missing()
        if self.download and len(missing) == len(self.train_files) + 2:
            reason = fetch(self.source, self.root)
            if self._missing():
                raise missing_files(self.root, self.folder, self._missing(), reason)

    def load(self) -> Splits:
        if self._missing():
            raise missing_files(self.root, self.folder, self._missing())
        path = self._folder() / self.names_file
        names = _entry(read_pickle(path), self.names_key, path)
        if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
            raise ImprintError(f"{path}: {self.names_key!r} is not a list of names")
        class_names = [_text(name) for name in names]
        train = [self._read_batch(file, len(class_names)) for file in self.train_files]
        images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
        test_images, test_labels = self._read_batch(self.test_file, len(class_names))
        return Splits(
            class_names,
            ArrayDataset(torch.from_numpy(images), torch.from_numpy(labels)),
            ArrayDataset(torch.from_numpy(test_images.copy()), torch.from_numpy(test_labels)),
        )

    def _folder(self) -> Path:
        return Path(self.root, self.folder).absolute()

    def _missing(self) -> list[str]:
        names = [*self.train_files, self.test_file, self.names_file]
        return [name for name in names if not (self._folder() / name).is_file()]

    def _read_batch(self, file: str, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
        path = self._folder() / file
        content = read_pickle(path)
        data, labels = (_entry(content, key, path) for key in ("data", self.labels_key))
        pixels = data.values if isinstance(data, StoredArray) else None
        width = int(np.prod(SHAPE))
        if pixels is None or pixels.dtype != np.uint8 or pixels.shape[1:] != (width,):
            found = "no array" if pixels is None else f"{pixels.dtype} of shape {pixels.shape}"
            raise ImprintError(
                f"{path}: 'data' must be uint8 of shape (n, {width}), but is {found}"
            )
        if isinstance(labels, StoredArray) and labels.values is not None:
            labels = labels.values.tolist()
        if not isinstance(labels, list):
            raise ImprintError(f"{path}: {self.labels_key!r} is not a list of labels")
        if len(labels) != len(pixels):
            raise ImprintError(f"{path} has {len(pixels)} images but {len(labels)} labels")
        for label in labels:
            if not isinstance(label, int) or not 0 <= label < num_classes:
                raise ImprintError(
                    f"{path} has the label {label!r}, but {self.names_file} names {num_classes} "
                    f"classes: labels run from 0 to {num_classes - 1}"
                )
        return pixels.reshape(-1, *SHAPE), np.array(labels, dtype=np.int64)


class CIFAR100(CIFAR10):
    """CIFAR-100, 3 x 32 x 32: 50,000 train and 10,000 test images of a hundred classes.

    Reads `<root>/cifar-100-python/`: `train`, `test` and `meta`, with the fine labels. The
    published archive is fetched only where none of these files is there.
    """

    name = "cifar100"
    source = "CIFAR100"
    folder = "cifar-100-python"
    train_files = ("train",)
    test_file = "test"
    names_file = "meta"
    names_key, labels_key = "fine_label_names", "fine_labels"


def read_pickle(path: Path) -> Any:
    """Read a pickle of arrays of numbers, lists, dictionaries, strings and numbers.

    Nothing that the file names is imported or called.

    Returns:
        The pickled object, with arrays as `StoredArray` and strings of Python 2 as Latin-1 text.

    Raises:
        ImprintError: If the file is damaged, or asks for anything else, which the message names.
    """
    try:
        with open(path, "rb") as file:
            return _ArraysOnly(file, path).load()
    except ImprintError:
        raise
    # A damaged pickle can raise nearly anything.
    except Exception as error:
        raise ImprintError(
            f"cannot read {path} ({type(error).__name__}: {error}): it is cut short, damaged, or "
            "no file of CIFAR's python version; fetch it again"
        ) from error


class StoredArray:
    """Replaces NumPy's array while a pickle is read, since NumPy's unpickling trusts the file."""

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, content = state
        self._fill(content, dtype, shape, "F" if is_fortran else "C")

    @classmethod
    def from_buffer(cls, content: Any, dtype: Any, shape: Any, order: Any) -> "StoredArray":
        array = cls()
        array._fill(content, dtype, shape, order)
        return array

    def _fill(self, content: Any, dtype: Any, shape: Any, order: Any) -> None:
        if isinstance(content, str):
            content = content.encode("latin1")
        self.values = np.frombuffer(content, dtype.numpy()).reshape(shape, order=order)


class _StoredDtype:
    def __init__(self, name: Any, *_: Any) -> None:
        self.name = _text(name)
        self.byte_order = "="
        if not re.fullmatch(r"[biu][1248]", self.name):
            raise ValueError(f"the array type {self.name!r} is not one of whole numbers")

    def __setstate__(self, state: Any) -> None:
        self.byte_order = _text(state[1])
        if not re.fullmatch(r"[<>=|]", self.byte_order):
            raise ValueError(f"{self.byte_order!r} is not a byte order")

    def numpy(self) -> np.dtype:
        return np.dtype(self.byte_order + self.name)


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"the encoding {encoding!r} is not latin1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


class _ArraysOnly(pickle.Unpickler):
    # The globals that Python 2 and old and new NumPy write for arrays and bytes, each with our
    # replacement.
    ALLOWED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): StoredArray,
        ("numpy._core.multiarray", "_reconstruct"): StoredArray,
        ("numpy.core.numeric", "_frombuffer"): StoredArray.from_buffer,
        ("numpy._core.numeric", "_frombuffer"): StoredArray.from_buffer,
        ("numpy", "ndarray"): StoredArray,
        ("numpy", "dtype"): _StoredDtype,
        ("_codecs", "encode"): _encode,
        ("builtins", "bytes"): _no_bytes,
        ("__builtin__", "bytes"): _no_bytes,
    }

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file, encoding="latin1")
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise ImprintError(
                f"{self.path} asks for {module}.{name}, which a data file has no use for and which "
                "could run any code: do not trust it; fetch CIFAR's python version again"
            )
        return self.ALLOWED[module, name]


def _entry(content: Any, key: str, path: Path) -> Any:
    if isinstance(content, dict):
        by_text = {_text(name): value for name, value in content.items()}
        if key in by_text:
            return by_text[key]
    raise ImprintError(f"{path} has no entry {key!r}: it is no file of CIFAR's python version")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value
