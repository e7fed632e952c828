"""Labels that merge classes: subsets by name, d-in-1 tasks, the paper's hundred, and unions."""

import random
from collections import Counter

import numpy as np
import pytest
import tiny_sets
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint_pl.data import MNIST, SVHN, USPS, ArrayDataset, CombiDigits, Digits, Union
from imprint_pl.data.base import ImageDataModule, Splits
from imprint_pl.data.tasks import d_in_1, draw, relabel, resolve_task
from imprint_pl.errors import ImprintError

NAMES = [str(digit) for digit in range(10)]
ANIMALS = ["cat", "dog", "hen", "owl", "pig"]


def set_up(module):
    module.setup()
    return module


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (None, list(range(10))),
        ("all", list(range(10))),
        ("even", [0, 2, 4, 6, 8]),
        ("odd", [1, 3, 5, 7, 9]),
        ("short", [0, 1, 2]),
        ([7, "3"], [7, 3]),
    ],
)
def test_the_paper_s_subsets_have_names(classes, expected):
    assert resolve_task(classes, NAMES) == [[index] for index in expected]


def test_an_inner_list_is_one_label_under_the_joined_names():
    assert resolve_task([["dog", 0], "owl"], ANIMALS) == [[1, 0], [3]]
    module = set_up(Digits(classes=[[0, 3], 7]))
    assert (module.class_names, module.num_classes) == (["0+3", "7"], 2)
    assert module.task == "digits (classes 0+3,7)"
    train = module.train_dataset
    assert set(zip(train.labels.tolist(), train.original_labels.tolist(), strict=True)) == {
        (0, 0),
        (0, 3),
        (1, 7),
    }
    assert module.original_class_names == NAMES


@pytest.mark.parametrize("classes", [["cat"], [[1, 2], 0]])
def test_the_original_class_of_each_sample_is_its_class_before_relabelling(classes):
    class Animals(ImageDataModule):
        name = "animals"

        def load(self):
            labels = torch.arange(20) % 5
            images = labels.to(torch.uint8).reshape(-1, 1, 1, 1)
            return Splits(ANIMALS, ArrayDataset(images, labels), ArrayDataset(images, labels))

    module = set_up(Animals(classes=classes, shots=2))
    for dataset in (module.train_dataset, module.test_dataset):
        assert dataset.original_labels.tolist() == dataset.images.flatten().tolist()


@given(
    num_classes=st.integers(2, 40),
    d=st.integers(1, 5),
    labels=st.integers(1, 6),
    seed=st.integers(),
)
@settings(deadline=None)
def test_a_d_in_1_task_takes_d_classes_a_label_none_twice_and_grows_with_d(
    num_classes, d, labels, seed
):
    if d * labels > num_classes:
        with pytest.raises(ImprintError, match=f"asks for {d * labels} classes, but there are"):
            d_in_1(range(num_classes), d, labels, seed)
        return
    before = random.getstate()
    task = d_in_1(range(num_classes), d, labels, seed)
    assert random.getstate() == before
    assert [len(group) for group in task] == [d] * labels
    assert max(Counter(c for group in task for c in group).values()) == 1
    smaller = d_in_1(range(num_classes), max(d - 1, 1), labels, seed)
    assert all(set(a) <= set(b) for a, b in zip(smaller, task, strict=True))


def test_d_in_1_draws_from_the_chosen_classes_and_by_its_own_seed():
    module = set_up(Digits(classes="even", d=2, task_seed=4))
    assert module.num_classes == 2
    assert module.task == "digits (even, 2-in-1, seed 4)"
    assert set("".join(module.class_names)) <= set("02468+")
    tasks = {str(d_in_1(range(10), 3, 3, seed)) for seed in range(10)}
    assert len(tasks) == 10
    assert d_in_1(range(10), 3, 3, 5) == d_in_1(range(10), 3, 3, 5)


@pytest.mark.parametrize(("d", "shuffle"), [(1, 0), (3, 4), (10, 9)])
def test_the_paper_s_tasks_are_those_of_its_definition(d, shuffle):
    state = random.getstate()
    random.seed(420)
    numbers = random.sample(range(1000), 100)
    assert numbers[:5] == [26, 689, 800, 373, 279]
    for _ in range(shuffle + 1):
        random.shuffle(numbers)
    random.setstate(state)
    task = resolve_task(f"paper-{d}in1-{shuffle}", [str(i) for i in range(1000)])
    assert [set(group) for group in task] == [set(numbers[10 * j :][:d]) for j in range(10)]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"classes": "evn"}, "classes='evn' is unknown; did you mean 'even'"),
        ({"classes": "paper-3in1-0"}, "a task of ImageNet's 1000 classes, the data has 10"),
        ({"classes": [[0, 1], [1, 2]]}, r"names class 1 \('1'\) twice"),
        ({"classes": [[0], []]}, "has an empty list"),
        ({"classes": [[0, 1], 2], "d": 2}, "both merge classes"),
        ({"d": 0}, "d=0"),
        ({"d": 3, "num_labels": 4}, "asks for 12 classes, but there are 10"),
        ({"d": 11}, "asks for 11 classes, but there are 10"),
        ({"num_labels": 3}, "give d too"),
        ({"classes": [[0, 1], 2], "shots": 300}, r"class 0\+1 \('0\+1'\) has 289 training images"),
    ],
)
def test_wrong_tasks_are_named_with_the_cure(keywords, message):
    with pytest.raises(ImprintError, match=message):
        Digits(**keywords).setup()


