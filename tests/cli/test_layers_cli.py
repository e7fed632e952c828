"""Layers and views through the commands that a user would type."""

import csv
import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from places import ROOT
from safetensors.torch import save_file

from imprint_pl import ImprintError
from imprint_pl.cli import main
from imprint_pl.experiments.report.read import read_results
from imprint_pl.experiments.sweep import checked_sweep

BACKBONE = ["--model.backbone", "timm/test_resnet", "--model.pretrained", "false"]
DIGITS = ["--data", "Digits", "--data.classes", "[0,1,2]", "--data.shots", "20"]
CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


def run(capsys, *words):
    assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def summary_of(out):
    folder = next(line for line in out.splitlines() if line.startswith("run: "))[5:]
    with open(f"{folder}/summary.json") as file:
        return json.load(file)


def test_a_fit_says_its_layers_and_what_follows_carries_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    size = ["--model.image_size", "32"]
    out = run(capsys, "fit", *DIGITS, *CPU, *BACKBONE, *size, "--model.views", "flip")
    fitted = summary_of(out)
    widths = fitted["layer_widths"]
    assert f"layers: all ({len(widths)} vectors, {sum(widths):,} numbers); views: flip" in out
    assert (fitted["layers"], fitted["views"]) == ("all", "flip")
    out = run(capsys, "test", *DIGITS, *CPU, "--ckpt_path", fitted["checkpoint"])
    assert summary_of(out)["accuracy"] == fitted["accuracy"]
    assert summary_of(out)["layer_widths"] == widths
    Image.new("L", (8, 8), 90).save("it.png")
    run(capsys, "predict", "--ckpt_path", fitted["checkpoint"], *CPU, "--images", "it.png")
    # A cache of all layers gives the same, and serves the last one.
    cached = ["--cache_dir", "cache"]
    same = run(capsys, "fit", *DIGITS, *CPU, *BACKBONE, *size, "--model.views", "flip", *cached)
    assert summary_of(same)["accuracy"] == fitted["accuracy"]
    last = [*BACKBONE, *size, "--model.views", "flip", "--model.recipe", "qi"]
    out = run(capsys, "fit", *DIGITS, *CPU, *last, *cached)
    assert f"layers: last ({widths[-1]:,} numbers); views: flip" in out
    assert summary_of(out)["embedded_images"] == 0
    run(capsys, "export", fitted["checkpoint"], "--format", "safetensors", "--output", "head")
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["layer_widths"] == widths
    # Each feature map has a mean and a deviation.
    assert 2 * len(config["backbone"]["layers"]) == len(widths) - 1
    assert config["backbone"]["views"] == "flip"


@pytest.mark.parametrize("layers", ["layer1,layer3", "[layer1, layer3]"])
def test_layers_are_named_as_text_or_as_a_list(tmp_path, monkeypatch, capsys, layers):
    monkeypatch.chdir(tmp_path)
    words = [*BACKBONE, "--model.image_size", "32", "--model.recipe", "qi"]
    out = run(capsys, "fit", *DIGITS, *CPU, *words, "--model.layers", layers)
    assert "layers: layer1, layer3, last (5 vectors, " in out
    with open(tmp_path / "it.yaml", "w") as file:
        yaml.safe_dump({"model": {"layers": ["layer1", "layer3"]}}, file)
    out = run(capsys, "fit", *DIGITS, *CPU, *words, "--config", "it.yaml")
    assert "layers: layer1, layer3, last (5 vectors, " in out


def test_a_wrong_name_ends_in_one_line(capsys):
    words = [*BACKBONE, "--model.recipe", "qi", "--model.layers", "layer9"]
    assert main(["fit", *DIGITS, *CPU, *words]) == 2
    assert "has no module 'layer9'" in capsys.readouterr().err


def wide_file(path):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 6, generator=generator) + 3 * torch.eye(3, 6)[y]
    arrays = {"train_embeddings": x[:40], "train_labels": y[:40]}
    save_file(arrays | {"test_embeddings": x[40:], "test_labels": y[40:]}, path)
    return str(path)


SWEEP = {
    "name": "wide",
    "backbones": [
        {
            "name": "timm/test_resnet",
            "pretrained": False,
            "image_size": 32,
            "layers": ["last", "all"],
        }
    ],
    "data": ["Digits"],
    "tasks": [{"classes": [0, 1], "name": "two"}],
    "grid": [{"recipe": ["qi", "ridge"]}],
}


