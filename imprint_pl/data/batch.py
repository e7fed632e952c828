"""Images (or embeddings) and labels of a batch, whichever DataModule it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError

IMAGE_KEYS = ("image", "images", "x", "pixel_values", "input")

LABEL_KEYS = ("label", "labels", "y", "target", "targets")


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Take a batch apart.

    Args:
        batch: A tuple `(images, labels, …)`, or a dict with the usual keys.

    Returns:
        The images, as they are, and the labels `(B,)`, int64.

    Raises:
        ImprintError: If the batch has another form, or its labels are not one integer for each
            sample.
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
    """Return the images of a batch, with or without labels.

    The images are a tensor or a list of `(C, H, W)` tensors.
    """
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
    # A list of single images (image files of any sizes) is not a pair. The `[x]` that a
    # `TensorDataset` returns has no second entry.
    last = batch[:2][-1]
    return not (isinstance(last, Tensor) and last.ndim == 3)


def _describe(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"keys {sorted(map(str, batch))}"
    return type(batch).__name__
