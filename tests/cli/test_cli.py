"""The commands as a user types them, in an empty folder, without a network."""

import csv
import gc
import json
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT, SHARED

from imprint_pl import ImprintedClassifier
from imprint_pl.cli import main

CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs" / "loggers").glob("*.yaml"))
QUICK = ["--config", "configs/quickstart.yaml", "--data.shots", "10", "--model.image_size", "32"]
QUICK += ["--model.recipe", "robust"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_folder(output):
    last = output.splitlines()[-1]
    assert last.startswith("run: ")
    return Path(last.removeprefix("run: "))


def summary_of(output):
    return json.loads((run_folder(output) / "summary.json").read_text())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A checkpoint of digits 0, 1, 2."""
    folder = tmp_path_factory.mktemp("fitted")
    arguments = [*QUICK, "--data.classes", "[0,1,2]", "--trainer.default_root_dir", str(folder)]
    assert main(["fit", *arguments]) == 0
    return next(folder.glob("**/imprinted.ckpt"))


def rows_of(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def photos(folder, classes=("cat", "dog"), n=8, modes=("RGB", "L", "RGBA", "P")):
    """Squares and rings of any size and mode."""
    generator = np.random.default_rng(0)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = generator.integers(0, 60, (20 + 5 * i, 30, 3), dtype=np.uint8)
            pixels[5:15, 5:15, label] = 255
            image = Image.fromarray(pixels).convert(modes[i % len(modes)])
            image.save(folder / name / f"{i}.png")


def test_fit_ends_with_a_table_and_the_run_folder(capfd):
    assert main(["fit", *QUICK]) == 0
    output = capfd.readouterr().out
    for column in ("task", "recipe", "accuracy", "macro F1", "ECE", "NC1", "embed", "GEN"):
        assert column in output
    folder, summary = run_folder(output), summary_of(output)
    assert summary["task"] == "digits"
    assert summary["recipe"] == "robust"
    assert 0.4 < summary["accuracy"] < 1
    assert 0.4 < summary["macro_f1"] < 1
    assert summary["nc1"] > 0
    assert 0 < summary["calibration_error"] < 0.5
    assert summary["embed_seconds"] > 0
    assert summary["gen_seconds"] > 0
    assert Path(summary["checkpoint"]).is_file()
    assert summary["k"] == 20
    assert summary["shots"] == 10
    assert summary["image_size"] == 32
    assert summary["backbone"] == "efficientnet_lite0"
    rows = rows_of(folder / "per_class.csv")
    assert [row["class"] for row in rows] == [str(i) for i in range(10)]
    logged = rows_of(folder / "metrics.csv")
    assert any(row["val/accuracy"] for row in logged)
    assert any(row["train/nc1"] for row in logged)
    assert (folder / "config.yaml").is_file()


@pytest.mark.slow
def test_the_quickstart_reaches_its_accuracy(capfd):
    assert main(["fit", "--config", "configs/quickstart.yaml"]) == 0
    output = capfd.readouterr().out
    summary = summary_of(output)
    assert summary["accuracy"] >= 0.95
    assert summary["calibration_error"] <= 0.05
    # The table of what auto compared.
    assert summary["recipe"] == "auto"
    assert summary["chosen_recipe"] in ("kernel", "ridge")
    assert [row["recipe"] for row in summary["tried"]].count("kernel") == 3
    assert "kernel last+power+l2+nystrom" in output
    assert "chosen" in output
    assert f"auto chose {summary['chosen_recipe']}" in output


def test_test_and_validate_of_a_checkpoint_repeat_the_accuracy_of_the_fit(capfd):
    arguments = ["--data", "Digits", "--data.shots", "10"]
    assert main(["fit", *arguments, "--model.image_size", "32"]) == 0
    fit = summary_of(capfd.readouterr().out)
    for command in ("test", "validate"):
        assert main([command, "--data", "Digits", "--ckpt_path", fit["checkpoint"]]) == 0
        summary = summary_of(capfd.readouterr().out)
        assert summary["accuracy"] == fit["accuracy"]
        assert summary["recipe"] == "auto"
        assert summary["chosen_recipe"] == fit["chosen_recipe"]
        assert summary["calibration_error"] == pytest.approx(fit["calibration_error"], abs=1e-6)
        assert summary["image_size"] == 32
        assert summary["nc1"] is None


def test_an_argument_without_its_option_is_told_which_options_there_are(capsys):
    assert main(["predict", "it.ckpt", "photos"]) == 2
    message = capsys.readouterr().err
    assert "'it.ckpt photos' needs an option before it: --images for images, --ckpt_path" in message


def test_a_command_line_option_beats_the_checkpoints(fitted, capfd):
    arguments = ["--data", "Digits", "--data.classes", "[0,1,2]", "--ckpt_path", str(fitted)]
    assert main(["test", *arguments, "--model.norm_inf", "none"]) == 0
    summary = summary_of(capfd.readouterr().out)
    assert summary["norm_inf"] == "none"
    assert summary["image_size"] == 32


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--model.recipe", "ls", "--model.lam", "0.01"], {"gen": "ls", "lam": 0.01}),
        (["--model.recipe", "knn", "--model.m", "3"], {"agg": "mnn", "m": 3, "num_proxies": 30}),
        (
            ["--model.agg", "mnn", "--model.votes", "uniform", "--model.weibull", "[0.1, 0.9]"],
            {"votes": "uniform", "weibull": [0.1, 0.9]},
        ),
        (["--model.recipe", "hosoda", "--model.as_published", "true"], {"as_published": True}),
        (["--model.gen", "kls", "--model.k", "2"], {"gen": "kls", "k": 2, "num_proxies": 6}),
        (["--model.recipe", "kernel", "--model.projection_dim", "50"], {"norm_inf": "same"}),
        (["--model.recipe", "ridge", "--model.lam", "gcv"], {"gen": "ridge", "lam": "gcv"}),
        (
            ["--model.norm_pre", "[whiten, l2]", "--model.gen", "mean"],
            {"norm_pre": "whiten+l2", "norm_inf": "same"},
        ),
    ],
)
def test_recipes_and_parts_are_options(options, expected, capfd):
    digits = ["--data.classes", "[0,1,2]"]
    assert main(["fit", *QUICK, *digits, *options]) == 0
    summary = summary_of(capfd.readouterr().out)
    assert summary["accuracy"] > 0.6
    assert {name: summary[name] for name in expected} == expected
    saved = ["--data", "Digits", *digits, "--ckpt_path", summary["checkpoint"]]
    assert main(["test", *saved]) == 0
    assert summary_of(capfd.readouterr().out)["accuracy"] == summary["accuracy"]
    # AGG can be changed on saved proxies.
    if summary["agg"] == "mnn":
        assert main(["test", *saved, "--model.agg", "max"]) == 0
        assert summary_of(capfd.readouterr().out)["agg"] == "max"


def test_predict_on_a_data_set_writes_a_csv_that_agrees_with_the_accuracy(fitted, capfd):
    arguments = ["--data", "Digits", "--data.classes", "[0,1,2]", "--ckpt_path", str(fitted)]
    assert main(["test", *arguments]) == 0
    accuracy = summary_of(capfd.readouterr().out)["accuracy"]
    assert main(["predict", *arguments]) == 0
    path = capfd.readouterr().out.splitlines()[-1].removeprefix("106 predictions: ")
    rows = rows_of(path)
    assert list(rows[0]) == ["index", "label", "class", "score", "probability"]
    from imprint_pl.data import Digits

    data = Digits(classes=[0, 1, 2])
    data.setup()
    labels = torch.tensor([int(row["label"]) for row in rows])
    assert (labels == data.test_dataset.labels).double().mean().item() == pytest.approx(accuracy)


def test_a_folder_of_photos_is_imprinted_and_single_files_are_predicted(tmp_path, capfd):
    photos(tmp_path / "photos")
    arguments = ["--config", "configs/image_folder.yaml", "--model.image_size", "64"]
    assert main(["fit", *arguments]) == 0
    summary = summary_of(capfd.readouterr().out)
    assert summary["accuracy"] == 1
    arguments = ["--ckpt_path", summary["checkpoint"], "--output", "out/it.csv"]
    arguments += ["--images", "photos/dog/3.png", "photos/cat", "photos/*/5.png"]
    assert main(["predict", *arguments]) == 0
    rows = rows_of("out/it.csv")
    assert [Path(row["file"]).parent.name for row in rows] == ["dog", *["cat"] * 8, "dog"]
    assert [row["class"] for row in rows] == ["dog", *["cat"] * 8, "dog"]


def test_a_folder_of_unequal_classes_is_fitted_by_balanced_accuracy_and_weights(tmp_path, capfd):
    photos(tmp_path / "photos", ("cat",), n=24)
    photos(tmp_path / "photos", ("cow", "dog"), n=6)
    common = ["--data", "ImageFolder", "--data.root", "photos", "--data.num_workers", "0"]
    common += ["--model.image_size", "64"]
    chosen = ["--model.metric", "balanced_accuracy", "--model.class_weight", "balanced"]
    assert main(["fit", *common, *chosen]) == 0
    output = capfd.readouterr().out
    summary = summary_of(output)
    assert re.search(r"candidate\W+balanced accuracy", output)
    assert {row["recipe"] for row in summary["tried"]} == {"kernel", "ridge"}
    assert all("balanced_accuracy" in row for row in summary["tried"])
    assert (summary["metric"], summary["class_weight"]) == ("balanced_accuracy", "balanced")
    page = (run_folder(output) / "evaluation.html").read_text()
    assert "<th" in page
    assert "balanced accuracy" in page
    # The checkpoint remembers both, and measures as the fit did.
    assert main(["test", *common, "--ckpt_path", summary["checkpoint"]]) == 0
    model = ImprintedClassifier.load_from_checkpoint(summary["checkpoint"])
    assert model.hparams["class_weight"] == "balanced"
    assert model.head.settings["class_weight"] == "balanced"
    # Kept embeddings follow new samples; a recipe without weights says so in one line.
    capfd.readouterr()
    kept = ["--model.recipe", "ridge", "--model.class_weight", "balanced", "--model.keep"]
    assert main(["fit", *common, *kept, "embeddings"]) == 0
    assert main(["fit", *common, *kept, "moments"]) == 2
    assert "class_weight changes what every sample weighs" in capfd.readouterr().err
    refused = ["--model.recipe", "qi", "--model.class_weight", "balanced"]
    assert main(["fit", *common, *refused]) == 2
    assert "recipe: auto, ls, ridge, ranpac, kernel" in capfd.readouterr().err


SMALL = ["--data", "ImageFolder", "--data.num_workers", "0"]
MODEL = ["--model.recipe", "qi", "--model.image_size", "32"]


def test_a_folder_around_the_classes_ends_in_one_line_before_anything_is_embedded(tmp_path, capfd):
    photos(tmp_path / "photos" / "photos")
    assert main(["fit", *SMALL, "--data.root", "photos", *MODEL]) == 2
    lines = capfd.readouterr().err.splitlines()
    # Lightning says first which devices there are.
    (line,) = (line for line in lines if "GPU available" not in line)
    assert line.startswith(
        "error: photos has a single class folder, photos/photos, with cat/ and dog/ in it: "
    )


def test_a_single_class_goes_through_the_commands(tmp_path, capfd):
    photos(tmp_path / "photos", ["cat"])
    data = [*SMALL, "--data.root", "photos"]
    options = ["--model.keep", "embeddings", "--model.accept", "0.9", "--gallery", "file"]
    assert main(["fit", *data, *MODEL, *options]) == 0
    output = capfd.readouterr()
    summary = summary_of(output.out)
    assert (summary["accuracy"], summary["macro_f1"], summary["nc1"]) == (1, 1, None)
    assert "nan" not in output.out
    checkpoint = ["--ckpt_path", summary["checkpoint"]]
    assert main(["test", *data, *checkpoint]) == 0
    assert summary_of(capfd.readouterr().out)["accuracy"] == 1
    images = ["--images", "photos", "--output", "it.csv", "--top", "3", "--explain", "explained"]
    assert main(["predict", *checkpoint, *images]) == 0
    assert {row["class"] for row in rows_of("it.csv")} <= {"cat", "none of these"}


def test_a_grown_checkpoint_is_measured_by_name_and_names_are_found(tmp_path, capfd):
    photos(tmp_path / "photos", ["ant", "cat"])
    photos(tmp_path / "all", ["ant", "cafe\u0301", "cat"])
    data = [*SMALL, "--data.root", "photos"]
    assert main(["fit", *data, *MODEL, "--model.keep", "embeddings"]) == 0
    checkpoint = summary_of(capfd.readouterr().out)["checkpoint"]
    command = ["add-class", checkpoint, "--images", "all/caf*/*.png", "--output", "grown.ckpt"]
    assert main([*command, "--name", "caf\u00e9"]) == 0
    # The head has ant, cat, café, in this order, the folder ant, café, cat.
    assert main(["test", *SMALL, "--data.root", "all", "--ckpt_path", "grown.ckpt"]) == 0
    folder = run_folder(capfd.readouterr().out)
    rows = rows_of(folder / "per_class.csv")
    assert [row["class"] for row in rows] == ["ant", "cat", "caf\u00e9"]
    assert main(["test", *data, "--ckpt_path", "grown.ckpt"]) == 0
    rows = rows_of(run_folder(capfd.readouterr().out) / "per_class.csv")
    assert rows[2]["accuracy"] == "" != rows[1]["accuracy"]
    assert main(["remove-class", "grown.ckpt", "--name", "CAFE\u0301"]) == 2
    assert "did you mean 'caf\u00e9'" in capfd.readouterr().err
    assert main(["remove-class", "grown.ckpt", "--name", "cafe\u0301"]) == 0
    assert "2 classes: ant (6), cat (6)" in capfd.readouterr().out


def test_paths_are_read_as_a_shell_reads_them(tmp_path, monkeypatch, capfd):
    home = tmp_path / "home"
    photos(home / "photos")
    monkeypatch.setenv("HOME", str(home))
    Path("it.yaml").write_text(
        "data: {class_path: ImageFolder, init_args: {root: ~/photos, num_workers: 0}}\n"
        "model: {recipe: qi, image_size: 32, keep: embeddings}\n"
        "trainer: {default_root_dir: $HOME/runs}\ncache_dir: ~/cache\n"
    )
    assert main(["fit", "--config=file://" + str(tmp_path / "it.yaml")]) == 0
    assert (home / "cache").is_dir()
    (checkpoint,) = (home / "runs").rglob("*.ckpt")
    shown = f"~/{checkpoint.relative_to(home)}"
    assert main(["test", *SMALL, "--data.root=~/photos/", f"--ckpt_path={shown}"]) == 0
    images = ["--images=~/photos/cat/*.png", "--output=$HOME/it.csv"]
    assert main(["predict", *images, f"--ckpt_path=file://{checkpoint}"]) == 0
    assert len(rows_of(home / "it.csv")) == 8
    command = ["add-class", shown, "--name", "fox", "--images", "~/photos/dog"]
    assert main([*command, "--output", "~/grown.ckpt"]) == 0
    assert (home / "grown.state.safetensors").is_file()
    capfd.readouterr()
    assert main(["predict", *images, f"--ckpt_path={checkpoint.parent}"]) == 2
    assert "is a folder: give the .ckpt in it" in capfd.readouterr().err
    assert not Path("~").exists()


def test_a_truncated_photo_is_named_whether_or_not_workers_read_it(tmp_path, capfd):
    photos(tmp_path / "photos")
    broken = tmp_path / "photos" / "dog" / "1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    for workers in ("0", "2"):
        arguments = ["--config", "configs/image_folder.yaml", "--data.num_workers", workers]
        assert main(["fit", *arguments, "--model.image_size", "64"]) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert "dog/1.png" in error


@pytest.mark.slow
def test_cifar_swin_runs_from_cifars_own_files_with_random_weights(tmp_path, capfd):
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    names = [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        labels = [i % 10 for i in range(10)]
        data = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
        content = {b"data": data, b"labels": labels}
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    arguments = ["--config", "configs/cifar_swin.yaml", "--model.pretrained", "false"]
    arguments += ["--model.image_size", "64", "--data.download", "false"]
    assert main(["fit", *arguments]) == 0
    summary = summary_of(capfd.readouterr().out)
    assert summary["task"] == "cifar10"
    assert summary["backbone"] == "torchvision/swin_b"
    # Five training images a class: each is a proxy.
    assert summary["num_proxies"] == 50
    again = ["--data", "CIFAR10", "--ckpt_path", summary["checkpoint"]]
    assert main(["test", *again]) == 0
    assert summary_of(capfd.readouterr().out)["accuracy"] == summary["accuracy"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="Fashion-MNIST (../shared/data) is not here")
def test_fashion_mnist_on_disk_is_read_without_a_network(capfd):
    arguments = ["--config", "configs/fashion_mnist.yaml", "--data.root", str(SHARED / "data")]
    arguments += ["--data.shots", "20", "--data.classes", "[Bag, Sneaker]"]
    arguments += ["--model.image_size", "32", "--trainer.limit_val_batches", "2"]
    assert main(["fit", *arguments]) == 0
    summary = summary_of(capfd.readouterr().out)
    assert summary["accuracy"] > 0.9
    assert summary["num_classes"] == 2


def wandb_records(path):
    """An offline run's file: a log in LevelDB's format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, parts = path.read_bytes(), 7, []
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        parts.append(content[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def test_wandb_offline_keeps_accuracy_and_nc1(tmp_path):
    assert main(["fit", *QUICK, "--config", "configs/loggers/wandb.yaml"]) == 0
    import wandb

    wandb.finish()
    found, names, deadline = {}, set(), time.monotonic() + 30
    # wandb writes from a process of its own.
    while "val/accuracy" not in found and time.monotonic() < deadline:
        for record in wandb_records(next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))):
            names.add(record.run.display_name)
            for item in record.history.item:
                found["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        time.sleep(0.2)
    summary = summary_of_any(tmp_path)
    assert found["val/accuracy"] == pytest.approx(summary["accuracy"], abs=1e-6)
    assert found["train/nc1"] == pytest.approx(summary["nc1"], abs=1e-6)
    assert "robust · efficientnet_lite0 · digits" in names
    # A local CSV is written all the same.
    assert list(tmp_path.glob("runs/**/metrics.csv"))


def summary_of_any(folder):
    return json.loads(next(folder.glob("runs/**/summary.json")).read_text())


def test_tensorboard_by_its_overlay(tmp_path):
    assert main(["fit", *QUICK, "--config", "configs/loggers/tensorboard.yaml"]) == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = tmp_path.glob("runs/**/events.out.*")
    # In the run's folder, with the picture of the confusion matrix.
    assert (file.parent / "summary.json").is_file()
    events = EventAccumulator(str(file))
    events.Reload()
    assert events.Tags()["images"] == ["val/confusion_matrix"]
    accuracy = events.Scalars("val/accuracy")[-1].value
    assert accuracy == pytest.approx(summary_of_any(tmp_path)["accuracy"], abs=1e-6)


def test_fast_dev_run_keeps_nothing_and_works(capfd, tmp_path):
    assert main(["fit", *QUICK, "--trainer.fast_dev_run", "true"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "run: none (fast_dev_run keeps nothing)"
    assert not list(tmp_path.glob("**/summary.json"))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_every_config_parses(config, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert stopped.value.code == 0
    assert "backbone:" in capsys.readouterr().out


@pytest.mark.parametrize("overlay", OVERLAYS, ids=str)
def test_every_overlay_parses_over_the_quickstart(overlay, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *QUICK, "--config", str(overlay), "--print_config"])
    assert stopped.value.code == 0
    assert "Logger" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fot"], "unknown command 'fot'"),
        (["fit"], "no data: give --data Digits"),
        (["fit", "--data", "Digist"], "unknown data 'Digist'; did you mean 'Digits'"),
        (["fit", "--data", "Digits", "--data.shots", "0"], "shots=0"),
        (["fit", "--data", "Digits", "--data.shot", "3"], "did you mean 'shots'"),
        (["fit", "--data", "Digits", "--model.recipe", "robst"], "did you mean 'robust'"),
        (["fit", "--data", "Digits", "--model.recipee", "qi"], "did you mean 'model.recipe'"),
        (["fit", *QUICK, "--model.k", "0"], "k=0: a class needs"),
        (["fit", "--data", "Digits", "--model.k", "3"], "k=3 is not used by recipe='auto'"),
        (["fit", "--data", "Digits", "--model.m", "3"], "m=3 is not used by"),
        (["fit", "--data", "Digits", "--model.k", "few"], "model.k=few: Expected a <class 'int'>"),
        (["fit", "--data", "Digits", "--model.backbone", "resnet18"], "torchvision/resnet18"),
        (["fit", "--data", "Digits", "--model.backbone", "timm/resnet81"], "timm/resnet18"),
        (["fit", "--data", "Digits", "--data.classes", "[0,11]"], "unknown class 11"),
        (["fit", "--data", "Digits", "--data.classes", "[yes]"], "put such names in quotes"),
        (["fit", "--data", "MNIST", "--data.download", "false"], "train-images-idx3-ubyte"),
        (["fit", "--data", "CIFAR10", "--data.download", "false"], "data_batch_1"),
        (["fit", "--data", "ImageFolder", "--data.root", "none"], "the folder none does not exist"),
        (["fit", "--config", "none.yaml"], "File does not exist"),
        (["test", "--data", "Digits"], "no proxies yet; fit first, or give ckpt_path"),
        (["test", "--data", "Digits", "--ckpt_path", "none.ckpt"], "there is no such file"),
        (["predict", "--images", "none.jpg"], "'none.jpg' matches no image file"),
    ],
)
def test_a_mistake_ends_in_one_line_that_names_it(arguments, message, capfd):
    assert main(arguments) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert message in error[error.index("error: ") :]


def test_a_typo_in_a_config_file_is_named_with_near_names(tmp_path, capfd):
    (tmp_path / "it.yaml").write_text("data: Digits\nmodel:\n  recipee: qi\n")
    assert main(["fit", "--config", "it.yaml"]) == 2
    assert "'model.recipee'; did you mean 'model.recipe'" in capfd.readouterr().err


def test_the_config_that_a_fit_leaves_serves_the_other_commands(fitted, tmp_path, capfd):
    config = fitted.parent.parent / "config.yaml"
    given = config.read_text()
    assert "\ncache_dir: null\n" in given
    given = given.replace("cache_dir: null", "cache_dir: embeddings")
    given = given.replace(
        "  callbacks: null",
        "  callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: val/accuracy}}]",
    )
    (tmp_path / "set.yaml").write_text(given)
    # Options beat configurations wherever they stand: the config has `ckpt_path: null`.
    assert main(["test", "--ckpt_path", str(fitted), f"--config={config}"]) == 0
    expected = summary_of(capfd.readouterr().out)
    assert expected["num_classes"] == 3
    with pytest.warns(UserWarning, match="cache_dir, an option of another command, is not used"):
        assert main(["test", "--config", "set.yaml", "--ckpt_path", str(fitted)]) == 0
    assert summary_of(capfd.readouterr().out)["accuracy"] == expected["accuracy"]
    assert not (tmp_path / "embeddings").exists()
    assert main(["validate", "--config", str(config), "--ckpt_path", str(fitted)]) == 0
    assert summary_of(capfd.readouterr().out)["accuracy"] == expected["accuracy"]
    assert main(["predict", "--config", str(config), "--ckpt_path", str(fitted)]) == 0
    assert "106 predictions" in capfd.readouterr().out
    assert main(["test", "--config", str(config), "--cache_dir", "there"]) == 2
    assert "--cache_dir is an option of another command: leave" in capfd.readouterr().err


def test_a_fit_without_a_training_batch_fails_and_says_why(capfd):
    for option, reason in (
        (["--trainer.limit_train_batches", "0"], "limit_train_batches=0 leaves none"),
        (["--trainer.max_time", "00:00:00:00"], "the Trainer was told to stop (max_time"),
    ):
        assert main(["fit", *QUICK, *option]) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert error.startswith("error: the fit had no training batch to imprint a head from: ")
        assert reason in error


def test_a_fit_that_is_terminated_does_not_end_as_if_all_were_well(tmp_path, monkeypatch, capfd):
    (tmp_path / "terminating.py").write_text(
        "import os, signal\n"
        "from lightning.pytorch import Callback\n"
        "class Terminating(Callback):\n"
        "    def on_train_batch_end(self, *arguments):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--data.batch_size", "50", "--trainer.callbacks", "terminating.Terminating"]
    with pytest.warns(UserWarning, match="SIGTERM ends the fit after 1 training batches: no head"):
        assert main(["fit", *QUICK, *options]) == 2
    assert "error: SIGTERM has ended `fit` before its end" in capfd.readouterr().err


def test_of_several_loaders_each_has_its_row_and_its_figures(tmp_path, monkeypatch, capfd):
    (tmp_path / "two_loaders.py").write_text(
        "import torch\n"
        "from lightning.pytorch import LightningDataModule\n"
        "from torch.utils.data import DataLoader, TensorDataset\n"
        "x, y = torch.eye(3).repeat(4, 1), torch.arange(3).repeat(4)\n"
        "class TwoLoaders(LightningDataModule):\n"
        "    def train_dataloader(self):\n"
        "        return DataLoader(TensorDataset(x, y), batch_size=5)\n"
        "    def val_dataloader(self):\n"
        "        shifted = TensorDataset(x, (y + (y > 0)) % 3)\n"
        "        return [self.train_dataloader(), DataLoader(shifted, batch_size=5)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--model.backbone", "null", "--model.recipe", "qi", "--trainer.accelerator", "cpu"]
    assert main(["fit", "--data", "two_loaders.TwoLoaders", *options]) == 0
    output = capfd.readouterr().out
    summary, folder = summary_of(output), run_folder(output)
    assert "loader" in output
    assert summary["accuracy"] is None
    assert summary["accuracy/dataloader_idx_0"] == 1
    assert summary["accuracy/dataloader_idx_1"] == pytest.approx(1 / 3, abs=1e-5)
    rows = rows_of(folder / "per_class.csv")
    assert [row["accuracy/dataloader_idx_0"] for row in rows] == ["1.0", "1.0", "1.0"]
    assert [row["accuracy/dataloader_idx_1"] for row in rows] == ["0.5", "", "0.0"]


def test_a_checkpoint_of_another_task_is_refused(fitted, capfd):
    assert main(["test", "--data", "Digits", "--ckpt_path", str(fitted)]) == 2
    assert "imprinted for the classes [0, 1, 2] (3)" in capfd.readouterr().err


def test_a_damaged_checkpoint_is_refused(fitted, tmp_path, capfd):
    (tmp_path / "it.ckpt").write_bytes(fitted.read_bytes()[:500])
    assert main(["test", "--data", "Digits", "--ckpt_path", "it.ckpt"]) == 2
    assert "it.ckpt: damaged, or not a checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_and_version_do_not_wait_for_lightning(argument):
    code = (
        "import sys; from imprint_pl.cli.commands import main; assert main([sys.argv[1]]) == 0;"
        "assert not {'torch', 'lightning', 'timm', 'faiss', 'wandb'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, argument], check=True, capture_output=True)


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_help_of_a_command_explains_our_options(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "--model.recipe" in output
    assert "proxies a class" in output
    assert ("--images" in output) == (command != "fit")


def test_the_module_runs_as_a_program(tmp_path):
    command = [sys.executable, "-m", "imprint_pl", "test", "--data", "Digits"]
    finished = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stderr.splitlines()[-1].startswith("error: cannot test")


def test_a_summary_prints_names_that_look_like_markup(capsys):
    from imprint_pl.cli.summary import print_summary

    summary = dict.fromkeys(
        ("accuracy", "macro_f1", "calibration_error", "nc1", "gen_seconds"), 0.5
    )
    summary |= {"task": "[/x]", "recipe": "qi", "embed_seconds": 1.0, "backbone": "[/b]"}
    summary |= {"layers": "last", "layer_widths": None, "embedding_dim": 9, "views": "none"}
    summary |= dict.fromkeys(("norm_pre", "gen", "norm_post", "norm_inf", "agg"), "none")
    print_summary(summary | {"num_proxies": 1, "num_classes": 1, "tried": []})
    output = capsys.readouterr().out
    assert "[/x]" in output
    assert "[/b]: none" in output


def test_a_command_in_somebody_elses_process_leaves_its_garbage_collector_alone(tmp_path):
    before = gc.isenabled(), gc.get_freeze_count()
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert (gc.isenabled(), gc.get_freeze_count()) == before


def test_a_command_of_its_own_process_collects_no_garbage_among_what_it_imports(monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(sys, "argv", ["imprint-pl", "report", "nothing"])
    assert main() == 2
    # Once after the import, and once at the end, when collections go on again.
    assert frozen == [False, True]
    assert gc.isenabled()
