"""A sweep against a loop over `imprint`, on real embeddings, in one process, interleaved.

    python benchmarks/sweep.py [EMBEDDINGS.safetensors REFERENCE.csv]

The file holds `train_embeddings, train_labels, test_embeddings, test_labels`, the CSV rows of
parameters with `accuracy` and the reference's `gen_seconds`, `inference_seconds`. Its rows with AGG
max are run, with the CSV's norms, generators, k, seeds and shots. Seconds are the least of all
rounds, as the clock and as the processor count them.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from imprint_pl import imprint
from imprint_pl.data import EmbeddingDataModule
from imprint_pl.experiments.sweep import CHUNK_BYTES, checked_sweep
from imprint_pl.experiments.sweep.embeddings import load_embeddings, load_splits
from imprint_pl.experiments.sweep.plan import units
from imprint_pl.experiments.sweep.work import Work
from imprint_pl.method.selection import draw_shots

SHARED = "../shared/acceptance"
EMBEDDINGS = "fashion_mnist_efficientnet_lite0.safetensors"
SLOTS = ("norm_pre", "gen", "norm_post", "norm_inf", "agg")
COUNTED = ("kmeans", "kmedoids", "random", "fps", "cov_max", "kls")


def keywords(row):
    given = {slot: row[slot] for slot in SLOTS}
    if row["gen"] in COUNTED:
        given["k"] = int(row["k"])
    if row["norm_post"] == "quantile":
        given["as_published"] = True
    if row["lambda"] and row["gen"] in ("ls", "kls"):
        given["lam"] = float(row["lambda"])
    return given


def plan_of(rows, path):
    # A block a row, as many seeds and tasks as there are; what no row asks for is taken out below.
    blocks = []
    for row in rows:
        shots = None if row["fewshot"] == "-1" else int(row["fewshot"])
        block = keywords(row) | ({"shots": shots} if shots else {})
        if block not in blocks:
            blocks.append(block)
    seeds = sorted({int(row["seed"]) for row in rows})
    data = [{"name": "reference", "embeddings": path}]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    given = {"name": "benchmark", "data": data, "tasks": tasks, "grid": blocks, "seeds": seeds}
    # The reference ran k = 20 on fewer shots, too.
    return checked_sweep(given | {"prune": False})


def key_of(task, parameters, shots, seed):
    names = (*SLOTS, "k")
    return task, *(parameters.get(name) for name in names), shots, seed


def wanted(plan, rows):
    source = plan.sources[0]
    _, splits = load_splits(source[1])
    configurations = plan.configurations(source, splits.class_names, len(splits.train.labels))
    found = {}
    for c in configurations:
        found[key_of(c.task.name, c.variant.parameters, c.shots, c.seed)] = c
    chosen, missing = [], 0
    for row in rows:
        shots = None if row["fewshot"] == "-1" else int(row["fewshot"])
        given = keywords(row)
        keys = [key_of(row["task"], given, shots, seed) for seed in (int(row["seed"]), None)]
        match = next((found[key] for key in keys if key in found), None)
        missing += match is None
        chosen.append(match)
    assert not missing, f"{missing} rows of the CSV are not in the grid"
    return source, chosen


@torch.no_grad()
def ours(source, chosen):
    embeddings = load_embeddings(source, list(dict.fromkeys(c.task for c in chosen)), ".")
    start, cpu_start = time.perf_counter(), time.process_time()
    work = Work(embeddings, CHUNK_BYTES)
    rows, failed = [], []
    for unit in units(list({c.id: c for c in chosen}.values())):
        found, errors = work.run(unit, {c.id for c in unit})
        rows += found
        failed += errors
    seconds = time.perf_counter() - start, time.process_time() - cpu_start
    assert not failed, failed
    start = time.perf_counter()
    for task in dict.fromkeys(c.task for c in chosen):
        work.collapse(task)
    return seconds, time.perf_counter() - start, {r["id"]: r for r in rows}


def loop(source, rows, chosen):
    """A plain loop over `imprint`; tasks are cut out once, as anybody would."""
    _, splits = load_splits(source[1])
    tasks, accuracies = {}, []
    start, cpu_start = time.perf_counter(), time.process_time()
    for row, c in zip(rows, chosen, strict=True):
        if row["task"] not in tasks:
            task = EmbeddingDataModule(splits, classes=row["task"])
            tasks[row["task"]] = (*task.arrays("train"), *task.arrays("test"))
        x, y, x_test, y_test = tasks[row["task"]]
        seed = c.seed or 0
        if c.shots:
            kept = draw_shots(y, c.shots, seed)
            x, y = x[kept], y[kept]
        head = imprint(x, y, "qi", seed=seed, calibrate=False, **keywords(row))
        accuracies.append((head(x_test).argmax(1) == y_test).double().mean().item())
    return (time.perf_counter() - start, time.process_time() - cpu_start), accuracies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("embeddings", nargs="?", default=f"{SHARED}/{EMBEDDINGS}")
    parser.add_argument("reference", nargs="?", default=f"{SHARED}/reference_accuracy.csv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-loop", action="store_true")
    arguments = parser.parse_args()
    for path in (arguments.embeddings, arguments.reference):
        if not Path(path).is_file():
            print(f"{path} is not there: the sweep is not measured")
            return
    with open(arguments.reference) as file:
        rows = [row for row in csv.DictReader(file) if row["agg"] == "max"]
    theirs = sum(float(r["gen_seconds"]) + float(r["inference_seconds"]) for r in rows)
    source, chosen = wanted(plan_of(rows, arguments.embeddings), rows)
    fast, collapse, slow = [], [], []
    for _ in range(arguments.rounds):
        seconds, of_collapse, results = ours(source, chosen)
        fast.append(seconds)
        collapse.append(of_collapse)
        if not arguments.no_loop:
            seconds, accuracies = loop(source, rows, chosen)
            slow.append(seconds)
    table = Table(title=f"{len(rows)} rows, {len(results)} different configurations")
    for name in ("", "seconds", "of each round", "CPU seconds", "rows/s"):
        table.add_column(name, justify="right")
    for name, measured in (("sweep", fast), ("loop over imprint", slow)):
        if measured:
            seconds, cpu = (min(times) for times in zip(*measured, strict=True))
            each = ", ".join(f"{wall:.1f}" for wall, _ in measured)
            speed = f"{len(rows) / seconds:.0f}"
            table.add_row(name, f"{seconds:.2f}", each, f"{cpu:.2f}", speed)
    table.add_row("the reference, by its CSV", f"{theirs:.1f}", "", "", f"{len(rows) / theirs:.0f}")
    Console(width=110).print(table)
    print(f"NC1 and VCI of the tasks: {statistics.median(collapse):.2f} s besides")
    if slow:
        ratios = [a / b for (_, a), (_, b) in zip(slow, fast, strict=True)]
        print(f"loop / sweep, CPU seconds: {', '.join(f'{r:.1f}' for r in ratios)}")
    if slow:
        off = [
            (round(results[c.id]["num_test"] * (a - results[c.id]["accuracy"])), c.columns()["gen"])
            for a, c in zip(accuracies, chosen, strict=True)
        ]
        off = [(samples, gen) for samples, gen in off if samples]
        print(f"rows where sweep and loop differ, in test samples: {off or 'none'}")
    groups = {}
    for row, c in zip(rows, chosen, strict=True):
        difference = 100 * results[c.id]["accuracy"] - float(row["accuracy"])
        groups.setdefault(row["gen"], []).append(difference)
    for gen, differences in groups.items():
        mean = sum(differences) / len(differences)
        worst = max(differences, key=abs)
        print(f"{gen}: {len(differences)} rows, {mean:+.3f} points on average, worst {worst:+.2f}")


if __name__ == "__main__":
    main()
