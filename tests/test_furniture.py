"""What a contributor looks for first: the workflows, hooks and pages do what they say."""

import re
import tomllib

import pytest
import torch
import yaml
from places import ROOT

from imprint_pl import imprint

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = ("CONTRIBUTING.md", "SECURITY.md", "CODE_OF_CONDUCT.md", "CHANGELOG.md")
FURNITURE = [
    *(ROOT / page for page in PAGES),
    *(ROOT / name for name in ("Makefile", "pyproject.toml", "constraints.txt", "CITATION.cff")),
    *(path for path in (ROOT / ".github").rglob("*") if path.is_file()),
    *(ROOT / ".ci" / "run", ROOT / ".pre-commit-config.yaml"),
]


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def commands(path):
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_targets_of_the_makefile_alone(path):
    assert commands(path)
    for command in commands(path):
        make, *targets = command.split()
        assert make == "make", command
        assert targets, command
        assert set(targets) <= TARGETS, command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_ends_by_itself(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for job in jobs(path).values():
        assert job["timeout-minutes"] <= 180


def test_every_check_runs_somewhere():
    run = {target for path in WORKFLOWS for c in commands(path) for target in c.split()[1:]}
    assert run == {"lint", "test", "docs", "wheel", "test-slow"}


def test_the_tests_run_on_every_python_that_the_package_is_said_to_run_on():
    matrix = jobs(ROOT / ".github/workflows/checks.yml")["tests"]["strategy"]["matrix"]["python"]
    said = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert matrix == said
    assert PROJECT["requires-python"] == f">={said[0]}"


def test_hooks_use_what_the_makefile_installs():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        assert hook["entry"].startswith((".venv/bin/ruff ", ".venv/bin/python -m mypy"))


def test_the_part_of_contributing_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert len([line for line in block.split("class", 1)[1].splitlines() if line.strip()]) <= 10
    names = {}
    exec(block, names)
    y = torch.arange(30) % 3
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)) + 9 * torch.eye(3, 4)[y]
    head = imprint(x, y, "qi", gen=names["Nearest"](k=3))
    assert len(head.proxies) == 9
    assert (head(x).argmax(1) == y).all()


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"`([\w./]+/[\w./]*|[\w]+\.(?:md|toml|cff))`", text):
        if path.startswith(("tests/", "docs/", "imprint_pl/", "configs/", "benchmarks/")):
            assert (ROOT / path).exists() or path == "docs/_build/html", path
        elif path.endswith((".md", ".toml", ".cff")):
            assert (ROOT / path).exists(), path
    for target in re.findall(r"(?:^    |`)make ((?!PYTHON)[\w-]+)", text, re.MULTILINE):
        assert target in TARGETS, target


@pytest.mark.parametrize("path", FURNITURE, ids=lambda path: path.name)
def test_no_address_is_named(path):
    """Neither a package index, nor a site or a mailbox that may not exist."""
    text = path.read_text()
    assert not re.search(r"https?://|index-url|[\w.]+@[\w-]+\.\w+", text)


def test_an_extra_that_the_code_names_exists():
    extras = PROJECT["optional-dependencies"]
    for path in (*(ROOT / "imprint_pl").rglob("*.py"), ROOT / "CHANGELOG.md"):
        text = path.read_text()
        for extra in re.findall(r"needs\(\s*\"(\w+)\"|imprint-pl\[(\w+)\]", text):
            assert "".join(extra) in extras, path
    assert "".join(extras["all"]).count(",") == 7


def test_the_version_comes_from_the_tags():
    assert "version" in PROJECT["dynamic"]
    assert "version" not in PROJECT
    assert "version" not in yaml.safe_load((ROOT / "CITATION.cff").read_text())
