"""Shares work among the processes (ranks) of a run. Rank 0 has the embeddings; it sends each rank a
share of the classes and gets their proxies back. Every rank gets the result.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from imprint_pl.errors import ImprintError

# A function of the classes' embeddings, a seed and whether to show a bar; returns the proxies of
# each class.
OfClasses = Callable[[list[Tensor], int, bool], list[Tensor]]
Result = TypeVar("Result")

# Whether the other ranks wait for classes. A context variable saves an argument in every function
# between `on_rank_zero` and `share`.
_helped = ContextVar("helped", default=False)
# Rows that are sent between ranks at a time.
CHUNK = 8192


class _Job(NamedTuple):
    """A job for the other ranks from `share`; `sizes` has the classes' sizes for each rank."""

    of_classes: OfClasses
    seed: int
    sizes: list[list[int]]
    columns: int
    dtype: torch.dtype


def _same(result: Result) -> Result:
    return result


def on_rank_zero(
    function: Callable[[], Result], for_others: Callable[[Result], Result] = _same
) -> Result:
    """Runs `function()` on rank 0; every rank returns its result, or raises its error.

    Meanwhile the other ranks do the work that `share` sends them. With one process it is a plain
    call.

    Args:
        function: called on rank 0 alone.
        for_others: turns the result into the one that the other ranks return; only called if there
            are other ranks. Its result is pickled, so its tensors must be on the CPU.

    Returns:
        The result of `function`, or on other ranks that of `for_others`.

    Raises:
        ImprintError: on all ranks, if the function raises one on rank 0.
        RuntimeError: on the other ranks, if rank 0 raises any other exception.
    """
    if ranks() == 1:
        return function()
    if dist.get_rank() > 0:
        while isinstance(message := _broadcast(), _Job):
            _work_on(message)
        if isinstance(message, Exception):
            raise message
        return message
    token = _helped.set(True)
    try:
        result = function()
        _broadcast(for_others(result))
    except Exception as error:
        told = (
            error if isinstance(error, ImprintError) else RuntimeError(f"rank 0 raised {error!r}")
        )
        _broadcast(told)
        raise
    finally:
        _helped.reset(token)
    return result


def share(of_classes: OfClasses, xs: list[Tensor], seed: int, progress: bool) -> list[Tensor]:
    """Call `of_classes(xs, seed, progress)`; inside `on_rank_zero`, divide the classes among ranks.

    Args:
        of_classes: returns one tensor `(p, d)` per class, which must not depend on other classes.
            It is pickled, and so are its errors.
        xs: embeddings `(n, d)` of each class.
        seed, progress: passed on; a bar is shown for the share of rank 0.

    Returns:
        One tensor `(p, d)` per class.

    Raises:
        ImprintError: raised by any of the ranks.
    """
    if not _helped.get() or len(xs) < 2:
        return of_classes(xs, seed, progress)
    # Assign the large classes first, so that no rank gets all of them.
    order = sorted(range(len(xs)), key=lambda i: -len(xs[i]))
    shares = [order[rank :: ranks()] for rank in range(ranks())]
    sizes = [[len(xs[i]) for i in share] for share in shares]
    _broadcast(_Job(of_classes, seed, sizes, xs[0].shape[1], xs[0].dtype))
    for rank, members in enumerate(shares[1:], 1):
        if members:
            dist.send(torch.cat([xs[i] for i in members]).to(travelling_device()), rank)
    results: list[Any] = [None] * ranks()
    try:
        own = of_classes([xs[i] for i in shares[0]], seed, progress)
    finally:
        # Collect the results of the other ranks even if this rank failed.
        dist.gather_object([], results)
    results[0] = own
    proxies = list(xs)
    for members, found in zip(shares, results, strict=True):
        if isinstance(found, Exception):
            raise found
        for i, of_class in zip(members, found, strict=True):
            proxies[i] = of_class.to(xs[i].device)
    return proxies


def _work_on(job: _Job) -> None:
    """Computes this rank's classes of a job, and sends their proxies, or an error, to rank 0."""
    sizes = job.sizes[dist.get_rank()]
    results: list[Tensor] | ImprintError = []
    if sizes:
        rows = torch.empty(sum(sizes), job.columns, dtype=job.dtype, device=travelling_device())
        dist.recv(rows, 0)
        try:
            proxies = job.of_classes(list(rows.split(sizes)), job.seed, False)
            results = [of_class.cpu() for of_class in proxies]
        except ImprintError as error:
            results = error
    dist.gather_object(results)


def _broadcast(message: Any = None) -> Any:
    """Return the message of rank 0 on every rank."""
    told = [message]
    dist.broadcast_object_list(told, 0)
    return told[0]


def ranks() -> int:
    """Return how many processes there are."""
    there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if there else 1


def travelling_device() -> torch.device:
    """Return the device that tensors must be on to be sent from rank to rank."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def gather_rows(rows: Tensor, empty: Callable[..., Tensor] = torch.empty) -> Tensor | None:
    """Gather the rows of all ranks on rank 0: row j of rank r becomes row j · ranks + r.

    Args:
        rows: the rows of this rank, `(n, …)`; n may differ between ranks.
        empty: makes the tensor for all rows.

    Returns:
        The rows of all ranks on rank 0; `None` on the other ranks.
    """
    if ranks() == 1:
        return rows
    device, rank = travelling_device(), dist.get_rank()
    of_ranks = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks())]
    dist.all_gather(of_ranks, torch.tensor([len(rows)], device=device))
    counts = torch.cat(of_ranks).cpu()
    result, done = None, 0
    if rank == 0:
        result = empty(int(counts.sum()), *rows.shape[1:], dtype=rows.dtype)
    for start in range(0, int(counts.max()), CHUNK):
        size = min(CHUNK, int(counts.max()) - start)
        piece = rows.new_zeros(size, *rows.shape[1:])
        own = rows[start : start + size]
        piece[: len(own)] = own
        piece = piece.to(device)
        if result is None:
            dist.gather(piece)
            continue
        pieces = [torch.empty_like(piece) for _ in range(ranks())]
        dist.gather(piece, pieces)
        held = torch.arange(start, start + size)[:, None] < counts
        found = torch.stack(pieces, 1).cpu()[held]
        result[done : done + len(found)] = found
        done += len(found)
    return result


def concatenate(chunks: list[Tensor]) -> Tensor:
    """Concatenate chunks like `torch.cat`, and empty the list.

    Each chunk is freed once it is copied, so the peak of memory is one copy instead of two.
    """
    if not chunks:
        return torch.empty(0, 0)
    rows = torch.empty(sum(map(len, chunks)), *chunks[0].shape[1:], dtype=chunks[0].dtype)
    start = 0
    chunks.reverse()
    while chunks:
        chunk = chunks.pop()
        rows[start : start + len(chunk)] = chunk
        start += len(chunk)
    return rows


def positions_in_dataset(start: int, count: int) -> Tensor:
    """Return the positions in the data set `(count,)` of the samples `start … start + count − 1` of
    this rank.

    Samples are counted in the order of the rank's loader, whose sampler deals them as described in
    `sampler_length`. With one process, positions are these numbers.
    """
    rank = dist.get_rank() if ranks() > 1 else 0
    return torch.arange(start, start + count) * ranks() + rank
