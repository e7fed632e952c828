"""The paper's recipes in plain NumPy, to compare the package with: it imports nothing of it.

Each function follows a formula of the paper and its published code (with that code's faults, see
`quantile` and `vote`), in float64 and without regard to speed or memory. The accuracies of the rows
that nothing random enters lie beside this file, for a part of real embeddings that lies there, too:

    python tests/data/reference.py                  compute the rows of the part, print the CSV
    python tests/data/reference.py FOLDER           compare all such rows with the CSV that the
                                                    paper's own code gave for the full embeddings
    python tests/data/reference.py FOLDER --part    write the part from the full embeddings
"""

from __future__ import annotations

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Row = dict[str, str]

HERE = Path(__file__).parent
PART = HERE / "fashion_mnist_part.npz"
PART_ROWS = HERE / "fashion_mnist_part.csv"
# In the folder of the full set: embeddings, the scores of the paper's code, proxies of its k-means.
FULL = "fashion_mnist_efficientnet_lite0.safetensors"
FULL_ROWS = "reference_accuracy.csv"
FULL_PROXIES = "reference_proxies_short_kmeans20.safetensors"

TASKS = {"all": range(10), "even": range(0, 10, 2), "odd": range(1, 10, 2), "short": range(3)}
COLUMNS = (
    *("task", "norm_pre", "gen", "k", "norm_post", "norm_inf", "agg", "distance", "weighting"),
    *("m", "lambda", "accuracy"),
)
# Samples of each class in the part.
TRAIN, TEST = 120, 80


