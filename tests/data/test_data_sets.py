"""USPS, SVHN, MNIST-M, CIFAR-100 and ImageNet from small files in their real formats."""

import os
import pickle
import random

import numpy as np
import pytest
import tiny_sets
import torch

from imprint_pl.data import CIFAR100, MNISTM, SVHN, USPS, ImageNet
from imprint_pl.errors import ImprintError

NUMBERS = list(range(10))
DIGITS = [str(digit) for digit in NUMBERS]


def set_up(module):
    module.setup()
    return module


def test_usps_is_read_back_to_the_bytes_that_were_written(tmp_path):
    written = tiny_sets.write_usps(tmp_path)
    module = set_up(USPS(root=str(tmp_path), download=False))
    found = module.train_dataset.images
    assert (found.dtype, tuple(found.shape)) == (torch.uint8, (20, 1, 16, 16))
    # torchvision cuts instead of rounding: a step of 1/255 at most.
    difference = written["usps.bz2"].astype(int) - found.flatten(1).numpy()
    assert set(np.unique(difference)) <= {0, 1}
    assert module.train_dataset.labels.tolist() == [i % 10 for i in range(20)]
    assert len(module.test_dataset) == 10
    assert (module.class_names, module.task) == (DIGITS, "usps")


def test_svhn_has_channels_first_and_calls_ten_zero(tmp_path):
    written = tiny_sets.write_svhn(tmp_path)
    module = set_up(SVHN(root=str(tmp_path), download=False))
    assert np.array_equal(module.train_dataset.images, written["train"])
    assert np.array_equal(module.test_dataset.images, written["test"])
    assert module.train_dataset.labels.tolist() == [i % 10 for i in range(20)]
    assert module.train_dataset.labels.dtype == torch.int64
    assert module.class_names == DIGITS


def test_mnist_m_is_read_from_image_files_with_their_names(tmp_path):
    written = tiny_sets.write_mnist_m_files(tmp_path)
    module = set_up(MNISTM(root=str(tmp_path), download=False, num_workers=0))
    images, labels = next(iter(module.test_dataloader()))
    expected = written["test"].transpose(0, 3, 1, 2)
    assert all(np.array_equal(a, b) for a, b in zip(images, expected, strict=True))
    assert labels.tolist() == NUMBERS
    assert module.sample_names("test")[3].endswith("mnist_m/mnist_m_test/00000003.png")


@pytest.mark.parametrize("below", ["", "mnist_m"])
def test_mnist_m_is_read_from_tensors_in_either_folder(tmp_path, below):
    (tmp_path / below).mkdir(exist_ok=True)
    written = tiny_sets.write_mnist_m_tensors(tmp_path / below)
    module = set_up(MNISTM(root=str(tmp_path), download=False))
    assert torch.equal(module.train_dataset.images, written["train"].permute(0, 3, 1, 2))
    assert module.test_dataset.labels.tolist() == NUMBERS


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_in_the_place_of_mnist_m_s_tensors_is_not_executed(tmp_path):
    tiny_sets.write_mnist_m_tensors(tmp_path)
    torch.save((Attack(tmp_path / "executed"), 1), tmp_path / "mnist_m_train.pt")
    with pytest.raises(ImprintError, match=r"cannot read .*mnist_m_train\.pt"):
        MNISTM(root=str(tmp_path)).setup()
    assert not (tmp_path / "executed").exists()


def test_cifar_100_has_its_fine_labels(tmp_path):
    written = tiny_sets.write_cifar100(tmp_path)
    module = set_up(CIFAR100(root=str(tmp_path), download=False))
    assert np.array_equal(module.train_dataset.images.flatten(1), written["train"])
    assert module.test_dataset.labels.tolist() == [i % 5 for i in range(10)]
    assert module.class_names == [f"class {i}" for i in range(5)]
    assert module.task == "cifar100"


def test_a_hostile_file_of_cifar_100_is_refused_and_not_executed(tmp_path):
    tiny_sets.write_cifar100(tmp_path)
    content = {"data": Attack(tmp_path / "executed"), "fine_labels": []}
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(content))
    with pytest.raises(ImprintError, match=r"test asks for \w+\.system"):
        CIFAR100(root=str(tmp_path)).setup()
    assert not (tmp_path / "executed").exists()


WRITERS = {
    USPS: (tiny_sets.write_usps, ["usps.bz2", "usps.t.bz2"]),
    SVHN: (tiny_sets.write_svhn, ["train_32x32.mat", "test_32x32.mat"]),
    MNISTM: (tiny_sets.write_mnist_m_tensors, ["mnist_m_train.pt", "mnist_m_test.pt"]),
    CIFAR100: (tiny_sets.write_cifar100, ["cifar-100-python/train", "cifar-100-python/test"]),
}