@pytest.mark.parametrize("name", ["paper-0in1-0", "paper-11in1-0", "paper-1in1-10"])
def test_the_paper_has_no_other_tasks(name):
    with pytest.raises(ImprintError, match="run from paper-1in1-0 to paper-10in1-9"):
        resolve_task(name, [str(i) for i in range(1000)])


def test_shots_are_of_the_label_nested_and_of_all_its_classes():
    labels = torch.arange(300) % 3
    few, _ = draw(labels, NAMES[:3], [[0, 2], [1]], shots=20, seed=1)
    more, _ = draw(labels, NAMES[:3], [[0, 2], [1]], shots=40, seed=1)
    assert set(few.tolist()) <= set(more.tolist())
    counts = torch.bincount(labels[more]).tolist()
    assert counts[0] + counts[2] == counts[1] == 40
    assert min(counts) > 10


def test_a_merged_label_holds_out_a_part_of_each_of_its_classes():
    labels = torch.arange(30) % 3
    drawn, held = draw(labels, NAMES[:3], [[0, 2], [1]], held_fraction=0.2)
    assert torch.bincount(labels[held]).tolist() == [2, 2, 2]
    assert sorted([*drawn.tolist(), *held.tolist()]) == list(range(30))


def test_relabel_merges():
    positions, labels = relabel(torch.tensor([0, 1, 2, 3, 2]), [[3, 0], [2]])
    assert positions.tolist() == [0, 2, 3, 4]
    assert labels.tolist() == [0, 1, 0, 1]


def write_all(root):
    tiny_sets.write_mnist(root)
    tiny_sets.write_usps(root)
    tiny_sets.write_svhn(root)
    return tiny_sets.write_mnist_m_files(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_combi_digits_is_four_sources_under_ten_digits(tmp_path, workers):
    mnist_m = write_all(tmp_path)
    module = set_up(CombiDigits(root=str(tmp_path), download=False, num_workers=workers))
    assert (module.class_names, module.task) == (NAMES, "combi_digits")
    images, labels = next(iter(module.train_dataloader()))
    shapes = [(1, 28, 28), (3, 32, 32), (1, 16, 16), (3, 32, 32)]
    assert [tuple(image.shape) for image in images] == [s for s in shapes for _ in range(20)]
    assert labels.tolist() == [i % 10 for i in range(20)] * 4
    assert np.array_equal(images[20], mnist_m["train"][0].transpose(2, 0, 1))
    names = [module.original_class_names[i] for i in module.train_dataset.original_labels]
    assert names[3::20] == ["mnist: 3", "mnist_m: 3", "usps: 3", "svhn: 3"]


def test_a_union_takes_subsets_and_shots_across_its_sources(tmp_path):
    write_all(tmp_path)
    module = set_up(CombiDigits(root=str(tmp_path), classes=[[0, 5], 3], shots=6, num_workers=0))
    assert module.class_names == ["0+5", "3"]
    batch, labels = next(iter(module.train_dataloader()))
    assert torch.bincount(labels).tolist() == [6, 6]
    names = [module.original_class_names[i] for i in module.train_dataset.original_labels]
    assert {name.split(": ")[1] for name in names} == {"0", "3", "5"}
    assert len(batch) == 12
    # Each image stands beside its own label: sources tell themselves apart by their shapes.
    sizes = {"mnist": (1, 28), "mnist_m": (3, 32), "usps": (1, 16), "svhn": (3, 32)}
    for image, name in zip(batch, names, strict=True):
        assert (image.shape[0], image.shape[1]) == sizes[name.split(":")[0]]


def test_a_union_of_any_sets_joins_classes_of_one_name(tmp_path):
    write_all(tmp_path)
    root = str(tmp_path)
    module = set_up(Union([USPS(root=root), SVHN(root=root), Digits()]))
    assert (module.class_names, module.task) == (NAMES, "usps+svhn+digits")
    assert len(module.train_dataset) == 20 + 20 + 1437
    apart = set_up(Union([MNIST(root=root), USPS(root=root)]))
    assert apart.class_names[:2] == ["0 - zero", "1 - one"]
    assert apart.num_classes == 20


def test_tasks_of_a_union_s_sources_are_refused():
    with pytest.raises(ImprintError, match=r"shots=3 of the source 'digits': give shots to"):
        Union([Digits(shots=3)])
    with pytest.raises(ImprintError, match="sources is empty"):
        Union([])


def test_a_damaged_file_of_a_union_is_named_also_by_workers(tmp_path):
    write_all(tmp_path)
    path = tmp_path / "mnist_m" / "mnist_m_train" / "00000007.png"
    path.write_bytes(path.read_bytes()[:50])
    for workers in (0, 2):
        module = set_up(CombiDigits(root=str(tmp_path), num_workers=workers))
        with pytest.raises(ImprintError, match=r"cannot read the image .*00000007\.png"):
            list(module.train_dataloader())
