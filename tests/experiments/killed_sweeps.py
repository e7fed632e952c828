"""Sweeps in processes that are killed at random moments; run by test_sweep.py.

Prints how many rows were there after each kill. Processes are forked, since importing takes
seconds, and nothing is computed before.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from imprint_pl.experiments.results import Results
from imprint_pl.experiments.sweep import checked_sweep
from imprint_pl.experiments.sweep import run as sweep_file

KILLS = 12
# Seconds from start to kill, at most, while kills leave rows behind.
LONGEST = 0.5


class SlowResults(Results):
    """Takes its time before and after rows are kept, so that all kills come while rows are made."""

    def append(self, rows):
        time.sleep(0.05)
        super().append(rows)
        time.sleep(0.05)


def run(path, folder):
    sweep_file.Results = SlowResults
    # Saves within every kill's reach, too.
    sweep_file.SAVE_SECONDS = 0.05
    grid = [
        dict(recipe="robust", gen=["kmeans", "fps", "random"], k=[1, 2, 3, 5, 8]),
        dict(recipe=["qi", "ls", "lda", "knn", "ridge"]),
    ]
    data = [{"name": "digits", "embeddings": str(path)}]
    tasks, seeds = ["all", "even", "odd"], [0, 1, 2]
    given = {"name": "s", "data": data, "grid": grid, "tasks": tasks, "seeds": seeds}
    sweep_file.sweep(checked_sweep(given), folder, progress=False)


def forked(path, folder):
    process = os.fork()
    if process == 0:
        try:
            run(path, folder)
        finally:
            os._exit(0)
    return process


def readable(folder):
    """Rows now; every file has to be whole."""
    for name, read in (("results.parquet", pd.read_parquet), ("results.csv", pd.read_csv)):
        if (folder / name).exists():
            read(folder / name)
    return len(Results(folder).ids)


def narrow(path, folder):
    """Fewer numbers a row, so that rows come within every kill's reach."""
    file = load_file(path)
    narrow = {name: t[:, :96].contiguous() if t.ndim == 2 else t for name, t in file.items()}
    save_file(narrow, folder / "narrow.safetensors")
    return folder / "narrow.safetensors"


def main(path, folder, seed):
    torch.set_num_threads(1)
    path = narrow(path, folder)
    moments = random.Random(seed)
    counts, longest = [0], LONGEST
    for _ in range(KILLS):
        process = forked(path, folder / "killed")
        time.sleep(moments.uniform(0.0, longest))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        counts.append(readable(folder / "killed" / "s"))
        # On a busy machine a process may not get as far as its first row.
        longest = LONGEST if counts[-1] > counts[-2] else 1.5 * longest
    counts = counts[1:]
    for name in ("killed", "whole"):
        os.waitpid(forked(path, folder / name), 0)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
