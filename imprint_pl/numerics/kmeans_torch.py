"""The torch engine of `kmeans.py`: it clusters all classes at once, each independently of the
others.

Each class is projected to its own principal directions and clustered there in a batch with others
(greedy k-means++, then Lloyd). The clusters are then refined by Lloyd iterations on the embeddings
themselves. In few dimensions Lloyd is cheap and finds worse local optima less often: on real
embeddings the objective is the same as with k-means++ and Lloyd in all dimensions, or lower
(`benchmarks/kmeans.py`).

The centroids of a class depend only on its own samples, `k` and the seed: its padded size, matrix
products and random draws are the same as if the class were alone.
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

from imprint_pl.numerics.draws import sample as draw_rows
from imprint_pl.numerics.moments import sum_dtype
from imprint_pl.numerics.passes import bar

# Directions of the projection. Measured on Fashion-MNIST embeddings: more directions are no better.
# One basis for all classes is no better either, and would make classes depend on each other. Random
# directions are worse.
DIMS = 32
BASIS_ROWS = 384
# The first Lloyd iterations use a sample of this size: they are cheap and bring most of the gain.
SAMPLE_ROWS = 1536
SAMPLE_ITERATIONS = 20
ALL_ITERATIONS = 15
POLISH_ITERATIONS = 1
EXACT_ITERATIONS = 300
# Iterations between two checks of convergence and empty clusters; each check makes a GPU wait.
CHECK_EVERY = 5
# A matrix product with fewer multiplications runs on one thread. Waking a second thread takes about
# as long as the product, and a hundred times as long if the cores are busy.
THREADED_PRODUCT = 3 << 20
# Bounds the memory of a batch of projected classes, and of a block of distances.
BATCH_BYTES = 256 << 20
SUM_ROWS = 1024  # rows summed at a time, since long float32 sums lose precision


_ALONE = threading.Lock()


@torch.no_grad()
def cluster(
    xs: list[Tensor], k: int, *, seed: int, exact: bool = False, progress: bool = False
) -> list[Tensor]:
    """Compute the centroids of each class.

    Args:
        xs: one tensor `(n, d)` a class, float32, all on one device, each with `n > k`.
        k: clusters a class, at least 2.
        seed: the same for every class. The global generator is left alone.
        exact: refine until nothing changes (at most 300 iterations) instead of once.
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
    """Yield batches of classes, as indices: classes of one padded shape that fit `BATCH_BYTES`."""
    shapes = defaultdict(list)
    for i, x in enumerate(xs):
        shapes[_padded_rows(len(x)), x.shape[1]].append(i)
    for (rows, _), members in shapes.items():
        size = max(1, BATCH_BYTES // (4 * rows * (2 * DIMS + 2 * k)))
        yield from (members[start : start + size] for start in range(0, len(members), size))


def _padded_rows(n: int) -> int:
    """Round up to one of eight sizes per power of two. Classes of different sizes can then share a
    batch, and padding wastes at most 12 %."""
    step = max(16, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step


def _aligned(x: Tensor) -> Tensor:
    # BLAS may round differently on unaligned memory, and a slice must give the result of its copy.
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 64 else x


def _generator(seed: int) -> torch.Generator:
    # Draw on the CPU, so that the draws are the same for every device.
    return torch.Generator().manual_seed(seed)


def _projected(xs: list[Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Return the centred and projected classes `(B, rows, p)`, padded with zeros, and their sizes
    `(B,)`."""
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
    """Return the mean `(1, d)` of some rows of a class and their orthonormal principal directions
    `(d, DIMS)`."""
    generator = _generator(seed)
    rows = torch.randperm(len(x), generator=generator)[:BASIS_ROWS]
    sample = x[rows.to(x.device)]
    mean = sample.mean(0, keepdim=True)
    sample = sample - mean
    start = torch.randn(len(sample), DIMS, generator=generator).to(x)
    # Without a power iteration the objective is 0.2 to 1 % higher; a second one does not help.
    return mean, torch.linalg.qr(sample.T @ (sample @ (sample.T @ start))).Q


def _cluster_projected(z: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    """Return the cluster of each row, `(B, rows)`; the values of padded rows are arbitrary."""
    real = (torch.arange(z.shape[1], device=z.device) < counts[:, None]).to(z.dtype)
    if z.shape[1] > SAMPLE_ROWS:
        sizes = counts.tolist()
        rows = [draw_rows(n, SAMPLE_ROWS, seed) for n in sizes]
        some = z[torch.arange(len(z), device=z.device)[:, None], torch.stack(rows).to(z.device)]
        all_real = torch.ones_like(some[..., 0])
        centroids = _plus_plus(some, all_real, counts.clamp(max=SAMPLE_ROWS), k, seed)
        centroids = _lloyd(some, all_real, centroids, SAMPLE_ITERATIONS)
        return _nearest(z, _lloyd(z, real, centroids, ALL_ITERATIONS))
    centroids = _plus_plus(z, real, counts, k, seed)
    # Small clusters converge soon: with ten samples each, more than ten iterations change nothing.
    iterations = min(SAMPLE_ITERATIONS, max(10, z.shape[1] // k))
    return _nearest(z, _lloyd(z, real, centroids, iterations))


def _plus_plus(z: Tensor, real: Tensor, counts: Tensor, k: int, seed: int) -> Tensor:
    """Choose starts by greedy k-means++: among some candidates drawn by squared distance, take the
    one that lowers the objective most."""
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
            # All distances are 0 if there are fewer distinct samples than clusters.
            rows = torch.minimum(rows, counts[:, None] - 1)
            candidates = torch.minimum(distances(rows), nearest[:, None])
            best = candidates.sum(2).argmin(1)
            chosen.append(rows[batch, best])
            nearest = candidates[batch, best]
    return z[batch[:, None], torch.stack(chosen, 1)]


def _lloyd(z: Tensor, real: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Run Lloyd iterations from `centroids (B, k, p)`; a converged class no longer changes."""
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
    """Run Lloyd iterations on one class `(1, n, d)` from its labels `(1, n)`; return the means."""
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
    """Return the index of the nearest of `(B, k, p)` for each of `(B, n, p)`; a tie goes to the
    lowest."""
    # Subtract the centroids' mean, so that embeddings far from the origin lose no precision.
    shift = centroids.mean(1, keepdim=True)
    centred = centroids - shift
    half = (centred * (shift + centred / 2)).sum(2, keepdim=True)
    blocks = (z[:, rows] for rows in _blocks(z.shape[1], centroids.shape[1]))
    return torch.cat([_minus_product(half, centred, z).min(1).indices for z in blocks], 1)


def _minus_product(bias: Tensor, centroids: Tensor, z: Tensor) -> Tensor:
    """Compute `bias (B, k, 1)` − centroids `(B, k, p)` · z `(B, n, p)`, `(B, k, n)`."""
    out = z.new_empty(len(z), centroids.shape[1], z.shape[1])
    # Do not use one batched product: its rounding depends on the number of classes in the batch,
    # and a difference in the last digit can move a sample, and then a cluster.
    for one in zip(bias.unbind(), centroids.unbind(), z.mT.unbind(), out.unbind(), strict=True):
        torch.addmm(*one[:3], alpha=-1, out=one[3])
    return out


def _sums(z: Tensor, real: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the sum `(B, k, p)` and the size `(B, k, 1)` of each cluster."""
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
    # On a GPU the order in which `index_add_` adds is not fixed; that of a matrix product is.
    members = z.new_zeros(*labels.shape, sums.shape[1])
    members.scatter_(2, labels[..., None], real[..., None])
    for i in range(len(z)):
        sums[i].addmm_(members[i].T, z[i])
    sizes += members.sum(1)[..., None]


def _blocks(rows: int, columns: int) -> list[slice]:
    """Return blocks of rows such that float32 blocks with `columns` columns fit `BATCH_BYTES`."""
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
    """Compute float32 products in full precision, whatever autocast or matmul precision is set.

    The setting holds for the whole process. The lock keeps two threads from restoring each other's
    setting.
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
