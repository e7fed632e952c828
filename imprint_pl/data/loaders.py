"""What a loader will give: how many samples, and which a `DistributedSampler` deals to a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

from torch.utils.data import DistributedSampler


def loader_at(index: int, loaders: Any) -> Any:
    """Of the loaders that a Trainer has, one or a collection, that of a `dataloader_idx`."""
    loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    return loaders[index] if isinstance(loaders, list | tuple) else loaders


def sampler_length(loader: Any) -> int | None:
    """How many samples a `DistributedSampler` deals to the ranks, or `None` without one.

    It gives rank r the positions r, r + ranks, r + 2 · ranks, … and starts again at the first
    samples to make the ranks even: a position from this number on is a repetition. A collection of
    one loader is that loader.
    """
    if isinstance(loader, list | tuple | Mapping) and len(loader) == 1:
        loader = loader_at(0, loader)
    sampler = getattr(loader, "sampler", None)
    return len(sampler.dataset) if isinstance(sampler, DistributedSampler) else None


def expected_samples(loader: Any, batches: float, processes: int) -> int | None:
    """How many different samples all ranks together will see in `batches` batches of each rank.

    `None` where nobody can know: no `DataLoader` of a data set with a length and a batch size, or
    several ranks whose samples no `DistributedSampler` deals.
    """
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if size is None or not isinstance(sampler, Sized):
        return None
    own = int(min(len(sampler), batches * size))
    dealt = sampler_length(loader)
    if dealt is None:
        return own if processes == 1 else None
    return min(dealt, own * processes)
