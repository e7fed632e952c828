"""The peak memory of a sweep in a process of its own; run by test_sweep_reference.py.

    python sweep_memory.py FOLDER CHUNK_MB [write]

Prints, in MiB, the embeddings and how much the peak grew above what a small sweep had taken; with
`write` it makes the embeddings.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from imprint_pl.experiments.sweep import checked_sweep, sweep

TRAIN, TEST, DIM = 40_000, 5_000, 1_280
GRID = [
    {"recipe": ["qi", "hosoda", "janson", "ls", "lda", "ridge"]},
    {"recipe": "robust", "gen": ["kmeans", "fps", "random", "cov_max"], "k": [1, 5]},
]


def peak() -> float:
    """The peak of this process so far, MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def run(folder: Path, name: str, chunk_bytes: int) -> None:
    data = [{"name": name, "embeddings": str(folder / f"{name}.safetensors")}]
    given = {"name": name, "data": data, "tasks": ["all", "odd"], "grid": GRID}
    sweep(checked_sweep(given), folder, chunk_bytes=chunk_bytes, progress=False)


def write(folder: Path, name: str, train: int, test: int) -> None:
    generator, arrays = torch.Generator().manual_seed(0), {}
    for split, n in (("train", train), ("test", test)):
        y = torch.randint(0, 10, (n,), generator=generator)
        arrays[f"{split}_embeddings"] = torch.rand(n, DIM, generator=generator)
        arrays[f"{split}_embeddings"][torch.arange(n), y] += 3
        arrays[f"{split}_labels"] = y
    save_file(arrays, folder / f"{name}.safetensors")


if __name__ == "__main__":
    folder, chunk = Path(sys.argv[1]), int(sys.argv[2]) << 20
    if len(sys.argv) > 3:
        write(folder, "small", 200, 100)
        write(folder, "large", TRAIN, TEST)
    else:
        run(folder, "small", chunk)
        before = peak()
        run(folder, "large", chunk)
        print((TRAIN + TEST) * DIM * 4 / 2**20, peak() - before)
