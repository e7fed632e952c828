"""`predict` on image files: formats of output, files that cannot be read, explanations."""

import csv
import json

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier
from imprint_pl.cli import main
from imprint_pl.cli.predictions import PredictionWriter
from imprint_pl.cli.sorting import ClassFolders
from imprint_pl.data import Digits


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A checkpoint with a state, and the folder of the photos that it was made of."""
    folder = tmp_path_factory.mktemp("fitted")
    data = Digits()
    data.setup()
    images, labels = data.train_dataset.__getitems__(list(range(80)))
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        if label < 3:
            place = folder / "photos" / f"digit{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).save(place / f"{i}.png")
    arguments = [
        "--config",
        "configs/image_folder.yaml",
        "--model.recipe",
        "robust",
        "--data.root",
        str(folder / "photos"),
    ]
    arguments += ["--model.image_size", "32", "--trainer.default_root_dir", str(folder)]
    arguments += ["--model.keep", "embeddings", "--model.keep_sources", "true"]
    assert main(["fit", *arguments, "--data.num_workers", "0", "--model.k", "2"]) == 0
    return next(folder.rglob("imprinted.ckpt")), folder / "photos"


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_file_that_cannot_be_read_is_skipped_by_name_or_fails(fitted, tmp_path, capfd, workers):
    checkpoint, photos = fitted
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    whole = next((photos / "digit1").iterdir())
    (mixed / "a.png").write_bytes(whole.read_bytes())
    (mixed / "b.png").write_bytes(whole.read_bytes()[:60])
    (mixed / "c.png").write_bytes(whole.read_bytes())
    arguments = ["predict", "--ckpt_path", str(checkpoint), "--images", str(mixed)]
    arguments += ["--data.num_workers", workers, "--output", str(tmp_path / "it.csv")]
    assert main(arguments) == 2
    assert "b.png" in capfd.readouterr().err
    assert main([*arguments, "--on_error", "skip", "--top", "2"]) == 0
    out = capfd.readouterr().out
    assert "skipped 1 that cannot be read" in out
    assert "b.png" in out
    rows = rows_of(tmp_path / "it.csv")
    assert [row["file"][-5:] for row in rows] == ["a.png", "c.png"]
    assert [row["class"] for row in rows] == ["digit1", "digit1"]
    assert float(rows[0]["probability"]) >= float(rows[0]["probability_2"]) > 0


def test_images_and_on_error_may_be_written_with_an_equals_sign_anywhere(fitted, tmp_path, capfd):
    checkpoint, photos = fitted
    one, other = (str(next((photos / name).iterdir())) for name in ("digit1", "digit2"))
    (tmp_path / "b.png").write_bytes(b"no image")
    arguments = ["predict", "--on_error=skip", f"--images={one}", "--ckpt_path", str(checkpoint)]
    arguments += ["--images", str(tmp_path / "b.png"), other, "--data.num_workers", "0"]
    assert main([*arguments, "--output", str(tmp_path / "it.csv")]) == 0
    assert "skipped 1 that cannot be read" in capfd.readouterr().out
    assert [row["file"] for row in rows_of(tmp_path / "it.csv")] == [one, other]


def test_a_second_prediction_writes_a_file_of_its_own(tmp_path):
    x, y = torch.eye(3), torch.arange(3)
    model = ImprintedClassifier(nn.Identity(), "qi")
    quiet_trainer().fit(model, DataLoader(TensorDataset(x, y), 3))
    run = quiet_trainer(callbacks=[PredictionWriter(str(tmp_path / "it.csv"))])
    for rows in (x, x.flip(0)):
        run.predict(model, DataLoader(TensorDataset(rows), batch_size=3))
        written = rows_of(tmp_path / "it.csv")
        assert [row["index"] for row in written] == ["0", "1", "2"]
        assert [row["class"] for row in written] == [str(int(row.argmax())) for row in rows]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json_holds_what_the_csv_holds(fitted, tmp_path, suffix):
    checkpoint, photos = fitted
    path = tmp_path / f"it.{suffix}"
    arguments = ["--ckpt_path", str(checkpoint), "--images", str(photos), "--top", "3"]
    assert main(["predict", *arguments, "--output", str(path)]) == 0
    text = path.read_text()
    rows = json.loads(text) if suffix == "json" else [json.loads(t) for t in text.splitlines()]
    assert len(rows) == len(list(photos.rglob("*.png")))
    for row in rows:
        total = row["probability"] + row["probability_2"] + row["probability_3"]
        assert total == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl"])
@pytest.mark.parametrize("top", [1, 2])
def test_what_is_none_of_these_has_no_probability_and_names_whose_the_nearest_is(
    tmp_path, suffix, top
):
    x, y = torch.eye(3), torch.arange(3)
    model = ImprintedClassifier(nn.Identity(), "qi")
    quiet_trainer().fit(model, DataLoader(TensorDataset(x, y), 3))
    model.head.threshold = 0.9
    path = tmp_path / f"it.{suffix}"
    rows = torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.9, 0.0]])
    run = quiet_trainer(callbacks=[PredictionWriter(str(path), top)])
    run.predict(model, DataLoader(TensorDataset(rows), batch_size=2))
    if suffix == "csv":
        known, none = rows_of(path)
        assert (none["label"], none["class"], none["probability"]) == ("-1", "none of these", "")
    else:
        text = path.read_text()
        known, none = json.loads(text) if suffix == "json" else map(json.loads, text.splitlines())
        assert (none["label"], none["class"]) == (-1, "none of these")
        assert none["probability"] is None
    assert 0.3 < float(known["probability"]) < 1
    assert float(none["score"]) == pytest.approx(1 / 1.81**0.5, rel=1e-4)
    if top == 2:
        assert none["class_2"] == "0"
        assert 0 < float(none["probability_2"]) < 1


def test_explanations_show_the_nearest_training_images(fitted, tmp_path):
    checkpoint, photos = fitted
    image = sorted((photos / "digit2").iterdir())[0]
    arguments = ["--ckpt_path", str(checkpoint), "--images", str(image)]
    arguments += ["--output", str(tmp_path / "it.csv"), "--explain", str(tmp_path / "why")]
    assert main(["predict", *arguments]) == 0
    (record,) = json.loads((tmp_path / "why" / "explanations.json").read_text())
    assert record["class_name"] == "digit2"
    assert record["neighbours"][0]["class_name"] == "digit2"
    assert (tmp_path / "why" / record["picture"]).stat().st_size > 1000


def test_a_class_is_added_and_removed_from_the_command_line(fitted, tmp_path, capfd):
    checkpoint = fitted[0]
    new = tmp_path / "new"
    new.mkdir()
    # Stripes look like no digit.
    for i in range(5):
        pixels = torch.zeros(8, 8, dtype=torch.uint8)
        pixels[:, i % 2 :: 2] = 200 + 10 * i
        Image.fromarray(pixels.numpy()).save(new / f"{i}.png")
    grown = str(tmp_path / "grown.ckpt")
    arguments = ["--name", "stripes", "--images", str(new), "--output", grown]
    assert main(["add-class", str(checkpoint), *arguments]) == 0
    assert "stripes (5)" in capfd.readouterr().out
    assert main(["remove-class", grown, "--name", "digit0"]) == 0
    arguments = ["--images", str(new), "--output", str(tmp_path / "it.csv")]
    assert main(["predict", "--ckpt_path", grown, *arguments]) == 0
    classes = [row["class"] for row in rows_of(tmp_path / "it.csv")]
    assert classes == ["stripes"] * 5
    capfd.readouterr()
    assert main(["remove-class", grown, "--name", "stirpes"]) == 2
    assert "did you mean 'stripes'?" in capfd.readouterr().err


def test_few_images_are_named_with_their_class_and_many_are_counted(fitted, tmp_path, capfd):
    checkpoint, photos = fitted
    arguments = ["predict", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "it.csv")]
    few = sorted(map(str, (photos / "digit1").iterdir()))[:3]
    assert main([*arguments, "--images", *few, "--data.num_workers", "0"]) == 0
    out = capfd.readouterr().out
    rows = rows_of(tmp_path / "it.csv")
    for row in rows:
        percent = f"{100 * float(row['probability']):.0f} %"
        assert f"  {row['file']}: {row['class']} ({percent})" in out
    assert main([*arguments, "--images", str(photos), "--data.num_workers", "0"]) == 0
    out = capfd.readouterr().out
    rows = rows_of(tmp_path / "it.csv")
    assert len(rows) > 20
    for name in {row["class"] for row in rows}:
        assert f"{sum(row['class'] == name for row in rows)}  {name}\n" in out
    assert rows[0]["file"] not in out


def test_images_are_copied_into_folders_of_their_class_and_nothing_is_overwritten(
    fitted, tmp_path, capfd
):
    checkpoint, photos = fitted
    mixed, target = tmp_path / "mixed", tmp_path / "sorted"
    whole = sorted((photos / "digit1").iterdir())[:2]
    for name, source in zip(("a", "b"), whole, strict=True):
        (mixed / name).mkdir(parents=True)
        (mixed / name / "same.png").write_bytes(source.read_bytes())
    (mixed / "broken.png").write_bytes(b"no image")
    (target / "digit1").mkdir(parents=True)
    (target / "digit1" / "same.png").write_text("mine")
    arguments = ["predict", "--ckpt_path", str(checkpoint), "--images", str(mixed)]
    arguments += ["--data.num_workers", "0", "--output", str(tmp_path / "it.csv")]
    arguments += ["--on_error", "skip", "--sort_into", str(target)]
    for copied, there in ((2, 0), (0, 2)):
        assert main(arguments) == 0
        out = capfd.readouterr().out
        assert f"sorted: {copied} images copied into {target}" in out
        assert (f"({there} were there already)" in out) == (there > 0)
        assert "broken.png" in out
    assert (target / "digit1" / "same.png").read_text() == "mine"
    found = {path.name: path.read_bytes() for path in (target / "digit1").iterdir()}
    assert set(found) == {"same.png", "same (2).png", "same (3).png"}
    assert {found["same (2).png"], found["same (3).png"]} == {p.read_bytes() for p in whole}
    assert len(list(mixed.rglob("*.png"))) == 3
    data = ["predict", "--ckpt_path", str(checkpoint), "--data", "Digits", "--sort_into", "x"]
    assert main(data) == 2
    assert "--sort_into needs image files" in capfd.readouterr().err


@pytest.mark.parametrize(
    "names",
    [["../up", "a/b"], ["", "."], ["a/b", "a_b", "A_B"], ["none of these ", "CON"], ["..", "..."]],
)
def test_any_class_name_becomes_a_folder_inside_of_the_target(tmp_path, names):
    image = tmp_path / "x.png"
    image.write_bytes(b"x")
    made = ClassFolders(tmp_path / "sorted", names)
    for name in names:
        made.put(str(image), name)
    found = [path.parent for path in (tmp_path / "sorted").rglob("x.png")]
    assert len(found) == len(names)
    assert all(folder.parent == tmp_path / "sorted" for folder in found)


def test_a_folder_is_measured_by_its_folders_names_whatever_their_order(fitted, tmp_path, capfd):
    checkpoint, photos = fitted
    own = tmp_path / "own"
    # digit0 is missing, so that the labels of the folder are not those of the head.
    for name in ("digit2", "digit1"):
        (own / name).mkdir(parents=True)
        for image in sorted((photos / name).iterdir())[:5]:
            (own / name / image.name).write_bytes(image.read_bytes())
    (tmp_path / "others").mkdir()
    for i in range(4):
        Image.new("L", (9, 9), 60 * i).save(tmp_path / "others" / f"{i}.png")
    arguments = ["test", "--ckpt_path", str(checkpoint), "--trainer.default_root_dir"]
    arguments += [str(tmp_path), "--images", str(own), "--data.num_workers", "0"]
    assert main([*arguments, "--outsiders", str(tmp_path / "others")]) == 0
    run = capfd.readouterr().out.splitlines()[-1].removeprefix("run: ")
    summary = json.loads((tmp_path / run / "summary.json").read_text())
    assert summary["accuracy"] >= 0.9
    assert 0 <= summary["outsiders_auroc"] <= 1
    (own / "digit1").rename(own / "unheard of")
    assert main(arguments) == 2
    assert "unheard of" in capfd.readouterr().err
    assert main([*arguments[:5], "--images", str(own), str(own)]) == 2
    assert "takes one folder" in capfd.readouterr().err


def test_a_head_with_a_familiarity_adds_a_column_that_the_label_goes_by(tmp_path):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.eye(3)[y] + 0.1 * torch.randn(90, 3, generator=generator)
    model = ImprintedClassifier(nn.Identity(), "ridge", accept=0.95)
    quiet_trainer().fit(model, DataLoader(TensorDataset(x, y), 30))
    rows = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [-1.0, -1.0, -1.0]])
    writer = PredictionWriter(str(tmp_path / "it.csv"), top=2)
    quiet_trainer(callbacks=[writer]).predict(model, DataLoader(TensorDataset(rows), batch_size=2))
    assert not model.head._forward_hooks
    read = rows_of(tmp_path / "it.csv")
    expected = model.head.familiarity(rows)
    for row, value, label in zip(read, expected, model.head.label(rows), strict=True):
        assert float(row["familiarity"]) == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
        assert row["label"] == str(label.item())
    assert [row["label"] for row in read] == ["0", "-1", "-1"]
    assert list(read[0])[:6] == ["index", "label", "class", "score", "probability", "familiarity"]


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_prediction_sets_are_a_column_and_another_coverage_needs_no_new_fit(
    tmp_path, suffix, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    options = ["--data", "Digits", "--data.shots", "20", "--model.image_size", "32"]
    options += ["--model.recipe", "qi", "--model.accept", "0.9", "--model.coverage", "0.8"]
    assert main(["fit", *options]) == 0
    checkpoint = str(next(tmp_path.rglob("imprinted.ckpt")))
    sizes = []
    for name, more in (("own", []), ("wide", ["--coverage", "0.95"])):
        path = tmp_path / f"{name}.{suffix}"
        arguments = ["--ckpt_path", checkpoint, "--data", "Digits", "--output", str(path)]
        assert main(["predict", *arguments, *more]) == 0
        rows = rows_of(path) if suffix == "csv" else json.loads(path.read_text())
        sets = [json.loads(row["set"]) if suffix == "csv" else row["set"] for row in rows]
        for row, found in zip(rows, sets, strict=True):
            assert set(found) <= set("0123456789")
            assert found == [] or int(row["label"]) >= 0
        sizes.append(sum(map(len, sets)))
    assert 0 < sizes[0] < sizes[1]
    assert main(["predict", *arguments, "--coverage", "2"]) == 2
    assert "coverage=2" in capsys.readouterr().err


def test_a_coverage_for_a_head_without_sets_is_one_sentence(fitted, tmp_path, capsys):
    arguments = ["--ckpt_path", str(fitted[0]), "--images", str(fitted[1])]
    arguments += ["--output", str(tmp_path / "it.csv"), "--coverage", "0.9"]
    assert main(["predict", *arguments]) == 2
    assert "no prediction sets: fit with coverage=0.95" in capsys.readouterr().err
    assert not (tmp_path / "it.csv").exists()
