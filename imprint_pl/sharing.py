"""Classes dealt out to the processes of a run: rank 0, which has the embeddings, sends each rank a
share of the classes and gets back their proxies. On the ground floor, below `store.py`.
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


@contextmanager
def helped() -> Iterator[None]:
    """On rank 0: while it lasts `share` deals out classes; the other ranks are in `help_out`."""
    if ranks() == 1:
        yield
        return
    token = _helped.set(True)
    try:
        yield
    finally:
        _helped.reset(token)
        _told(None)


def help_out() -> None:
    """On the other ranks: does what `share` deals out, until rank 0 leaves `helped`."""
    while (job := _told()) is not None:
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
    _told((of_classes, seed, sizes, xs[0].shape[1], xs[0].dtype))
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


def _told(job: tuple | None = None) -> tuple | None:
    """The job of rank 0, on every rank."""
    told = [job]
    dist.broadcast_object_list(told, 0)
    return told[0]
