"""What only the base install brings is enough for `fit`, `predict` and `imprint`; a command that
needs an extra says in one line which."""

import json
import os
import re
import subprocess
import sys

import pytest
from places import ROOT

from imprint_pl.cli.commands import COMMANDS, FILE_COMMANDS

SCRIPT = ROOT / "tests" / "base_install.py"
PYTHON = """
import sys; sys.path.insert(0, {tests!r})
import base_install; base_install.hide()
import torch
import imprint_pl
from imprint_pl import ImprintEstimator, imprint
y = torch.arange(60) % 3
x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + 5 * torch.eye(3, 8)[y]
for recipe in ("auto", "qi", "robust", "knn", "ls", "ridge"):
    assert (imprint(x, y, recipe)(x).argmax(1) == y).all(), recipe
assert ImprintEstimator().fit(x.numpy(), y.numpy()).score(x.numpy(), y.numpy()) == 1
for name in ("collapse", "data", "gallery", "explain"):
    getattr(__import__("imprint_pl." + name), name)
try:
    imprint(x, y, "qi", gen="kmedoids", k=2)
except imprint_pl.ImprintError as error:
    print(error)
from imprint_pl.experiments.sweep import sweep
"""


def environment():
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "WANDB_MODE"} | own


def commands(folder, *lines):
    """Exit status, stdout and stderr of each command line in one process without extras."""
    done = subprocess.run(
        [sys.executable, SCRIPT, folder],
        input=json.dumps([line.split() for line in lines]),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((folder / "base_install.json").read_text())
    assert {"pandas", "pyarrow", "scikit_posthocs", "wandb_workspaces"} < set(found["hidden"])
    assert {"onnx", "onnxruntime", "onnxscript", "distributed"} < set(found["hidden"])
    assert not {"torch", "wandb", "faiss", "matplotlib", "jinja2"} & set(found["hidden"])
    return found["results"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    checkpoint = "runs/Digits/version_0/checkpoints/imprinted.ckpt"
    results = commands(
        folder,
        "fit --config configs/quickstart.yaml --data.shots 5 --model.image_size 32 --gallery file",
        f"predict --ckpt_path {checkpoint} --images runs --output it.csv --explain explained",
        f"export {checkpoint} --format safetensors --output head",
        f"export {checkpoint} --format onnx",
        f"serve {checkpoint}",
        "sweep --config configs/sweeps/quick.yaml",
        "report results/quick",
        "dashboard --entity somebody",
        "dashboard results/quick --offline",
        # Last: wandb is offline in the whole process afterwards.
        "fit --config configs/quickstart.yaml --config configs/loggers/wandb.yaml --data.shots 2",
    )
    return folder, results


@pytest.mark.slow
def test_fit_with_its_pictures_and_predict_need_only_the_base(fitted):
    folder, (fit, predict, head, *_, logged) = fitted
    for status, _, err in (fit, predict, head, logged):
        assert status == 0, err[-2000:]
    assert list(folder.rglob("gallery*.png"))
    assert list(folder.glob("wandb/offline-run-*"))
    assert (folder / "it.csv").is_file()
    assert list(folder.glob("explained/*"))
    assert (folder / "head" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_command_whose_extra_is_missing_says_in_one_line_what_to_install(fitted):
    _, (_, _, _, export, serve, sweep, report, online, offline, _) = fitted
    for (status, out, err), extra, package in [
        (export, "onnx", "onnx"),
        (serve, "serve", "fastapi"),
        (sweep, "sweep", "p(yarrow|andas)"),
        (report, "sweep", "pandas"),
        (online, "sweep", "wandb_workspaces"),
        (offline, "sweep", "pandas"),
    ]:
        assert status == 2
        assert out == ""
        cure = rf"needs the package {package}, which .*: pip install 'imprint-pl\[{extra}\]'"
        (line,) = err.splitlines()
        assert re.search(cure, line), line


@pytest.mark.slow
def test_every_command_helps_without_extras(tmp_path):
    lines = [f"{command} --help" for command in (*COMMANDS, *FILE_COMMANDS)]
    for line, (status, out, err) in zip(lines, commands(tmp_path, *lines), strict=True):
        assert status == 0, (line, err)
        assert "usage" in out.lower(), line


@pytest.mark.slow
def test_imprint_and_the_estimator_need_only_the_base():
    script = PYTHON.format(tests=str(ROOT / "tests"))
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert done.stdout == (
        "gen='kmedoids' needs the package kmedoids, which does not import here: "
        "pip install 'imprint-pl[kmedoids]', or choose gen='kmeans'\n"
    ), done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].endswith("pip install 'imprint-pl[sweep]'")
