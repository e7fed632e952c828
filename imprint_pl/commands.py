"""`fit`, `validate`, `test`, `predict`: LightningCLI with our defaults and our run folder."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import imprint_pl.data  # noqa: F401  (makes the data sets known by their short names)
from imprint_pl.errors import ImprintError
from imprint_pl.module import ImprintedClassifier
from imprint_pl.run import PredictionWriter, print_summary, summarise, write_summary

DESCRIPTIONS = {
    "fit": "Imprint a head on the training images in one epoch, and measure it.",
    "validate": "Measure a checkpoint on the validation images.",
    "test": "Measure a checkpoint on the test images.",
    "predict": "Label the images of a data set, of files or of folders; writes a CSV.",
}


def run(argv: list[str]) -> None:
    """Parses and runs one command."""
    _quieten()
    try:
        ImprintCLI(
            ImprintedClassifier,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_epochs": 1,
                # The head is empty before the epoch, and nothing is trainable.
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            parser_kwargs={
                command: {"description": text} for command, text in DESCRIPTIONS.items()
            },
            args=argv,
        )
    except MisconfigurationException as error:
        raise ImprintError(str(error)) from error


class ImprintCLI(LightningCLI):
    """Adds to LightningCLI: the run folder with its summary, files to predict, and a command line
    that beats a checkpoint's hyperparameters."""

    def add_core_arguments_to_parser(self, parser) -> None:
        # `data` is not required: `predict --images` does without.
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": v for name, v in self.trainer_defaults.items()})
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(
            self._datamodule_class, "data", subclass_mode=True, required=False
        )

    def _prepare_subcommand_parser(self, klass, subcommand, **kwargs):
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--images", nargs="+", type=str, help="Image files, folders or globs to label."
            )
            parser.add_argument(
                "--output", type=str, help="The CSV to write (default: in the run's folder)."
            )
            parser.set_defaults({"return_predictions": False})
        elif subcommand != "fit":
            parser.set_defaults({"verbose": False})
        return parser

    def parse_arguments(self, parser, args) -> None:
        self.config = parser.parse_args(args)
        self.given = parser.parse_args(args, defaults=False)

    def _parse_ckpt_path(self) -> None:
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path")
        if not path:
            return
        if not Path(path).is_file():
            raise ImprintError(f"--ckpt_path {path}: there is no such file")
        try:
            checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            saved = dict(checkpoint["hyper_parameters"])
        except Exception as error:
            raise ImprintError(
                f"--ckpt_path {path}: not a checkpoint of ImprintedClassifier ({error})"
            ) from error
        # LightningCLI lets the file's hyperparameters win; a user who types one means it.
        given = self.given[command].get("model") or {}
        model = {
            name: value
            for name, value in saved.items()
            if not name.startswith("_") and name not in given
        }
        self.config = self.parser.parse_object({command: {"model": model}}, self.config)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        images = config.get("images")
        if images:
            config["data"] = self._parser(self.subcommand).parse_object(
                {"data": {"class_path": "ImageFiles", "init_args": {"paths": images}}}
            )["data"]
        if not config.get("data"):
            cure = "or --images FILE …" if self.subcommand == "predict" else "with --data.root …"
            raise ImprintError(
                "no data: give --data Digits (or MNIST, FashionMNIST, CIFAR10, ImageFolder "
                f"{cure}), or a --config that does"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        logger = config.get("logger")
        # A local CSV is always written, whatever else is asked for; first, so that its folder is
        # the run's.
        if logger is not False:
            given = logger if isinstance(logger, list) else [logger]
            loggers = [entry for entry in given if entry not in (None, True)]
            if not any(isinstance(entry, CSVLogger) for entry in loggers):
                name = type(self.datamodule).__name__
                loggers.insert(0, CSVLogger(config.get("default_root_dir") or "runs", name=name))
            kwargs["logger"] = sorted(loggers, key=lambda entry: not isinstance(entry, CSVLogger))
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        if self.subcommand == "predict":
            self.writer = PredictionWriter(self._get(self.config, "output"))
            callbacks.append(self.writer)
        if self.subcommand != "fit":
            kwargs["enable_checkpointing"] = False
        elif config.get("enable_checkpointing") is not False and not any(
            isinstance(callback, ModelCheckpoint) for callback in callbacks
        ):
            # Lightning's own name, epoch=0-step=1, says nothing here.
            callbacks.append(ModelCheckpoint(filename="imprinted"))
        kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        self._finish("val")

    def after_validate(self) -> None:
        self._finish("val")

    def after_test(self) -> None:
        self._finish("test")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            print(f"{self.writer.count:,} predictions: {self.writer.path}")

    def _finish(self, stage: str) -> None:
        folder = self.trainer.log_dir
        if not self.trainer.is_global_zero:
            return
        summary = summarise(self.trainer, self.model, stage)
        if self.trainer.fast_dev_run:
            print_summary(summary)
            print("run: none (fast_dev_run keeps nothing)")
            return
        folder = Path(folder or self.trainer.default_root_dir)
        write_summary(folder, summary, self.model)
        print_summary(summary)
        print(f"run: {folder}")


def _quieten() -> None:
    """Leaves out what Lightning says on every run and nobody can act on."""
    for message in (
        # Ours serve images from memory, or start workers themselves.
        ".*does not have many workers.*",
        # Ours count each sample once.
        ".*it is recommended to use .*devices=1.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    advertisements = ("💡 Tip", "TPU available", "HPU available", "`Trainer.fit` stopped")
    return not record.getMessage().startswith(advertisements)
