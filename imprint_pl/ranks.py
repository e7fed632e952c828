"""The processes (ranks) of a run: rank 0, which has the embeddings, sends each rank a share of the
classes and gets back their proxies; rows of all ranks come to rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imprint_pl.errors import ImprintError

# Of a list of classes, seed and whether to show a bar: proxies of each class.
OfClasses = Callable[[list[Tensor], int, bool], list[Tensor]]

# Whether the other ranks wait for classes. Set around a call, not handed down through every
# function in between.
_helped = ContextVar("helped", default=False)
# Rows that travel between ranks at a time.
CHUNK = 8192


@contextmanager
def helped() -> Iterator[None]:
    """On rank 0: while it lasts `share` deals out classes to the other ranks, which are in
    `work_for_rank_zero`."""
    if ranks() == 1:
        yield
        return
    token = _helped.set(True)
    try:
        yield
    finally:
        _helped.reset(token)
        _broadcast_job(None)


def work_for_rank_zero() -> None:
    """On the other ranks: does what `share` deals out, until rank 0 leaves `helped`."""
    while (job := _broadcast_job()) is not None:
        of_classes, seed, sizes, columns, dtype = job
        sizes, results = sizes[dist.get_rank()], []
        if sizes:
            rows = torch.empty(sum(sizes), columns, dtype=dtype, device=travelling_device())
            dist.recv(rows, 0)
            try:
                results = [x.cpu() for x in of_classes(list(rows.split(sizes)), seed, False)]
            except ImprintError as error:
                results = error
        dist.gather_object(results)


def share(of_classes: OfClasses, xs: list[Tensor], seed: int, progress: bool) -> list[Tensor]:
    """`of_classes(xs, seed, progress)`; inside `helped`, each rank takes a part of the classes.

    Args:
        of_classes: gives one tensor `(p, d)` a class; a class's own may not depend on the others.
            Pickled, as are its errors.
        xs: embeddings `(n, d)` of each class.
        seed, progress: handed on; a bar is shown for the share of rank 0.

    Raises:
        ImprintError: of whichever rank had it.
    """
    if not _helped.get() or len(xs) < 2:
        return of_classes(xs, seed, progress)
    # The large classes first, so that no rank has all of them.
    order = sorted(range(len(xs)), key=lambda i: -len(xs[i]))
    shares = [order[rank :: ranks()] for rank in range(ranks())]
    sizes = [[len(xs[i]) for i in share] for share in shares]
    _broadcast_job((of_classes, seed, sizes, xs[0].shape[1], xs[0].dtype))
    for rank, members in enumerate(shares[1:], 1):
        if members:
            dist.send(torch.cat([xs[i] for i in members]).to(travelling_device()), rank)
    results: list[Any] = [None] * ranks()
    try:
        own = of_classes([xs[i] for i in shares[0]], seed, progress)
    finally:
        # The others hand in what they have, come what may.
        dist.gather_object([], results)
    results[0] = own
    proxies = list(xs)
    for members, found in zip(shares, results, strict=True):
        if isinstance(found, Exception):
            raise found
        for i, of_class in zip(members, found, strict=True):
            proxies[i] = of_class.to(xs[i].device)
    return proxies


def ranks() -> int:
    """How many processes there are."""
    there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if there else 1


def travelling_device() -> torch.device:
    """Where tensors lie while they go from rank to rank."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def _broadcast_job(job: tuple | None = None) -> tuple | None:
    """The job of rank 0, on every rank."""
    told = [job]
    dist.broadcast_object_list(told, 0)
    return told[0]


def gather_rows(rows: Tensor) -> Tensor | None:
    """Row j of rank r becomes row j · ranks + r on rank 0; `None` on the others.

    Ranks may hold different numbers of rows.
    """
    if ranks() == 1:
        return rows
    device, rank = travelling_device(), dist.get_rank()
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(ranks())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    counts = torch.cat(counts).cpu()
    parts = []
    for start in range(0, int(counts.max()), CHUNK):
        size = min(CHUNK, int(counts.max()) - start)
        piece = rows.new_zeros(size, *rows.shape[1:])
        own = rows[start : start + size]
        piece[: len(own)] = own
        piece = piece.to(device)
        pieces = [torch.empty_like(piece) for _ in range(ranks())] if rank == 0 else None
        dist.gather(piece, pieces)
        if rank == 0:
            held = torch.arange(start, start + size)[:, None] < counts
            parts.append(torch.stack(pieces, 1).cpu()[held])
    return _concatenate(parts) if rank == 0 else None


def _concatenate(chunks: list[Tensor]) -> Tensor:
    """As `torch.cat`, but frees each chunk once copied: the peak is one copy, not two."""
    if not chunks:
        return torch.empty(0, 0)
    rows = torch.empty(sum(map(len, chunks)), *chunks[0].shape[1:], dtype=chunks[0].dtype)
    start = 0
    for i, chunk in enumerate(chunks):
        rows[start : start + len(chunk)] = chunk
        start += len(chunk)
        chunks[i] = None
    return rows


def positions_in_dataset(start: int, count: int) -> Tensor:
    """Where the samples `start … start + count − 1` of this rank stand in the data set, `(count,)`.

    In the order of the loader, dealt as `sampler_length` says; with one process, their numbers.
    """
    rank = dist.get_rank() if ranks() > 1 else 0
    return torch.arange(start, start + count) * ranks() + rank
