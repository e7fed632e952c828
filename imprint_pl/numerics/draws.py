"""Random draws that a seed fixes, and helpers that group samples by class."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_keys(positions: Tensor, seed: int) -> Tensor:
    """Return a random number for each position; sorting by it gives a random order.

    The number depends only on the position and the seed, so the other positions need not be known.

    Args:
        positions: `(n,)` int64, such as indices in a data set or keys of rows.
        seed: fixes the order.

    Returns:
        `(n,)` int64.

    Source: Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    # Mix the seed first: otherwise the next seed would only shift the positions by one.
    start = _mixed(np.array([seed]).astype(np.uint64))
    mixed = _mixed(start + positions.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(n: int, count: int, seed: int) -> Tensor:
    """Draw `(min(n, count),)` different positions in 0..n−1, on the CPU.

    A smaller `count` gives a prefix of a larger one.
    """
    # Draw on the CPU, so that the draws are the same for every device.
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]


def rows_by_class(y: Tensor, num_classes: int = 0) -> list[Tensor]:
    """Return the positions of the samples of each class, in ascending order.

    Args:
        y: `(N,)`, labels from 0.
        num_classes: C; the largest label + 1 by default.

    Returns:
        C tensors `(n,)`, empty for a class without samples.

    >>> rows_by_class(torch.tensor([1, 0, 1]), 3)
    [tensor([1]), tensor([0, 2]), tensor([], dtype=torch.int64)]
    """
    order = y.argsort(stable=True)
    return list(order.split(torch.bincount(y, minlength=num_classes).tolist()))


def place_in_class(y: Tensor, order: Tensor) -> Tensor:
    """Number the samples of each class in a given order. All stratified draws are based on this.

    Args:
        y: `(N,)`, labels from 0.
        order: `(N,)`, all positions 0..N−1 in that order, such as `sample(N, N, seed)`.

    Returns:
        `(N,)` int64: 0 for the first sample of its class in the order, then 1, 2, …

    >>> place_in_class(torch.tensor([0, 0, 1, 0]), torch.tensor([3, 2, 1, 0]))
    tensor([2, 1, 0, 0])
    """
    by_class = order[y[order].argsort(stable=True)]
    counts = torch.bincount(y)
    starts = counts.cumsum(0) - counts
    places = torch.empty_like(by_class)
    places[by_class] = torch.arange(len(y), device=y.device) - starts[y[by_class]]
    return places