@pytest.mark.parametrize("kept", [0, 100])
@pytest.mark.parametrize(("data", "place"), [(d, i) for d in WRITERS for i in (0, 1)])
def test_a_file_cut_short_is_named(tmp_path, data, place, kept):
    write, files = WRITERS[data]
    write(tmp_path)
    path = tmp_path / files[place]
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ImprintError, match="cannot read") as caught:
        data(root=str(tmp_path)).setup()
    assert str(path) in str(caught.value)
    assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize("data", WRITERS)
def test_a_missing_set_is_fetched_only_where_asked_and_a_failure_has_the_cure(
    tmp_path, data, monkeypatch
):
    def no_network(*_, **__):
        raise OSError("no route")

    for name in ("USPS", "SVHN", "CIFAR100", "utils.download_and_extract_archive"):
        monkeypatch.setattr(f"torchvision.datasets.{name}", no_network)
    with pytest.raises(ImprintError, match="the download failed: no route.* Put the unpacked"):
        data(root=str(tmp_path)).setup()
    with pytest.raises(ImprintError, match="no such file"):
        data(root=str(tmp_path), download=False).setup()


def test_a_split_that_is_there_is_kept_and_only_the_other_fetched(tmp_path, monkeypatch):
    tiny_sets.write_svhn(tmp_path)
    content = (tmp_path / "test_32x32.mat").read_bytes()
    (tmp_path / "test_32x32.mat").unlink()
    asked = []

    def fetched(root, **split):
        asked.append(split)
        (tmp_path / "test_32x32.mat").write_bytes(content)

    monkeypatch.setattr("torchvision.datasets.SVHN", fetched)
    set_up(SVHN(root=str(tmp_path)))
    assert asked == [{"download": True, "split": "test"}]


SYNSETS = ["n01440764", "n01443537", "n01484850"]
INDEX = {"0": ["n01440764", "tench"], "1": ["n01443537", "crane"], "2": ["n01484850", "crane"]}


def test_imagenet_takes_its_names_from_a_class_index_file(tmp_path):
    tiny_sets.write_imagenet(tmp_path, SYNSETS, INDEX)
    module = set_up(ImageNet(root=str(tmp_path), num_workers=0))
    assert module.class_names == ["tench", "crane (n01443537)", "crane (n01484850)"]
    assert (module.task, len(module.train_dataset), len(module.test_dataset)) == ("imagenet", 9, 6)
    images, labels = next(iter(module.val_dataloader()))
    assert [tuple(image.shape) for image in images[:2]] == [(3, 20, 30), (3, 21, 30)]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_imagenet_knows_its_thousand_names_without_a_file_and_a_part_of_it_keeps_its_numbers(
    tmp_path,
):
    tiny_sets.write_imagenet(tmp_path, [*SYNSETS, "n15075141"])
    module = set_up(ImageNet(root=str(tmp_path), classes=["toilet tissue", 2], num_workers=0))
    assert module.class_names == ["toilet tissue", "great white shark"]
    assert module.train_dataset.original_labels.tolist() == [2, 2, 2, 999, 999, 999]
    with pytest.raises(ImprintError, match=r"class 3 \('tiger shark'\) .* no training image"):
        ImageNet(root=str(tmp_path)).setup()


def test_a_task_of_the_paper_needs_its_own_classes_only(tmp_path):
    random.seed(420)
    numbers = random.sample(range(1000), 100)
    random.shuffle(numbers)
    random.shuffle(numbers)
    groups = [sorted(numbers[10 * j : 10 * j + 2]) for j in range(10)]
    from timm.data import ImageNetInfo

    synsets = ImageNetInfo().label_names()
    tiny_sets.write_imagenet(tmp_path, [synsets[i] for group in groups for i in group], train=1)
    module = set_up(ImageNet(root=str(tmp_path), classes="paper-2in1-1", num_workers=0))
    assert module.task == "imagenet (paper-2in1-1)"
    for label, group in enumerate(groups):
        original = module.test_dataset.original_labels[module.test_dataset.labels == label]
        assert sorted(original.tolist()) == sorted(group * 2)
        names = [module.original_class_names[i] for i in group]
        assert module.class_names[label] == "+".join(names)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: (root / "train" / SYNSETS[0]).mkdir(parents=True), "needs train/<synset>/"),
        (lambda root: tiny_sets.write_imagenet(root, ["n00000000"]), "is no class of ImageNet"),
        (
            lambda root: tiny_sets.write_imagenet(root, SYNSETS, {"1": ["n", "x"]}),
            r"cannot read .*imagenet_class_index\.json",
        ),
    ],
)
def test_what_is_not_imagenet_is_an_error_with_the_cure(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(ImprintError, match=message):
        ImageNet(root=str(tmp_path)).setup()
