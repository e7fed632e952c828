"""Writes the files that `test_old_files.py` reads. They were written by the version of 2026-11-26,
before its modules moved to other places; a newer version must read them, so do not write them anew.

    python tests/old_files/write.py tests/old_files
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from imprint_pl import ImprintedClassifier, imprint
from imprint_pl.cli import main
from imprint_pl.data import ArrayDataset, ImageDataModule, Splits
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone

# Keywords of the classifier, and what is kept beside its checkpoint.
FITS = {
    "qi": dict(recipe="qi", keep="moments"),
    "kernel": dict(recipe="kernel", projection_dim=12, keep="embeddings", accept=0.9),
    "ranpac": dict(recipe="ranpac", keep="embeddings"),
    "knn": dict(recipe="knn", m=3),
}
SWEEP = """\
name: old
data: [{{name: points, embeddings: {embeddings}}}]
seeds: [0, 1]
grid:
  - recipe: [qi, ridge, knn]
  - {{recipe: robust, k: [1, 2]}}
"""


class Doubled(nn.Module):
    """A backbone that takes float images as embeddings."""

    def forward(self, x):
        return 2 * x.flatten(1).float()


class Squares(ImageDataModule):
    """12 grey images of 2 x 2 pixels in 3 classes."""

    name = "Squares"

    def load(self):
        images = torch.arange(48, dtype=torch.uint8).view(12, 1, 2, 2)
        labels = torch.arange(12) % 3
        train, test = (
            ArrayDataset(images[part], labels[part]) for part in (slice(9), slice(9, 12))
        )
        return Splits(["a", "b", "c"], train, test)


def backbone():
    """Reads the squares."""
    preprocess = {"size": 2, "mean": [0.0] * 3, "std": [1.0] * 3}
    return load_backbone(Doubled(), preprocess=preprocess)


def points():
    """60 embeddings of 6 numbers in 3 classes."""
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(60) % 3
    return 3 * torch.eye(3, 6)[y] + 2 * torch.randn(60, 6, generator=generator), y


def write(folder: Path) -> None:
    x, y = points()
    logits = {}
    for name, keywords in FITS.items():
        model = ImprintedClassifier(Doubled(), **keywords)
        trainer = Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(model, DataLoader(TensorDataset(x, y), 20))
        trainer.save_checkpoint(folder / f"{name}.ckpt")
        if "keep" in keywords:
            model.save_state(folder / f"{name}.ckpt")
        logits[name] = model(x).detach()
    head = imprint(x, y, "whitened", class_names=["a", "b", "c"])
    head.save_pretrained(folder / "head")
    logits["head"] = head(x).detach()
    save_file(logits, folder / "logits.safetensors")
    embed(backbone(), Squares(), folder / "cache", name="doubled", device="cpu")
    embeddings = folder / "points.safetensors"
    parts = {"train": slice(45), "test": slice(45, 60)}
    arrays = {f"{name}_embeddings": x[part].contiguous() for name, part in parts.items()}
    arrays |= {f"{name}_labels": y[part].contiguous() for name, part in parts.items()}
    save_file(arrays, embeddings)
    config = folder / "sweep.yaml"
    config.write_text(SWEEP.format(embeddings=embeddings))
    assert main(["sweep", "--config", str(config), "--results_dir", str(folder / "results")]) == 0


if __name__ == "__main__":
    write(Path(sys.argv[1]))
