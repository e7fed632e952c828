"""Near-copies among the rows of a data set: the same photograph twice, cropped or saved anew.

A held-out sample whose near-copy is in the training set is too easy to predict. When a sample is
held out, its near-copies must be held out, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint_pl.numerics.draws import place_in_class
from imprint_pl.numerics.large import floats, rows_like
from imprint_pl.numerics.passes import CHUNK, blocks, largest, with_bar

# A near-copy is nearer than this share of the usual distance. Nine of ten mirrored photographs are
# at 0.24 to 0.39 of it (EfficientNet-Lite0), burst shots at 0.2 to 0.4. One in a hundred other
# photographs, digits or garments has a neighbour nearer than 0.6; with 8 × 8 pixels, 0.48.
SHARE = 0.45
# The usual distance of a row is at most that to its tenth neighbour. Copies are then nearer than
# the usual distance even if each image occurs up to nine times.
NEIGHBOURS = 10
# Rows among which usual distances are measured, as many as in the bounded sample of a stream.
REFERENCE = 2000
# Most near-copies of a row; the nearest ones count.
MOST = 15
# Dimensions of a random projection, which suffices to reject most pairs.
PROJECTED = 64
# Projection changes distances by about a tenth. Pairs are compared in full if their projected
# distance is up to this factor larger than the bound.
MARGIN = 1.5
# Number of distances computed at a time, and the most rows in such a block.
BLOCK, ROWS = 2**22, 512
# Number of rows for the median of the usual distances.
MEDIAN_OF = 500
# Expected number of neighbours of a row that are as near as copies only by chance.
CHANCE = 1e-3
# Number of pairs that are compared in full at a time.
PAIRS = 4096


@dataclass(frozen=True)
class Copies:
    """Pairs of near-copies among rows.

    Attributes:
        first, second: `(k,)` int64, indices of the two rows of each pair, on the CPU. A pair whose
            rows were both searched is contained in both orders.
        rows: number of all rows.
    """

    first: Tensor
    second: Tensor
    rows: int

    def of(self, places: Tensor) -> Tensor:
        """Return the near-copies `(m,)`, ascending, of the rows at `places (n,)`, without these."""
        asked = torch.zeros(self.rows, dtype=torch.bool)
        asked[places.cpu()] = True
        found = torch.zeros_like(asked)
        found[self.second[asked[self.first]]] = True
        return (found & ~asked).nonzero().flatten().to(places.device)

    def among(self, places: Tensor) -> Copies:
        """Return the pairs among the rows at `places (n,)`, which get the new numbers 0..n−1."""
        number = torch.full((self.rows,), -1)
        number[places.cpu()] = torch.arange(len(places))
        first, second = number[self.first], number[self.second]
        kept = (first >= 0) & (second >= 0)
        return Copies(first[kept], second[kept], len(places))


class CopyFinder:
    """Finds near-copies of rows of a data set.

    A pair counts if its distance is less than `SHARE` of the usual distance, or a smaller share in
    data of low dimension, where rows may be that near by chance. The usual distance is that of the
    row to its k-th nearest row, or the median of these distances, whichever is less. k is a third
    of the usual size of a class, at most ten, so that the rows of a tight class or of a dense part
    of the data do not count as copies of each other. If a row has k equal rows, since there are few
    different values, none of them is a copy. In classes of fewer than six samples no copies are
    found. Only pairs that are close in 64 random directions are compared in full.

    Args:
        x: `(N, d)`, all rows.
        y: `(N,)`, their labels, which only decide on k: copies may have different labels.
        reference: `(n,)`, indices of the rows among which usual distances are measured; at most the
            first 2,000 are used, since a random sample suffices. Default: all rows.
    """

    def __init__(self, x: Tensor, y: Tensor, reference: Tensor | None = None) -> None:
        x = x.detach()
        self.x = floats(x.cpu() if x.device.type == "mps" else x)
        reference = torch.arange(len(x)) if reference is None else reference
        self.reference = reference[:REFERENCE].to(self.x.device)
        counts = torch.bincount(y[reference[:REFERENCE].to(y.device)]) if len(y) else y
        most = min(NEIGHBOURS, len(self.reference) - 1)
        size = int(counts[counts > 0].median()) if len(counts) else 0
        self.neighbours = max(1, min(most, size // 3))
        # Scale the rows, so that squares neither overflow nor underflow.
        scale = largest(self.x) if self.x.numel() else self.x.new_ones(())
        self.scale = scale.clamp_min(1e-30)
        self.short = _projected(self.x, self.x[self.reference].mean(0), self.scale)
        self.squares = self.short.new_empty(len(x))
        for rows, squares in zip(self.short.split(CHUNK), self.squares.split(CHUNK), strict=True):
            torch.sum(rows.square(), 1, out=squares)
        if len(self.reference) > 2:
            some = self.reference[:MEDIAN_OF]
            usual, half = self._usual(some), self._usual(some, (self.neighbours + 1) // 2)
            self.usual = usual.median()
            # A row has about k (r / usual)^D others within a distance r, where D is the dimension
            # of the data. If D is low, some of them are as near as copies by chance.
            ratio = (half / usual.clamp_min(1e-30)).median().clamp(1e-3, 0.999).item()
            growth = self.neighbours / ((self.neighbours + 1) // 2)
            dimension = math.log(growth) / -math.log(ratio) if growth > 1 else math.inf
            self.share = min(SHARE, (CHANCE / self.neighbours) ** (1 / dimension))

    def find(self, places: Tensor | None = None) -> Copies:
        """Find the near-copies of the rows at `places (n,)`, by default of all rows.

        At most the 15 nearest copies of each row are found.

        >>> x = torch.tensor([[0.0], [1e-4], [1.0], [2.0], [3.0], [4.0]])
        >>> CopyFinder(x, torch.zeros(6, dtype=torch.int64)).find().of(torch.tensor([0]))
        tensor([1])
        """
        total = len(self.x)
        nothing = torch.zeros(0, dtype=torch.int64)
        everything = torch.arange(total, device=self.x.device)
        asked = everything if places is None else places.to(self.x.device)
        if len(self.reference) < 3 or not len(asked):
            return Copies(nothing, nothing, total)
        limit = self.share * self._usual(asked).clamp_max(self.usual)
        found: list[tuple[Tensor, Tensor]] = []
        size = max(ROWS, BLOCK // total)
        for rows, nearer in zip(asked.split(size), limit.split(size), strict=True):
            # Allow for rounding of the projected distances; candidates are checked in full later.
            bound = (MARGIN * nearer).square() + 1e-6 * self.squares[rows]
            row = other = asked[:0]
            parts = everything.split(max(1, BLOCK // len(rows)))
            for others in with_bar(parts, "comparing rows"):
                some, place = (self._apart(rows, others) < bound[:, None]).nonzero().T
                row, other = torch.cat([row, some]), torch.cat([other, others[place]])
            exact = torch.cat(
                [
                    ((self.x[rows[r]] - self.x[o]) / self.scale).norm(dim=1)
                    for r, o in zip(row.split(PAIRS), other.split(PAIRS), strict=True)
                ]
            )
            near = exact < nearer[row]
            row, other, exact = row[near], other[near], exact[near]
            kept = place_in_class(row, exact.argsort(stable=True)) < MOST
            found.append((rows[row[kept]].cpu(), other[kept].cpu()))
        first, second = (torch.cat(parts) for parts in zip(*found, strict=True))
        # A pair that was found from one row also counts for the other.
        known = torch.zeros(total, dtype=torch.bool)
        known[asked.cpu()] = True
        back = known[second]
        pairs = torch.cat([first * total + second, (second * total + first)[back]]).unique()
        return Copies(pairs // total, pairs % total, total)

    def _usual(self, places: Tensor, k: int | None = None) -> Tensor:
        """Return the distances `(n,)` of the rows at `places (n,)` to their k-th neighbours."""
        k = k or self.neighbours
        found = [
            self._apart(rows, self.reference).kthvalue(k, 1).values.sqrt()
            for rows in places.split(max(1, BLOCK // len(self.reference)))
        ]
        return torch.cat(found)

    def _apart(self, rows: Tensor, others: Tensor) -> Tensor:
        """Return the squared projected distances `(n, m)` between rows at the indices `(n,)` and
        `(m,)`; ∞ between a row and itself."""
        one, other = self.short[rows], self.short[others]
        apart = torch.addmm(self.squares[others][None], one, other.T, alpha=-2)
        apart.add_(self.squares[rows, None]).clamp_min_(0)
        return apart.masked_fill_(rows[:, None] == others, torch.inf)


def projected_bytes(samples: int, dim: int) -> int:
    """Bytes that looking for near-copies among so many rows takes beside them."""
    return 4 * samples * min(dim, PROJECTED)


def _projected(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Project (x − mean) / scale `(N, d)` to random directions, `(N, min(d, 64))`. Distances stay
    the same on average."""
    short = rows_like(x[:, :PROJECTED], len(x), beside=x.nbytes)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(x.shape[1], PROJECTED, generator=generator).to(x.device)
    directions /= PROJECTED**0.5 * scale
    for block in blocks(len(x), "preparing rows to compare"):
        if x.shape[1] <= PROJECTED:
            short[block] = (x[block] - mean) / scale
        else:
            short[block] = x[block] @ directions - mean @ directions
    return short
