"""The package as others get it: a wheel, installed elsewhere, runs what the README shows."""

import os
import subprocess
import sys
import zipfile

import pytest
from places import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("imprint_pl-*.whl"))


def test_the_wheel_has_configs_and_type_marker_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    needed = ("py.typed", "configs/quickstart.yaml", "configs/loggers/wandb.yaml")
    for name in (
        *needed,
        "audit/audit.html.jinja",
        "serve/page.html.jinja",
        "experiments/report/page.html.jinja",
        "experiments/report/published.csv",
    ):
        assert f"imprint_pl/{name}" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_the_wheel_installed_elsewhere_runs_the_quickstart(wheel, tmp_path):
    site, work = tmp_path / "site", tmp_path / "work"
    work.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site]
    subprocess.run([*install, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = "import imprint_pl; print(imprint_pl.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=work, env=environment, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(site))
    command = [sys.executable, "-m", "imprint_pl", "fit", "--config", "configs/quickstart.yaml"]
    run = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "run: runs/Digits/version_0"
    script = subprocess.run([site / "bin" / "imprint-pl", "--version"], env=environment)
    assert script.returncode == 0
