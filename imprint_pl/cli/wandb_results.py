"""Logs the results of a run to wandb besides its metrics: summary, tables of classes and
predictions, confusion matrix, and the proxy gallery. The commands add this callback for a
WandbLogger.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from imprint_pl.cli.summary import OF_LOADER
from imprint_pl.data.lightning_packages import both
from imprint_pl.errors import ImprintError
from imprint_pl.evaluation.classes import measure
from imprint_pl.evaluation.predictions import Predictions
from imprint_pl.evaluation.write import per_class_table, prediction_table
from imprint_pl.experiments.dashboard import FIGURES, tags_of
from imprint_pl.gallery import ImprintGallery
from imprint_pl.lightning.evaluation import Evaluation
from imprint_pl.lightning.predictions import PredictionKeeper

# Most classes of a confusion matrix: wandb stores a row for each cell, and a larger matrix could
# not be read.
MOST_CLASSES = 100
# Most rows of a table; wandb truncates longer tables.
MOST_PREDICTIONS = 10_000
# Paths of this machine, which are not sent.
KEPT_HERE = ("checkpoint", "weights")


class WandbResults(PredictionKeeper):
    """Keeps the predictions of a validation or test, and logs the results when `send` is called.

    Attributes:
        confusion: `(C, C)` int64 after an evaluation, on rank 0: row = true class, column =
            predicted class. With several loaders it is that of the first; all are logged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loggers: list[WandbLogger] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, both(WandbLogger))]
        self._loggers = cast(list[WandbLogger], loggers)

    @property
    def confusion(self) -> Tensor | None:
        first = next(iter(self.predictions.values()), None)
        return None if first is None else first.confusion.dense()

    def send(
        self,
        summary: dict[str, Any],
        gallery: ImprintGallery | None = None,
        with_images: bool = False,
        evaluation: Evaluation | None = None,
    ) -> None:
        """Logs what the run left behind.

        Args:
            summary: the result of `summarise`; its figures become wandb's summary, the rest its
                config. Paths of this machine are left out.
            gallery: the proxy gallery, logged as a table of numbers.
            with_images: log the gallery's picture as well. Training images then leave this machine.

            evaluation: its page and its pictures of errors are logged, which hold images and names
                of files.

        Raises:
            ImprintError: the picture is requested, but no gallery was drawn.
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
        tables: dict[str, Any] = {}
        several = len(self.predictions) > 1
        for number, found in self.predictions.items():
            suffix = f"{OF_LOADER}{number}" if several else ""
            tables |= {f"{name}{suffix}": table for name, table in _tables(found, suffix).items()}
        if gallery is not None and gallery.rows:
            tables["proxies"] = wandb.Table(
                columns=[*gallery.rows[0]], data=[[*row.values()] for row in gallery.rows]
            )
        if with_images:
            if gallery is None or gallery.path is None:
                raise ImprintError("no gallery was drawn: give --gallery wandb to a `fit`")
            tables["gallery"] = wandb.Image(str(gallery.path))
        for number, written in evaluation.written.items() if evaluation is not None else ():
            suffix = f"{OF_LOADER}{number}" if several else ""
            tables[f"evaluation{suffix}"] = wandb.Html(written.page.read_text())
            if written.errors is not None:
                tables[f"errors{suffix}"] = wandb.Image(str(written.errors))
        for logger in self._loggers:
            run = logger.experiment
            run.config.update(rest, allow_val_change=True)
            tags = tags_of(summary, "backbone", "task", "recipe")
            run.tags = tuple(dict.fromkeys([*(run.tags or ()), *tags]))
            if logger._wandb_init.get("name") is None:
                # Name the run as a sweep does, instead of by wandb's two random words.
                run.name = " · ".join(str(summary[n]) for n in ("recipe", "backbone", "task"))
            run.log(tables)
            run.summary.update(figures)


def _tables(found: Predictions, suffix: str) -> dict[str, Any]:
    """Returns the figures of each class, the confusion matrix and the predictions as wandb tables.

    Images are identified by their indices, so that names of files stay on this machine.
    """
    import wandb

    header, rows = per_class_table(measure(found))
    tables: dict[str, Any] = {"per_class": wandb.Table(columns=[*header], data=[*rows])}
    if len(found.class_names) <= MOST_CLASSES:
        tables["confusion_matrix"] = wandb.plot.confusion_matrix(
            y_true=found.labels.tolist(),
            preds=found.predicted.tolist(),
            class_names=found.class_names,
            title=f"Confusion matrix{suffix}",
        )
    if len(found) <= MOST_PREDICTIONS:
        header, samples = prediction_table(replace(found, names=None))
        tables["predictions"] = wandb.Table(columns=[*header], data=[*samples])
    return tables
