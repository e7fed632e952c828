"""Checks of the input of `imprint`: embeddings, labels, names, weights and a classifier."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.factorisations import double
from imprint_pl.numerics.labels import plain_labels
from imprint_pl.numerics.large import as_tensor, floats
from imprint_pl.numerics.passes import largest
from imprint_pl.numerics.values import check_classes, check_size, check_values


class Checked(NamedTuple):
    """Embeddings `x (N, d)` in float32, labels `y (N,)` in int64 on their device, and C."""

    x: Tensor
    y: Tensor
    num_classes: int


def _tensor(values: Any, what: str) -> Tensor:
    try:
        if hasattr(values, "__array__") and not isinstance(values, Tensor):
            # Torch takes neither data frames nor arrays with negative strides.
            values = np.require(values, requirements=["C"])
        # Embeddings may come with an autograd graph, which is not needed here.
        return as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImprintError(
            f"{what} of type {type(values).__name__} ({' '.join(str(error).split())}): expected a "
            "tensor or an array of numbers; ImprintEstimator takes labels of any kind"
        ) from error


def checked_classifier(weights: Any) -> Tensor:
    """Return the weights `(…, d)` of a classifier as a tensor; raise an `ImprintError` for anything
    else."""
    weights = _tensor(weights, "classifier")
    if weights.ndim != 2 or not weights.is_floating_point() or 0 in weights.shape:
        raise ImprintError(
            f"classifier of shape {tuple(weights.shape)} and type {weights.dtype}: expected the "
            "weights (C, d) of the backbone's own classifier, floats"
        )
    check_values(weights, "classifier: ")
    return weights


def checked(
    x: Tensor,
    y: Tensor,
    num_classes: int | None,
    class_names: list[str] | None,
    allow_empty: bool,
    values_checked: bool = False,
) -> Checked:
    """Checks embeddings and labels, and that they fit each other, C and the names.

    Args:
        x, y, num_classes, class_names: as for `imprint`.
        allow_empty: accept classes without samples.
        values_checked: whether `check_values` has already checked the values batch by batch.

    Returns:
        Embeddings, labels and C.

    Raises:
        ImprintError: they do not fit, or have values that the arithmetic cannot take.
    """
    x, y = _tensor(x, "embeddings"), _tensor(plain_labels(y), "labels")
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        raise ImprintError(
            f"embeddings of shape {tuple(x.shape)} and type {x.dtype}: expected floats (N, d)"
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex():
        raise ImprintError(
            f"labels of shape {tuple(y.shape)} and type {y.dtype} for {len(x)} embeddings: "
            f"expected integers ({len(x)},)"
        )
    # Check before converting to float32, since float64 can hold values that float32 cannot. The
    # largest value of the whole set is needed even if each batch was checked on its own.
    check_size(largest(x).item() if values_checked else check_values(x))
    x, y = floats(x), y.long().to(x.device)
    if num_classes is None:
        num_classes = len(class_names) if class_names else int(y.max()) + 1
    if class_names and len(class_names) != num_classes:
        raise ImprintError(f"{len(class_names)} class_names for num_classes={num_classes}")
    check_classes(num_classes)
    outside = (y < 0) | (y >= num_classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ImprintError(
            f"label {int(y[first])} of sample {first} is out of range: labels are "
            f"0..{num_classes - 1} for num_classes={num_classes}"
        )
    present = torch.unique(y).tolist()
    if len(present) < num_classes and not allow_empty:
        # Do not list all classes: a single absurdly large label would exhaust the memory.
        some = itertools.islice(sorted(set(range(len(present) + 5)) - set(present)), 5)
        empty = [c for c in some if c < num_classes]
        names = [f"{c} ({class_names[c]!r})" if class_names else str(c) for c in empty]
        left = num_classes - len(present) - len(empty)
        more = f" and {left} more" if left else ""
        raise ImprintError(
            f"class {', '.join(names)}{more} has no training sample: add samples, "
            "or leave the class out and number the labels without gaps"
        )
    return Checked(x, y, num_classes)


def checked_weights(sample_weight: Any, samples: int) -> Tensor:
    """Checks the weights of samples.

    Args:
        sample_weight: N numbers of at least 0.
        samples: N.

    Returns:
        `(N,)` float64.

    Raises:
        ImprintError: their number is not N, one is negative or not finite, or all are 0.
    """
    weights = _tensor(sample_weight, "sample_weight")
    if weights.shape != (samples,) or weights.is_complex():
        raise ImprintError(
            f"sample_weight of shape {tuple(weights.shape)} for {samples} embeddings: expected "
            f"numbers ({samples},)"
        )
    weights = double(weights)
    wrong = ~(weights.isfinite() & (weights >= 0))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ImprintError(
            f"sample_weight {weights[first].item()} of sample {first}: give a finite number of at "
            "least 0"
        )
    if not (weights > 0).any():
        raise ImprintError("sample_weight is 0 for every sample: give one of them more")
    return weights
