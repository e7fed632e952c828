"""Passes over many rows, block by block, with a bar where they take long.

The rows may lie in a file that is larger than memory: each pass then reads the whole file.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

# Rows that are copied, converted or added up at a time.
CHUNK = 4096

Item = TypeVar("Item")

_shows_bars = ContextVar("shows_bars", default=False)


@contextmanager
def showing_bars(progress: bool = True) -> Iterator[None]:
    """Within it, passes show a bar on stderr if they take longer than two seconds, or none."""
    before = _shows_bars.set(progress)
    try:
        yield
    finally:
        _shows_bars.reset(before)


def bar(items: Sequence[Item], what: str, unit: str = "it", show: bool = True) -> tqdm[Item]:
    """A bar on stderr, which comes after two seconds and goes with the last item.

    Where a Trainer shows a bar of rich's, stderr is what rich puts in its place, which waits for
    the end of a line, and a bar has none: this one goes to the terminal and takes the line of
    rich's, which draws itself anew afterwards.
    """
    more: dict[str, Any] = {}
    if hasattr(sys.stderr, "rich_proxied_file"):
        width = shutil.get_terminal_size().columns
        more = {"file": sys.stderr.rich_proxied_file, "ncols": width}
    return tqdm(items, what, unit=unit, leave=False, delay=2, disable=not show, **more)


def with_bar(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items of a pass, one after the other, with a bar where bars are shown."""
    return bar(items, what) if _shows_bars.get() and len(items) > 1 else items


def blocks(samples: int, what: str) -> Iterator[slice]:
    """The rows of a pass, `CHUNK` at a time, with a bar where bars are shown."""
    for start in with_bar(range(0, samples, CHUNK), what):
        yield slice(start, start + CHUNK)


def row_sizes(x: Tensor) -> Tensor:
    """The largest absolute value of each row of `x (N, d)`: `(N,)`; NaN where a row has one."""
    x = x.detach()
    sizes = x.new_empty(len(x))
    for block in blocks(len(x), "checking values"):
        sizes[block] = torch.linalg.vector_norm(x[block], torch.inf, 1)
    return sizes


def largest(x: Tensor) -> Tensor:
    """The largest absolute value of `x (N, d)`, which has values: `()`."""
    ends = [
        x.detach()[block].aminmax() for block in blocks(len(x), "looking for the largest value")
    ]
    return torch.stack([torch.maximum(-end.min, end.max) for end in ends]).amax()
