"""k-means of all classes: this package's engines against scikit-learn and `faiss.Kmeans` a class.

    python benchmarks/kmeans.py --embeddings FILE.safetensors

All run interleaved in one process, seed by seed, so that a busy machine slows all of them; a
seed's time is the median of three runs, the ratios are medians of the seeds' ratios. scikit-learn
runs k-means++, one start, at most 300 iterations; faiss k-means++, 25 iterations, all points.
Embeddings are l2-normalised; a file with more than 1,000 samples a class also gives the cases of
its first 1,000.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import faiss
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info
from torch import Tensor

from imprint_pl.numerics.kmeans import kmeans_classes

DEFAULT = Path("../shared/acceptance/fashion_mnist_efficientnet_lite0.safetensors")
# Set on some machines for other programs; they slow numpy's BLAS, hence scikit-learn.
SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
Engine = Callable[[list[Tensor], int, int], list[Tensor]]


def scikit_learn(xs: list[Tensor], k: int, seed: int) -> list[Tensor]:
    fits = [KMeans(k, n_init=1, max_iter=300, random_state=seed).fit(x.numpy()) for x in xs]
    return [torch.from_numpy(fit.cluster_centers_) for fit in fits]


def faiss_a_class(xs: list[Tensor], k: int, seed: int) -> list[Tensor]:
    centroids = []
    for x in xs:
        clustering = faiss.Kmeans(
            x.shape[1],
            k,
            niter=25,
            seed=seed,
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            max_points_per_centroid=len(x),
            min_points_per_centroid=1,
        )
        clustering.train(x.numpy())
        centroids.append(torch.from_numpy(clustering.centroids))
    return centroids


def ours(engine: str) -> Engine:
    return lambda xs, k, seed: kmeans_classes(xs, k, seed=seed, engine=engine)


ENGINES: dict[str, Engine] = {
    "scikit-learn": scikit_learn,
    "faiss.Kmeans a class": faiss_a_class,
    "imprint_pl torch": ours("torch"),
    "imprint_pl exact": ours("exact"),
}


def inertia(x: Tensor, centroids: Tensor) -> float:
    """Sum of squared distances to the nearest centroid, in float64."""
    blocks = (torch.cdist(rows.double(), centroids.double()) for rows in x.split(2000))
    return sum(float(block.amin(1).square().sum()) for block in blocks)


def load_classes(path: Path) -> list[Tensor]:
    """One l2-normalised tensor a class."""
    tensors = load_file(path)
    x, y = F.normalize(tensors["train_embeddings"].float()), tensors["train_labels"]
    return [x[y == label] for label in y.unique()]


def measure(
    xs: list[Tensor], k: int, seeds: int, repeats: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Seconds (median of the repeats) and inertia of each seed, per engine."""
    for engine in ENGINES.values():  # threads, imports and caches warm
        engine([x[: 10 * k] for x in xs[:2]], k, 0)
    results = {name: ([], []) for name in ENGINES}
    for seed in range(seeds):
        for name, engine in ENGINES.items():
            seconds = []
            for _ in range(repeats):
                start = time.perf_counter()
                centroids = engine(xs, k, seed)
                seconds.append(time.perf_counter() - start)
            results[name][0].append(statistics.median(seconds))
            results[name][1].append(sum(map(inertia, xs, centroids)))
    return results


def add_rows(table: Table, case: str, results: dict[str, tuple[list[float], list[float]]]) -> None:
    their_mean = statistics.mean(results["scikit-learn"][1])
    for name, (seconds, inertias) in results.items():
        faster = [
            statistics.median(t / s for t, s in zip(results[other][0], seconds, strict=True))
            for other in ("scikit-learn", "faiss.Kmeans a class")
        ]
        table.add_row(
            case,
            name,
            f"{statistics.median(seconds):.3f}",
            f"{min(seconds):.3f}–{max(seconds):.3f}",
            *(f"{ratio:.1f}×" for ratio in faster),
            f"{statistics.mean(inertias) / their_mean:.4f}",
            f"{max(inertias) / their_mean:.4f}",
        )
        case = ""
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--embeddings", type=Path, default=DEFAULT, help="train_embeddings, _labels"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each engine")
    parser.add_argument("--repeats", type=int, default=3, help="of each run, back to back")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(width=130)
    xs = load_classes(arguments.embeddings)
    first = [x[:1000] for x in xs]
    cases = [(first, 20), (first, 100)]
    if len(xs[0]) > 1000:
        cases.insert(0, (xs, 20))
    table = Table(title=f"k-means on {arguments.embeddings.name}, {arguments.seeds} seeds")
    for column in ("classes × samples × d", "engine"):
        table.add_column(column, no_wrap=True)
    for column in ("seconds", "spread", "vs sklearn", "vs faiss", "inertia", "worst"):
        table.add_column(column, justify="right", no_wrap=True)
    for classes, k in cases:
        rows = round(statistics.mean(map(len, classes)))
        case = f"{len(classes)} × {rows:,} × {classes[0].shape[1]:,}, k={k}"
        console.print(f"measuring {case} …")
        add_rows(table, case, measure(classes, k, arguments.seeds, arguments.repeats))
    console.print(table)
    console.print(
        "seconds: median; vs: how many times faster; inertia: mean (and worst) seed over "
        "scikit-learn's mean"
    )
    libraries = {
        (i["internal_api"], i.get("architecture"), i["num_threads"]) for i in threadpool_info()
    }
    console.print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; libraries {libraries}")
    if slowing := [name for name in SLOWING if name in os.environ]:
        console.print(f"[red]{' and '.join(slowing)} set: unset for a fair race")


if __name__ == "__main__":
    main()
