"""Images for imprinting, as LightningDataModules: named sets, unions of them, image folders, tables
of image files, data sets of the `datasets` library, image files; and embeddings.

Every module returns uint8 images at their native size, whatever backbone reads them.
The extras of the base class (`class_names`, `task`, `sample_names`, ...) are conveniences: any
other LightningDataModule works with the package too.
"""

from imprint_pl.data.arrays import MNIST, ArrayDataset, Digits, FashionMNIST
from imprint_pl.data.base import ImageDataModule, Splits
from imprint_pl.data.cifar import CIFAR10, CIFAR100
from imprint_pl.data.digit_sets import MNISTM, SVHN, USPS
from imprint_pl.data.embeddings import EmbeddingDataModule
from imprint_pl.data.folders import ImageFiles, ImageFolder, LabelledFolder
from imprint_pl.data.hugging_face import HuggingFace
from imprint_pl.data.image_files import ImageFileDataset
from imprint_pl.data.imagenet import ImageNet
from imprint_pl.data.listed import CSV
from imprint_pl.data.union import CombiDigits, Union, UnionDataset

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CSV",
    "MNIST",
    "MNISTM",
    "SVHN",
    "USPS",
    "ArrayDataset",
    "CombiDigits",
    "Digits",
    "EmbeddingDataModule",
    "FashionMNIST",
    "HuggingFace",
    "ImageDataModule",
    "ImageFileDataset",
    "ImageFiles",
    "ImageFolder",
    "ImageNet",
    "LabelledFolder",
    "Splits",
    "Union",
    "UnionDataset",
]
