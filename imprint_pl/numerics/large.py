"""Embeddings that may be larger than memory: above a budget they lie in a file that is mapped.

Torch reads a mapped file like any other tensor, and whoever takes it block by block needs no memory
of its size: the system fetches its pages and drops them again. The files have no name, so that a
process that is killed leaves none behind.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.passes import blocks, showing_bars
from imprint_pl.numerics.values import is_number

# GEN and what surrounds it take so many times the bytes of the embeddings that it sees: themselves,
# in order, normalised, clustered, the folds that choose a temperature. Measured with k-means,
# before they were put in order: 3.3 to 4.2.
COPIES = 5.5
# The part of the free memory that the default budget is. The rest is for the backbone, for other
# programs, and for the pages of the files.
SHARE = 0.5
SMALL = 2**25
# Files of the size of the embeddings at a time: the epoch's, in order, without held-out samples,
# and normalised.
FILES = 4
# File systems in memory.
RAM_DISKS = ("tmpfs", "ramfs")

_budget: ContextVar[float | None] = ContextVar("budget", default=None)


@contextmanager
def within_budget(gib: float | None = None, progress: bool = False) -> Iterator[None]:
    """Within it, rows that do not fit into the budget lie in files.

    It is set around a call, not handed down through every function in between.

    Args:
        gib: the budget in GiB; `None` leaves it as it is, which is at first half of the memory that
            is free.
        progress: passes over many rows show a bar on stderr if they take longer than two seconds.

    Raises:
        ImprintError: see `check_budget`.
    """
    check_budget(gib)
    budget = _budget.set(_budget.get() if gib is None else gib * 2**30)
    try:
        with showing_bars(progress):
            yield
    finally:
        _budget.reset(budget)


def check_budget(gib: float | None) -> None:
    """Raises an `ImprintError` unless a budget is `None` or a number above 0."""
    if gib is not None and not (is_number(gib) and gib > 0):
        raise ImprintError(f"memory_budget={gib!r}: give a number of GiB above 0, such as 4")


def chosen_room() -> float:
    """Bytes of embeddings that fit into the budget that was asked for; ∞ where none was."""
    budget = _budget.get()
    return float("inf") if budget is None else budget / COPIES


def fits(size: int) -> bool:
    """Whether embeddings of so many bytes fit into the budget, with what is computed of them."""
    # Nobody asks the system about sizes that any machine has.
    return (_budget.get() is None and size <= SMALL) or size <= room()


def room() -> float:
    """Bytes of embeddings that fit into the budget, with what is computed of them."""
    budget = _budget.get()
    return (SHARE * available_bytes() if budget is None else budget) / COPIES


def available_bytes() -> int:
    """What this process may still take: of the machine, or of the control group (container) that it
    runs in."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files that are not in use, which the kernel gives back.
        cached = int(dict(pairs).get("inactive_file", 0))
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, limit - used + cached)


def check_in_memory(samples: int, dim: int, reason: str) -> str:
    """Whether so many embeddings of `dim` float32 numbers can be kept in memory and imprinted.

    Args:
        reason: why they have to be in memory, for the message.

    Returns:
        A sentence with the estimate.

    Raises:
        ImprintError: the machine does not have so much.
    """
    embeddings, free = 4 * samples * dim, available_bytes()
    estimate = (
        f"the embeddings of {samples:,} images take {in_gib(embeddings)}, imprinting them some "
        f"{in_gib(COPIES * embeddings)}, and {in_gib(free)} of memory are available"
    )
    if COPIES * embeddings > free:
        fits = max(1, int(free / (COPIES * 4 * dim)))
        raise ImprintError(
            f"{estimate}, where they have to be since {reason}: bound them with max_per_class, or "
            f"shots in Python (room is for {fits:,} in all), or take a recipe that goes over them "
            "in passes, such as kernel or ridge"
        )
    return estimate


def empty_rows(*shape: int, dtype: torch.dtype = torch.float32, beside: int = 0) -> Tensor:
    """An uninitialised tensor on the CPU, in a file where it does not fit into the budget.

    Args:
        shape, dtype: of the tensor.
        beside: bytes of the rows that it is made of, and that have to fit beside it.

    Raises:
        ImprintError: no disk has room for it.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if fits(beside + size):
        return torch.empty(shape, dtype=dtype)
    with _new_file(size) as file:
        return _mapped(file, shape, dtype)


def rows_like(some: Tensor, samples: int, beside: int = 0) -> Tensor:
    """So many uninitialised rows, of the kind of `some (n, d)` and on its device; in a file where
    they do not fit, see `empty_rows`."""
    if some.device.type != "cpu":
        return some.new_empty(samples, *some.shape[1:])
    return empty_rows(samples, *some.shape[1:], dtype=some.dtype, beside=beside)


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """`x[rows]`, in a file where it does not fit: `x (N, d)`, places or a mask `rows`."""
    rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
    if x.device.type != "cpu" or fits(x[:1].nbytes * len(rows)):
        return x[rows]
    result = rows_like(x, len(rows))
    for block in blocks(len(rows), "copying"):
        torch.index_select(x, 0, rows[block], out=result[block])
    return result


def floats(x: Tensor) -> Tensor:
    """`x.float()`, in a file where it does not fit: `x (N, d)`."""
    if x.dtype == torch.float32 or x.device.type != "cpu" or fits(4 * x.numel()):
        return x.float()
    result = empty_rows(*x.shape)
    for block in blocks(len(x), "converting"):
        result[block] = x[block]
    return result


def joined(parts: list[Tensor]) -> Tensor:
    """`torch.cat(parts)`, in a file where it does not fit."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, out=rows_like(parts[0], sum(map(len, parts))))


