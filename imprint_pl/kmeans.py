"""k-means of one class's embeddings: faiss behind one function, with its traps closed.

faiss's own defaults start at random samples and look at 256 points a centroid at most, which costs
accuracy. Here: k-means++ starts, all points, until the objective stops changing.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ITERATIONS = 100


def kmeans(x: Tensor, k: int, *, seed: int = 0, device: torch.device | str | None = None) -> Tensor:
    """Centroids of `x` under squared Euclidean distance (Lloyd's algorithm from k-means++ starts).

    Args:
        x: `(n, d)` float32, finite.
        k: number of clusters. With `n ≤ k` the samples themselves are the centroids; with `k = 1`
            it is the mean.
        seed: fixes the result on one machine.
        device: where to cluster; `x.device` by default. A CUDA device is used where faiss sees it.

    Returns:
        `(min(n, k), d)` float32, on the CPU or `x`'s device.
    """
    if len(x) <= k:
        return x.clone()
    if k == 1:
        return x.mean(0, keepdim=True, dtype=torch.float64).to(x.dtype)
    import faiss

    parameters = faiss.ClusteringParameters()
    parameters.niter = ITERATIONS
    parameters.seed = seed
    parameters.init_method = faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS
    parameters.max_points_per_centroid = len(x)
    # Below this faiss prints a warning on stderr; few points a proxy is what few shots are.
    parameters.min_points_per_centroid = 1
    points = np.ascontiguousarray(x.detach().cpu().numpy(), dtype=np.float32)
    clustering = faiss.Clustering(points.shape[1], k, parameters)
    clustering.train(points, _index(faiss, points.shape[1], torch.device(device or x.device)))
    centroids = faiss.vector_to_array(clustering.centroids).reshape(k, -1)
    return torch.from_numpy(centroids).to(x.device)


def _index(faiss, dim: int, device: torch.device):
    if device.type != "cuda" or not hasattr(faiss, "GpuIndexFlatL2") or faiss.get_num_gpus() == 0:
        return faiss.IndexFlatL2(dim)
    config = faiss.GpuIndexFlatConfig()
    # Each rank its own GPU; faiss.Kmeans(gpu=True) would take every visible one.
    config.device = torch.cuda.current_device() if device.index is None else device.index
    index = faiss.GpuIndexFlatL2(faiss.StandardGpuResources(), dim, config)
    return index
