"""Data sets of the `datasets` library."""

import numpy as np
import pytest
import torch
from PIL import Image
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier
from imprint_pl.data import HuggingFace, ImageFolder
from imprint_pl.errors import ImprintError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What the library keeps goes into the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


@pytest.fixture
def folder(tmp_path):
    """Five dark and five light pictures, JPEG and PNG."""
    for label, base in (("dark", 0), ("light", 127)):
        for i in range(5):
            path = tmp_path / "photos" / label / f"{i}.{'jpg' if i % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(base + i).integers(0, 128, (12, 10 + i, 3)) + base
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def listed(folder, labels=None):
    paths = sorted(map(str, folder.rglob("*.*")))
    labels = labels or [path.split("/")[-2] for path in paths]
    rows = datasets.Dataset.from_dict({"picture": paths, "label": labels})
    return rows.cast_column("picture", datasets.Image())


def loaded(*arguments, **options):
    data = HuggingFace(*arguments, num_workers=0, **options)
    data.setup()
    return data


def refused(*arguments, **options):
    with pytest.raises(ImprintError) as caught:
        loaded(*arguments, **options)
    return str(caught.value)


def pixels(dataset):
    return [image.sum().item() for image in dataset.__getitems__(range(len(dataset)))[0]]


def as_folder(folder):
    data = ImageFolder(str(folder), num_workers=0)
    data.setup()
    return data


def test_an_object_and_its_saved_folder_hold_the_pixels_and_splits_of_the_files(folder, tmp_path):
    expected, rows = as_folder(folder), listed(folder)
    rows.save_to_disk(str(tmp_path / "saved"))
    prints = []
    for source in (rows, str(tmp_path / "saved")):
        data = loaded(source)
        assert data.class_names == expected.class_names
        for split in ("train", "val", "test"):
            own, theirs = getattr(data, f"{split}_dataset"), getattr(expected, f"{split}_dataset")
            assert own.labels.tolist() == theirs.labels.tolist()
            assert pixels(own) == pixels(theirs)
        assert data.sample_names("train") is None
        prints.append(data.train_dataset.fingerprint())
    again = loaded(str(tmp_path / "saved"))
    assert again.train_dataset.fingerprint() == prints[1] != again.test_dataset.fingerprint()
    assert again.train_dataset.sized(8, 4).fingerprint() != prints[1]


def test_a_folder_of_the_hubs_layout_is_read(folder, tmp_path):
    hub = tmp_path / "hub" / "data"
    hub.mkdir(parents=True)
    listed(folder).to_parquet(str(hub / "train-00000-of-00001.parquet"))
    assert len(loaded(str(tmp_path / "hub")).train_dataset) == 8


def test_class_labels_keep_their_order_and_splits_their_names(folder):
    names = ["light", "dark"]
    kind = datasets.ClassLabel(names=names)
    rows = listed(folder).cast_column("label", kind)
    splits = datasets.DatasetDict(train=rows.select([0, 1, 5, 6]), validation=rows.select([2, 7]))
    splits["test"] = rows.select([3, 4, 8])
    splits["extra"] = rows.select([9])
    with pytest.warns(UserWarning, match="the splits extra are not read"):
        data = loaded(splits)
    assert data.class_names == names
    assert data.train_dataset.labels.tolist() == [1, 1, 0, 0]
    assert [len(data.val_dataset), len(data.test_dataset)] == [2, 3]


def test_numbers_are_sorted_by_value(folder):
    data = loaded(listed(folder, [10] * 5 + [9] * 5))
    assert data.class_names == ["9", "10"]


def test_columns_are_found_or_named(folder):
    rows = listed(folder).rename_column("label", "kind")
    assert "has no column 'label' (its columns: picture, kind): give label_column" in refused(rows)
    assert len(loaded(rows, label_column="kind").train_dataset) == 8
    assert "did you mean 'kind'?" in refused(rows, label_column="kinds")
    paths = sorted(map(str, folder.rglob("*.*")))
    plain = datasets.Dataset.from_dict({"picture": paths, "label": [1, 2] * 5})
    assert "has 0 columns of images" in refused(plain)
    assert len(loaded(plain, image_column="picture").train_dataset) == 8
    assert "'label' of train is no column of images" in refused(plain, image_column="label")


def test_all_bad_rows_are_named_at_once(folder, tmp_path):
    rows = listed(folder)
    known = str(folder / "dark/0.png")
    paths = [str(tmp_path / "gone.png"), known, None, known]
    bad = datasets.Dataset.from_dict({"picture": paths, "label": ["dark", "dark", "light", None]})
    bad = bad.cast_column("picture", datasets.Image())
    message = refused(datasets.DatasetDict(train=rows, test=bad))
    assert "has 5 rows that cannot be used" in message
    assert "No label: test 3" in message
    assert "No image: test 2" in message
    assert f"No such file: test 0 ({tmp_path}/gone.png)" in message
    assert f"The same file twice: test 1 ({folder}/dark/0.png), as in train 0, test 3" in message


def test_secret_labels_are_no_labels(folder):
    rows = listed(folder).cast_column("label", datasets.ClassLabel(names=["dark", "light"]))
    secret = rows.map(lambda row: {"label": -1}, features=rows.features)
    message = refused(datasets.DatasetDict(train=rows, test=secret.select([0])))
    assert "No label: test 0" in message


def test_several_labels_an_image_are_refused_with_a_sentence(folder):
    message = refused(listed(folder, [["dark"], ["dark", "light"]] * 5))
    assert "an image has one label here, and several of them (multi-label) are not" in message


def test_a_split_without_train_a_stream_and_other_objects_are_refused(folder):
    rows = listed(folder)
    message = refused(datasets.DatasetDict(test=rows, extra=rows))
    assert "has no split train, but test, extra" in message
    assert "is a stream" in refused(rows.to_iterable_dataset())
    assert "give a datasets.Dataset" in refused([1, 2])
    assert len(loaded(datasets.DatasetDict(all=rows)).train_dataset) == 8


def test_a_folder_that_is_none_is_refused_with_a_cure(tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    assert "give a folder of save_to_disk, or a name" in refused(str(tmp_path / "none"))
    (tmp_path / "state.json").write_text("{}")
    assert "cannot read the data set" in refused(str(tmp_path))


def test_images_that_cannot_be_read_are_named_or_skipped(folder, tmp_path):
    rows = listed(folder)
    (folder / "dark" / "0.png").write_bytes(b"no picture")
    rows.save_to_disk(str(tmp_path / "saved"))
    data = loaded(str(tmp_path / "saved"), test_fraction=0.2)
    with pytest.raises(ImprintError, match=r"cannot read the image train 0 \(0.png\)"):
        pixels(data.train_dataset)
    with pytest.warns(UserWarning, match="1 of 10 images of saved cannot be read"):
        data = loaded(str(tmp_path / "saved"), on_error="skip")
    assert list(data.unreadable) == ["train 0"]
    assert len(data.train_dataset) + len(data.test_dataset) == 9


def test_a_fit_in_workers_gives_the_head_of_the_folder(folder):
    heads = []
    in_workers = HuggingFace(listed(folder), num_workers=1, batch_size=2)
    for data in (ImageFolder(str(folder), num_workers=0), in_workers):
        model = ImprintedClassifier("efficientnet_lite0", recipe="qi", image_size=32)
        quiet_trainer().fit(model, data)
        heads.append(model.head)
    assert torch.equal(heads[0].proxies, heads[1].proxies) or torch.allclose(
        heads[0].proxies, heads[1].proxies, atol=1e-6
    )
    assert heads[0].class_names == heads[1].class_names
