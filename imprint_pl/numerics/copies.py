"""Near-copies among the rows of a data set: the same photograph twice, cropped or saved anew.

A sample whose near-copy is among the others says nothing of how well others are foretold. Whoever
leaves a sample out leaves its near-copies out, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imprint_pl.numerics.draws import place_in_class
from imprint_pl.numerics.large import floats, rows_like
from imprint_pl.numerics.passes import CHUNK, blocks, largest, with_bar

# A near-copy is nearer than this share of the usual distance. Mirrored photographs are at 0.24 to
# 0.39 of it (EfficientNet-Lite0; nine of ten), burst shots at 0.2 to 0.4. Of other photographs,
# digits and garments one in a hundred has a neighbour nearer than 0.6, of 8 × 8 pixels than 0.48.
SHARE = 0.45
# The usual distance of a row is at most that to its tenth neighbour: where each image occurs
# twice, or nine times, the others of its kind are nearer than that.
NEIGHBOURS = 10
# Rows among which usual distances are measured: as many as a bounded sample of all rows has.
REFERENCE = 2000
# Most near-copies of a row; the nearest ones count.
MOST = 15
# Numbers of a row after a random projection: most pairs are told apart by it.
PROJECTED = 64
# The projected distance of a pair varies by a tenth; pairs up to so much more are looked at.
MARGIN = 1.5
# Distances computed at a time, and the rows that they are from where there are many others.
BLOCK, ROWS = 2**22, 512
# Rows whose usual distances the median is taken of.
MEDIAN_OF = 500
# Neighbours that a row may have by chance that are as near as copies.
CHANCE = 1e-3
# Pairs that are compared in full at a time.
PAIRS = 4096


@dataclass(frozen=True)
class Copies:
    """Pairs of near-copies among rows.

    Attributes:
        first, second: `(k,)` int64, places of the two rows of each pair, on the CPU. A pair of two
            rows that were both looked at is there in both orders.
        rows: number of all rows.
    """

    first: Tensor
    second: Tensor
    rows: int

    def of(self, places: Tensor) -> Tensor:
        """The near-copies of the rows at `places (n,)`, without these rows: `(m,)`, ascending."""
        asked = torch.zeros(self.rows, dtype=torch.bool)
        asked[places.cpu()] = True
        found = torch.zeros_like(asked)
        found[self.second[asked[self.first]]] = True
        return (found & ~asked).nonzero().flatten().to(places.device)

    def among(self, places: Tensor) -> Copies:
        """The pairs within the rows at `places (n,)`, under their new numbers 0..n−1."""
        number = torch.full((self.rows,), -1)
        number[places.cpu()] = torch.arange(len(places))
        first, second = number[self.first], number[self.second]
        kept = (first >= 0) & (second >= 0)
        return Copies(first[kept], second[kept], len(places))


class CopyFinder:
    """Finds near-copies of rows of a data set.

    A pair counts if its distance is less than `SHARE` of the usual distance, or a smaller share in
    data of low dimension, where chance brings rows so near. The usual distance is that of the row
    to its k-th nearest row, or the median of these, whichever is less. k is a third of the usual
    size of a class, at most ten: the rows of a tight class are no copies of each other. Neither are
    rows in a dense part of the data. Where values are few, so that a row has k equal ones,
    equal rows are usual, and none is a copy. In classes of fewer than six none is found.

    Not all pairs are compared in full: rows are projected to 64 random directions first.

    Args:
        x: `(N, d)`, all rows.
        y: `(N,)`, their labels, for k alone: copies may have other labels.
        reference: `(n,)`, places of rows among which usual distances are measured, the first 2,000
            at most: a random sample says as much as all. All rows by default.
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
        # In proportion, so that no square is too large or too small.
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
            # Within a distance r of a row there are k (r / usual)^D others, D the dimension of the
            # data: where it is low, some are as near as copies by chance.
            ratio = (half / usual.clamp_min(1e-30)).median().clamp(1e-3, 0.999).item()
            growth = self.neighbours / ((self.neighbours + 1) // 2)
            dimension = math.log(growth) / -math.log(ratio) if growth > 1 else math.inf
            self.share = min(SHARE, (CHANCE / self.neighbours) ** (1 / dimension))

    def find(self, places: Tensor | None = None) -> Copies:
        """The near-copies of the rows at `places (n,)`, by default of all; of each the nearest 15.

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
            # The rounding of projected distances counts, too: candidates are then checked in full.
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
        # A pair that one of the two rows finds is one for the other, too.
        known = torch.zeros(total, dtype=torch.bool)
        known[asked.cpu()] = True
        back = known[second]
        pairs = torch.cat([first * total + second, (second * total + first)[back]]).unique()
        return Copies(pairs // total, pairs % total, total)

    def _usual(self, places: Tensor, k: int | None = None) -> Tensor:
        """The distance of the rows at `places (n,)` to their k-th neighbour: `(n,)`."""
        k = k or self.neighbours
        found = [
            self._apart(rows, self.reference).kthvalue(k, 1).values.sqrt()
            for rows in places.split(max(1, BLOCK // len(self.reference)))
        ]
        return torch.cat(found)

    def _apart(self, rows: Tensor, others: Tensor) -> Tensor:
        """Squared projected distances of rows, places `(n,)` and `(m,)`: `(n, m)`; ∞ to itself."""
        one, other = self.short[rows], self.short[others]
        apart = torch.addmm(self.squares[others][None], one, other.T, alpha=-2)
        apart.add_(self.squares[rows, None]).clamp_min_(0)
        return apart.masked_fill_(rows[:, None] == others, torch.inf)


def projected_bytes(samples: int, dim: int) -> int:
    """Bytes that looking for near-copies among so many rows takes beside them."""
    return 4 * samples * min(dim, PROJECTED)


def _projected(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """(x − mean) / scale `(N, d)` in random directions, `(N, min(d, 64))`, whose distances are on
    average those of the rows."""
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
