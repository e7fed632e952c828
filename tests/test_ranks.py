"""`ranks.py`: classes that rank 0 deals out to the others. That fits use it, on any number of
processes, is in test_processes.py.
"""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from imprint_pl import ImprintError
from imprint_pl.parts.gen.kmeans import KMeans
from imprint_pl.ranks import on_rank_zero, share

SIZES = [7, 90, 12, 40, 3]


def classes():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, 6, generator=generator) for size in SIZES]


def of_classes(xs, seed, progress, refuse=None, die=None):
    """Each class's size, the seed, and the rank that had it."""
    rank = dist.get_rank()
    if refuse == rank:
        raise ImprintError(f"rank {rank} does not like its classes")
    if die == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return [torch.tensor([[len(x), seed, rank]]) for x in xs]


def run_rank(folder, rank, ranks, case):
    """What a process of these tests does."""
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    options = {"refuse": {"refuse": int(case[-1])}, "dies": {"die": int(case[-1])}}
    work = functools.partial(of_classes, **options.get(case[:-1], {}))

    def shared():
        assert rank == 0
        if case == "bug0":
            raise TypeError("a bug")
        found = [share(work, classes(), seed, False) for seed in (3, 4)]
        found.append(share(KMeans(2).of_classes, classes(), 0, False))
        found.append(share(work, classes()[:2], 5, False))
        found.append(share(work, classes()[:1], 5, False))
        return found

    try:
        found = on_rank_zero(shared, for_others=len)
        if rank == 0:
            found.append(share(work, classes(), 6, False))
        torch.save(found, f"{folder}/found-{rank}.pt")
    except (ImprintError, TypeError) as error:
        Path(folder, f"error-{rank}.txt").write_text(str(error))
    except RuntimeError as error:
        if case != "bug0":
            raise
        Path(folder, f"error-{rank}.txt").write_text(str(error))
    dist.barrier()
    dist.destroy_process_group()


def run(folder, ranks, case="plain0"):
    code = "import sys, test_ranks as t; t.run_rank(sys.argv[1], *map(int, sys.argv[2:4]), "
    code += "sys.argv[4])"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder), str(rank), str(ranks), case],
            stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    return [(process.communicate(timeout=120)[1], process.returncode) for process in started]


@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_takes_a_share_of_the_classes_and_all_come_back_in_order(ranks, tmp_path):
    assert [code for _, code in run(tmp_path, ranks)] == [0] * ranks
    *found, clustered, two, single, outside = torch.load(tmp_path / "found-0.pt", weights_only=True)
    # The others have what they were sent instead: how many results there are.
    for rank in range(1, ranks):
        assert torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) == 5
    for seed, results in zip((3, 4), found, strict=True):
        rows = torch.cat(results)
        assert rows[:, 0].tolist() == SIZES
        assert rows[:, 1].tolist() == [seed] * 5
        assert set(rows[:, 2].tolist()) == set(range(ranks))
    for got, expected in zip(clustered, KMeans(2).of_classes(classes(), 0, False), strict=True):
        torch.testing.assert_close(got, expected)
    # The larger of two classes stays, however many ranks there are.
    assert torch.cat(two).tolist() == [[7, 5, 1], [90, 5, 0]]
    # One class alone is not sent; nor is anything once nobody helps.
    assert single[0].tolist() == [[7, 5, 0]]
    assert torch.cat(outside)[:, 2].tolist() == [0] * 5


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_any_rank_is_raised_on_all(rank, tmp_path):
    assert [code for _, code in run(tmp_path, 2, f"refuse{rank}")] == [0, 0]
    for own in (0, 1):
        error = (tmp_path / f"error-{own}.txt").read_text()
        assert error == f"rank {rank} does not like its classes"


def test_a_bug_on_rank_0_ends_the_others_too(tmp_path):
    assert [code for _, code in run(tmp_path, 2, "bug0")] == [0, 0]
    assert (tmp_path / "error-0.txt").read_text() == "a bug"
    assert (tmp_path / "error-1.txt").read_text() == "rank 0 raised TypeError('a bug')"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_with_an_error(rank, tmp_path):
    start = time.monotonic()
    results = run(tmp_path, 3, f"dies{rank}")
    assert time.monotonic() - start < 100
    assert results[rank][1] == -signal.SIGKILL
    for message, code in (result for i, result in enumerate(results) if i != rank):
        assert code == 1
        assert "Connection" in message
    assert not list(tmp_path.glob("found-*.pt"))


def test_without_other_processes_all_is_done_here():
    found = on_rank_zero(lambda: share(KMeans(2).of_classes, classes(), 0, False))
    for got, expected in zip(found, KMeans(2).of_classes(classes(), 0, False), strict=True):
        assert torch.equal(got, expected)
