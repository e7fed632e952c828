"""k-means of classes behind one function: faiss, or a batched torch engine that takes all classes.

faiss's own defaults start at random samples and look at 256 points a centroid at most, which costs
accuracy; its traps are closed here. `kmeans_torch.py` holds the other engine.
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
    """Centroids of each class under squared Euclidean distance.

    A class's centroids depend on its own samples and their order, on `k`, the seed and the engine:
    not on the other classes. Bit by bit so with torch on a CPU, for a given number of threads.

    Args:
        xs: one tensor `(n, d)` a class, finite; clustered as float32. n may differ.
        k: clusters a class. A class with `n ≤ k` keeps its samples; `k = 1` gives the exact mean.
        seed: the same for every class; fixes the result on one machine. The global generators are
            left alone.
        engine: "torch": all classes together, clustered in 32 dimensions and polished in all: by
            far the fastest on a CPU, at the same objective or a lower one. "exact": the same,
            polished until Lloyd's iterations in all dimensions move nothing. "faiss": one class
            after the other, k-means++ starts, all points. "auto": faiss on a GPU that faiss can
            use, otherwise torch.
        device: where to cluster; the classes' own device by default.
        progress: a bar on stderr if it takes longer than two seconds.

    Returns:
        One tensor `(min(n, k), d)` a class, float32, on the class's device.

    Raises:
        ImprintError: `k < 1`, an unknown engine, faiss asked for and not installed.

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
    """Centroids of one class: `(n, d)` → `(min(n, k), d)`; see `kmeans_classes`.

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
    # Below this faiss prints a warning on stderr; few points a proxy is what few shots are.
    parameters.min_points_per_centroid = 1
    points = np.ascontiguousarray(x.detach().float().cpu().numpy())
    clustering = faiss.Clustering(points.shape[1], k, parameters)
    index.reset()  # of the class before
    clustering.train(points, index)
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(k, -1))


def _import_faiss() -> Any:
    try:
        import faiss  # here, not above: a second to import, and not needed by every recipe
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
    # Each rank its own GPU; faiss.Kmeans(gpu=True) would take every visible one.
    config.device = torch.cuda.current_device() if device.index is None else device.index
    resources = faiss.StandardGpuResources()
    # Its own 1.5 GB would be missing where PyTorch has the rest.
    resources.setTempMemory(GPU_BYTES)
    return faiss.GpuIndexFlatL2(resources, dim, config)
