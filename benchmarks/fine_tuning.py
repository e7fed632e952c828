"""Fine-tuning from an imprinted head: accuracy at rest, and after each epoch.

    python benchmarks/fine_tuning.py [--root ../shared/data] [--quick] [--tasks digits …]
        [--images 2000] [--image_size 96] [--seeds 3] [--epochs 3] [--out FILE.csv]

The module is EfficientNet-Lite0 with a linear layer behind it, all weights trained by cross-entropy
in batches of 32, with mirrored images for photographs; or, for "small network", two convolutions
with fresh batch norm on 800 digits of 8 x 8 pixels. It starts from

- a random layer;
- an imprinted head, `ImprintCallback("fc")`;
- an imprinted head that is kept, with `freeze_batch_norm=True` and `backbone_lr=1e-5`;
- a linear layer that was trained on the frozen embeddings for 20 epochs, by AdamW with a learning
  rate of 1e-3: linear probing, then fine-tuning (LP-FT, Kumar et al. 2022);
- the same layer, kept likewise.

AdamW has learning rates of 1e-3 and 1e-4, SGD with momentum 0.9 of 1e-2 and 1e-3. Accuracies are
those of 500 test images, means over the seeds. Other seeds mean another order of the training
images. All of it takes hours on a CPU. `--quick` takes
some minutes: 200 training images of 64 pixels, 100 test images, one epoch, one seed, the digits.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from imprint_pl import ImprintCallback
from imprint_pl.data import CIFAR10, Digits, ImageFolder
from imprint_pl.data.base import ImageDataModule
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.lightning.fine_tuning import BACKBONE_LR, batch_norms, freeze, limited
from imprint_pl.numerics.draws import sample

TASKS: dict[str, Callable[[str], ImageDataModule]] = {
    "TrashNet": lambda root: ImageFolder(f"{root}/trashnet"),
    "CIFAR-10": lambda root: CIFAR10(root, download=False),
    "digits": lambda root: Digits(),
    "small network": lambda root: Digits(),
}
# Text cannot be mirrored.
MIRRORED = ("TrashNet", "CIFAR-10")
OPTIMIZERS = (("AdamW", 1e-3), ("AdamW", 1e-4), ("SGD", 1e-2), ("SGD", 1e-3))
STARTS = ("random", "imprinted", "imprinted, kept", "probed", "probed, kept")
PROBE_EPOCHS = 20


class Task(NamedTuple):
    """Preprocessed images `(N, 3, s, s)` and labels `(N,)`."""

    x: Tensor
    y: Tensor
    new_x: Tensor
    new_y: Tensor
    mirrored: bool
    body: Callable[[], nn.Module]


def pretrained(size: int) -> nn.Module:
    """Images of a size to embeddings `(B, 1280)`."""
    return load_backbone("efficientnet_lite0", image_size=size).model.requires_grad_(True)


def small() -> nn.Module:
    """A network that was never trained: images `(B, 1, 8, 8)` to embeddings `(B, 64)`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


class Classifier(LightningModule):
    """A module as users have it: a backbone, a linear layer, an optimizer of all weights."""

    def __init__(self, task: Task, optimizer: str, rate: float) -> None:
        super().__init__()
        self.body = task.body()
        with torch.no_grad():
            width = self.body.eval()(task.x[:1]).shape[1]
        self.fc = nn.Linear(width, int(task.y.max()) + 1)
        self.task, self.optimizer, self.rate = task, optimizer, rate
        self.accuracies: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        if self.task.mirrored:
            mirrored = torch.rand(len(x), device=x.device) < 0.5
            x = x.flip(-1).where(mirrored[:, None, None, None], x)
        return functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), self.rate)

    def on_train_start(self) -> None:
        self.measure()

    def on_train_epoch_end(self) -> None:
        self.measure()

    @torch.no_grad()
    def measure(self) -> None:
        modes = [(part, part.training) for part in self.modules()]
        self.eval()
        logits = torch.cat([self(x) for x in self.task.new_x.to(self.device).split(128)])
        right = logits.argmax(1).cpu() == self.task.new_y
        self.accuracies.append(100 * right.double().mean().item())
        for part, mode in modes:
            part.training = mode


