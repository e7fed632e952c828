"""The README's Python runs as it stands, and its commands and keywords exist."""

import re

import pytest
import torch
from places import ROOT

from imprint_pl.method.recipes import RECIPES
from imprint_pl.parts.by_name import SLOTS

README = (ROOT / "README.md").read_text()


def test_the_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 8, generator=generator) + 4 * torch.eye(3, 8)[y]
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    names = {"images": images, "x": x, "y": y, "new_x": x}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        exec(block, names)
    assert names["probabilities"].shape == (2, 10)
    assert (names["labels"] == y).all()


def test_every_config_named_in_it_exists():
    for name in re.findall(r"configs/[\w/]+\.yaml", README):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_stands_in_its_table(recipe):
    assert f"| `{recipe}` |" in README


@pytest.mark.parametrize("slot", SLOTS)
def test_every_part_is_named_in_it(slot):
    for part in SLOTS[slot]:
        assert f"`{part}`" in README, part


def test_every_room_is_named_in_it():
    for path in (ROOT / "imprint_pl").iterdir():
        if path.is_dir() and (path / "__init__.py").exists():
            assert f"`{path.name}/`" in README, path.name
