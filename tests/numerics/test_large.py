"""Rows that do not fit into the budget of memory lie in files that nobody sees."""

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from imprint_pl import ImprintError, imprint
from imprint_pl.numerics import large

X = torch.arange(40_000.0).reshape(10_000, 4)
TINY = 1e-9


@pytest.fixture
def files(monkeypatch):
    """The sizes of the files that were made."""
    made, new = [], large._new_file

    def counted(size, expected=0):
        made.append(size)
        return new(size, expected)

    monkeypatch.setattr(large, "_new_file", counted)
    return made


def test_rows_that_fit_stay_in_memory(files):
    with large.within_budget(5.5 * X.nbytes / 2**30 * 1.001):
        assert torch.equal(large.taken(X, torch.arange(10_000)), X)
    assert files == []


@pytest.mark.parametrize("rows", [torch.arange(9_999, 0, -1), X[:, 0] % 3 == 0, torch.tensor([2])])
def test_rows_of_a_file_are_those_that_were_asked_for(files, rows):
    with large.within_budget(TINY):
        found = large.taken(X, rows)
    assert torch.equal(found, X[rows])
    assert files == [found.nbytes]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_floats_are_converted_block_by_block(files, dtype):
    x = X.sqrt().to(dtype)
    with large.within_budget(TINY):
        found = large.floats(x)
        assert large.floats(X) is X
    assert torch.equal(found, x.float())
    assert files == [4 * x.numel()]


def test_joined_parts_are_one_tensor(files):
    with large.within_budget(TINY):
        assert torch.equal(large.joined([X[:3], X[3:3], X[3:]]), X)
        assert large.joined([X]) is X
    assert files == [X.nbytes]


def test_appended_rows_come_back_as_one_tensor():
    file = large.RowFile()
    for rows in (X[:7], X[7:7], X[7:].t().contiguous().t()):
        file.append(rows)
    assert torch.equal(file.rows(), X)
    assert large.RowFile().rows().shape == (0, 0)


def test_a_budget_ends_with_its_block_and_one_inside_is_its_own():
    before = large.chosen_room()
    with large.within_budget(5.5):
        with large.within_budget(11):
            assert large.chosen_room() == 2 * 2**30
        with large.within_budget():
            assert large.chosen_room() == large.room() == 2**30
    assert large.chosen_room() == before == float("inf")


@pytest.mark.parametrize("budget", [0, -1, "4", True, float("nan")])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ImprintError, match="memory_budget=.*GiB above 0"):
        imprint(X[:4], torch.tensor([0, 0, 1, 1]), "qi", memory_budget=budget)


def test_an_array_that_may_only_be_read_is_taken_without_a_copy_and_a_word(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = large.as_tensor(array)
    assert tensor.data_ptr() == array.ctypes.data


class Usage(NamedTuple):
    free: int


class Mount(NamedTuple):
    mountpoint: str
    fstype: str


def test_no_room_on_any_disk_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(large.psutil, "disk_usage", lambda folder: Usage(free=100_000))
    with large.within_budget(TINY), pytest.raises(ImprintError, match=r"left: set TMPDIR to a fol"):
        large.taken(X, torch.arange(10_000))


def test_a_disk_that_fills_up_meanwhile_is_an_error_too(monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with large.within_budget(TINY), pytest.raises(ImprintError, match=r"No space left.*TMPDIR"):
        large.taken(X, torch.arange(10_000))


def test_files_never_go_to_a_ram_disk(monkeypatch, tmp_path):
    real = os.path.realpath(tmp_path)
    # The later of two mounts at a place hides the earlier.
    mounts = [Mount("/", "ext4"), Mount(real, "ext4"), Mount(real, "tmpfs")]
    monkeypatch.setattr(large.psutil, "disk_partitions", lambda all: mounts)
    monkeypatch.setattr(large.tempfile, "tempdir", str(tmp_path / "inside"))
    (tmp_path / "inside").mkdir()
    assert large.is_ram_disk(str(tmp_path / "inside"))
    assert not large.is_ram_disk(str(tmp_path.parent))
    assert large.check_disk(1) == (Path("/var/tmp"), f"{tmp_path / 'inside'} is a RAM disk")
    mounts[0] = Mount("/", "tmpfs")
    with pytest.raises(ImprintError, match="is a RAM disk, /var/tmp is a RAM disk: set TMPDIR"):
        large.check_disk(1)


# Says so when its file is there, and waits to be killed.
WAITS = """
import torch, time
from imprint_pl.numerics import large
with large.within_budget(1e-9):
    rows = large.empty_rows(1000, 1000).fill_(1)
    stored = large.RowFile()
    stored.append(rows)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_killed_process_leaves_no_file_behind(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert f"{tmp_path}/" in mapped
        assert list(tmp_path.iterdir()) == []
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    assert list(tmp_path.iterdir()) == []
