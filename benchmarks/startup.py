"""Start and end of the commands, beside `import lightning`: `--help`, mistakes, and all of a fit
but its work.

    python benchmarks/startup.py

New processes, interleaved; the medians of the rounds and the spread of the ratios. "a fit of ten
images" embeds 10 digits and validates 16 of 32 pixels: what is left is what every fit takes beside
embedding, GEN and validation. Processor seconds (user and system) say more on a busy machine.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

RUN = ["-m", "imprint_pl"]
CASES = {
    "import lightning.pytorch": ["-c", "import lightning.pytorch"],
    "import imprint_pl": ["-c", "import imprint_pl"],
    "--help": [*RUN, "--help"],
    "fit --help": [*RUN, "fit", "--help"],
    "fit with a wrong recipe": [*RUN, "fit", "--data", "Digits", "--model.recipe", "robsut"],
    "fit with a wrong key": [*RUN, "fit", "--data", "Digits", "--model.kk", "3"],
    "a fit of ten images": [
        *(*RUN, "fit", "--data", "Digits", "--data.shots", "1", "--data.batch_size", "16"),
        *("--model.recipe", "qi", "--model.image_size", "32"),
        *("--trainer.limit_val_batches", "1", "--trainer.accelerator", "cpu"),
    ],
    "sweep --help": [*RUN, "sweep", "--help"],
}


class Took(NamedTuple):
    """What a process took.

    Args:
        seconds: From start to end.
        processor: User and system time.
    """

    seconds: float
    processor: float


def took(command: list[str], folder: str) -> Took:
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, check=False)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Took(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    times: dict[str, list[Took]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        for round_ in range(rounds + 1):
            for name, command in CASES.items():
                one = took(command, folder)
                if round_:  # the first fills the file cache
                    times[name].append(one)
    (base, *_) = times.values()
    table = Table("", "s", "× import lightning", "processor s", "× its processor s")
    for name, own in times.items():
        columns = []
        for field in Took._fields:
            values = [getattr(one, field) for one in own]
            ratios = sorted(
                value / getattr(other, field) for value, other in zip(values, base, strict=True)
            )
            middle = statistics.median(ratios)
            columns += [
                f"{statistics.median(values):.2f}",
                f"{middle:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})",
            ]
        table.add_row(name, *columns)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
