"""The callback `Evaluation`: writes the results of a validation or test into the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.batch_hooks import datamodule_of
from imprint_pl.data.facts import DataFacts
from imprint_pl.data.lightning_packages import both, callbacks_of, is_fast_dev_run
from imprint_pl.data.loaders import loader_at
from imprint_pl.evaluation.page import Run
from imprint_pl.evaluation.pictures import Thumbnails, of_dataset, of_files
from imprint_pl.evaluation.write import Written, write_evaluation
from imprint_pl.gallery import ImprintGallery
from imprint_pl.lightning.metrics import places_of, stage_of
from imprint_pl.lightning.predictions import PredictionKeeper, in_order
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.recipes import AUTO
from imprint_pl.numerics.labels import names_of
from imprint_pl.numerics.measures import ACCURACY, compared_by
from imprint_pl.parts.gen import GENERATORS, Ridge
from imprint_pl.parts.gen.ridge import BY_LABELS

WHAT = {"val": "validation", "test": "test"}
# Logged figures and their names on the page.
LOGGED = {
    "calibration_error": "calibration error (ECE)",
    "outsiders_auroc": "AUROC against outsiders",
    "accepted": "own images accepted",
    "rejected": "outsiders rejected",
}


class Evaluation(PredictionKeeper):
    """Writes an evaluation when a `fit`, `validate` or `test` ends.

    The files are `predictions.csv` (the columns of the command `predict`, and the true class),
    `per_class.csv`, `confusion_matrix.csv` and `.png`, `errors.png` (the errors of which the head
    is most certain) and `evaluation.html`, a page that shows all of it and recommends a next step.
    They are written into the folder of the Trainer's first logger, or without a logger into
    `evaluation/` in its `default_root_dir`. With several loaders they are in `dataloader_idx_0/`,
    …; those of a `test` after a fit with the same callback are in `test/`. Images are not embedded
    again. A TensorBoard logger gets the confusion matrix.

    It works for `ImprintedClassifier`, and for any LightningModule that has one `ImprintedHead` and
    takes batches `(images, labels)`.

    Args:
        images: a data module with the images, if the Trainer's data are embeddings.
        folder: the folder for the files. Default: the run's folder.

    Attributes:
        written: on rank 0, for each loader by its number: the figures, and the paths of the files.
    """

    def __init__(self, images: ImageDataModule | None = None, folder: str | None = None) -> None:
        super().__init__()
        self.images = images
        self.folder = folder
        self.written: dict[int, Written] = {}
        # The stage whose files are in a folder.
        self._used: dict[Path, str] = {}
        # Keep the stage, since the Trainer no longer knows it when the files are written.
        self._stage = "val"
        self._loaders: Any = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super()._start(trainer, pl_module)
        if not trainer.sanity_checking:
            self.written = {}
            self._stage = stage_of(trainer)
            self._loaders = getattr(trainer, f"{self._stage}_dataloaders")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Within a fit wait for its end, since there may be another validation.
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # `log_dir` is a broadcast, so every rank must read it. Without a logger that has a folder
        # for the run, it is a folder that other runs share.
        own = trainer.log_dir
        own = own if getattr(trainer.logger, "log_dir", None) else None
        predictions, self.predictions = self.predictions, {}
        if not trainer.is_global_zero or is_fast_dev_run(trainer):
            return
        if not predictions:
            rank_zero_info("no evaluation is written: no head was measured on any image")
            return
        # In a shared folder use a subfolder, since the files have common names.
        folder = Path(self.folder or own or Path(trainer.default_root_dir, "evaluation"))
        if self._used.setdefault(folder, self._stage) != self._stage:
            folder = folder / WHAT[self._stage]
        head = next(module for module in pl_module.modules() if isinstance(module, ImprintedHead))
        several = isinstance(self._loaders, list | tuple | dict) and len(self._loaders) > 1
        for number, found in predictions.items():
            suffix = f"dataloader_idx_{number}" if several else ""
            loader = loader_at(number, self._loaders)
            self.written[number] = write_evaluation(
                folder / suffix,
                _run(trainer, pl_module, head, self._stage, suffix),
                found,
                _trained(trainer, head),
                self._thumbnails(loader, found.names, len(found)),
                _gallery(trainer),
            )
            _to_tensorboard(trainer, self.written[number].confusion, self._stage, suffix)

    def _thumbnails(self, loader: Any, files: list[str] | None, count: int) -> Thumbnails | None:
        if files is not None:
            return of_files(files)
        if not in_order(loader):
            return None
        found = of_dataset(loader.dataset)
        if found is None and self.images is not None:
            self.images.setup()
            dataset = getattr(self.images, f"{self._stage}_dataset")
            found = of_dataset(dataset) if len(dataset) >= count else None
        return found


def _run(
    trainer: Trainer, pl_module: LightningModule, head: ImprintedHead, stage: str, suffix: str
) -> Run:
    data = datamodule_of(trainer)
    facts = []
    if callable(source := getattr(getattr(pl_module, "backbone", None), "source", None)):
        facts.append(str(source()["name"]))
    recipe = str(head.settings.get("recipe", ""))
    facts += [f"auto chose {recipe}" if head.tried else recipe] if recipe else []
    facts.append(f"{len(head.proxies):,} proxies for {head.num_classes:,} classes")
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    end = f"/{suffix}" if suffix else ""
    figures = {
        shown: f"{logged[key]:.3f}" if "auroc" in name else f"{100 * logged[key]:.1f} %"
        for name, shown in LOGGED.items()
        if (key := f"{stage}/{name}{end}") in logged
    }
    if "train/nc1" in logged:
        figures["NC1 of the training images"] = f"{logged['train/nc1']:.3f}"
    name = str(getattr(data, "task", type(data or pl_module).__name__))
    name = f"{name}, loader {suffix.rsplit('_', 1)[1]}" if suffix else name
    # Show the candidates of `auto` only after a fit: those of an earlier fit may be for other data.
    tried = head.tried if trainer.state.fn == "fit" else []
    return Run(name, WHAT[stage], facts, figures, tried, balance_of(head))


def balance_of(head: ImprintedHead) -> str:
    """Return settings, as YAML, with which another fit would treat small classes better.

    The text is empty if the recipe takes no such settings, or they are in use already.
    """
    settings = head.settings
    by_auto = settings.get("chosen_by") == AUTO
    if settings.get("gen") == "lda" and not by_auto:
        return "prior: uniform" if settings.get("prior") == "empirical" else ""
    is_ridge = GENERATORS.get(settings.get("gen", "")) is Ridge
    metric = settings.get("metric", compared_by(head.tried))
    chooses = by_auto or (is_ridge and settings.get("lam") in BY_LABELS)
    # Both settings together improve the recall of small classes more than either alone. `ls` gives
    # class means equal weights anyway; with class weights the recall is lower.
    found = ["class_weight: balanced"] * (by_auto or is_ridge) * ("class_weight" not in settings)
    found += ["metric: balanced_accuracy"] * chooses * (metric == ACCURACY)
    return " and ".join(found)


def _trained(trainer: Trainer, head: ImprintedHead) -> Tensor | None:
    """Return the number of training images of each class of the head, `(C,)`; `None` if unknown.

    It is unknown in a test of a checkpoint, which may have been fitted on other data.
    """
    if trainer.state.fn != "fit":
        return None
    data = datamodule_of(trainer)
    counts = DataFacts(data).class_counts
    if counts is None:
        return None
    counts = torch.as_tensor(counts).long().cpu()
    places = places_of(names_of(data), head)
    places = torch.arange(len(counts)) if places is None else places
    if len(counts) != len(places) or len(counts) > head.num_classes:
        return None
    return torch.zeros(head.num_classes, dtype=torch.int64).index_add(0, places, counts)


def _gallery(trainer: Trainer) -> Path | None:
    drawn = [c.path for c in callbacks_of(trainer) if isinstance(c, ImprintGallery) and c.path]
    return drawn[-1] if drawn and trainer.state.fn == "fit" else None


def _to_tensorboard(trainer: Trainer, confusion: Path | None, stage: str, suffix: str) -> None:
    from PIL import Image

    name = f"{stage}/confusion_matrix{f'/{suffix}' if suffix else ''}"
    for logger in trainer.loggers:
        if confusion is not None and isinstance(logger, both(TensorBoardLogger)):
            pixels = np.asarray(Image.open(confusion).convert("RGB"))
            writer: Any = cast(TensorBoardLogger, logger).experiment
            writer.add_image(name, pixels, trainer.global_step, dataformats="HWC")
