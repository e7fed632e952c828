"""Random draws by a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def random_keys(positions: Tensor, seed: int) -> Tensor:
    """The turn of each position `(n,)` in a random order of all, int64; the others' are not drawn.

    Source: Steele, Lea & Flood 2014, "Fast Splittable Pseudorandom Number Generators".
    """
    # Mixed first, as neighbouring seeds would differ by a shift of the positions.
    start = _mixed(np.array([seed]).astype(np.uint64))
    mixed = _mixed(start + positions.numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return torch.from_numpy((mixed >> np.uint64(1)).astype(np.int64))


def _mixed(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample(n: int, count: int, seed: int) -> Tensor:
    """`(min(n, count),)` different positions in 0..n−1, on the CPU; fewer are a prefix of more."""
    # On the CPU on purpose: the draws are the same on every device.
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count]
