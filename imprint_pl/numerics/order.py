"""Sorts rows by their contents, so that draws and folds do not depend on the order in which the
rows came.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from imprint_pl.numerics.passes import blocks, row_sizes

# Rows that are processed in float64 at a time, few enough for the processor's cache.
CHUNK = 128
# Factor for the exponent in the hash, an arbitrary odd number.
EXPONENT = 0x1E3779B97F4A7C15


def keys(x: Tensor) -> Tensor:
    """Compute a key for each row of `x (N, d)`, `(N,)` int64, on the CPU; equal rows, equal keys.

    The key is the sum, modulo 2^64, of the row's features, as fractions of the largest feature,
    times fixed random whole numbers. Sums of whole numbers are the same in any order and on any
    device. Rows that differ only by rounding, or by a common factor of all rows, mostly get
    neighbouring keys. With a single feature the fraction is always the same, so its mantissa and
    exponent are used, too.
    """
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**15), 2**15, (x.shape[1] + 1,), generator=generator)
    x = x.detach()
    x = x.cpu() if x.device.type == "mps" else x
    factors, single = factors.to(x.device), x.shape[1] == 1
    # Allocate the result once. Small tensors that stay between large temporary ones would fragment
    # the memory, by up to the size of x.
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
    """Sort the rows `x (N, d)` with labels `y (N,)` by their contents.

    Multiples of a row are sorted by size, equal rows by label.

    Returns:
        The indices `(N,)` of the rows in this order.
    """
    columns = (y, row_sizes(x.detach()), keys(x))
    return torch.from_numpy(np.lexsort([c.cpu().numpy() for c in columns])).to(x.device)
