"""The audit: wrong labels, duplicates and unusual images are found, shown and left out."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from places import SHARED

from imprint_pl.audit import audit, label_scores
from imprint_pl.audit.neighbours import far_from_everything, neighbours
from imprint_pl.audit.page import summary
from imprint_pl.audit.write import write_audit
from imprint_pl.cli import main
from imprint_pl.data import Digits, ImageFolder
from imprint_pl.data.arrays import ArrayDataset
from imprint_pl.data.embeddings import EmbeddingDataModule
from imprint_pl.data.splits import Splits
from imprint_pl.errors import ImprintError

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read and are left out")
EVIL = '<img src=x onerror="alert(1)">.png'


def rows_of(path):
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def blobs(n=60, C=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % C
    x = torch.randn(n, 8, generator=generator) + 6 * torch.eye(8)[y]
    return x, y


def photos(root, n=12):
    """Two classes of noise, each with its colour, in a folder without splits."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(0, 120, (64, 80, 3))
            pixels[..., label] += 130
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


def embedded_by_colour(data):
    """Embeddings of two numbers: how red and how green an image is, with a little of its own."""
    splits = []
    for split in ("train", "test"):
        dataset = getattr(data, f"{split}_dataset")
        images, labels = dataset.__getitems__(list(range(len(dataset))))
        x = torch.stack([i[:3].float().flatten(1)[:, :2000].mean(1).div(255) for i in images])
        splits.append(ArrayDataset(x, labels))
    return EmbeddingDataModule(Splits(data.class_names, *splits))


def test_flipped_labels_come_first_in_the_order_of_the_rows_given():
    x, y = blobs()
    wrong = y.clone()
    wrong[[4, 17, 33]] = (y[[4, 17, 33]] + 1) % 3
    scores = label_scores(x, wrong, "ridge")
    assert set(scores.ranking()[:3].tolist()) == {4, 17, 33}
    assert scores.likely[[4, 17, 33]].tolist() == y[[4, 17, 33]].tolist()
    assert scores.doubted.sum() == 3
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    again = label_scores(x[order], wrong[order], "ridge")
    assert torch.allclose(again.given, scores.given[order], atol=1e-4)


@pytest.mark.parametrize("recipe", ["kernel", "ridge", "lda", "qi", "robust", "knn"])
def test_every_label_is_checked_by_any_recipe(recipe):
    x, y = blobs()
    scores = label_scores(x, y, recipe)
    assert not scores.given.isnan().any()
    assert (scores.likely == y).float().mean() > 0.9


def test_a_class_of_one_sample_is_not_checked():
    x, y = blobs()
    y[0] = 3
    scores = label_scores(x, y)
    assert scores.given.isnan().nonzero().flatten().tolist() == [0]
    assert scores.likely[0] == -1
    assert len(scores.ranking()) == 59
    assert not scores.doubted[0]
    with pytest.raises(ImprintError, match="no class has two samples"):
        label_scores(torch.eye(3), torch.arange(3))


def test_layers_are_joined_where_the_widths_are_given():
    x, y = blobs()
    wide = torch.cat([torch.randn(60, 4, generator=torch.Generator().manual_seed(2)), x], 1)
    scores = label_scores(wide, y, layer_widths=[4, 8])
    assert (scores.likely == y).float().mean() > 0.9


def test_neighbours_are_those_of_the_whole_matrix_in_any_chunks(monkeypatch):
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    z = torch.nn.functional.normalize(x - x.mean(0))
    cosine = z @ z.T
    cosine.fill_diagonal_(-1)
    near = {(i, j) for i in range(50) for j in range(i) if cosine[i, j] >= 0.9}
    for rows, columns in ((512, 8192), (7, 11), (1, 50)):
        monkeypatch.setattr("imprint_pl.audit.neighbours.ROWS", rows)
        monkeypatch.setattr("imprint_pl.audit.neighbours.COLUMNS", columns)
        found = neighbours(x, 0.9)
        assert {(b, a) for a, b in found.pairs.tolist()} == near
        assert found.total == len(near)
        assert torch.allclose(found.fifth, cosine.sort(1, descending=True).values[:, 4], atol=1e-5)
        assert (found.cosines.diff() <= 0).all()


