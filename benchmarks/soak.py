"""Fit and predict in a loop, and see that memory and open files do not grow.

    python benchmarks/soak.py --minutes 10

Each round imprints a recipe on images, predicts, saves a checkpoint and loads it; garbage is
collected after each. Ends with status 1 where the resident memory of the last third is more than
3 % above that of the middle third, or where there are more open files.
"""

import argparse
import gc
import itertools
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import psutil
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from tqdm import tqdm

from imprint_pl import ImprintedClassifier
from imprint_pl.data import ArrayDataset

RECIPES = ("robust", "kernel", "ridge", "auto", "qi")


def one_round(loader: DataLoader, recipe: str, folder: Path) -> None:
    model = ImprintedClassifier("timm/resnet10t", recipe, pretrained=False, image_size=32)
    trainer = Trainer(
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
    )
    trainer.fit(model, loader)
    logits = torch.cat(trainer.predict(model, loader))
    path = folder / "soak.ckpt"
    trainer.save_checkpoint(path)
    loaded = ImprintedClassifier.load_from_checkpoint(path, backbone=model.backbone).eval()
    images, _ = next(iter(loader))
    assert torch.allclose(loaded(images), logits[: len(images)], atol=1e-3)


def third(values: list[float], number: int) -> float:
    size = len(values) // 3
    part = values[number * size : (number + 1) * size]
    return sum(part) / len(part)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = ArrayDataset(images, torch.arange(600) % 6)
    loader = DataLoader(data, 100, collate_fn=lambda batch: batch)
    process, memory, files = psutil.Process(), [], []
    start, end = time.monotonic(), time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder, tqdm(total=round(60 * minutes), unit="s") as bar:
        for recipe in itertools.cycle(RECIPES):
            one_round(loader, recipe, Path(folder))
            # A Trainer and its model refer to each other; Python looks for such circles rarely, and
            # does not know how much memory their tensors hold.
            gc.collect()
            memory.append(process.memory_info().rss / 2**20)
            files.append(process.num_fds())
            bar.update(min(round(time.monotonic() - start), bar.total) - bar.n)
            if time.monotonic() > end and len(memory) >= 9:
                break
    first, middle, last = (third(memory, number) for number in range(3))
    growth = last / middle - 1
    print(
        f"{len(memory)} rounds; resident MiB, by thirds: {first:.0f}, {middle:.0f}, {last:.0f} "
        f"({100 * growth:+.1f} %); open files {files[0]}, {max(files)} at most, {files[-1]} at the "
        "end"
    )
    return int(growth > 0.03 or files[-1] > files[len(files) // 3])


if __name__ == "__main__":
    sys.exit(main())
