"""Image files that a table lists: CSV and Parquet."""

import csv
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier
from imprint_pl.data import CSV, ImageFolder
from imprint_pl.errors import ImprintError


def photo(path, seed, base=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 128, (12, 10, 3)) + base
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Five dark and five light pictures, one of each in a folder of its own."""
    for label, base in (("dark", 0), ("light", 127)):
        for i in range(5):
            inner = "deep/" if i == 1 else ""
            photo(tmp_path / "photos" / label / f"{inner}{i}.png", i + base, base)
    return tmp_path / "photos"


def found_in(folder):
    return [
        (os.path.relpath(path, folder), os.path.relpath(path, folder).split(os.sep)[0])
        for path in sorted(map(str, folder.rglob("*.png")))
    ]


def written(path, rows, header=("file", "label"), delimiter=","):
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return str(path)


def loaded(*arguments, **options):
    data = CSV(*arguments, num_workers=0, **options)
    data.setup()
    return data


def refused(*arguments, **options):
    with pytest.raises(ImprintError) as caught:
        loaded(*arguments, **options)
    return str(caught.value)


def held(data):
    """Files below photos/, with their labels, of train and test."""
    return [
        [
            (path.split("photos/")[1], data.class_names[label])
            for path, label in zip(split.paths, split.labels.tolist(), strict=True)
        ]
        for split in (data.train_dataset, data.test_dataset)
    ]


def test_rows_in_any_order_are_the_folder_with_its_held_out_images(folder):
    rows = found_in(folder)
    random.Random(3).shuffle(rows)
    expected = ImageFolder(str(folder), num_workers=0)
    expected.setup()
    data = loaded(written(folder / "all.csv", rows))
    assert data.class_names == ["dark", "light"]
    assert held(data) == held(expected)
    assert data.train_dataset.fingerprint() == expected.train_dataset.fingerprint()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_columns_are_named_and_cells_separated_in_any_way(folder, delimiter):
    rows = [(f"x{i}", name, label) for i, (name, label) in enumerate(found_in(folder))]
    table = written(folder / "t.csv", rows, ("id", "path", "kind"), delimiter)
    data = loaded(table, file_column="path", label_column="kind")
    assert len(data.train_dataset) == 8
    message = refused(table, file_column="pathe", label_column="kind")
    assert "no column 'pathe'; did you mean 'path'? (its columns: id, path, kind)" in message
    assert refused(table).endswith("give file_column")


def test_splits_are_taken_in_any_spelling(folder):
    splits = ["train", "Training", "val", "valid", "TEST"] * 2
    rows = [(*row, split) for row, split in zip(found_in(folder), splits, strict=True)]
    data = loaded(written(folder / "t.csv", rows, ("file", "label", "split")))
    assert [len(d) for d in (data.train_dataset, data.val_dataset, data.test_dataset)] == [4, 4, 2]
    data = loaded(written(folder / "t.csv", rows, ("file", "label", "part")), split_column="part")
    assert len(data.val_dataset) == 4


def test_a_table_may_lie_elsewhere_and_name_whole_paths(folder, tmp_path):
    rows = found_in(folder)
    (tmp_path / "tables").mkdir()
    table = written(tmp_path / "tables" / "t.csv", rows)
    assert len(loaded(table, root=str(folder)).train_dataset) == 8
    whole = written(tmp_path / "tables" / "w.csv", [(folder / name, label) for name, label in rows])
    assert len(loaded(whole).train_dataset) == 8
    assert refused(table).count("dark/0.png") == 1


def test_all_bad_rows_are_named_at_once(folder):
    rows = [(*row, "train") for row in found_in(folder)]
    rows += [
        ("dark/gone.png", "dark", "train"),  # line 12
        ("dark/lost.png", "dark", "test"),
        ("dark/0.png", "dark", "train"),
        ("light/0.png", "dark", "train"),
        ("", "dark", "train"),
    ]
    rows[3] = (rows[3][0], "  ", "train")  # line 5
    rows[4] = (*rows[4][:2], "exam")  # line 6
    rows[5] = (*rows[5][:2], "")
    message = refused(written(folder / "t.csv", rows, ("file", "label", "split")))
    assert "t.csv has 8 rows that cannot be used." in message
    for part in (
        f"No label: line 5 ({rows[3][0]})",
        "Unknown split (give train, val or test): line 6 ('exam'), line 7 (empty)",
        "No such file: line 12 (dark/gone.png), line 13 (dark/lost.png)",
        "The same file twice: line 14 (dark/0.png), as in line 2",
        "No file: line 16",
        "multi-label) are not supported): light/0.png ('light' in line 7, 'dark' in line 15)",
    ):
        assert part in message, (part, message)


def test_more_bad_rows_than_can_be_shown_are_counted(folder):
    rows = found_in(folder) + [(f"gone{i}.png", "dark") for i in range(30)]
    assert "line 31 (gone19.png) and 10 more" in refused(written(folder / "t.csv", rows))


@pytest.mark.parametrize("both", ["dark;light", "dark|light", "dark, light", "['dark', 'light']"])
def test_several_labels_in_a_cell_are_refused_with_a_sentence(folder, both):
    rows = found_in(folder)
    rows[0] = (rows[0][0], both)
    message = refused(written(folder / "t.csv", rows))
    assert "an image has one label here" in message
    assert "(multi-label) are not supported" in message


def test_a_label_with_a_comma_is_a_label(folder):
    rows = [(name, label.replace("dark", "black, dark")) for name, label in found_in(folder)]
    assert loaded(written(folder / "t.csv", rows)).class_names == ["black, dark", "light"]


def test_labels_of_test_images_are_training_labels(folder):
    rows = [(*row, "train") for row in found_in(folder)]
    rows[9] = (rows[9][0], "lihgt", "test")
    message = refused(written(folder / "t.csv", rows, ("file", "label", "split")))
    assert "'lihgt' (1), first in line 11 (did you mean 'light'?)" in message


def test_a_table_without_rows_or_that_is_none_is_refused(folder, tmp_path):
    assert "lists no image" in refused(written(folder / "t.csv", []))
    (folder / "empty.csv").write_text("")
    assert "has no column 'file'" in refused(str(folder / "empty.csv"))
    assert "cannot be read (No such file" in refused(str(folder / "none.csv"))
    (folder / "no.parquet").write_text("file,label\n")
    assert "no.parquet cannot be read" in refused(str(folder / "no.parquet"))
    rows = [(*row, "test") for row in found_in(folder)]
    table = written(folder / "t.csv", rows, ("file", "label", "split"))
    assert "no row of the split train" in refused(table)


def test_files_that_cannot_be_read_are_skipped_where_asked(folder):
    rows = [*found_in(folder), ("dark/gone.png", "dark"), ("dark/bad.png", "dark")]
    (folder / "dark/bad.png").write_bytes(b"no picture")
    table = written(folder / "t.csv", rows)
    with pytest.warns(UserWarning, match="left out"):
        data = loaded(table, on_error="skip")
    assert sorted(os.path.basename(path) for path in data.unreadable) == ["bad.png", "gone.png"]
    assert len(data.train_dataset) + len(data.test_dataset) == 10


def test_excluded_files_are_left_out(folder):
    table = written(folder / "t.csv", found_in(folder))
    assert len(loaded(table, exclude=["dark/0.png", "light/0.png"]).train_dataset) == 6
    assert "no image below" in refused(table, exclude=["dark/9.png"])


def parquet(path, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_a_parquet_file_is_read_like_a_csv(folder):
    names, labels = zip(*found_in(folder), strict=True)
    data = loaded(parquet(folder / "t.parquet", file=names, label=labels, size=range(10)))
    assert held(data) == held(loaded(written(folder / "t.csv", found_in(folder))))
    numbers = [float(label == "light") for label in labels]
    assert loaded(parquet(folder / "n.parquet", file=names, label=numbers)).class_names == [
        "0",
        "1",
    ]


def test_a_parquet_file_with_lists_fractions_or_gaps_is_refused(folder):
    names, labels = zip(*found_in(folder), strict=True)
    lists = parquet(folder / "l.parquet", file=names, label=[[label] for label in labels])
    assert "row 1: the label ['dark'] is a collection: an image has one label" in refused(lists)
    fractions = parquet(folder / "f.parquet", file=names, label=[0.5] * 10)
    assert "a number with a fraction" in refused(fractions)
    gaps = parquet(folder / "g.parquet", file=names, label=[None, *labels[1:]])
    assert "No label: row 1 (dark/0.png)" in refused(gaps)


def test_a_fit_on_the_table_gives_the_head_of_the_folder(folder):
    rows = found_in(folder)
    random.Random(0).shuffle(rows)
    heads = []
    for data in (ImageFolder(str(folder)), CSV(written(folder / "t.csv", rows))):
        data.num_workers = 0
        model = ImprintedClassifier("efficientnet_lite0", recipe="qi", image_size=32)
        quiet_trainer().fit(model, data)
        heads.append(model.head)
    assert torch.equal(heads[0].proxies, heads[1].proxies)
    assert heads[0].class_names == heads[1].class_names