def groups_that_fit(sizes: Sequence[int], row_bytes: int) -> list[range]:
    """Neighbouring classes of so many rows each, in groups whose rows fit into memory.

    A class that does not fit is a group of its own.

    >>> with within_budget(5.5 * 100 / 2**30):
    ...     groups_that_fit([4, 5, 9, 2], row_bytes=10)
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    most, groups, start, size = room(), [], 0, 0
    for i, rows in enumerate(sizes):
        if i > start and (size + rows) * row_bytes > most:
            groups.append(range(start, i))
            start, size = i, 0
        size += rows
    return [*groups, range(start, len(sizes))]


def as_tensor(values: Any) -> Tensor:
    """`torch.as_tensor`, which takes arrays that may only be read without a word, and shares their
    memory: nothing here writes to what users give."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(values)


class RowFile:
    """Rows that are appended to a file without a name.

    Args:
        expected: bytes that will come, where that is known: the disk is chosen by it.

    Raises:
        ImprintError: no disk has room.
    """

    def __init__(self, expected: int = 0) -> None:
        self.samples, self.dim = 0, 0
        self._file = _new_file(0, expected)

    def append(self, rows: Tensor) -> None:
        """Appends rows `(n, d)`, float32 on the CPU."""
        try:
            self._file.write(rows.contiguous().numpy().data)
        except OSError as error:
            raise _full(error) from error
        self.samples += len(rows)
        self.dim = rows.shape[1]

    def rows(self) -> Tensor:
        """All rows `(N, d)`; the file is closed, and lives as long as the tensor."""
        with self._file as file:
            file.flush()
            return _mapped(file, (self.samples, self.dim), torch.float32)


class Disk(NamedTuple):
    """Where files go.

    Attributes:
        folder: that one.
        passed_over: why none of the folders before it was taken, such as "/tmp is a RAM disk".
    """

    folder: Path
    passed_over: str


def check_disk(size: int) -> Disk:
    """Where files of so many bytes together go: to the folder for temporary files, or `/var/tmp`.

    Raises:
        ImprintError: neither has room, or each is a RAM disk, whose files take memory.
    """
    folders = list(dict.fromkeys([tempfile.gettempdir(), "/var/tmp"]))
    found = []
    for folder in filter(os.path.isdir, folders):
        if is_ram_disk(folder):
            found.append(f"{folder} is a RAM disk")
            continue
        free = psutil.disk_usage(folder).free
        if free >= size:
            return Disk(Path(folder), ", ".join(found))
        found.append(f"{folder} has {in_gib(free)} left")
    raise ImprintError(
        f"the embeddings do not fit into memory, and need {in_gib(size)} of disk for a while, but "
        f"{', '.join(found)}: set TMPDIR to a folder on a disk with room, give a larger "
        "memory_budget, or fewer samples"
    )


def is_ram_disk(folder: str) -> bool:
    """Whether the files of a folder lie in memory."""
    place, kind, longest = os.path.realpath(folder), "", -1
    for mount in psutil.disk_partitions(all=True):
        inside = place == mount.mountpoint or place.startswith(mount.mountpoint.rstrip("/") + "/")
        # Of two at one place the later hides the earlier.
        if inside and len(mount.mountpoint) >= longest:
            kind, longest = mount.fstype, len(mount.mountpoint)
    return kind in RAM_DISKS


def in_gib(size: float) -> str:
    """A number of bytes for messages."""
    return f"{size / 2**30:.1f} GiB"


def _new_file(size: int, expected: int = 0) -> BinaryIO:
    """An empty file without a name, with disk reserved for so many bytes."""
    folder = check_disk(max(size, expected)).folder
    try:
        file = tempfile.TemporaryFile(prefix="imprint_pl-", dir=folder)  # noqa: SIM115
        if size and hasattr(os, "posix_fallocate"):
            # A page that the disk has no room for would end the process without a word.
            os.posix_fallocate(file.fileno(), 0, size)
        elif size:
            file.truncate(size)
    except OSError as error:
        raise _full(error) from error
    return file


def _mapped(file: BinaryIO, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    kind = torch.empty(0, dtype=dtype).numpy().dtype
    return torch.from_numpy(np.memmap(file, kind, "r+", shape=shape))


def _full(error: OSError) -> ImprintError:
    return ImprintError(
        f"cannot write embeddings to disk ({error}): set TMPDIR to a folder on a disk with room, "
        "or give a larger memory_budget"
    )
