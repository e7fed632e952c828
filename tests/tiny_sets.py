"""A few images of each named set, written in the formats that the real files have."""

import bz2
import json
import pickle

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat


def images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, train=20, test=10):
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, count in (("train", train), ("t10k", test)):
        write_idx(folder / f"{split}-images-idx3-ubyte", images(count, 28, 28))
        write_idx(folder / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)


def write_usps(root, train=20, test=10):
    """Lines "label 1:-1 2:0.5 …": labels 1..10, pixels -1..1, as in the file of the LIBSVM page."""
    written = {}
    for file, count in (("usps.bz2", train), ("usps.t.bz2", test)):
        written[file] = images(count, 256)
        lines = [
            f"{i % 10 + 1} "
            + " ".join(f"{j + 1}:{2 * int(v) / 255 - 1:.7g}" for j, v in enumerate(row))
            for i, row in enumerate(written[file])
        ]
        (root / file).write_bytes(bz2.compress("\n".join(lines).encode() + b" \n"))
    return written


def write_svhn(root, train=20, test=10):
    """Matlab 5 files: X (32, 32, 3, n), y (n, 1) with 10 for the digit 0."""
    written = {}
    for split, count in (("train", train), ("test", test)):
        written[split] = images(count, 3, 32, 32)
        labels = np.arange(count) % 10
        labels[labels == 0] = 10
        content = {"X": written[split].transpose(2, 3, 1, 0), "y": labels[:, None].astype(np.uint8)}
        savemat(root / f"{split}_32x32.mat", content, do_compression=True)
    return written


def write_mnist_m_files(root, train=20, test=10):
    written = {}
    for split, count in (("train", train), ("test", test)):
        folder = root / "mnist_m" / f"mnist_m_{split}"
        folder.mkdir(parents=True)
        written[split] = images(count, 32, 32, 3)
        lines = []
        for i, pixels in enumerate(written[split]):
            Image.fromarray(pixels).save(folder / f"{i:08d}.png")
            lines.append(f"{i:08d}.png {i % 10}\n")
        (root / "mnist_m" / f"mnist_m_{split}_labels.txt").write_text("".join(lines))
    return written


def write_mnist_m_tensors(root, train=20, test=10):
    written = {}
    for split, count in (("train", train), ("test", test)):
        written[split] = torch.from_numpy(images(count, 28, 28, 3))
        torch.save((written[split], torch.arange(count) % 10), root / f"mnist_m_{split}.pt")
    return written


def write_cifar100(root, train=20, test=10, classes=5):
    folder = root / "cifar-100-python"
    folder.mkdir()
    written = {}
    for split, count in (("train", train), ("test", test)):
        written[split] = images(count, 3072)
        content = {
            b"filenames": [f"{i}.png".encode() for i in range(count)],
            b"batch_label": b"part 1 of 1",
            b"fine_labels": [i % classes for i in range(count)],
            b"coarse_labels": [0] * count,
            b"data": written[split],
        }
        (folder / split).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {i}".encode() for i in range(classes)]
    meta = {b"fine_label_names": names, b"coarse_label_names": [b"all"]}
    (folder / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return written


def write_imagenet(root, synsets, index=None, train=3, test=2):
    """JPEGs of any size, n images a synset; `index` is written as imagenet_class_index.json."""
    for split, count in (("train", train), ("val", test)):
        for synset in synsets:
            folder = root / split / synset
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = images(1, 20 + i, 30, 3, seed=i)[0]
                name = f"{synset}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{i:08d}.JPEG"
                Image.fromarray(pixels).save(folder / name)
    if index is not None:
        (root / "imagenet_class_index.json").write_text(json.dumps(index))
