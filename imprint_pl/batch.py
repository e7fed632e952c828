"""What a batch is, whichever DataModule it comes from: images (or embeddings) and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from imprint_pl.errors import ImprintError
from imprint_pl.sharing import ranks

IMAGE_KEYS = ("image", "images", "x", "pixel_values", "input")
LABEL_KEYS = ("label", "labels", "y", "target", "targets")


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """`(images, labels)` of a batch: a tuple `(x, y, …)`, or a dict with the usual keys.

    Raises:
        ImprintError: neither shape, or labels that are not one integer a sample.
    """
    images, labels = images_of(batch), None
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
    elif _is_pair(batch) and len(batch) > 1:
        labels = batch[1]
    if labels is None:
        raise ImprintError(
            f"a batch of {_describe(batch)} has no labels: give tuples (images, labels) or dicts "
            f"with one of {', '.join(LABEL_KEYS)}"
        )
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImprintError(
            f"the labels of a batch, {str(labels)[:60]}, are no numbers: give integers 0..C−1, and "
            "the names as class_names of the DataModule"
        ) from error
    if labels.ndim != 1 or labels.is_floating_point() or len(labels) != len(images):
        raise ImprintError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} for {len(images)} "
            f"images: expected one integer a sample, ({len(images)},)"
        )
    return images, labels.long()


def images_of(batch: Any) -> Any:
    """The images of a batch, with or without labels: a tensor, or a list of `(C, H, W)` tensors."""
    if isinstance(batch, Mapping):
        for key in IMAGE_KEYS:
            if key in batch:
                return batch[key]
        raise ImprintError(
            f"a batch of {_describe(batch)} has no images: give one of {', '.join(IMAGE_KEYS)}"
        )
    return batch[0] if _is_pair(batch) else batch


def _is_pair(batch: Any) -> bool:
    if not isinstance(batch, (tuple, list)) or not batch:
        return False
    # A list of single images (image files of any sizes) is not a pair; `[x]` of a `TensorDataset`
    # has no second.
    last = batch[:2][-1]
    return not (isinstance(last, Tensor) and last.ndim == 3)


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"keys {sorted(map(str, batch))}"
    return type(batch).__name__


def loader_number(index: int, loaders: Any) -> Any:
    """Of the loaders that a Trainer has, one or a collection, that of a `dataloader_idx`."""
    loaders = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    return loaders[index] if isinstance(loaders, list | tuple) else loaders


def dealt_samples(loader: Any) -> int | None:
    """How many samples a `DistributedSampler` deals to the ranks, or `None` without one.

    It gives rank r the positions r, r + ranks, r + 2 · ranks, … and starts again at the first
    samples to make the ranks even: a position from this number on is a repetition. A collection of
    one loader is that loader.
    """
    if isinstance(loader, list | tuple | Mapping) and len(loader) == 1:
        loader = loader_number(0, loader)
    sampler = getattr(loader, "sampler", None)
    return len(sampler.dataset) if isinstance(sampler, DistributedSampler) else None


def dealt_positions(start: int, count: int) -> Tensor:
    """Where the samples `start … start + count − 1` of this rank stand in the data set, `(count,)`.

    In the order of the loader, dealt as `dealt_samples` says; with one process, their numbers.
    """
    rank = dist.get_rank() if ranks() > 1 else 0
    return torch.arange(start, start + count) * ranks() + rank


def samples_to_come(loader: Any, batches: float, processes: int) -> int | None:
    """How many different samples all ranks together will see in `batches` batches of each rank.

    `None` where nobody can know: no `DataLoader` of a data set with a length and a batch size, or
    several ranks whose samples no `DistributedSampler` deals.
    """
    size, sampler = getattr(loader, "batch_size", None), getattr(loader, "sampler", None)
    if size is None or not isinstance(sampler, Sized):
        return None
    own = int(min(len(sampler), batches * size))
    dealt = dealt_samples(loader)
    if dealt is None:
        return own if processes == 1 else None
    return min(dealt, own * processes)
