"""Passes over many rows, and the bars that they show."""

import io
import sys

import pytest
import torch
from rich.console import Console
from rich.live import Live
from tqdm import tqdm

from imprint_pl.numerics import passes


@pytest.fixture
def at_once(monkeypatch):
    """Bars that come at once, not after two seconds."""
    monkeypatch.setattr(
        passes, "tqdm", lambda *items, **how: tqdm(*items, **how | {"delay": 0, "mininterval": 0})
    )


def test_the_blocks_of_a_pass_are_all_rows_once():
    assert [(one.start, one.stop) for one in passes.blocks(9000, "x")] == [
        (0, 4096),
        (4096, 8192),
        (8192, 12288),
    ]
    assert list(passes.blocks(0, "x")) == []


def test_bars_come_where_they_were_asked_for_and_leave_nothing(at_once, capsys):
    list(passes.blocks(9000, "adding up"))
    assert capsys.readouterr().err == ""
    with passes.showing_bars():
        list(passes.blocks(4096, "adding up"))  # a single block
        assert capsys.readouterr().err == ""
        list(passes.blocks(9000, "adding up"))
        with passes.showing_bars(False):
            list(passes.blocks(9000, "not this"))
    shown = capsys.readouterr().err
    assert "adding up" in shown
    assert "not this" not in shown
    assert shown.split("\r")[-2].strip() == ""


def test_a_bar_is_seen_beside_one_of_rich(at_once, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    console = Console(file=terminal, force_terminal=True, width=40)
    with Live("the epoch", console=console, auto_refresh=False), passes.showing_bars():
        before = len(terminal.getvalue())
        list(passes.blocks(9000, "adding up"))
        assert "adding up: 100%" in terminal.getvalue()[before:]


def test_sizes_are_those_of_rows_block_by_block():
    x = torch.randn(9000, 3, generator=torch.Generator().manual_seed(0))
    x[5000, 1] = torch.nan
    sizes = passes.row_sizes(x)
    expected = x.abs().amax(1)
    assert torch.equal(sizes.nan_to_num(-1), expected.nan_to_num(-1))
    assert sizes[5000].isnan()
    assert passes.largest(x).isnan()
    assert passes.largest(x[:5000]) == expected[:5000].max()
    assert len(passes.row_sizes(x[:0])) == 0
