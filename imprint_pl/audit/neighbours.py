"""Which embeddings are near to each other, and which are far from all: cosines in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

# Cosines in memory at a time: 2**22 of them take 16 MB.
ROWS, COLUMNS = 512, 8192
# Pairs that are kept, those with the largest cosines.
MOST_PAIRS = 20_000
# An image is as far from everything as from its fifth neighbour: a few copies of an odd image
# do not make it usual.
NEIGHBOURS = 5


class Neighbours(NamedTuple):
    """What the cosines of all pairs say.

    Attributes:
        pairs: `(P, 2)` int64, samples whose cosine is at least what was asked for, the smaller
            index first; the largest cosines first.
        cosines: `(P,)`, theirs.
        total: how many pairs there are; P of them are kept.
        fifth: `(N,)`, the cosine with the fifth nearest other sample (or the last there is).
    """

    pairs: Tensor
    cosines: Tensor
    total: int
    fifth: Tensor


@torch.no_grad()
def neighbours(x: Tensor, least: float, progress: bool = False) -> Neighbours:
    """Compares all embeddings with each other, after their mean was taken off.

    What all images share says nothing of a pair: without it two photographs of different things
    are farther apart, and copies stay near.

    Args:
        x: `(N, d)`, embeddings.
        least: smallest cosine of a pair that is returned.
        progress: show a bar on stderr.

    >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [-2.0, -1.0]])
    >>> neighbours(x, 0.99).pairs
    tensor([[0, 2]])
    """
    z = nn.functional.normalize(x.float() - x.float().mean(0))
    k = min(NEIGHBOURS, max(len(z) - 1, 1))
    pairs, cosines, total = torch.empty(0, 2, dtype=torch.int64), torch.empty(0), 0
    fifth = torch.full((len(z),), torch.nan)
    blocks = range(0, len(z), ROWS)
    for start in tqdm(
        blocks, "comparing images", delay=2, leave=False, disable=None if progress else True
    ):
        rows = z[start : start + ROWS]
        best = torch.full((len(rows), k), -1.0, device=z.device)
        for left in range(0, len(z), COLUMNS):
            cosine = rows @ z[left : left + COLUMNS].T
            own = torch.arange(start, start + len(rows), device=z.device) - left
            inside = (own >= 0) & (own < cosine.shape[1])
            cosine[inside.nonzero().flatten(), own[inside]] = -1.0
            best = torch.cat([best, cosine], 1).topk(k, dim=1).values
            near = (cosine >= least).nonzero()
            near = near[near[:, 0] + start < near[:, 1] + left]
            total += len(near)
            values = cosine[near[:, 0], near[:, 1]].cpu()
            near = near.cpu() + torch.tensor([start, left])
            pairs, cosines = torch.cat([pairs, near]), torch.cat([cosines, values])
            if len(pairs) > 2 * MOST_PAIRS:
                pairs, cosines = _largest(pairs, cosines)
        fifth[start : start + len(rows)] = best[:, -1].cpu()
    return Neighbours(*_largest(pairs, cosines), total, fifth)


def _largest(pairs: Tensor, cosines: Tensor) -> tuple[Tensor, Tensor]:
    order = cosines.argsort(descending=True, stable=True)[:MOST_PAIRS]
    return pairs[order], cosines[order]


def far_from_everything(fifth: Tensor) -> Tensor:
    """Samples `(n,)` that are far from everything, the farthest first.

    A sample is far where the distance 1 − cosine to its fifth neighbour lies above the upper
    quartile by more than three times the distance between the quartiles (Tukey's outer fence).

    Args:
        fifth: `(N,)`, as `neighbours` returns it.
    """
    distances = 1 - fifth
    if len(distances) < 8 or distances.isnan().any():
        return torch.empty(0, dtype=torch.int64)
    # torch.quantile refuses more than 16 million values.
    low, high = distances.sort().values[[len(distances) // 4, 3 * len(distances) // 4]]
    far = (distances > high + 3 * (high - low)).nonzero().flatten()
    return far[distances[far].argsort(descending=True, stable=True)]
