"""README and site: their Python runs as it stands; their links, commands, paths and names exist."""

import re
import subprocess
import sys

import pytest
import torch
import yaml
from places import ROOT

import imprint_pl.data
import imprint_pl.embedding
from imprint_pl.cli.commands import COMMANDS, FILE_COMMANDS
from imprint_pl.experiments.sweep import checked_sweep
from imprint_pl.method.recipes import RECIPES
from imprint_pl.parts.by_name import SLOTS

DOCS = ROOT / "docs"
# `make docs` copies the notebooks; they have a test of their own.
SITE = [path for path in sorted(DOCS.rglob("*.md")) if "_build" not in path.parts]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *SITE)}
ALL = "\n".join(PAGES.values())


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def names_of_a_reader():
    """What the pages say that a reader has: images, embeddings, a head, a project of their own."""
    from lightning.pytorch import LightningModule

    from imprint_pl import ImprintedClassifier, imprint
    from imprint_pl.data import Digits

    class Project(LightningModule):
        def __init__(self):
            super().__init__()
            self.body = torch.nn.Flatten()
            self.fc = torch.nn.Linear(64, 10)

        def forward(self, x):
            return self.fc(self.body(x.float() / 255))

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-2)

    y = torch.arange(60) % 3
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(3, 8)[y]
    return {
        "images": torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8),
        "x": x,
        "y": y,
        "new_x": x,
        "head": imprint(x, y, "robust", k=2),
        "model": ImprintedClassifier("efficientnet_lite0", image_size=32),
        "module": Project(),
        "net": Project(),
        "datamodule": Digits(),
    }


# What each page must have computed, so that its code has done what the page says.
SHOWN = {
    "docs/guides/after.md": lambda n: n["evaluation"].written[0].page.is_file(),
    "README.md": lambda n: (n["labels"] == n["y"]).all() and n["head"].embedding_dim == 64,
    "docs/guides/arrays.md": lambda n: (
        n["estimator"].score(n["X_test"], n["y_test"]) > 0.9
        and (n["labels"] == n["y"]).all()
        and n["head"].settings["k"] == 5
    ),
    "docs/guides/backbones.md": lambda n: n["found"].rounds[-1].images == 71,
    "docs/guides/clean.md": lambda n: (
        n["scores"].ranking()[0] == 5 and n["data"].exclude == "fix.csv"
    ),
    "docs/guides/data.md": lambda n: n["few"].shots == 5 and len(n["train_x"]) == 1437,
    "docs/guides/grow.md": lambda n: n["estimator"].classes_.tolist() == [1, 2, 3],
    "docs/guides/lightning.md": lambda n: (
        n["probabilities"].shape == (2, 10) and n["net"](n["images"]).shape == (2, 11)
    ),
    "docs/guides/photos.md": lambda n: n["backbone"].layer_widths[-1] == 1280,
    "docs/guides/recipes.md": lambda n: (
        n["head"].layer_widths == [8, 4] and [round(s, 2) for s in n["recall"]] == [0.86, 0.9]
    ),
    "docs/guides/unknowns.md": lambda n: (
        n["accepted"].mean() > 0.8 and (n["sets"] <= n["wider"]).all() and n["familiar"].mean() > -1
    ),
    "docs/guides/ship.md": lambda n: (n["head"](n["x"]).argmax(1) == n["y"]).all(),
    "docs/how_it_is_built.md": lambda n: (
        n["head"].settings["gen"] == "trimmed.Trimmed"
        and (n["head"](n["x"]).argmax(1) == n["y"]).float().mean() > 0.9
    ),
    "docs/reference/collapse.md": lambda n: n["nc1"](n["x"], n["y"]) > 0,
}


def test_every_page_with_python_has_an_outcome():
    assert {name for name, text in PAGES.items() if blocks(text, "python")} == set(SHOWN)


# These pages fit or compare several models: as long as all the others together.
LONG = ("docs/guides/lightning.md", "docs/guides/backbones.md")


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] if p in LONG else []) for p in SHOWN]
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(DOCS / "examples")
    names = names_of_a_reader()
    for block in blocks(PAGES[page], "python"):
        exec(block, names)
    assert SHOWN[page](names)