def test_only_the_largest_cosines_are_kept_and_all_pairs_counted(monkeypatch):
    monkeypatch.setattr("imprint_pl.audit.neighbours.MOST_PAIRS", 5)
    monkeypatch.setattr("imprint_pl.audit.neighbours.ROWS", 4)
    x = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    found = neighbours(x, 0.5)
    z = torch.nn.functional.normalize(x - x.mean(0))
    above = (z @ z.T).triu(1).flatten().sort(descending=True).values
    assert found.total == int((above >= 0.5).sum()) > 10
    assert torch.allclose(found.cosines, above[:5], atol=1e-5)


def test_what_is_far_from_everything_is_odd_and_equal_distances_are_not():
    fifth = torch.cat([torch.linspace(0.8, 0.9, 40), torch.tensor([0.1, -0.2])])
    assert far_from_everything(fifth).tolist() == [41, 40]
    assert not len(far_from_everything(torch.full((20,), 0.9)))
    assert not len(far_from_everything(torch.tensor([0.1, 0.9])))


@pytest.fixture(scope="module")
def dirty(tmp_path_factory):
    """A folder with one fault of each kind."""
    root = tmp_path_factory.mktemp("dirty") / "photos"
    photos(root)
    shutil.copy(root / "cat" / "0.png", root / "dog" / "copy of cat.png")
    shutil.copy(root / "dog" / "1.png", root / "dog" / "copy.png")
    (root / "dog" / "broken.png").write_bytes((root / "dog" / "2.png").read_bytes()[:500])
    Image.new("RGB", (64, 64), (40, 200, 40)).save(root / "dog" / "blank.png")
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (8, 9, 3), np.uint8)).save(
        root / "cat" / "tiny.png"
    )
    shutil.copy(root / "cat" / "5.png", root / "cat" / EVIL.replace("/", "_"))
    return root


@pytest.fixture(scope="module")
def found(dirty):
    data = ImageFolder(str(dirty), on_error="skip", num_workers=0)
    data.setup()
    return audit(data, embedded_by_colour(data))


def test_an_audit_finds_a_fault_of_each_kind(dirty, found):
    names = found.samples.names
    identical = {frozenset((names[p.a], names[p.b])) for p in found.pairs if p.kind == "identical"}
    assert identical == {
        frozenset(("cat/0.png", "dog/copy of cat.png")),
        frozenset(("dog/1.png", "dog/copy.png")),
        frozenset(("cat/5.png", f"cat/{EVIL}")),
    }
    # A contradiction comes first.
    assert found.is_contradiction(found.pairs[0])
    assert found.pairs[0].kind == "identical"
    reasons = {(names[issue.sample], issue.reason) for issue in found.issues}
    assert ("dog/blank.png", "blank: its pixels hardly differ") in reasons
    assert ("cat/tiny.png", "tiny: 9 × 8 pixels") in reasons
    assert [path.endswith("broken.png") for path in found.unreadable] == [True]
    first = summary(found)[0]
    assert "1 pair of identical images has different labels" in first
    assert "copy of cat" in first


def test_the_page_escapes_names_and_the_files_name_every_fault(found, tmp_path):
    page = write_audit(found, tmp_path, EVIL)
    text = page.read_text()
    assert "<img src=x" not in text
    assert "&lt;img src=x" in text
    assert "http" not in text.split("</head>")[1]
    assert {row["file"] for row in rows_of(tmp_path / "images.csv")} >= {"dog/blank.png"}
    assert len(rows_of(tmp_path / "labels.csv")) == len(found.samples.labels)
    kinds = [row["kind"] for row in rows_of(tmp_path / "duplicates.csv")]
    assert kinds.count("identical") == 3
    classes = {row["class"]: row for row in rows_of(tmp_path / "classes.csv")}
    assert sum(int(classes["cat"][split]) for split in ("train", "test")) == 14


def test_the_last_sentence_is_the_next_step(found):
    assert "--fix_list fix.csv" in summary(found)[-1]
    clean = replace(found, scores=None, pairs=[], issues=[], unreadable={})
    assert summary(clean) == ["Nothing else stands out: the data can be used as they are."]


def test_a_class_name_cannot_colour_the_terminal(found):
    text = " ".join(summary(replace(found, class_names=["cat", "\x1b[31mdog"])))
    assert "(\\x1b[31mdog)" in text
    assert "\x1b" not in text


