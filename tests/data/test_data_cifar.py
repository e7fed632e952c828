"""CIFAR-10 from tiny files in its own format, however they were pickled, and from hostile ones."""

import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch

from imprint_pl.data import CIFAR10
from imprint_pl.data.cifar import read_pickle
from imprint_pl.errors import ImprintError

CLASSES = ["airplane", "automobile", "bird"]


def write(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol=protocol))


def write_cifar(root, protocol=2, keys=str):
    """Batches of 1 to 5 rows, and a test batch of 3; returns all rows by file."""

    def text(value):
        return value.encode() if keys is bytes else value

    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    rows = {}
    for number in range(1, 7):
        name = f"data_batch_{number}" if number < 6 else "test_batch"
        count = number if number < 6 else 3
        rows[name] = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {
            text("batch_label"): text(""),
            text("labels"): [row % 3 for row in range(count)],
            text("data"): rows[name],
            text("filenames"): [text(f"{row}.png") for row in range(count)],
        }
        write(folder / name, content, protocol)
    write(
        folder / "batches.meta", {text("label_names"): [text(name) for name in CLASSES]}, protocol
    )
    return folder, rows


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("keys", [str, bytes])
def test_batches_of_every_protocol_are_read_exactly(tmp_path, protocol, keys):
    _, rows = write_cifar(tmp_path, protocol, keys)
    module = CIFAR10(root=str(tmp_path), download=False)
    module.setup()
    expected = np.concatenate([rows[f"data_batch_{number}"] for number in range(1, 6)])
    images = module.train_dataset.images
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (15, 3, 32, 32))
    assert np.array_equal(images, expected.reshape(-1, 3, 32, 32))
    assert np.array_equal(module.test_dataset.images.flatten(1), rows["test_batch"])
    assert module.train_dataset.labels.tolist() == [
        row % 3 for number in range(1, 6) for row in range(number)
    ]
    assert module.train_dataset.labels.dtype == torch.int64
    assert module.class_names == CLASSES
    assert module.task == "cifar10"


def test_classes_and_shots_select_of_it(tmp_path):
    write_cifar(tmp_path)
    module = CIFAR10(root=str(tmp_path), classes=["bird", "airplane"], shots=2)
    module.setup()
    assert torch.bincount(module.train_dataset.labels).tolist() == [2, 2]
    assert module.test_dataset.labels.tolist() == [1, 0]
    assert module.task == "cifar10 (classes 2,0)"


def python2_batch(rows, labels):
    """A batch as Python 2 and the numpy of its day wrote it: 8-bit strings, old module names."""

    def string(value):
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value):
        return b"J" + struct.pack("<i", value)

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
        b"(K\x01(" + number(len(rows)) + number(3072) + b"t"
        b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"
        b"(K\x03U\x01|NNN" + number(-1) + number(-1) + b"K\x00tb"
        b"I00\n" + string(rows.tobytes()) + b"tb"
    )
    label_list = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + label_list + b"u."


