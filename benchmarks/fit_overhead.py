"""What a fit costs beyond preprocessing and the backbone's forward, in microseconds an image.

    python benchmarks/fit_overhead.py

Both sides read the same images in the same batches. "bare" preprocesses and embeds and keeps the
embeddings; "fit" is the whole `Trainer.fit`: loader, hooks, store, GEN, NC1, no validation.
Interleaved in one process; the median of the rounds and their spread are printed.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from imprint_pl import ImprintedClassifier
from imprint_pl.data import ArrayDataset

CASES = (
    ("torchvision/resnet18", 64, 10_000, "robust"),
    ("timm/resnet10t", 32, 10_000, "robust"),
    ("timm/resnet10t", 32, 10_000, "qi"),
)


def bare(model: ImprintedClassifier, loader: DataLoader) -> float:
    start = time.perf_counter()
    with torch.no_grad():
        kept = [model.backbone(images) for images, _ in loader]
    assert len(kept) == len(loader)
    return time.perf_counter() - start


def fit(model: ImprintedClassifier, loader: DataLoader, accelerator: str = "auto") -> float:
    """Seconds."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        start = time.perf_counter()
        trainer.fit(model, loader)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    table = Table(title=f"fit over preprocessing and forward, {torch.get_num_threads()} threads")
    for name in ("backbone", "px", "images", "recipe", "bare s", "fit s", "ratio", "overhead"):
        table.add_column(name, justify="right")
    for backbone, size, n, recipe in CASES:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(n) % 10
        images = torch.randint(
            0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator
        ) // 2 + 10 * labels[:, None, None, None].to(torch.uint8)
        loader = DataLoader(ArrayDataset(images, labels), batch_size=256, collate_fn=lambda b: b)
        model = ImprintedClassifier(backbone, recipe, pretrained=False, image_size=size)
        bare(model, loader)
        pairs = [(bare(model, loader), fit(model, loader)) for _ in range(rounds)]
        ratios = sorted(b / a for a, b in pairs)
        overhead = sorted((b - a) / n * 1e6 for a, b in pairs)
        table.add_row(
            backbone,
            str(size),
            f"{n:,}",
            recipe,
            f"{statistics.median(a for a, _ in pairs):.2f}",
            f"{statistics.median(b for _, b in pairs):.2f}",
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}–{ratios[-1]:.3f})",
            f"{statistics.median(overhead):.0f} µs ({overhead[0]:.0f}–{overhead[-1]:.0f})",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
