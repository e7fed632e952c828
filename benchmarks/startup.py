"""Time to `--help` and to a mistake in a command line, beside `import lightning`.

    python benchmarks/startup.py

New processes, interleaved; the median of the rounds and their spread.
"""

import argparse
import statistics
import subprocess
import sys
import time

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
    "sweep --help": [*RUN, "sweep", "--help"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    times = {name: [] for name in CASES}
    for round_ in range(parser.parse_args().rounds + 1):
        for name, command in CASES.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], capture_output=True, check=False)
            if round_:  # the first fills the file cache
                times[name].append(time.perf_counter() - start)
    (base, *_) = times.values()
    table = Table("", "s", "× import lightning", "spread")
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, base, strict=True))
        table.add_row(
            name,
            f"{statistics.median(own):.2f}",
            f"{statistics.median(ratios):.2f}",
            f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
