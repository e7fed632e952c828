"""Images for imprinting, as LightningDataModules: named sets, image folders, image files.

Every module hands out uint8 images at their native size and never asks which backbone reads them.
The extras of the base class (`class_names`, `task`, `sample_names`, ...) are conveniences: any
other LightningDataModule works with the package too.
"""

from imprint_pl.data.arrays import MNIST, ArrayDataset, Digits, FashionMNIST
from imprint_pl.data.cifar import CIFAR10
from imprint_pl.data.files import ImageFileDataset
from imprint_pl.data.folders import ImageFiles, ImageFolder
from imprint_pl.data.images import ImageDataModule, Splits

__all__ = [
    "CIFAR10",
    "MNIST",
    "ArrayDataset",
    "Digits",
    "FashionMNIST",
    "ImageDataModule",
    "ImageFileDataset",
    "ImageFiles",
    "ImageFolder",
    "Splits",
]