def l2(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def quantile(proxies: Array, labels: Labels) -> Array:
    """NORM_post: the sorted values of a proxy become the quantiles (i + ½) / d of all values of the
    classes before it, already normalised. The first class stays as it is, as published."""
    result, d = proxies.copy(), proxies.shape[1]
    for c in np.unique(labels)[1:]:
        values = np.quantile(result[labels < c], (np.arange(d) + 0.5) / d)
        for i in np.flatnonzero(labels == c):
            result[i, np.argsort(proxies[i], kind="stable")] = values
    return result


def cov_max(x: Array, k: int) -> Array:
    """The k samples with the largest sums of covariances; the samples are the variables."""
    sums = np.atleast_2d(np.cov(x)).sum(0)
    return x[np.argsort(-sums, kind="stable")[:k]]


def medoid(x: Array) -> Array:
    """The sample with the smallest sum of Euclidean distances to all."""
    return x[[euclidean(x, x).sum(1).argmin()]]


def least_squares(x: Array, y: Labels, lam: float) -> Array:
    """W = (1/C) Mᵀ (Σ_T + μ_G μ_Gᵀ + λI)⁻¹, the class means as columns of M."""
    means = np.stack([x[y == c].mean(0) for c in np.unique(y)])
    mean = x.mean(0)
    total = (x - mean).T @ (x - mean) / len(x)
    matrix = total + np.outer(mean, mean) + lam * np.eye(x.shape[1])
    return np.linalg.solve(matrix, means.T).T / len(means)


def generate(row: Row, x: Array, y: Labels) -> tuple[Array, Labels]:
    """GEN: proxies and their labels."""
    classes = np.unique(y)
    # With one cluster a class the pseudo-classes of kls are the classes.
    if row["gen"] in ("ls", "kls"):
        return least_squares(x, y, float(row["lambda"])), classes
    of_class = {
        "mean": lambda rows: rows.mean(0, keepdims=True),
        "all": lambda rows: rows,
        "cov_max": lambda rows: cov_max(rows, int(row["k"])),
        "kmedoids": medoid,
    }[row["gen"]]
    proxies = [of_class(x[y == c]) for c in classes]
    return np.concatenate(proxies), np.repeat(classes, [len(p) for p in proxies])


def euclidean(z: Array, p: Array) -> Array:
    squares = (z**2).sum(1, keepdims=True) - 2 * z @ p.T + (p**2).sum(1)
    return np.sqrt(np.maximum(squares, 0))


def cosine(z: Array, p: Array) -> Array:
    return 1 - l2(z) @ l2(p).T


def manhattan(z: Array, p: Array) -> Array:
    return np.stack([np.abs(row - p).sum(1) for row in z])


def chebyshev(z: Array, p: Array) -> Array:
    return np.stack([np.abs(row - p).max(1) for row in z])


def mahalanobis(z: Array, p: Array) -> Array:
    """Under S = Cov(proxies) + 1e-6 I, as wide as the embeddings: Euclidean after L⁻¹, S = L Lᵀ."""
    factor = np.linalg.cholesky(np.cov(p.T) + 1e-6 * np.eye(p.shape[1]))
    z, p = (np.linalg.solve(factor, rows.T).T for rows in (z, p))
    return np.stack([np.sqrt(((row - p) ** 2).sum(1)) for row in z])


DISTANCES = {f.__name__: f for f in (euclidean, cosine, manhattan, chebyshev, mahalanobis)}


def vote(far: Array, labels: Labels, m: int, weighting: str) -> Labels:
    """The m nearest proxies vote; a tie goes to the lowest label, as published."""
    near = np.argsort(far, axis=1, kind="stable")[:, :m]
    votes = np.ones(near.shape)
    if weighting == "weighted_by_distance":
        votes = 1 / (np.take_along_axis(far, near, 1) + 1e-10)
    scores = np.zeros((len(far), labels.max() + 1))
    np.add.at(scores, (np.arange(len(far))[:, None], labels[near]), votes)
    return scores.argmax(1)


def predict(row: Row, z: Array, proxies: Array, labels: Labels) -> Labels:
    """AGG: the class of each row of `z`."""
    if row["agg"] == "max":
        return labels[(z @ proxies.T).argmax(1)]
    far = DISTANCES[row["distance"]](z, proxies)
    return vote(far, labels, int(row["m"]), row["weighting"])


def accuracy(
    row: Row, data: dict[str, NDArray], proxies: tuple[Array, Labels] | None = None
) -> float:
    """Percent of the test samples of the row's task; with `proxies` nothing is imprinted."""
    kept = {split: np.isin(data[f"{split}_labels"], TASKS[row["task"]]) for split in SPLITS}
    x, z = (data[f"{split}_embeddings"][kept[split]].astype(np.float64) for split in SPLITS)
    y, truth = (data[f"{split}_labels"][kept[split]] for split in SPLITS)
    x = l2(x) if row["norm_pre"] == "l2" else x
    z = l2(z) if row["norm_inf"] == "l2" else z
    if proxies is None:
        weights, labels = generate(row, x, y)
        if row["norm_post"] == "l2":
            weights = l2(weights)
        elif row["norm_post"] == "quantile":
            weights = quantile(weights, labels)
        proxies = weights, labels
    return 100 * float((predict(row, z, *proxies) == truth).mean())


SPLITS = ("train", "test")


def is_fixed(row: Row) -> bool:
    """Whether nothing random enters a row of the paper's code."""
    return row["fewshot"] == "-1" and (
        row["gen"] in ("mean", "all", "ls", "cov_max")
        or (row["gen"] in ("kmedoids", "kls") and row["k"] == "1")
    )


def rows_of_part() -> list[Row]:
    """The rows that are computed on the part: each GEN under each choice of NORMs with the maximum,
    each distance and each weighting with m nearest proxies."""
    gens = [("mean", "1", ""), ("all", "-1", ""), ("kmedoids", "1", ""), ("ls", "1", "0.0001")]
    gens += [("cov_max", k, "") for k in ("1", "5", "20")]
    maximum = ("max", "inner_product", "uniform", "-1")
    rows = []
    for task, pre, (gen, k, lam), post, inf in itertools.product(
        TASKS, ("none", "l2"), gens, ("none", "l2", "quantile"), ("none", "l2")
    ):
        # As in the paper: normalised training samples ask for normalised test samples, and
        # `quantile` for one proxy a class.
        if (pre, inf) != ("l2", "none") and (post != "quantile" or gen in ("mean", "ls")):
            rows.append((task, pre, gen, k, post, inf, *maximum, lam))
    for (gen, k), distance, weighting, m in itertools.product(
        (("all", "-1"), ("cov_max", "20")), DISTANCES, ("uniform", "weighted_by_distance"), "135"
    ):
        rows.append(("all", "l2", gen, k, "l2", "l2", "mnn", distance, weighting, m, ""))
    for task in TASKS:
        rows.append((task, "none", "mean", "1", "none", "none", "mnn", *maximum[1:], ""))
    rows = [dict(zip(COLUMNS, row, strict=False)) for row in rows]
    for row in rows:
        if row["agg"] == "mnn" and row["gen"] == "mean":
            row |= {"distance": "euclidean", "m": "1"}
    return rows


def full(folder: Path) -> dict[str, NDArray]:
    """The full set's arrays."""
    from safetensors.numpy import load_file

    return load_file(folder / FULL)


def deviations(folder: Path) -> list[tuple[Row, float]]:
    """The rows that are fixed in the CSV of the paper's code, and ours less its accuracy on the
    full set, rounded as it is. The proxies of its k-means, of one task, are read, not computed."""
    from safetensors.numpy import load_file

    data, file = full(folder), load_file(folder / FULL_PROXIES)
    given = file["proxies"].astype(np.float64), file["proxy_labels"].astype(np.int64)
    found = []
    with open(folder / FULL_ROWS) as rows:
        for row in csv.DictReader(rows):
            on_given = row["gen"] == "kmeans" and row["agg"] == "mnn"
            if on_given or is_fixed(row):
                ours = accuracy(row, data, given if on_given else None)
                found.append((row, round(ours, 4) - float(row["accuracy"])))
    return found


def write_part(folder: Path) -> None:
    """Writes the first samples of each class, in the order of the full set."""
    data, part = full(folder), {}
    for split, count in zip(SPLITS, (TRAIN, TEST), strict=True):
        labels = data[f"{split}_labels"]
        kept = [np.flatnonzero(labels == c)[:count] for c in np.unique(labels)]
        kept = np.sort(np.concatenate(kept))
        part[f"{split}_embeddings"] = data[f"{split}_embeddings"][kept]
        part[f"{split}_labels"] = labels[kept].astype(np.int64)
    np.savez_compressed(PART, **part)


def main(arguments: list[str]) -> None:
    if arguments[1:] == ["--part"]:
        write_part(Path(arguments[0]))
    elif arguments:
        found = deviations(Path(arguments[0]))
        for row, deviation in found:
            if deviation:
                print(f"{deviation:+.4f}", *(row[name] for name in COLUMNS))
        worst = max(abs(deviation) for _, deviation in found)
        print(f"{len(found)} rows, largest deviation {worst:.4f} points")
    else:
        data = dict(np.load(PART))
        writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows_of_part():
            writer.writerow(row | {"accuracy": f"{accuracy(row, data):.4f}"})


if __name__ == "__main__":
    main(sys.argv[1:])
