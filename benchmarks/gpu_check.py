"""On a GPU: does it compute what the CPU does, and how near is it to the device's limits?

    python benchmarks/gpu_check.py

Compares embeddings, NC1 and heads of every recipe with those of the CPU, and looks whether the
imprint epoch makes the processor wait for the GPU. Then prints images a second of `embed` beside
the bare forward, on images that lie on the device, of a whole `fit` from memory, and how fast
k-means gets through its points beside a copy within the device. Says so and ends where there is no
GPU; works without faiss.
"""

import argparse
import logging
import sys
import time
import warnings

import torch
from fit_overhead import fit
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from imprint_pl import ImprintedClassifier, imprint
from imprint_pl.collapse import nc1
from imprint_pl.data import ArrayDataset
from imprint_pl.embedding.backbone import Backbone, load_backbone
from imprint_pl.errors import ImprintError
from imprint_pl.lightning.metrics import TaskMetrics
from imprint_pl.method.recipes import RECIPES, resolve
from imprint_pl.numerics.kmeans import kmeans
from imprint_pl.training_set.reservoir import EmbeddingReservoir
from imprint_pl.training_set.store import RowStore
from imprint_pl.training_set.sums import EmbeddingSums

BACKBONE, SIZE, BATCH = "torchvision/resnet18", 224, 64


def seconds(work, device: str, repeats: int = 10) -> float:
    """Of one call, the best of three series; the device is waited for only around a series."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    work()
    best = float("inf")
    for _ in range(3):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def same_results(table: Table, device: str) -> bool:
    """A row a comparison of GPU with CPU; whether all agree."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(4000) % 10
    centres = torch.randn(10, 128, generator=generator)
    x = (centres[y] + torch.randn(4000, 128, generator=generator)).relu()
    test = (centres[y[:1000]] + torch.randn(1000, 128, generator=generator)).relu()
    good = True

    def row(what: str, found: float, bound: float, unit: str) -> None:
        nonlocal good
        good &= found <= bound
        table.add_row(what, f"{found:.2e}", f"{bound:.0e}", unit, "ok" if found <= bound else "NO")

    for recipe in RECIPES:
        heads = [imprint(part, y.to(part.device), recipe) for part in (x, x.to(device))]
        cpu, gpu = heads[0](test), heads[1](test.to(device)).cpu()
        differ = (cpu.argmax(1) != gpu.argmax(1)).double().mean().item()
        # k-means may start from other points on another device, and end elsewhere.
        clustered = RECIPES[recipe]["gen"] == "kmeans"
        row(f"{recipe}: labels that differ", differ, 0.03 if clustered else 0.002, "share")
    found = abs(nc1(x.to(device), y.to(device)) / nc1(x, y) - 1)
    row("NC1", float(found), 1e-4, "relative")
    images = torch.randint(0, 256, (64, 3, 90, 120), dtype=torch.uint8, generator=generator)
    for precision, bound in (("32", 1e-3), ("bf16", 5e-2), ("16", 1e-2)):
        cpu = _backbone(precision="32")(images)
        gpu = _backbone(precision=precision).to(device)(images.to(device)).float().cpu()
        row(f"embeddings, precision {precision}", _distance(cpu, gpu), bound, "relative")
    for name, take in _takers(device).items():
        row(f"waits of 20 batches: {name}", _waits(take, images, device), 0, "batches")
    return good


def _takers(device: str) -> dict:
    sums = EmbeddingSums(resolve("ridge"), num_classes=10)
    metrics = TaskMetrics(10).to(device)
    return {
        "sums": sums.add,
        "embeddings": RowStore().add,
        "max_per_class": EmbeddingReservoir(100, 0, 10).add,
        "metrics": lambda embeddings, labels: metrics.add(embeddings[:, :10], labels, None),
    }


def _waits(take, images: Tensor, device: str) -> int:
    """In how many of 20 batches PyTorch saw the processor wait for the GPU."""
    backbone = _backbone(precision="32").to(device)
    labels = (torch.arange(len(images)) % 10).to(device)
    images, waits = images.to(device), 0
    with torch.no_grad():
        take(backbone(images), labels)
        for _ in range(20):
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            try:
                take(backbone(images), labels)
            except RuntimeError as error:
                if "synchronizing" not in str(error):
                    raise
                waits += 1
            finally:
                if device == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
    return waits


def roofline(table: Table, device: str, scale: int) -> None:
    """Rows: what is reached, the limit, their ratio."""
    images = torch.randint(0, 256, (BATCH, 3, SIZE, SIZE), dtype=torch.uint8, device=device)
    for precision, dtype in (("32", torch.float32), ("bf16", torch.bfloat16)):
        backbone = _backbone(precision=precision, image_size=SIZE).to(device)
        floats = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
        floats = floats.to(memory_format=torch.channels_last)

        @torch.no_grad()
        def bare(backbone=backbone, floats=floats, dtype=dtype):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                backbone.model(floats)

        @torch.no_grad()
        def embed(backbone=backbone):
            backbone(images)

        limit, reached = BATCH / seconds(bare, device, scale), BATCH / seconds(embed, device, scale)
        table.add_row(
            f"embed, {BACKBONE}, {precision}",
            f"{reached:,.0f} images/s",
            f"{limit:,.0f} (bare forward)",
            f"{reached / limit:.2f}",
        )
        batches = 16 * scale
        took = _fit_seconds(precision, batches, device)
        table.add_row(
            f"fit from memory, {BACKBONE}, {precision}",
            f"{batches * BATCH / took:,.0f} images/s",
            f"{limit:,.0f} (bare forward)",
            f"{batches * BATCH / took / limit:.2f}",
        )
    points = torch.nn.functional.normalize(torch.randn(20_000 * scale, 1024, device=device))
    target = torch.empty_like(points)
    copy = seconds(lambda: target.copy_(points), device)
    for engine in ("torch", "faiss"):
        try:
            took = seconds(lambda engine=engine: kmeans(points, 20, engine=engine), device, 2)
        except ImprintError as error:
            table.add_row(f"k-means, {engine}", "not here", str(error), "")
            continue
        rate = 2 * points.nbytes / 1e9
        table.add_row(
            f"k-means, {engine}, {len(points):,} × 1024, k=20",
            f"{rate / took:,.1f} GB/s, the points once",
            f"{rate / copy:,.0f} GB/s (copy)",
            f"{copy / took:.4f}",
        )


def _fit_seconds(precision: str, batches: int, device: str) -> float:
    """A fit of `qi`, with transfers, hooks, sums and the head; the second of two."""
    images = torch.randint(0, 256, (batches * BATCH, 3, SIZE, SIZE), dtype=torch.uint8)
    data = ArrayDataset(images, torch.arange(len(images)) % 10)
    pinned = device == "cuda"
    loader = DataLoader(data, BATCH, collate_fn=lambda batch: batch, pin_memory=pinned)
    model = ImprintedClassifier(_backbone(precision=precision, image_size=SIZE), "qi")
    return [fit(model, loader, "gpu" if pinned else "cpu") for _ in range(2)][1]


def _backbone(**options) -> Backbone:
    torch.manual_seed(0)
    return load_backbone(BACKBONE, pretrained=False, **options).eval()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu: try the script itself")
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        print("gpu-check: skipped, PyTorch sees no GPU here")
        return 0
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    console = Console(width=120)
    compared = Table("GPU against CPU", "found", "bound", "", "")
    good = same_results(compared, device)
    console.print(compared)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    limits = Table(name, "reached", "limit", "ratio")
    roofline(limits, device, 10 if device == "cuda" else 1)
    console.print(limits)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
