"""Which values the arithmetic can take: embeddings that are finite and of a size whose squares
float32 can hold, counts that are whole, numbers that are numbers. Whoever lets values in
asks here.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprint_pl.errors import ImprintError, did_you_mean


def _one_of(keyword: str, value: str, known) -> str:
    if value not in known:
        raise ImprintError(
            f"unknown {keyword}={value!r}{did_you_mean(value, known)} (known: {', '.join(known)})"
        )
    return value


def _positive(keyword: str, value: float) -> float:
    if not is_number(value) or not value > 0:
        raise ImprintError(f"{keyword}={value!r}: give a number above 0")
    if not SMALLEST <= value <= LARGEST:
        raise ImprintError(f"{keyword}={value}: give one from {SMALLEST:.0e} to {LARGEST:.0e}")
    return float(value)


# Scores are products of two embeddings, and temperatures range over a factor of 1e6 beyond them:
# both must stay within float32, from 1e-38 to 3e38.
LARGEST, SMALLEST = 1e12, 1e-12

# Of a vector that l2 makes one of length 1: the square of a shorter one is lost in float32.
SMALLEST_LENGTH = 1e-18

# A label above says that there are more classes than anybody has; room is made for all of them.
MAX_CLASSES = 2**20


def check_values(x: Tensor, place: str = "") -> float:
    """Checks embeddings `(N, d)`, one pass over them.

    Args:
        x: of any float type.
        place: where they come from, such as "batch 3: "; before "2 of 7 embeddings".

    Returns:
        The largest absolute value, 0 without samples.

    Raises:
        ImprintError: NaN, infinity, or a value above 1e12; names the first such sample.
    """
    # The maximum hands NaN on.
    # In float32, since in float16 the bound itself is infinite.
    sizes = torch.linalg.vector_norm(x, torch.inf, dim=1).float()
    bad = ~(sizes <= LARGEST)
    if not bad.any():
        return sizes.max().item() if len(sizes) else 0.0
    first = int(bad.nonzero()[0])
    some = f"{place}{int(bad.sum())} of {len(x)} embeddings"
    if x[first].isfinite().all():
        raise ImprintError(
            f"{some} have values above {LARGEST:.0e}, the first is sample {first} "
            f"({sizes[first]:.1e}): scale all embeddings down, by one factor"
        )
    raise ImprintError(
        f"{some} are not finite (NaN or infinite), the first is sample {first}: look at that "
        "image, or at the backbone's weights and precision"
    )


def is_number(value: Any) -> bool:
    """Whether it is a real number, of Python or NumPy; not a text, nor a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Whether it is a whole number of at least 1."""
    return isinstance(value, Integral) and is_number(value) and value >= 1


def to_json_value(value: Any) -> Any:
    """For JSON, which knows numbers of Python alone: that in a number of NumPy or in a tensor of
    one; of anything else its text."""
    single = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if single else repr(value)


def check_count(name: str, value: Any) -> None:
    """Raises an `ImprintError` unless `value` is a whole number of at least 1."""
    if not is_count(value):
        raise ImprintError(f"{name}={value!r}: give a whole number of at least 1")


def checked_seed(seed: Any) -> int:
    """The seed; an `ImprintError` unless it is a whole number from 0 that 63 bits hold."""
    if not isinstance(seed, Integral) or not 0 <= seed < 2**63:
        raise ImprintError(f"seed={seed!r}: give an integer of at least 0, below 2^63")
    return int(seed)


def check_classes(num_classes: int) -> None:
    """Raises an `ImprintError` for no number of classes, or more of them than 2^20, before room is
    made for them."""
    check_count("num_classes", num_classes)
    if num_classes > MAX_CLASSES:
        raise ImprintError(
            f"num_classes={num_classes:,}, for labels up to {num_classes - 1:,}: at most "
            f"{MAX_CLASSES:,} are possible; number the labels 0, 1, … without gaps"
        )


def check_size(largest: float) -> None:
    """Checks the largest absolute value of all embeddings; zeros alone are fine.

    Raises:
        ImprintError: it is below 1e-12.
    """
    if 0 < largest < SMALLEST:
        raise ImprintError(
            f"no value of the embeddings is above {largest:.1e}, smaller than {SMALLEST:.0e}: "
            f"scale all embeddings up, by one factor such as {1 / largest:.0e}"
        )
