"""What an evaluation writes: tables, pictures without cut texts, and a page of bounded size."""

import csv
import html
import re

import numpy as np
import pytest
import torch
from pictures import NAMES, drawn
from PIL import Image

from imprint_pl.drawing.page import data_url
from imprint_pl.evaluation.page import Run
from imprint_pl.evaluation.pictures import as_url, of_dataset, of_files, thumbnail
from imprint_pl.evaluation.predictions import from_rows, rows_of
from imprint_pl.evaluation.write import MOST_PICTURED, write_evaluation

EVIL = "<img src=x onerror=alert(1)>\"'&"
RUN = Run("digits", "validation", ["efficientnet_lite0"], {"NC1": "0.9"})


def some(classes, images, wrong=0.2, names=None, files=None, least=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (images,), generator=generator)
    logits = torch.randn(images, classes, generator=generator) + 6 * torch.eye(classes)[labels]
    bad = torch.rand(images, generator=generator) < wrong
    logits[bad] = 3 * torch.randn(int(bad.sum()), classes, generator=generator)
    names = names or [f"class {i}" for i in range(classes)]
    passed = None if least is None else logits.amax(1) >= least
    return from_rows(rows_of(logits, labels, passed), labels, names, files, least is not None)


def grey(index):
    return np.full((8, 8), index % 256, dtype=np.uint8)


def rows(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def test_the_tables_hold_every_image_and_class(tmp_path):
    found = some(3, 50, files=[f"/x/{i}.png" for i in range(50)])
    written = write_evaluation(tmp_path / "new", RUN, found, torch.tensor([7, 8, 9]), grey)
    folder = written.page.parent
    samples = rows(folder / "predictions.csv")
    assert [row["file"] for row in samples] == found.names
    assert list(samples[0]) == [
        *("file", "label", "class", "score", "probability"),
        *("true_label", "true_class", "probability_of_true"),
    ]
    assert [int(row["label"]) for row in samples] == found.predicted.tolist()
    assert samples[0]["class"] == f"class {samples[0]['label']}"
    classes = rows(folder / "per_class.csv")
    assert [row["training_images"] for row in classes] == ["7", "8", "9"]
    assert sum(int(row["images"]) for row in classes) == 50
    for row in classes:
        assert row["accuracy"] == row["recall"]
        assert float(row["recall_low"]) <= float(row["recall"]) <= float(row["recall_high"])
    with open(folder / "confusion_matrix.csv") as file:
        header, *matrix = csv.reader(file)
    assert header == ["true class", "class 0", "class 1", "class 2"]
    assert [[int(n) for n in row[1:]] for row in matrix] == found.confusion.dense().tolist()
    assert written.errors == folder / "errors.png"


def test_a_threshold_adds_whether_an_image_is_accepted(tmp_path):
    write_evaluation(tmp_path, RUN, some(3, 30, least=4.0))
    accepted = [row["accepted"] for row in rows(tmp_path / "predictions.csv")]
    assert set(accepted) == {"true", "false"}
    assert "none of these" in (tmp_path / "evaluation.html").read_text()


def test_names_from_strangers_are_text_in_the_page(tmp_path):
    files = [f"/photos/{EVIL.replace('/', '')}\udce9 {i}.png" for i in range(40)]
    found = some(3, 40, 0.6, [EVIL, "</script><script>alert(2)</script>", "{{ 7 * 7 }}"], files)
    run = Run(EVIL, "test", [EVIL], {EVIL: EVIL}, [dict(recipe=EVIL, accuracy=None, chosen=True)])
    text = write_evaluation(tmp_path, run, found, None, grey).page.read_text()
    assert "<img src=x" not in text
    assert "<script>alert" not in text
    assert html.escape(EVIL, quote=False).split('"')[0] in text
    assert "{{ 7 * 7 }}" in text
    assert len(re.findall("<script>", text)) == 1
    # The file that is named in the table is the one that can be opened.
    assert rows(tmp_path / "predictions.csv")[0]["file"] == files[0]


def test_the_page_needs_nothing_else(tmp_path):
    text = write_evaluation(tmp_path, RUN, some(3, 40), None, grey).page.read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)


