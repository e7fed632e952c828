"""What a fit leaves in wandb besides its metrics: summary, per-class table, confusion matrix, and
the proxy gallery. The commands add it where there is a WandbLogger.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from imprint_pl.cli.summary import OF_LOADER, per_class
from imprint_pl.data.batch import split_batch
from imprint_pl.data.lightning_packages import both
from imprint_pl.data.loaders import loader_at, sampler_length
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.dashboard import FIGURES
from imprint_pl.gallery import ImprintGallery
from imprint_pl.training_set.store import RowStore

# wandb draws a matrix from a row a cell; above that nobody could read it.
MOST_CLASSES = 100
# Paths of this machine.
KEPT_HERE = ("checkpoint", "weights")


class WandbResults(Callback):
    """Keeps the predictions of a validation or test, and logs the results when asked.

    Attributes:
        confusion: `(C, C)` int64 after an evaluation, on rank 0: row = true class, column =
            predicted. Of several loaders that of the first; a matrix of each is logged.
    """

    def __init__(self) -> None:
        self.confusion: Tensor | None = None
        self._confusions: dict[str, Tensor] = {}
        self._loggers: list[WandbLogger] = []
        self._hook = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loggers = [x for x in trainer.loggers if isinstance(x, both(WandbLogger))]

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stores: dict[int, RowStore] = {}
        self._scores, self.confusion, self._confusions = None, None, {}

        def keep(module, inputs, scores):
            self._scores = scores

        # The module's steps return nothing: the scores are taken where the head gives them.
        self._hook = pl_module.head.register_forward_hook(keep)

    def _add(self, pl_module: LightningModule, batch: Any, number: int, loaders: Any) -> None:
        # None where the head was empty.
        if self._scores is not None:
            labels = pl_module.labels_of_head(split_batch(batch)[1])
            if number not in self._stores:
                self._stores[number] = RowStore(sampler_length(loader_at(number, loaders)))
            self._stores[number].add(self._scores.argmax(1)[:, None].float(), labels)
            self._scores = None

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hook.remove()
        C = pl_module.head.num_classes
        for number, store in self._stores.items():
            gathered = store.gather()
            if gathered is None or not len(gathered[1]):
                continue
            predicted, labels = gathered[0][:, 0].long(), gathered[1]
            confusion = torch.bincount(labels * C + predicted, minlength=C * C).view(C, C)
            several = len(self._stores) > 1
            self._confusions[f"{OF_LOADER}{number}" if several else ""] = confusion
        self.confusion = next(iter(self._confusions.values()), None)

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self._hook is not None:
            self._hook.remove()

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer, pl_module) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._add(pl_module, batch, dataloader_idx, trainer.val_dataloaders)

    def on_test_batch_end(
        self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0
    ) -> None:
        self._add(pl_module, batch, dataloader_idx, trainer.test_dataloaders)

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self._end(trainer, pl_module)

    def on_test_epoch_end(self, trainer, pl_module) -> None:
        self._end(trainer, pl_module)

    def send(
        self,
        summary: dict[str, Any],
        model: LightningModule,
        gallery: ImprintGallery | None = None,
        with_images: bool = False,
    ) -> None:
        """Logs what the run left behind.

        Args:
            summary: of `run.summarise`; its figures become wandb's summary, the rest its config.
                Paths of this machine stay here.
            model: for the classes' names and accuracies.
            gallery: what each proxy stands for; as a table of numbers.
            with_images: log the gallery's picture as well. Training images then leave this machine.
        """
        import wandb

        figures = {
            name: value
            for name, value in summary.items()
            if name.split(OF_LOADER)[0] in FIGURES and value is not None
        }
        rest = {
            name: value
            for name, value in summary.items()
            if name not in figures and name not in KEPT_HERE and value is not None
        }
        head = model.head
        names = [head.name_of(label) for label in range(head.num_classes)]
        tables: dict[str, Any] = {}
        if model.class_accuracy is not None:
            columns, rows = per_class(model)
            tables["per_class"] = wandb.Table(columns=columns, data=rows)
        for suffix, confusion in self._confusions.items() if len(names) <= MOST_CLASSES else ():
            true, predicted = confusion.nonzero().T
            times = confusion[true, predicted]
            tables[f"confusion_matrix{suffix}"] = wandb.plot.confusion_matrix(
                y_true=true.repeat_interleave(times).tolist(),
                preds=predicted.repeat_interleave(times).tolist(),
                class_names=names,
                title=f"Confusion matrix{suffix}",
            )
        if gallery is not None and gallery.rows:
            rows = [[row[name] for name in gallery.rows[0]] for row in gallery.rows]
            tables["proxies"] = wandb.Table(columns=list(gallery.rows[0]), data=rows)
        if with_images:
            if gallery is None or gallery.path is None:
                raise ImprintError("no gallery was drawn: give --gallery wandb to a `fit`")
            tables["gallery"] = wandb.Image(str(gallery.path))
        for logger in self._loggers:
            run = logger.experiment
            run.config.update(rest, allow_val_change=True)
            run.tags = (*(run.tags or ()), *_tags(summary, run.tags or ()))
            run.log(tables)
            run.summary.update(figures)


def _tags(summary: dict[str, Any], known: tuple) -> list[str]:
    tags = [str(summary[name])[:64] for name in ("backbone", "task", "recipe")]
    return [tag for tag in dict.fromkeys(tags) if tag not in known]
