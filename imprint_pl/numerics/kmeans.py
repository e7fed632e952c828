"""One function for k-means of all classes, by faiss or by a batched torch engine.

faiss's defaults start from random samples and use at most 256 points per centroid, which costs
accuracy; other settings are used here. `kmeans_torch.py` holds the torch engine.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics import kmeans_torch
from imprint_pl.numerics.moments import sum_dtype
from imprint_pl.numerics.passes import bar
from imprint_pl.numerics.values import is_count

ENGINES = ("auto", "faiss", "torch", "exact")
FAISS_ITERATIONS = 100
# Scratch memory of faiss on a GPU.
GPU_BYTES = 256 << 20


def kmeans_classes(
    xs: list[Tensor],
    k: int,
    *,
    seed: int = 0,
    engine: str = "auto",
    device: torch.device | str | None = None,
    progress: bool = False,
) -> list[Tensor]:
    """Compute the centroids of each class under squared Euclidean distance.

    The centroids of a class depend on its own samples and their order, `k`, the seed and the
    engine, but not on the other classes. With torch on a CPU they are the same bit by bit for a
    given number of threads.

    Args:
        xs: one tensor `(n, d)` a class, finite; clustered as float32. n may differ.
        k: clusters a class. A class with `n ≤ k` keeps its samples; `k = 1` gives the exact mean.
        seed: the same for every class; fixes the result on one machine. The global generators are
            left alone.
        engine: "torch" clusters all classes together in 32 dimensions and refines the result in all
            dimensions. It is by far the fastest on a CPU, and its objective is the same or lower.
            "exact" does the same, but refines until Lloyd's iterations change nothing. "faiss"
            clusters one class after the other, from k-means++ starts and with all points. "auto"
            is faiss on a GPU that faiss can use, otherwise torch.
        device: where to cluster; the classes' own device by default.
        progress: a bar on stderr if it takes longer than two seconds.

    Returns:
        One tensor `(min(n, k), d)` a class, float32, on the class's device.

    Raises:
        ImprintError: `k < 1`, an unknown engine, or "faiss" without faiss being installed.

    >>> left, right = torch.tensor([[0.0], [1.0], [9.0]]), torch.tensor([[5.0]])
    >>> [c.sort(0).values.flatten().tolist() for c in kmeans_classes([left, right], 2)]
    [[0.5, 9.0], [5.0]]
    """
    check_settings(k, engine)
    results = [x.detach().to(torch.float32, copy=True) if len(x) <= k else x[:0] for x in xs]
    todo = [i for i, x in enumerate(xs) if len(x) > k]
    if not todo:
        return results
    device = torch.device(device or xs[todo[0]].device)
    if k == 1:
        found = [_mean(xs[i]) for i in todo]
    elif _resolved(engine, device) == "faiss":
        dims = {xs[i].shape[1] for i in todo}
        indices = {dim: _index(_import_faiss(), dim, device) for dim in dims}
        found = [
            _faiss(xs[i], k, seed, indices[xs[i].shape[1]])
            for i in bar(todo, "k-means", "class", progress)
        ]
    else:
        classes = [xs[i].detach().to(device, torch.float32) for i in todo]
        exact = engine == "exact"
        found = kmeans_torch.cluster(classes, k, seed=seed, exact=exact, progress=progress)
    for i, centroids in zip(todo, found, strict=True):
        results[i] = centroids.to(xs[i].device)
    return results


def kmeans(
    x: Tensor,
    k: int,
    *,
    seed: int = 0,
    engine: str = "auto",
    device: torch.device | str | None = None,
) -> Tensor:
    """Compute the centroids of one class: `(n, d)` → `(min(n, k), d)`; see `kmeans_classes`.

    >>> kmeans(torch.tensor([[1.0, 0.0], [3.0, 2.0]]), 1)
    tensor([[2., 1.]])
    """
    return kmeans_classes([x], k, seed=seed, engine=engine, device=device)[0]


def check_settings(k: int, engine: str) -> None:
    """Raises an `ImprintError` for `k < 1` or an engine that does not exist."""
    if not is_count(k):
        raise ImprintError(f"k={k!r}: a class needs at least one proxy; give a whole number k ≥ 1")
    if engine not in ENGINES:
        raise ImprintError(f"unknown engine={engine!r} (known: {', '.join(ENGINES)})")


def _mean(x: Tensor) -> Tensor:
    return x.detach().mean(0, keepdim=True, dtype=sum_dtype(x.device)).float()


def _resolved(engine: str, device: torch.device) -> str:
    if engine != "auto":
        return engine
    if device.type != "cuda" or importlib.util.find_spec("faiss") is None:
        return "torch"
    return "faiss" if _sees_gpu(_import_faiss()) else "torch"


def _faiss(x: Tensor, k: int, seed: int, index: Any) -> Tensor:
    faiss = _import_faiss()
    parameters = faiss.ClusteringParameters()
    parameters.niter = FAISS_ITERATIONS
    parameters.seed = seed % 2**31
    parameters.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    parameters.max_points_per_centroid = len(x)
    # With fewer points per centroid faiss would print a warning, but with few shots this is normal.
    parameters.min_points_per_centroid = 1
    points = np.ascontiguousarray(x.detach().float().cpu().numpy())
    clustering = faiss.Clustering(points.shape[1], k, parameters)
    index.reset()  # remove the centroids of the previous class
    clustering.train(points, index)
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(k, -1))


def _import_faiss() -> Any:
    try:
        import faiss  # imported here: it takes a second, and most recipes do not need it
    except ImportError as error:
        raise ImprintError(
            "engine='faiss', but faiss does not import here: install faiss-cpu or faiss-gpu, or "
            "choose engine='torch'"
        ) from error
    return faiss


def _sees_gpu(faiss: Any) -> bool:
    return hasattr(faiss, "GpuIndexFlatL2") and faiss.get_num_gpus() > 0


def _index(faiss: Any, dim: int, device: torch.device) -> Any:
    if device.type != "cuda" or not _sees_gpu(faiss):
        return faiss.IndexFlatL2(dim)
    config = faiss.GpuIndexFlatConfig()
    # Use only this rank's GPU; faiss.Kmeans(gpu=True) would use all visible ones.
    config.device = torch.cuda.current_device() if device.index is None else device.index
    resources = faiss.StandardGpuResources()
    # By default faiss takes 1.5 GB, which PyTorch may need.
    resources.setTempMemory(GPU_BYTES)
    return faiss.GpuIndexFlatL2(resources, dim, config)
