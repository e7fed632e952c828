"""Checks of values that enter the package.

Embeddings must be finite, with squares that float32 can hold; counts must be whole numbers, and
numbers must not be texts.
"""

from __future__ import annotations

from collections.abc import Collection
from numbers import Integral, Real
from typing import Any

import numpy as np
from torch import Tensor

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.numerics.passes import row_sizes


def _one_of(keyword: str, value: str, known: Collection[str]) -> str:
    """Return the value, or raise an `ImprintError` if it is not known."""
    if value not in known:
        raise ImprintError(
            f"unknown {keyword}={value!r}{did_you_mean(value, known)} (known: {', '.join(known)})"
        )
    return value


def _positive(keyword: str, value: float) -> float:
    """Return the value, or raise an `ImprintError` unless it is a number from 1e-12 to 1e12."""
    if not is_number(value) or not value > 0:
        raise ImprintError(f"{keyword}={value!r}: give a number above 0")
    if not SMALLEST <= value <= LARGEST:
        raise ImprintError(f"{keyword}={value}: give one from {SMALLEST:.0e} to {LARGEST:.0e}")
    return float(value)


# Scores are products of two embeddings, and temperatures range over a factor of 1e6 beyond them:
# both must stay within float32, from 1e-38 to 3e38.
LARGEST, SMALLEST = 1e12, 1e-12

# Shortest vector that l2 scales to length 1: the square of a shorter one is lost in float32.
SMALLEST_LENGTH = 1e-18

# Memory is allocated for all classes, so a single wrong label could claim gigabytes.
MAX_CLASSES = 2**20


def check_values(x: Tensor, place: str = "") -> float:
    """Check embeddings, in one pass over them.

    Args:
        x: `(N, d)` of any float type.
        place: Where they come from, such as "batch 3: "; the message begins with it.

    Returns:
        The largest absolute value, 0 without samples.

    Raises:
        ImprintError: If values are NaN, infinite, or above 1e12; names the first such sample.
    """
    # The maximum of a row with NaN is NaN. Compare in float32: in float16 the bound is infinite.
    sizes = row_sizes(x).float()
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
    """Return whether a value is a real number of Python or NumPy, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, Integral) and is_number(value) and int(value) >= 1


def to_json_value(value: Any) -> Any:
    """Convert a value for JSON, which knows Python's numbers only.

    Returns:
        The number of a NumPy scalar or a tensor with one element; the text of anything else.
    """
    single = isinstance(value, np.generic) or (isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if single else repr(value)


def check_count(name: str, value: Any) -> None:
    """Raise an `ImprintError` unless `value` is a whole number of at least 1."""
    if not is_count(value):
        raise ImprintError(f"{name}={value!r}: give a whole number of at least 1")


def checked_seed(seed: Any) -> int:
    """Return the seed, or raise an `ImprintError` unless it is a whole number in 0..2^63 − 1."""
    if not isinstance(seed, Integral) or not 0 <= int(seed) < 2**63:
        raise ImprintError(f"seed={seed!r}: give an integer of at least 0, below 2^63")
    return int(seed)


def check_classes(num_classes: int) -> None:
    """Raise an `ImprintError` unless the number of classes is from 1 to 2^20.

    Call it before memory is allocated for the classes.
    """
    check_count("num_classes", num_classes)
    if num_classes > MAX_CLASSES:
        raise ImprintError(
            f"num_classes={num_classes:,}, for labels up to {num_classes - 1:,}: at most "
            f"{MAX_CLASSES:,} are possible; number the labels 0, 1, … without gaps"
        )


def check_size(largest: float) -> None:
    """Check the largest absolute value of all embeddings; zeros alone are fine.

    Raises:
        ImprintError: If it is above 0 and below 1e-12.
    """
    if 0 < largest < SMALLEST:
        raise ImprintError(
            f"no value of the embeddings is above {largest:.1e}, smaller than {SMALLEST:.0e}: "
            f"scale all embeddings up, by one factor such as {1 / largest:.0e}"
        )
