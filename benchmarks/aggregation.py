"""m nearest proxies under mahalanobis against scikit-learn, in one process, interleaved.

    python benchmarks/aggregation.py

1,500 samples and 60 proxies of 1,280 numbers, as in the paper's task "short". Both get the proxies
and decide the samples; ours includes the decomposition of the covariance, scikit-learn is given the
inverse and does not pay for it.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import NearestNeighbors

from imprint_pl.parts.agg.nearest import NearestProxies


def ours(z, proxies, classes, m):
    part = NearestProxies(m, "mahalanobis", "uniform", as_published=True)
    start = time.perf_counter()
    labels = part(z, proxies, torch.zeros(len(proxies)), classes, 3).argmax(1)
    return time.perf_counter() - start, labels.numpy()


def scikit_learn(z, proxies, classes, m, inverse):
    start = time.perf_counter()
    search = NearestNeighbors(
        n_neighbors=m, metric="mahalanobis", metric_params={"VI": inverse}, algorithm="brute"
    ).fit(proxies.double().numpy())
    nearest = search.kneighbors(z.double().numpy(), return_distance=False)
    votes = np.stack([np.bincount(classes.numpy()[row], minlength=3) for row in nearest])
    return time.perf_counter() - start, votes.argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(60) // 20
    centres = torch.randn(3, 1280, generator=generator)
    proxies = centres[classes] + torch.randn(60, 1280, generator=generator)
    truth = torch.arange(arguments.samples) % 3
    z = centres[truth] + torch.randn(arguments.samples, 1280, generator=generator)
    covariance = np.cov(proxies.double().numpy().T) + 1e-6 * np.eye(1280)
    inverse = np.linalg.inv(covariance)
    ours(z, proxies, classes, 5)
    fast, slow, agreement = [], [], []
    for _ in range(arguments.rounds):
        # Once more than a thousand times shorter than theirs: the median of several.
        runs = [ours(z, proxies, classes, 5) for _ in range(7)]
        fast.append(statistics.median(seconds for seconds, _ in runs))
        labels = runs[0][1]
        seconds, theirs = scikit_learn(z, proxies, classes, 5, inverse)
        slow.append(seconds)
        agreement.append((labels == theirs).mean())
    ratios = sorted(b / a for a, b in zip(fast, slow, strict=True))
    table = Table(title=f"5 nearest of 60 proxies, mahalanobis, {arguments.samples:,} samples")
    for name in ("scikit-learn s", "ours s", "ratio", "same labels"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{statistics.median(slow):.2f}",
        f"{statistics.median(fast):.4f}",
        f"{statistics.median(ratios):,.0f} ({ratios[0]:,.0f}–{ratios[-1]:,.0f})",
        f"{100 * min(agreement):.2f} %",
    )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