class Kept(Callback):
    """What `freeze_batch_norm` and `backbone_lr` do, for a layer that was not imprinted."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self.limit = limited(
            trainer.optimizers, pl_module, pl_module.fc, pl_module.task.backbone_lr
        )
        self.limit.__enter__()

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, *args: Any) -> None:
        freeze(batch_norms(pl_module))


def probe(module: Classifier) -> None:
    """Trains the linear layer on the frozen embeddings."""
    task = module.task
    with torch.no_grad():
        module.eval()
        z = torch.cat([module.body(x) for x in task.x.split(128)])
        module.train()
    optimizer = torch.optim.AdamW(module.fc.parameters(), 1e-3)
    for _ in range(PROBE_EPOCHS):
        for rows in torch.randperm(len(z)).split(32):
            functional.cross_entropy(module.fc(z[rows]), task.y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()


def run(task: Task, start: str, optimizer: str, rate: float, seed: int, epochs: int) -> list[float]:
    """The accuracies at rest and after each epoch, in percent."""
    seed_everything(seed, verbose=False)
    module = Classifier(task, optimizer, rate).train()
    kind, _, kept = start.partition(", ")
    callbacks: list[Callback] = []
    if kind == "imprinted":
        keep: dict[str, Any] = dict(freeze_batch_norm=True, backbone_lr=BACKBONE_LR)
        callbacks = [ImprintCallback("fc", **(keep if kept else {}))]
    elif kept:
        callbacks = [Kept()]
    if kind == "probed":
        probe(module)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(TensorDataset(task.x, task.y), 32, shuffle=True, drop_last=True)
    trainer.fit(module, loader)
    return module.accuracies


def load(name: str, root: str, images: int, tested: int, size: int) -> Task:
    """Up to so many training images and test images, drawn with a fixed seed."""
    data = TASKS[name](root)
    data.prepare_data()
    data.setup()
    own: Any = load_backbone("efficientnet_lite0", image_size=size, pretrained=False).preprocess
    preprocess, body = own, partial(pretrained, size)
    if name == "small network":
        images, body = 800, small

        def preprocess(batch: list[Tensor]) -> Tensor:
            return torch.stack(batch).float() / 255

    parts: list[Tensor] = []
    for split, most in (("train", images), ("test", tested)):
        dataset: Any = data._dataset(split)
        rows = sample(len(dataset), min(most, len(dataset)), 0)
        batch = [dataset[int(row)] for row in rows]
        parts.append(torch.cat([preprocess([image]) for image, _ in batch]))
        parts.append(torch.tensor([int(label) for _, label in batch]))
    return Task(*parts, mirrored=name in MIRRORED, body=body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="../shared/data")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=list(STARTS))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--test_images", type=int, default=500)
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.test_images, arguments.image_size = 200, 100, 64
        arguments.tasks, arguments.seeds, arguments.epochs = ["digits"], 1, 1
    # What Lightning and the callback say in each of the runs.
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows: list[list[Any]] = []
    cells = [(o, rate, start) for o, rate in OPTIMIZERS for start in arguments.starts]
    for name in arguments.tasks:
        try:
            sizes = arguments.images, arguments.test_images, arguments.image_size
            task = load(name, arguments.root, *sizes)
        except Exception as error:
            print(f"{name} is left out: {error}")
            continue
        for optimizer, rate, start in tqdm(cells, name, delay=2):
            found = [
                run(task, start, optimizer, rate, seed, arguments.epochs)
                for seed in range(arguments.seeds)
            ]
            means = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
            rows.append([name, f"{optimizer} {rate:g}", start, *(f"{m:.1f}" for m in means)])
            if arguments.out:
                with arguments.out.open("a", newline="") as file:
                    csv.writer(file).writerow(rows[-1])
    epochs = [f"after {epoch + 1}" for epoch in range(arguments.epochs)]
    table = Table("task", "optimizer", "start", "at rest", *epochs)
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
