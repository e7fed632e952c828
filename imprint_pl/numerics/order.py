"""The order of rows by what they hold: draws and folds that follow it depend on the set of rows
alone, not on the order in which they came.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imprint_pl.numerics.passes import blocks, row_sizes

# Rows looked at in float64 at a time: so few stay in the processor's cache.
CHUNK = 128
# What an exponent counts for: an odd number without a pattern.
EXPONENT = 0x1E3779B97F4A7C15


def keys(x: Tensor) -> Tensor:
    """A number for each row of `x (N, d)`: `(N,)` int64, on the CPU; equal rows have the same.

    A row's features, as fractions of its largest, times fixed random whole numbers, summed modulo
    2^64. Whole numbers add up to the same in any order and on any device; rows that differ by
    rounding alone mostly get neighbouring keys, and so do those of embeddings in another unit. Of a
    single feature fractions say nothing: its mantissa and exponent count, too.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**15), 2**15, (x.shape[1] + 1,), generator=generator)
    x = x.detach()
    x = x.cpu() if x.device.type == "mps" else x
    factors, single = factors.to(x.device), x.shape[1] == 1
    # Filled in: small results, kept one by one between large ones that come and go, would leave
    # holes in the memory that add up to the size of x.
    found = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for block in blocks(len(x), "putting rows in order"):
        for rows, result in zip(x[block].split(CHUNK), found[block].split(CHUNK), strict=True):
            rows = rows.double()
            largest = rows.abs().amax(1, keepdim=True)
            fractions = rows / largest.where(largest > 0, 1.0)
            if single:
                mantissa, exponent = torch.frexp(largest)
                fractions = torch.cat([fractions, mantissa], 1)
            whole = fractions.mul_(2.0**45).round_().long()
            key = whole.mul_(factors[: whole.shape[1]]).sum(1)
            result.copy_(key + EXPONENT * exponent.flatten().long() if single else key)
    return found.cpu()


def in_order(x: Tensor, y: Tensor) -> Tensor:
    """`(N,)`, the places of the rows `x (N, d)` with labels `y (N,)` in an order that depends on
    the rows alone. Multiples of a row follow each other by size, equal rows by label.
    """
    columns = (y, row_sizes(x.detach()), keys(x))
    return torch.from_numpy(np.lexsort([c.cpu().numpy() for c in columns])).to(x.device)