def test_a_sweep_goes_over_layers_and_embeds_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    plain = {"name": "timm/test_resnet", "pretrained": False, "image_size": 32}
    for name, backbone in (("old", plain), ("wide", SWEEP["backbones"][0])):
        given = SWEEP | {"name": name, "backbones": [backbone]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(given))
    run(capsys, "sweep", "--config", "old.yaml", "--cache_dir", "other")
    old = pd.read_csv("results/old/results.csv")
    assert "layers" not in old
    # What was done before layers is gone on with: the same rows, and those of all layers.
    (tmp_path / "results" / "old").rename(tmp_path / "results" / "wide")
    out = run(capsys, "sweep", "--config", "wide.yaml")
    rows = pd.read_csv("results/wide/results.csv")
    assert rows["layers"].fillna("last").tolist() == ["last", "last", "all", "all"]
    assert rows["id"][:2].tolist() == old["id"].tolist()
    assert "layers" in out
    # Only all layers were embedded.
    assert len(list((tmp_path / "cache").glob("*/key.json"))) in (1, 2)
    grouped = read_results("results/wide/results.parquet")
    assert sorted(grouped["backbone"].unique()) == [
        "timm/test_resnet@32",
        "timm/test_resnet@32 layers=all",
    ]
    assert sorted(grouped["method"].unique()) == ["qi", "ridge"]
    # NC1 is that of the last layer.
    assert rows["nc1"].nunique() == 1 or rows["nc1"].std() < 1e-3 * rows["nc1"].mean()


def test_a_sweep_takes_wide_embeddings_and_names_of_its_norms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = {"name": "points", "embeddings": wide_file("it.safetensors"), "layer_widths": [2, 4]}
    grid = [{"recipe": "qi", "norm_pre": ["l2", "last+l2", "join+l2"]}, {"recipe": "auto"}]
    (tmp_path / "it.yaml").write_text(yaml.safe_dump({"name": "w", "data": [data], "grid": grid}))
    run(capsys, "sweep", "--config", "it.yaml")
    rows = pd.read_csv("results/w/results.csv")
    assert len(rows) == 4
    assert set(rows["layers"]) == {"all"}
    assert "layer_widths" not in rows


def test_mistakes_in_layers_of_a_sweep_name_their_place():
    points = {"name": "points", "embeddings": "x.safetensors"}
    grid = [{"recipe": "qi"}]
    for data in (points | {"layers": "all"}, points | {"layer_widths": "wide"}):
        with pytest.raises(ImprintError, match=r"data 'points': .*layer"):
            checked_sweep({"name": "w", "data": [data], "grid": grid})
    backbone = SWEEP["backbones"][0]
    for wrong in ({"views": "mirror"}, {"layers": []}):
        with pytest.raises(ImprintError, match="backbone 'timm/test_resnet': "):
            checked_sweep(SWEEP | {"backbones": [backbone | wrong]})


@pytest.mark.slow
def test_two_processes_fit_what_one_does(tmp_path):
    def accuracy(*more):
        words = ["fit", *DIGITS, *CPU, *BACKBONE, "--model.image_size", "32", *more]
        done = subprocess.run(
            [sys.executable, "-m", "imprint_pl", *words],
            cwd=tmp_path, timeout=400, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "layers: all (" in done.stdout
        folder = tmp_path / done.stdout.splitlines()[-1].removeprefix("run: ")
        with open(folder / "per_class.csv") as file:
            return list(csv.reader(file))

    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert accuracy() == accuracy(*two)


@pytest.mark.parametrize("format", ["torch_export", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_an_exported_file_reads_layers_and_views(tmp_path, monkeypatch, capsys, format):
    monkeypatch.chdir(tmp_path)
    words = [*BACKBONE, "--model.image_size", "32", "--model.recipe", "qi"]
    words += ["--model.layers", "all", "--model.views", "flip"]
    fitted = summary_of(run(capsys, "fit", *DIGITS, *CPU, *words))
    for shade in (40, 160):
        Image.new("L", (8, 8), shade).save(f"{shade}.png")
    images = ["--images", "40.png", "160.png"]
    out = run(capsys, "export", fitted["checkpoint"], "--format", format, *images)
    assert "2 of 2 images get the same class" in out


@pytest.mark.slow
def test_the_help_names_both(capsys):
    done = subprocess.run(
        [sys.executable, "-m", "imprint_pl", "fit", "--help"],
        cwd=ROOT, text=True, capture_output=True, check=True,
    )  # fmt: skip
    # Beside the recipe's own keywords.
    for option in ("--model.layers", "--model.views", "--model.k ", "--model.layer_widths"):
        assert option in done.stdout
