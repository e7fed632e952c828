"""What a fit leaves in wandb besides its metrics: summary, per-class table, confusion matrix, and
the proxy gallery. The commands add this callback where there is a WandbLogger.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from imprint_pl.cli.summary import OF_LOADER, per_class
from imprint_pl.data.batch import split_batch
from imprint_pl.data.lightning_packages import both
from imprint_pl.data.loaders import loader_at, sampler_length
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.dashboard import FIGURES, tags_of
from imprint_pl.gallery import ImprintGallery
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.training_set.store import RowStore

# Largest number of classes of a confusion matrix: wandb stores a row for each cell, and nobody
# could read a larger matrix.
MOST_CLASSES = 100
# Paths of this machine, which are not sent.
KEPT_HERE = ("checkpoint", "weights")


class WandbResults(Callback):
    """Keeps the predictions of a validation or test, and logs the results when `send` is called.

    Attributes:
        confusion: `(C, C)` int64 after an evaluation, on rank 0: row = true class, column =
            predicted class. With several loaders it is that of the first; all are logged.
    """

    def __init__(self) -> None:
        self.confusion: Tensor | None = None
        self._confusions: dict[str, Tensor] = {}
        self._loggers: list[WandbLogger] = []
        self._hook: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, both(WandbLogger))]
        self._loggers = cast(list[WandbLogger], loggers)

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stores: dict[int, RowStore] = {}
        self._scores: Tensor | None = None
        self.confusion, self._confusions = None, {}

        def keep(module: nn.Module, inputs: Any, scores: Tensor) -> None:
            self._scores = scores

        # The module's steps return nothing, so that the scores are read from the head's output.
        self._hook = _classifier(pl_module).head.register_forward_hook(keep)

    def _add(self, pl_module: LightningModule, batch: Any, number: int, loaders: Any) -> None:
        # None where the head was empty.
        if self._scores is not None:
            labels = _classifier(pl_module).labels_of_head(split_batch(batch)[1])
            if number not in self._stores:
                self._stores[number] = RowStore(sampler_length(loader_at(number, loaders)))
            self._stores[number].add(self._scores.argmax(1)[:, None].float(), labels)
            self._scores = None

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._remove_hook()
        C = _classifier(pl_module).head.num_classes
        for number, store in self._stores.items():
            gathered = store.gather()
            if gathered is None or not len(gathered[1]):
                continue
            predicted, labels = gathered[0][:, 0].long(), gathered[1]
            confusion = torch.bincount(labels * C + predicted, minlength=C * C).view(C, C)
            several = len(self._stores) > 1
            self._confusions[f"{OF_LOADER}{number}" if several else ""] = confusion
        self.confusion = next(iter(self._confusions.values()), None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(pl_module, batch, dataloader_idx, trainer.val_dataloaders)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(pl_module, batch, dataloader_idx, trainer.test_dataloaders)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module)

    def send(
        self,
        summary: dict[str, Any],
        model: ImprintedClassifier,
        gallery: ImprintGallery | None = None,
        with_images: bool = False,
    ) -> None:
        """Logs what the run left behind.

        Args:
            summary: what `summarise` returned; its figures become wandb's summary, the rest its
                config. Paths of this machine are left out.
            model: has the names and accuracies of the classes.
            gallery: what each proxy stands for, logged as a table of numbers.
            with_images: log the gallery's picture as well. Training images then leave this machine.

        Raises:
            ImprintError: the picture is wanted, and no gallery was drawn.
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
        if (accuracies := per_class(model)) is not None:
            tables["per_class"] = wandb.Table(
                columns=[*accuracies.columns], data=[*accuracies.rows]
            )
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
            tables["proxies"] = wandb.Table(
                columns=[*gallery.rows[0]], data=[[*row.values()] for row in gallery.rows]
            )
        if with_images:
            if gallery is None or gallery.path is None:
                raise ImprintError("no gallery was drawn: give --gallery wandb to a `fit`")
            tables["gallery"] = wandb.Image(str(gallery.path))
        for logger in self._loggers:
            run = logger.experiment
            run.config.update(rest, allow_val_change=True)
            tags = tags_of(summary, "backbone", "task", "recipe")
            run.tags = tuple(dict.fromkeys([*(run.tags or ()), *tags]))
            if logger._wandb_init.get("name") is None:
                # As in a sweep's runs, instead of two words that wandb draws.
                run.name = " · ".join(str(summary[n]) for n in ("recipe", "backbone", "task"))
            run.log(tables)
            run.summary.update(figures)


def _classifier(module: LightningModule) -> ImprintedClassifier:
    """The module that the commands run, which is always ours."""
    return cast(ImprintedClassifier, module)
