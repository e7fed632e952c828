"""Finds embeddings that are near to each other or far from all others, by cosines in chunks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

# Rows and columns of a chunk of cosines: 2**22 of them take 16 MB.
ROWS, COLUMNS = 512, 8192
# Most pairs to keep, those with the largest cosines.
MOST_PAIRS = 20_000
# How far an image is from all others is measured by its fifth neighbour, so that a few copies of an
# odd image do not make it usual.
NEIGHBOURS = 5


class Neighbours(NamedTuple):
    """Near pairs of samples, and how far each sample is from the others.

    Attributes:
        pairs: `(P, 2)` int64, samples whose cosine is at least the requested one, the smaller index
            first; the largest cosines come first.
        cosines: `(P,)`, the cosines of these pairs.
        total: how many such pairs there are, of which P are kept.
        fifth: `(N,)`, the cosine with the fifth nearest other sample (or with the farthest one, if
            there are fewer).
    """

    pairs: Tensor
    cosines: Tensor
    total: int
    fifth: Tensor


@torch.no_grad()
def neighbours(x: Tensor, least: float, progress: bool = False) -> Neighbours:
    """Compares all embeddings with each other, after subtracting their mean.

    Without the mean, which all images share, photographs of different things are farther apart,
    while copies stay near.

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
    """Returns the samples `(n,)` that are far from all others, the farthest first.

    A sample is far if the distance 1 − cosine to its fifth neighbour is above the upper quartile by
    more than three times the interquartile range (Tukey's outer fence).

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
