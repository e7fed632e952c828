"""Imprinting data sets that are larger than memory should be: seconds and memory by their size.

    python benchmarks/large.py /a/folder/on/a/disk --samples 100000 300000 1281167 --dim 768

Writes synthetic embeddings once (1,000 classes, ReLU features), and imprints the first N of them
from the mapped file, each in a process of its own. Prints wall and CPU seconds, the peak of the
process's anonymous memory (RssAnon, for which no file can stand in), what of it was there before,
and the accuracy on 5,000 others. `--in_memory` reads the rows into memory first, and has a budget
without end. The figures are added to `results.jsonl` in the folder; `--figure FIGURE` draws what is
there, and measures nothing.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

CLASSES, HELD_OUT, PART = 1000, 5000, 20_000
# Each class has several modes, which no linear method tells apart, and samples spread about them.
MODES, NOISE = 3, 4.0


def part(number, rows, dim, dtype):
    """Embeddings and labels of one part of the data set."""
    centres = torch.randn(MODES * CLASSES, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(number + 1)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    # The classes of the first samples are all classes.
    y[: min(rows, CLASSES)] = torch.arange(min(rows, CLASSES))
    mode = MODES * y + torch.randint(MODES, (rows,), generator=generator)
    x = torch.randn(rows, dim, generator=generator).mul_(NOISE).add_(centres[mode]).relu_()
    return x.numpy().astype(dtype), y.numpy()


def write(path, samples, dim, dtype):
    """Writes embeddings and labels, unless they are there."""
    if path.with_suffix(".labels.npy").exists():
        return
    x = np.lib.format.open_memmap(path, "w+", dtype, (samples, dim))
    y = np.empty(samples, np.int64)
    for number, start in enumerate(range(0, samples, PART)):
        end = min(start + PART, samples)
        x[start:end], y[start:end] = part(number, end - start, dim, dtype)
    x.flush()
    np.save(path.with_suffix(".labels.npy"), y)


def anonymous():
    """MiB of anonymous memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def measure(path, samples, recipe, in_memory, budget, **options):
    """Imprints the first samples of a file and prints what that took."""
    from imprint_pl import imprint

    torch.set_num_threads(1)
    rows = np.load(path, mmap_mode="r")
    x, y = rows[:samples], np.load(path.with_suffix(".labels.npy"))[:samples]
    held, truth = part(10**6, HELD_OUT, x.shape[1], x.dtype)
    imprint(torch.randn(40, 5), torch.arange(40) % 2, "kernel")  # what the first call imports
    before, peak, done = anonymous(), [0.0], threading.Event()
    if in_memory:
        x, budget = np.array(x), 2.0**20

    def watch():
        while not done.wait(0.02):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, processor = time.perf_counter(), time.process_time()
    head = imprint(x, y, recipe, memory_budget=budget, **options)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    done.set()
    watcher.join()
    accuracy = float((head(torch.from_numpy(held).float()).argmax(1).numpy() == truth).mean())
    chosen = head.settings["recipe"]
    print(
        f"{recipe:8} {samples:>9,} x {x.shape[1]:,} {x.dtype} "
        f"{'in memory' if in_memory else 'mapped   '} {wall:7.1f} s, CPU {processor:7.1f} s, "
        f"anonymous {peak[0]:6.0f} MiB ({before:.0f} before), accuracy {accuracy:.4f}, "
        f"chose {chosen}",
        flush=True,
    )
    row = dict(recipe=recipe, samples=samples, dim=x.shape[1], in_memory=in_memory, seconds=wall)
    row |= dict(processor=processor, before=before, memory=peak[0], accuracy=accuracy)
    with (path.parent / "results.jsonl").open("a") as file:
        file.write(json.dumps(row | dict(chosen=chosen)) + "\n")


def draw(rows, figure):
    """Draws processor time and memory by the number of samples, of what was imprinted in files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in rows if not row["in_memory"]]
    sizes = sorted({row["samples"] for row in rows})
    recipes = sorted({row["recipe"] for row in rows})
    lines = [(recipe, dim) for dim in sorted({row["dim"] for row in rows}) for recipe in recipes]
    shown, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained")
    for recipe, dim in lines:
        of_line = sorted(
            (row["samples"], row["processor"], row["memory"])
            for row in rows
            if row["recipe"] == recipe and row["dim"] == dim
        )
        style = dict(
            color=f"C{recipes.index(recipe)}",
            marker="osD^"[recipes.index(recipe) % 4],
            linestyle="-" if dim == lines[0][1] else "--",
            label=f"{recipe}, d = {dim:,}",
            markersize=4,
        )
        samples, seconds, memory = zip(*of_line, strict=True)
        axes[0].loglog(samples, seconds, **style)
        axes[1].semilogx(samples, [mib / 1024 for mib in memory], **style)
    axes[0].set_ylabel("CPU seconds of imprint")
    axes[1].set_ylabel("anonymous memory, GiB")
    axes[1].set_ylim(0)
    for axis in axes:
        axis.set_xlabel("samples N")
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    shown.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    shown.savefig(figure, dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--recipes", nargs="+", default=["kernel", "auto", "robust"])
    parser.add_argument("--budget", type=float, help="GiB; half of what is free by default")
    parser.add_argument("--projection_dim", type=int, help="landmarks of kernel; 2,000 by default")
    parser.add_argument("--in_memory", action="store_true")
    parser.add_argument("--total", type=int, help="samples in the file; the most by default")
    parser.add_argument("--figure", help="PNG to draw from the results in the folder")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    total = arguments.total or max(arguments.samples)
    path = arguments.folder / f"{total}x{arguments.dim}-{arguments.dtype}.npy"
    if arguments.child:
        (samples,), (recipe,) = arguments.samples, arguments.recipes
        landmarks = arguments.projection_dim
        options = {} if landmarks is None else {"projection_dim": landmarks}
        measure(path, samples, recipe, arguments.in_memory, arguments.budget, **options)
        return
    if arguments.figure:
        results = (arguments.folder / "results.jsonl").read_text().splitlines()
        draw([json.loads(row) for row in results], arguments.figure)
        return
    write(path, total, arguments.dim, arguments.dtype)
    for recipe in arguments.recipes:
        for samples in arguments.samples:
            command = [sys.executable, __file__, str(arguments.folder), "--child"]
            command += ["--samples", str(samples), "--recipes", recipe, "--total", str(total)]
            command += ["--dim", str(arguments.dim), "--dtype", arguments.dtype]
            command += ["--in_memory"] * arguments.in_memory
            if arguments.projection_dim:
                command += ["--projection_dim", str(arguments.projection_dim)]
            if arguments.budget:
                command += ["--budget", str(arguments.budget)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
