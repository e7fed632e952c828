"""Sweeps on real embeddings: the reference implementation's rows, d-in-1 tasks, memory."""

import csv
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from places import ACCEPTANCE, ROOT

from imprint_pl.experiments.sweep import checked_sweep, sweep

SLOTS = ("norm_pre", "gen", "norm_post", "norm_inf", "agg")
COUNTED = ("kmeans", "kmedoids", "random", "fps", "cov_max", "kls")


@pytest.fixture(scope="module")
def reference():
    """The rows of the CSV."""
    if not ACCEPTANCE.is_file():
        pytest.skip("the acceptance embeddings (../shared/acceptance) are not on this machine")
    with open(ACCEPTANCE.with_name("reference_accuracy.csv")) as file:
        return list(csv.DictReader(file))


def block(row):
    """A row's keywords in a grid."""
    given = {slot: row[slot] for slot in SLOTS}
    if row["gen"] in COUNTED:
        given["k"] = int(row["k"])
    if row["gen"] in ("ls", "kls"):
        given["lam"] = float(row["lambda"])
    if row["agg"] == "mnn":
        given |= {"m": int(row["m"]), "distance": row["distance"], "votes": row["weighting"]}
    if row["agg"] == "mnn" or row["norm_post"] == "quantile":
        given["as_published"] = True
    if row["fewshot"] != "-1":
        given["shots"] = int(row["fewshot"])
    return given


def deviations(rows, folder, seeds=(0,)):
    """By generator, for each kind of row: the sweep's mean over seeds less the reference's, in
    points; the sweep's standard deviation, the reference's number of rows."""
    expected, found = defaultdict(list), defaultdict(list)
    for row in rows:
        expected[row["task"], *sorted(block(row).items())].append(float(row["accuracy"]))
    for task in {key[0] for key in expected}:
        blocks = [dict(key[1:]) for key in expected if key[0] == task]
        data = [{"name": "x", "embeddings": str(ACCEPTANCE)}]
        given = {"name": task, "data": data, "tasks": [task], "grid": blocks, "seeds": list(seeds)}
        table = sweep(checked_sweep(given | {"prune": False}), folder, progress=False)
        for of_block in blocks:
            kept = table
            for name in (*SLOTS, "k", "m", "distance", "votes", "shots"):
                column = kept[name]
                kept = kept[column == of_block[name] if name in of_block else column.isna()]
            found[task, *sorted(of_block.items())] = (100 * kept["accuracy"]).tolist()
    results = defaultdict(list)
    for key, ours in found.items():
        theirs, spread = expected[key], np.std(ours, ddof=1) if len(ours) > 1 else 0.0
        gen = dict(key[1:])["gen"]
        results[gen].append((np.mean(ours) - np.mean(theirs), spread, len(theirs), len(ours)))
    for gen, of_gen in results.items():
        worst = max((d for d, *_ in of_gen), key=abs)
        print(f"\n{gen}: {len(of_gen)} kinds of rows, worst {worst:+.4f} points", end="")
    return results


def is_fixed(row):
    """Whether nothing is random in it."""
    return row["fewshot"] == "-1" and (
        row["gen"] in ("mean", "all", "ls", "cov_max")
        or (row["k"] == "1" and row["gen"] in ("kmedoids", "kmeans", "kls"))
    )


@pytest.mark.slow
def test_rows_without_randomness_are_matched_within_a_tenth_of_a_point(reference, tmp_path):
    rows = [row for row in reference if is_fixed(row)]
    found = deviations(rows, tmp_path)
    assert {row["agg"] for row in rows} == {"max", "mnn"}
    kinds = {(row["task"], *block(row).items()) for row in rows}
    assert sum(map(len, found.values())) == len(kinds) > 90
    for gen, of_gen in found.items():
        assert max(abs(d) for d, *_ in of_gen) <= 0.1, gen


@pytest.mark.slow  # 20 seeds
def test_rows_of_random_draws_are_matched_on_average(reference, tmp_path):
    rows = [row for row in reference if not is_fixed(row) and row["agg"] == "max"]
    rows = [row for row in rows if row["gen"] in ("random", "fps") or row["fewshot"] != "-1"]
    found = deviations(rows, tmp_path, range(20))
    for gen, of_gen in found.items():
        for deviation, spread, theirs, ours in of_gen:
            assert ours == 20
            # The standard error of the difference of the two means.
            assert abs(deviation) <= 3 * spread * math.sqrt(1 / theirs + 1 / ours), gen


@pytest.mark.slow  # 220 MiB of embeddings
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peaks are read from /proc")
def test_peak_memory_is_twice_the_embeddings_and_the_chunk_at_most(tmp_path):
    script = [sys.executable, str(Path(__file__).with_name("sweep_memory.py")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*script, "64", "write"], check=True, env=environment, timeout=300)
    done = subprocess.run(
        [*script, "64"], check=True, env=environment, capture_output=True, text=True, timeout=300
    )
    embeddings, grown = map(float, done.stdout.split())
    print(f"\nembeddings {embeddings:.0f} MiB, chunk 64, peak {grown:.0f}", end="")
    assert embeddings / 2 < grown < 2 * embeddings + 64


@pytest.mark.slow  # NC1 and VCI of fifty tasks
def test_nc1_rises_with_d_and_the_second_proxy_gains_most_where_d_is_two(reference, tmp_path):
    given = yaml.safe_load((ROOT / "configs/sweeps/d_in_1_fashion_mnist.yaml").read_text())
    del given["backbones"]
    given["data"] = [{"name": "FashionMNIST", "embeddings": str(ACCEPTANCE)}]
    table = sweep(checked_sweep(given), tmp_path, progress=False)
    nc1 = table.groupby("d")["nc1"].mean()
    assert nc1.index.tolist() == [1, 2, 3, 4, 5]
    assert nc1.is_monotonic_increasing
    accuracy = 100 * table[table["d"] == 2].groupby("k")["accuracy"].mean()
    print(f"\nNC1 {nc1.round(3).tolist()}; d = 2: {accuracy.round(2).to_dict()}", end="")
    assert accuracy[2] - accuracy[1] > accuracy[10] - accuracy[2] > 0