def test_a_fix_list_leaves_out_contradictions_copies_and_what_shows_nothing(found):
    reasons = dict(found.leave_out())
    assert {"cat/0.png", "dog/copy of cat.png", "dog/blank.png", "dog/broken.png"} <= set(reasons)
    assert len({"dog/1.png", "dog/copy.png"} & set(reasons)) == 1
    assert "cat/tiny.png" not in {n for n, r in reasons.items() if r.startswith("tiny")}


def test_a_data_set_in_memory_is_audited_without_a_fix_list(tmp_path):
    data = Digits(classes=[0, 1, 2], shots=30)
    data.setup()
    images = data.train_dataset.images
    images[3] = images[8]
    splits = [
        ArrayDataset(d.images.float().flatten(1) / 255, d.labels)
        for d in (data.train_dataset, data.test_dataset)
    ]
    found = audit(data, EmbeddingDataModule(Splits(data.class_names, *splits)))
    pairs = {(found.samples.names[p.a], found.samples.names[p.b]) for p in found.pairs}
    assert ("train 3", "train 8") in pairs
    assert write_audit(found, tmp_path, "digits").is_file()
    assert "by their split and number" in summary(found)[-1]
    with pytest.raises(ImprintError, match="image files"):
        found.leave_out()


def test_one_class_has_no_labels_to_check(tmp_path):
    data = Digits(classes=[0])
    data.setup()
    splits = [
        ArrayDataset(d.images.float().flatten(1), d.labels)
        for d in (data.train_dataset, data.test_dataset)
    ]
    found = audit(data, EmbeddingDataModule(Splits(data.class_names, *splits)))
    assert found.scores is None
    assert "one class" in found.warnings[0]
    assert write_audit(found, tmp_path, "digits").is_file()


def test_the_command_writes_a_list_that_the_next_fit_takes(dirty, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = sorted(path.name for path in dirty.rglob("*"))
    options = ["--model.image_size", "32", "--data.num_workers", "0", "--cache_dir", "cache"]
    assert main(["audit", str(dirty), *options, "--fix_list", "fix.csv", "--output", "out"]) == 0
    out = capfd.readouterr().out
    assert "fix list: fix.csv" in out
    assert "audit: out/audit.html" in out
    listed = {row["file"] for row in rows_of("fix.csv")}
    assert {"cat/0.png", "dog/broken.png"} <= listed
    assert sorted(path.name for path in dirty.rglob("*")) == before
    fit = ["fit", "--data", "ImageFolder", "--data.root", str(dirty), *options[:4]]
    assert main([*fit, "--data.exclude", "fix.csv", "--model.recipe", "qi"]) == 0
    run = capfd.readouterr().out.splitlines()[-1].removeprefix("run: ")
    # The data of a run: its configuration leaves the same files out.
    assert main(["audit", run, "--output", "again"]) == 0
    capfd.readouterr()
    assert not {row["file"] for row in rows_of("again/labels.csv")} & listed
    checkpoint = next((tmp_path / run).rglob("*.ckpt"))
    assert main(["audit", str(checkpoint), "--output", "third"]) == 0
    assert rows_of("third/labels.csv") == rows_of("again/labels.csv")


def test_wrong_places_end_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["audit", "nowhere"]) == 2
    assert "nowhere: there is no such file or folder" in capfd.readouterr().err
    photos(tmp_path / "photos", 4)
    assert main(["audit", "photos", "--near", "2", "--model.image_size", "32"]) == 2
    assert "near=2" in capfd.readouterr().err


TRASHNET = SHARED / "data" / "trashnet"


@pytest.mark.slow
@pytest.mark.skipif(not TRASHNET.is_dir(), reason="TrashNet is not in ../shared/data")
def test_trashnets_three_contradictory_pairs_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model.image_size", "64", "--data.max_side", "64", "--output", "out"]
    assert main(["audit", str(TRASHNET), *options]) == 0
    pairs = [row for row in rows_of("out/duplicates.csv") if row["kind"] == "identical"]
    assert len(pairs) == 3
    assert all(row["class"] != row["class_2"] for row in pairs)
    assert sum(row["split"] != row["split_2"] for row in pairs) == 2
