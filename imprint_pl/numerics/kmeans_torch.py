"""The torch engine of `kmeans.py`: all classes at once, each as if it were alone.

A class is projected on its own main directions, clustered there beside the others (greedy
k-means++, Lloyd), and the clusters are polished by Lloyd iterations on the embeddings themselves.
In few dimensions Lloyd is cheap and gets stuck less: on real embeddings the objective ends where
Lloyd in all dimensions from k-means++ starts ends, or below (`benchmarks/kmeans.py`).

What a class's centroids are made of is a function of its own samples, `k` and the seed: the padded
size, every matrix product and every random draw are those that the class would see alone.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from imprint_pl.numerics.moments import sum_dtype
from imprint_pl.numerics.passes import bar

# Directions of the projection. Measured on Fashion-MNIST embeddings: more are no better; nor is one
# basis pooled over classes, which would tie a class to the others; random ones are worse.
DIMS = 32
BASIS_ROWS = 384
# A first Lloyd on a sample is cheap and does most of the way.
SAMPLE_ROWS = 1536
SAMPLE_ITERATIONS = 20
ALL_ITERATIONS = 15
POLISH_ITERATIONS = 1
EXACT_ITERATIONS = 300
# Iterations between two looks at convergence and empty clusters: each makes a GPU wait.
CHECK_EVERY = 5
# A product of fewer multiplications runs on one thread: to wake a second takes about as long, and
# a hundred times as long where other work has the cores.
THREADED_PRODUCT = 3 << 20
# Bounds the memory of a batch of projected classes, and of a block of distances.
BATCH_BYTES = 256 << 20
SUM_ROWS = 1024  # summed before they are added: float32 loses digits over many rows


_ALONE = threading.Lock()


@torch.no_grad()
def cluster(
    xs: list[Tensor], k: int, *, seed: int, exact: bool = False, progress: bool = False
) -> list[Tensor]:
    """Centroids of each class.

    Args:
        xs: one tensor `(n, d)` a class, float32, all on one device, each with `n > k`.
        k: clusters a class, at least 2.
        seed: the same for every class. The global generator is left alone.
        exact: polish until nothing moves (at most 300 iterations) instead of once.
        progress: a bar on stderr if it takes longer than two seconds.

    Returns:
        One tensor `(k, d)` a class.

    Source: Arthur & Vassilvitskii 2007 (k-means++; greedy variant with 2 + log k candidates),
    Halko et al. 2011 (randomised range finder).
    """
    iterations = EXACT_ITERATIONS if exact else POLISH_ITERATIONS
    centroids = list(xs)
    shown = bar(xs, "k-means", "class", progress)
    with shown, _full_precision(xs[0].device):
        for members in _batches(xs, k):
            batch = [_aligned(xs[i]) for i in members]
            rows, dim = _padded_rows(len(batch[0])), batch[0].shape[1]
            with _threads(rows * dim * DIMS):
                z, counts = _projected(batch, seed)
            with _threads(rows * z.shape[2] * k):
                labels = _cluster_projected(z, counts, k, seed)
            with _threads(rows * dim * k):
                for i, x, of_class in zip(members, batch, labels, strict=True):
                    centroids[i] = _polish(x[None], of_class[None, : len(x)], k, iterations)[0]
                    shown.update()
    return centroids


def _batches(xs: list[Tensor], k: int) -> Iterator[list[int]]:
    """Indices of classes of one padded shape, so many that the batch fits `BATCH_BYTES`."""
    shapes = defaultdict(list)
    for i, x in enumerate(xs):
        shapes[_padded_rows(len(x)), x.shape[1]].append(i)
    for (rows, _), members in shapes.items():
        size = max(1, BATCH_BYTES // (4 * rows * (2 * DIMS + 2 * k)))
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _padded_rows(n: int) -> int:
    """The next of eight sizes an octave: ragged classes share a batch at 12 % of waste at most."""
    step = max(16, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step


def _aligned(x: Tensor) -> Tensor:
    # A BLAS may round differently on unaligned memory: a slice must give what its copy gives.
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 64 else x


def _generator(seed: int) -> torch.Generator:
    # On the CPU on purpose: the draws are the same on every device.
    return torch.Generator().manual_seed(seed)


def _projected(xs: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Centred, projected classes `(B, rows, p)`, zero where padded, and their sizes `(B,)`."""
    few = xs[0].shape[1] <= 2 * DIMS or _padded_rows(len(xs[0])) <= 2 * DIMS
    # A multiple of 16 floats keeps every class of the batch aligned.
    width = -(-xs[0].shape[1] // 16) * 16 if few else DIMS
    z = xs[0].new_zeros(len(xs), _padded_rows(len(xs[0])), width)
    for x, out in zip(xs, z, strict=True):
        if few:
            torch.sub(x, x.mean(0), out=out[: len(x), : x.shape[1]])
        else:
            mean, basis = _basis(x, seed)
            torch.addmm(-(mean @ basis), x, basis, out=out[: len(x)])
    return z, torch.tensor([len(x) for x in xs], device=z.device)


def _basis(x: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Mean `(1, d)` and main directions `(d, DIMS)` of some rows of a class, orthonormal."""
    generator = _generator(seed)
    rows = torch.randperm(len(x), generator=generator)[:BASIS_ROWS]
    sample = x[rows.to(x.device)]
    mean = sample.mean(0, keepdim=True)
    sample = sample - mean
    start = torch.randn(len(sample), DIMS, generator=generator).to(x)
    # One power iteration: without it the objective is 0.2 to 1 % higher, a second adds nothing.
    return mean, torch.linalg.qr(sample.T @ (sample @ (sample.T @ start))).Q


def _cluster_projected(z: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    """Cluster of each row, `(B, rows)`; of padded rows, anything."""
    real = (torch.arange(z.shape[1], device=z.device) < counts[:, None]).to(z.dtype)
    if z.shape[1] > SAMPLE_ROWS:
        sizes = counts.tolist()
        rows = [torch.randperm(n, generator=_generator(seed))[:SAMPLE_ROWS] for n in sizes]
        some = z[torch.arange(len(z), device=z.device)[:, None], torch.stack(rows).to(z.device)]
        all_real = torch.ones_like(some[..., 0])
        centroids = _plus_plus(some, all_real, counts.clamp(max=SAMPLE_ROWS), k, seed)
        centroids = _lloyd(some, all_real, centroids, SAMPLE_ITERATIONS)
        return _nearest(z, _lloyd(z, real, centroids, ALL_ITERATIONS))
    centroids = _plus_plus(z, real, counts, k, seed)
    # Clusters of a few samples settle soon: with ten each the objective is the same after ten.
    iterations = min(SAMPLE_ITERATIONS, max(10, z.shape[1] // k))
    return _nearest(z, _lloyd(z, real, centroids, iterations))


def _plus_plus(z: Tensor, real: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    """Greedy k-means++: of some candidates drawn by squared distance, the one that helps most."""
    wide = sum_dtype(z.device)
    draws = torch.rand(k, 2 + int(math.log(k)), dtype=torch.float64, generator=_generator(seed))
    draws = draws.to(z.device, wide)
    batch = torch.arange(len(z), device=z.device)
    norms = z.square().sum(2)[:, None]

    def distances(rows: Tensor) -> Tensor:
        candidates = z[batch[:, None], rows]
        half = candidates.square().sum(2, keepdim=True) / 2
        return torch.add(norms, _minus_product(half, candidates, z), alpha=2).clamp_(min=0)

    chosen = [(draws[0, 0] * counts).long()]
    nearest = distances(chosen[0][:, None])[:, 0] * real
    with _threads(z[0].numel() * draws.shape[1]):
        for draw in draws[1:]:
            cumulative = nearest.cumsum(1, dtype=wide)
            rows = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
            # All distances are 0 where there are fewer distinct samples than clusters.
            rows = torch.minimum(rows, counts[:, None] - 1)
            candidates = torch.minimum(distances(rows), nearest[:, None])
            best = candidates.sum(2).argmin(1)
            chosen.append(rows[batch, best])
            nearest = candidates[batch, best]
    return z[batch[:, None], torch.stack(chosen, 1)]


def _lloyd(z: Tensor, real: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Lloyd iterations from `centroids (B, k, p)`; a class that has converged stays as it is."""
    k = centroids.shape[1]
    for iteration in range(1, iterations + 1):
        labels = _nearest(z, centroids)
        sums, sizes = _sums(z, real, labels, k)
        new = torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)
        if iteration % CHECK_EVERY == 0:
            if bool((sizes == 0).any()):
                new = _filled(z, real, labels, new, sizes)
            elif torch.equal(new, centroids):
                break
        centroids = new
    return centroids


def _polish(x: Tensor, labels: Tensor, k: int, iterations: int) -> Tensor:
    """Lloyd iterations on one class `(1, n, d)` from its labels `(1, n)`; ends with means."""
    real = torch.ones_like(x[..., 0])
    for _ in range(iterations):
        new = _nearest(x, _means(x, real, labels, k))
        if torch.equal(new, labels):
            break
        labels = new
    return _means(x, real, labels, k)


def _means(x: Tensor, real: Tensor, labels: Tensor, k: int) -> Tensor:
    sums, sizes = _sums(x, real, labels, k)
    means = sums / sizes.clamp(min=1)
    return _filled(x, real, labels, means, sizes) if bool((sizes == 0).any()) else means


def _filled(z: Tensor, real: Tensor, labels: Tensor, centroids: Tensor, sizes: Tensor) -> Tensor:
    """Moves the centroids of empty clusters to the samples farthest from their own centroids."""
    batch = torch.arange(len(z), device=z.device)[:, None]
    distances = torch.empty_like(real)
    for rows in _blocks(z.shape[1], z.shape[2]):
        distances[:, rows] = (z[:, rows] - centroids[batch, labels[:, rows]]).square().sum(2)
    farthest = (distances * real).topk(centroids.shape[1], dim=1).indices
    empty = sizes == 0
    farthest = farthest.gather(1, empty[..., 0].cumsum(1).sub_(1).clamp_(min=0))
    return torch.where(empty, z[batch, farthest], centroids)


def _nearest(z: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest of `(B, k, p)` for each of `(B, n, p)`; a tie goes to the lowest."""
    # Centroids about their own mean: embeddings far from the origin keep their digits.
    shift = centroids.mean(1, keepdim=True)
    centred = centroids - shift
    half = (centred * (shift + centred / 2)).sum(2, keepdim=True)
    blocks = (z[:, rows] for rows in _blocks(z.shape[1], centroids.shape[1]))
    return torch.cat([_minus_product(half, centred, z).min(1).indices for z in blocks], 1)


def _minus_product(bias: Tensor, centroids: Tensor, z: Tensor) -> Tensor:
    """`bias (B, k, 1)` − centroids `(B, k, p)` · z `(B, n, p)` → `(B, k, n)`."""
    out = z.new_empty(len(z), centroids.shape[1], z.shape[1])
    # Not one batched product: its rounding depends on how many classes share the batch, and a last
    # digit is enough to move a sample, then a cluster.
    for one in zip(bias.unbind(), centroids.unbind(), z.mT.unbind(), out.unbind(), strict=True):
        torch.addmm(*one[:3], alpha=-1, out=one[3])
    return out


def _sums(z: Tensor, real: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum `(B, k, p)` and size `(B, k, 1)` of each cluster."""
    sums = z.new_zeros(len(z), k, z.shape[2])
    sizes = z.new_zeros(len(z), k, 1)
    step = SUM_ROWS if z.device.type == "cpu" else max(1, BATCH_BYTES // (4 * k * len(z)))
    add = _add_on_cpu if z.device.type == "cpu" else _add_by_product
    for rows in (slice(start, start + step) for start in range(0, z.shape[1], step)):
        add(sums, sizes, z[:, rows], real[:, rows], labels[:, rows])
    return sums, sizes


def _add_on_cpu(sums: Tensor, sizes: Tensor, z: Tensor, real: Tensor, labels: Tensor) -> None:
    batch, k, dim = sums.shape
    cluster = (labels + torch.arange(0, batch * k, k)[:, None]).flatten()
    part = torch.zeros(batch * k, dim).index_add_(0, cluster, z.reshape(-1, dim))
    sums += part.view(batch, k, dim)
    sizes += torch.zeros(batch * k).index_add_(0, cluster, real.reshape(-1)).view(batch, k, 1)


def _add_by_product(sums: Tensor, sizes: Tensor, z: Tensor, real: Tensor, labels: Tensor) -> None:
    # On a GPU `index_add_` adds in no fixed order; a product with the memberships does.
    members = z.new_zeros(*labels.shape, sums.shape[1])
    members.scatter_(2, labels[..., None], real[..., None])
    for i in range(len(z)):
        sums[i].addmm_(members[i].T, z[i])
    sizes += members.sum(1)[..., None]


def _blocks(rows: int, columns: int) -> list[slice]:
    """Blocks of rows with at most `BATCH_BYTES` of float32 in so many columns."""
    step = max(1, BATCH_BYTES // (4 * columns))
    return [slice(start, start + step) for start in range(0, rows, step)]


@contextmanager
def _threads(multiplications: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1 if multiplications < THREADED_PRODUCT else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products in float32, whatever autocast or matmul precision the caller trains with.

    It is the whole process's: one thread at a time, or one would put back what another had set.
    """
    mkldnn: Any = torch.backends.mkldnn  # torch's types do not know its matmul
    backends = (torch.backends.cuda.matmul, mkldnn.matmul)
    with _ALONE, torch.autocast(device.type, enabled=False):
        before = [backend.fp32_precision for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