def test_python_2_strings_are_read_as_bytes(tmp_path):
    folder, _ = write_cifar(tmp_path)
    rows = np.random.default_rng(1).integers(0, 256, (4, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(python2_batch(rows, [2, 1, 0, 2]))
    content = pickle.loads((folder / "test_batch").read_bytes(), encoding="latin1")
    assert np.array_equal(content["data"], rows)
    module = CIFAR10(root=str(tmp_path))
    module.setup()
    assert np.array_equal(module.test_dataset.images.flatten(1), rows)
    assert module.test_dataset.labels.tolist() == [2, 1, 0, 2]


@pytest.mark.parametrize("dtype", ["<i4", ">i4", "<i8", "|u1"])
def test_arrays_of_either_byte_order_and_layout_are_read(tmp_path, dtype):
    array = np.asfortranarray(np.arange(6).reshape(2, 3).astype(dtype))
    for protocol in (2, 5):
        write(tmp_path / "array", array, protocol)
        assert np.array_equal(read_pickle(tmp_path / "array").values, array)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_hostile_batch_is_refused_by_name_and_not_executed(tmp_path, protocol):
    folder, _ = write_cifar(tmp_path)
    mark = tmp_path / "executed"
    attack = {"data": Attack(os.system, f"touch {mark}"), "labels": []}
    write(folder / "data_batch_3", attack, protocol)
    with pytest.raises(ImprintError, match=r"data_batch_3 asks for \w+\.system") as caught:
        CIFAR10(root=str(tmp_path)).setup()
    assert str(folder) in str(caught.value)
    assert not mark.exists()


@pytest.mark.parametrize(
    "function",
    [eval, getattr, np.load, np.frombuffer],
)
def test_nothing_but_arrays_is_unpickled(tmp_path, function):
    write(tmp_path / "file", Attack(function, "1"))
    with pytest.raises(ImprintError, match="asks for"):
        read_pickle(tmp_path / "file")


def test_arrays_of_objects_and_other_encodings_are_refused(tmp_path):
    write(tmp_path / "objects", np.array([{}, 1], dtype=object))
    with pytest.raises(ImprintError, match=r"objects .*'O8' is not one of whole numbers"):
        read_pickle(tmp_path / "objects")
    (tmp_path / "encode").write_bytes(b"\x80\x02c_codecs\nencode\n(U\x01aU\x05rot13tR.")
    with pytest.raises(ImprintError, match=r"encode .*'rot13' is not latin1"):
        read_pickle(tmp_path / "encode")


@pytest.mark.parametrize("name", ["data_batch_4", "test_batch", "batches.meta"])
def test_a_missing_file_is_named_and_nothing_is_fetched_over_the_others(
    tmp_path, monkeypatch, name
):
    folder, _ = write_cifar(tmp_path)
    (folder / name).unlink()
    monkeypatch.setattr("imprint_pl.data.cifar.fetch", lambda *_: pytest.fail("must not fetch"))
    with pytest.raises(ImprintError) as caught:
        CIFAR10(root=str(tmp_path), download=True).setup()
    assert str(caught.value).startswith(f"{name} missing in {folder} ")


def test_an_absent_set_is_fetched_and_a_failure_says_why(tmp_path, monkeypatch):
    asked = []

    def fail(*arguments, **keywords):
        asked.append((arguments, keywords))
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", fail)
    with pytest.raises(ImprintError, match=r"data_batch_1, .*the download failed: no route"):
        CIFAR10(root=str(tmp_path)).setup()
    assert asked == [((str(tmp_path),), {"download": True})]
    with pytest.raises(ImprintError, match="no such file"):
        CIFAR10(root=str(tmp_path), download=False).setup()
    assert len(asked) == 1


@pytest.mark.parametrize("kept", [0, 1, 40, 3000])
def test_a_truncated_file_is_named(tmp_path, kept):
    folder, _ = write_cifar(tmp_path)
    path = folder / "data_batch_2"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ImprintError, match=r"cannot read .*data_batch_2 .*cut short"):
        CIFAR10(root=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no entry 'data'"),
        ({"labels": []}, "no entry 'data'"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "no entry 'labels'"),
        ({"data": [0], "labels": [0]}, "but is no array"),
        ({"data": np.zeros((1, 3071), np.uint8), "labels": [0]}, r"uint8 of shape \(1, 3071\)"),
        ({"data": np.zeros((1, 3072), np.int64), "labels": [0]}, "is int64"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "2 images but 1 labels"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [3]}, "label 3, .* names 3 classes"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [-1]}, "label -1"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["a"]}, "label 'a'"),
    ],
)
def test_wrong_contents_are_named_with_the_file(tmp_path, content, message):
    folder, _ = write_cifar(tmp_path)
    write(folder / "data_batch_5", content)
    with pytest.raises(ImprintError, match=rf"data_batch_5.*{message}"):
        CIFAR10(root=str(tmp_path)).setup()


def test_labels_may_be_an_array(tmp_path):
    folder, rows = write_cifar(tmp_path)
    write(folder / "test_batch", {"data": rows["test_batch"], "labels": np.array([2, 2, 0])})
    module = CIFAR10(root=str(tmp_path))
    module.setup()
    assert module.test_dataset.labels.tolist() == [2, 2, 0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("batches.meta", {"label_names": 3}, "batches.meta: 'label_names' is not a list of names"),
        ("batches.meta", {"label_names": [1, 2]}, "'label_names' is not a list of names"),
        ("test_batch", {"labels": 7}, "test_batch: 'labels' is not a list of labels"),
        ("test_batch", {"labels": None}, "test_batch: 'labels' is not a list of labels"),
    ],
)
def test_lists_of_another_type_are_named_with_the_file(tmp_path, file, content, message):
    folder, rows = write_cifar(tmp_path)
    write(folder / file, {"data": rows["test_batch"]} | content)
    with pytest.raises(ImprintError, match=re.escape(message)):
        CIFAR10(root=str(tmp_path), download=False).setup()
