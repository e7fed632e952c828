"""What a head of 200 proxies costs beside `nn.Linear(d, 200)`, at batch 256.

    python benchmarks/head.py

Forward in inference mode, interleaved in one process; the median of the rounds and their spread.
`max` is the class of the best proxy (20 a class), `mean` one proxy a class; both with l2.
"""

import argparse
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from imprint_pl import imprint

BATCH, DIM, PROXIES = 256, 1280, 200


def seconds(module: nn.Module, x: torch.Tensor, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        module(x)
    return (time.perf_counter() - start) / calls


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--calls", type=int, default=50)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, DIM, generator=generator).abs()
    batch = torch.randn(BATCH, DIM, generator=generator).abs()
    with torch.inference_mode(False):
        heads = {
            "robust (10 classes × 20, l2, max)": imprint(x, torch.arange(2000) % 10, "robust"),
            "qi (200 classes, l2)": imprint(x, torch.arange(2000) % 200, "qi"),
            "ridge (200 classes)": imprint(x, torch.arange(2000) % 200, "ridge", lam=1.0),
        }
    linear = nn.Linear(DIM, PROXIES)
    for head in heads.values():
        assert len(head.proxies) == PROXIES
        head.eval()
    ratios = {name: [] for name in heads}
    times = {name: [] for name in heads}
    for round_ in range(arguments.rounds + 1):
        for name, head in heads.items():
            base = seconds(linear, batch, arguments.calls)
            own = seconds(head, batch, arguments.calls)
            if round_:  # the first warms up
                ratios[name].append(own / base)
                times[name].append(own)
    table = Table(
        "head", "µs a batch", "× nn.Linear", "spread", title=f"{BATCH} × {DIM}, {PROXIES} proxies"
    )
    for name in heads:
        low, *_, high = sorted(ratios[name])
        table.add_row(
            name,
            f"{1e6 * statistics.median(times[name]):.0f}",
            f"{statistics.median(ratios[name]):.2f}",
            f"{low:.2f}-{high:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