def test_the_sweeps_in_it_are_sweeps(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "examples")
    sweeps = blocks(ALL, "yaml")
    assert sweeps
    for text in sweeps:
        checked_sweep(yaml.safe_load(text))


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_every_page_is_reachable_from_the_index():
    reached, ahead = set(), [DOCS / "index.md"]
    while ahead:
        path = ahead.pop()
        reached.add(path)
        for tree in blocks(path.read_text(), "{toctree}"):
            entries = [line for line in tree.splitlines() if line and line[0] != ":"]
            found = [path.parent / f"{entry}.md" for entry in entries if "notebooks/" not in entry]
            ahead += [page for page in found if page not in reached]
    assert reached == set(SITE)


def test_every_notebook_is_on_the_site():
    entries = re.findall(r"^notebooks/(\w+)$", PAGES["docs/index.md"], re.MULTILINE)
    assert set(entries) == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def anchors(text):
    """The anchors of the headings, as code hosts and the site make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_path_named_in_it_exists():
    for name in re.findall(r"(?:configs|tests|benchmarks)/[\w/]+\.(?:yaml|py)", ALL):
        assert (ROOT / name).is_file(), name


def test_every_command_named_in_it_exists():
    known = {*COMMANDS, *FILE_COMMANDS}
    assert set(re.findall(r"(?:python -m imprint_pl|imprint-pl) ([a-z-]+)", ALL)) <= known
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|    )make ([\w-]+)", ALL)) <= set(targets)


@pytest.mark.parametrize("command", [*COMMANDS, *FILE_COMMANDS])
def test_every_command_stands_in_its_table(command):
    rows = re.findall(r"^\| (.*?) \|", PAGES["docs/reference/commands.md"], re.MULTILINE)
    assert any(re.search(rf"`{command}\b", row) for row in rows) or command == "validate"
    assert f"`{command}" in PAGES["docs/reference/commands.md"]


@pytest.mark.parametrize(
    ("page", "module"),
    [("python", imprint_pl), ("data", imprint_pl.data), ("embedding", imprint_pl.embedding)],
)
def test_every_public_name_stands_in_the_reference(page, module):
    entries = re.findall(r"auto\w+:: ([\w.]+)", PAGES[f"docs/reference/{page}.md"])
    assert set(module.__all__) <= {entry.split(".")[-1] for entry in entries}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_stands_in_its_table(recipe):
    assert f"| `{recipe}` |" in PAGES["docs/guides/recipes.md"]


@pytest.mark.parametrize("slot", SLOTS)
def test_every_part_is_named_in_it(slot):
    for part in SLOTS[slot]:
        assert f"`{part}`" in PAGES["docs/guides/recipes.md"], part


def test_every_room_is_named_in_it_and_every_file_named_there_exists():
    package = ROOT / "imprint_pl"
    rows = re.findall(
        r"^\| (`[a-z_./]+`.*) \| .* \| (.*) \|$", PAGES["docs/how_it_is_built.md"], re.M
    )
    rooms = {room for names, _ in rows for room in re.findall(r"`([a-z_]+)/`", names)}
    assert rooms == {path.parent.name for path in package.glob("*/__init__.py")}
    for names, files in rows:
        for name in re.findall(r"`([\w.]+/?)`", names):
            assert (package / name).exists(), name
        for name in re.findall(r"`([\w.]+/?)`", files):
            assert (package / re.search(r"\w+", names)[0] / name).exists(), name


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    site = tmp_path / "html"
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", tmp_path / "trees"]
    subprocess.run([*build, DOCS, site], check=True)
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(SITE)
    loaded = re.compile(
        r"""<(?:script|img|iframe|source|audio|video|embed)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*"""
        r"""|<link\b(?![^>]*rel="canonical")[^>]*\bhref=["']?(?:https?:)?//[^>]*"""
        r"""|url\(["']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*"""
    )
    for path in [*pages, *site.rglob("*.css")]:
        assert not loaded.findall(path.read_text()), path