@pytest.mark.slow
def test_the_page_has_a_bounded_size_and_says_what_is_left_out(tmp_path):
    noise = np.random.default_rng(0)
    found = some(1000, 20000, 0.5)
    pictures = lambda i: thumbnail(noise.integers(0, 256, (400, 300, 3), dtype=np.uint8))  # noqa: E731
    written = write_evaluation(tmp_path, RUN, found, None, pictures)
    # Noise is what JPEG packs worst.
    assert written.page.stat().st_size < 2_500_000
    text = written.page.read_text()
    count = len(found.worst())
    assert f"{count - 300:,} more are left out here; predictions.csv has all." in text


@pytest.mark.parametrize("classes", [1, 2, 9, 25, 100])
def test_no_text_of_a_picture_is_cut_or_overlaps(tmp_path, monkeypatch, classes):
    figures = drawn(monkeypatch)
    names = [f"{list(NAMES.values())[i % len(NAMES)]} {i}" for i in range(classes)]
    files = [f"/a/{'long name ' * 9}{i}.png" for i in range(300)]
    write_evaluation(tmp_path, RUN, some(classes, 300, 0.4, names, files), None, grey)
    assert len(figures) == (1 if classes == 1 else 2)
    assert [wrong for _, wrong in figures] == [[]] * len(figures)


def test_of_many_classes_the_matrix_shows_those_with_the_most_errors(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    write_evaluation(tmp_path, RUN, some(100, 300, 0.4))
    texts = [text.get_text() for text in figures[0][0].texts]
    assert "40 of 100 classes" in " ".join(texts).replace("\n", " ")


def test_without_pictures_or_errors_there_is_no_picture_of_errors(tmp_path):
    (tmp_path / "errors.png").write_bytes(b"of an earlier run")
    assert write_evaluation(tmp_path, RUN, some(3, 30)).errors is None
    assert not (tmp_path / "errors.png").exists()
    assert write_evaluation(tmp_path, RUN, some(3, 30, wrong=0), None, grey).errors is None
    assert write_evaluation(tmp_path, RUN, some(3, 30), None, lambda i: None).errors is None


def test_of_too_many_images_no_picture_is_read(tmp_path):
    def never(index):
        raise AssertionError("read")

    found = some(2, MOST_PICTURED + 1)
    assert write_evaluation(tmp_path, RUN, found, None, never).errors is None


@pytest.mark.parametrize(
    ("image", "shape"),
    [
        (torch.zeros(1, 8, 8, dtype=torch.uint8), (8, 8)),
        (torch.zeros(2, 8, 9, dtype=torch.uint8), (8, 9)),
        (torch.zeros(4, 300, 600, dtype=torch.uint8), (72, 144, 3)),
        (torch.randn(3, 20, 30), (20, 30, 3)),
        (torch.full((3, 5, 5), torch.nan), (5, 5, 3)),
        (torch.randn(6, 7).half(), (6, 7)),
        (Image.new("RGB", (20, 10)), (10, 20, 3)),
        (np.zeros((9, 4, 1), dtype=np.uint16), (9, 4)),
    ],
)
def test_an_image_of_any_kind_has_a_thumbnail(image, shape):
    found = thumbnail(image)
    assert found.shape == shape
    assert found.dtype == np.uint8
    assert as_url(found).startswith(data_url(b"", f"image/{'png' if max(shape) < 48 else 'jpeg'}"))


@pytest.mark.parametrize("other", [torch.randn(512), torch.zeros(3, 0, 4), "text", None])
def test_what_is_no_image_has_none(other):
    assert thumbnail(other) is None


def test_a_preprocessed_image_is_stretched_to_all_greys():
    found = thumbnail(torch.tensor([[[-2.0, 0.0], [1.0, 2.0]]]))
    assert found.tolist() == [[0, 128], [191, 255]]


def test_a_file_that_is_gone_has_no_picture_and_stops_nothing(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "there.png")
    read = of_files([str(tmp_path / "there.png"), str(tmp_path / "gone.png")])
    assert read(0).shape == (9, 9)
    assert read(1) is None
    found = some(2, 2, files=[str(tmp_path / "there.png"), str(tmp_path / "gone.png")])
    assert write_evaluation(tmp_path, RUN, found, None, read).page.is_file()


def test_embeddings_have_no_pictures():
    y = torch.arange(4)
    assert of_dataset(torch.utils.data.TensorDataset(torch.randn(4, 6), y)) is None
    images = of_dataset(torch.utils.data.TensorDataset(torch.rand(4, 3, 6, 6), y))
    assert images(2).shape == (6, 6, 3)
