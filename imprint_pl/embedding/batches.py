"""Passes over a loader that run a backbone, or any function of images, on each batch.

Every pass over a loader outside of a Trainer goes through `run_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from imprint_pl.data.batch import images_of, split_batch
from imprint_pl.errors import ImprintError

Given = TypeVar("Given")
Unpack = Callable[[Any], tuple[Any, Tensor]]


@torch.no_grad()
def run_batches(
    run: Callable[[Any], Given],
    batches: Iterable[Any],
    *,
    transfer: Callable[[Any], Any] | None = None,
    unpack: Unpack | None = None,
) -> Iterator[tuple[Given, Tensor]]:
    """Runs a function on the images of each batch, without gradients.

    The caller sets the modes of modules and the precision. Batches are read one by one, when the
    caller takes the next result.

    Args:
        run: takes the images of a batch, and returns their embeddings `(B, d)`, or anything else.
        batches: a loader.
        transfer: applied to each batch before it is unpacked, for batch hooks and the device.
        unpack: batch → (images, labels `(B,)`); `split_batch` by default.

    Yields:
        The result of `run` for each batch, and the labels.
    """
    for batch in batches:
        images, labels = (unpack or split_batch)(batch if transfer is None else transfer(batch))
        yield run(images), labels


def embed_loader(
    run: Callable[[Any], Tensor], batches: Iterable[Any], **options: Any
) -> tuple[Tensor, Tensor]:
    """Returns the embeddings `(N, d)` and labels `(N,)` of a whole loader, on their device.

    Args:
        run, batches, options: as for `run_batches`.

    Raises:
        ImprintError: the loader has no batch.
    """
    pairs = list(run_batches(run, batches, **options))
    if not pairs:
        raise ImprintError("no image was given: add some")
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def readable(batch: Any) -> Any:
    """Return the images of a batch without the black ones that replace skipped files."""
    images = images_of(batch)
    skipped = batch.get("skipped", {}) if isinstance(batch, dict) else {}
    return [image for i, image in enumerate(images) if i not in skipped] if skipped else images


def unlabelled(batch: Any) -> tuple[Any, Tensor]:
    """Return the readable images of a batch, and zeros instead of labels."""
    images = readable(batch)
    return images, torch.zeros(len(images), dtype=torch.int64)
