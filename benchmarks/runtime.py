"""How many images a second a backbone embeds in torch, ONNX Runtime and OpenVINO on this CPU.

    python benchmarks/runtime.py [--models NAME …] [--rounds 5] [--threads 2]

Random weights, batches of 32 images of 224 pixels, in turns in one process. "cold" is the time
until the first batch without a kept graph, "warm" with one. On a busy machine look at processor
time: the threads of torch wait for each other in a loop, which processor time counts too, so that
--threads 1 gives the most careful ratios. A runtime that is not installed is left out.
"""

import argparse
import importlib.util
import os
import tempfile
import time
import warnings

import torch
from rich.console import Console
from rich.table import Table

from imprint_pl.embedding.backbone import Backbone, load_backbone
from imprint_pl.embedding.runtime import gains

BATCH, SIZE = 32, 224
MODELS = (
    "efficientnet_lite0",
    "timm/efficientnet_b0",
    "torchvision/mobilenet_v3_large",
    "timm/convnext_tiny",
    "timm/vit_small_patch14_dinov2",
    "torchvision/resnet18",
    "torchvision/regnet_y_1_6gf",
    "torchvision/vit_b_16",
    "torchvision/swin_b",
)


def started(name: str, runtime: str, images: torch.Tensor) -> tuple[Backbone, float]:
    """A backbone that has embedded a batch, and the seconds from its loading on."""
    start = time.perf_counter()
    backbone = load_backbone(name, pretrained=False, image_size=SIZE, runtime=runtime)
    backbone(images)
    return backbone, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    others = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
    table = Table(title=f"{SIZE} pixels, batches of {BATCH}, {options.threads} threads")
    for column in ("backbone", "auto", "runtime", "cold s", "warm s", "images/s", "processor time"):
        table.add_column(column, justify="left" if column in ("backbone", "runtime") else "right")
    table.add_column("spread", justify="right")
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    for name in options.models:
        backbones, cold, warm = {}, {}, {}
        for runtime in ("torch", *others):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["IMPRINT_PL_GRAPHS"] = folder
                _, cold[runtime] = started(name, runtime, images)
                backbones[runtime], warm[runtime] = started(name, runtime, images)
        wall: dict[str, list[float]] = {runtime: [] for runtime in backbones}
        processor: dict[str, list[float]] = {runtime: [] for runtime in backbones}
        for _ in range(options.rounds):
            for runtime, backbone in backbones.items():
                start, used = time.perf_counter(), time.process_time()
                with torch.no_grad():
                    backbone(images)
                wall[runtime].append(time.perf_counter() - start)
                processor[runtime].append(time.process_time() - used)
        for runtime, backbone in backbones.items():
            pairs = zip(processor["torch"], processor[runtime], strict=True)
            ratios = sorted(torch_time / own for torch_time, own in pairs)
            table.add_row(
                name if runtime == "torch" else "",
                ("onnxruntime" if gains(backbone.model) else "torch") if runtime == "torch" else "",
                backbone.runtime.running,
                f"{cold[runtime]:.1f}",
                f"{warm[runtime]:.1f}",
                f"{BATCH / min(wall[runtime]):.0f}",
                f"{min(processor['torch']) / min(processor[runtime]):.2f}",
                f"{ratios[0]:.2f}-{ratios[-1]:.2f}",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
