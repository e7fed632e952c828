"""How many samples a loader will return, and how many of them a `DistributedSampler` repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, cast

from torch.utils.data import DistributedSampler


def loader_at(index: int, loaders: Any) -> Any:
    """Return the loader of a `dataloader_idx`.

    Args:
        index: Lightning's `dataloader_idx`.
        loaders: A Trainer's loader, or a list or dict of several.
    """
    loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    return loaders[index] if isinstance(loaders, list | tuple) else loaders


def sampler_length(loader: Any) -> int | None:
    """Return how many samples a `DistributedSampler` distributes over the ranks.

    The sampler gives rank r the positions r, r + ranks, r + 2 · ranks, … and repeats the first
    samples until all ranks have equally many: positions from this number on are repetitions.

    Args:
        loader: A loader, or a collection of one loader.

    Returns:
        The number, or None without a `DistributedSampler`.
    """
    if isinstance(loader, list | tuple | Mapping) and len(loader) == 1:
        loader = loader_at(0, loader)
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    return len(cast(Sized, sampler.dataset))


def expected_samples(loader: Any, batches: float, processes: int) -> int | None:
    """Return how many different samples all ranks together will see.

    Args:
        loader: A rank's loader.
        batches: Batches of each rank.
        processes: Number of ranks.

    Returns:
        The number, or None if it cannot be known: the loader is no `DataLoader` with a length and a
        batch size, or several ranks have no `DistributedSampler`.
    """
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if size is None or not isinstance(sampler, Sized):
        return None
    own = int(min(len(sampler), batches * size))
    distributed = sampler_length(loader)
    if distributed is None:
        return own if processes == 1 else None
    return min(distributed, own * processes)
