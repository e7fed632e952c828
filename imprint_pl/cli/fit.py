"""`fit`, `validate`, `test`, `predict`, `embed`: LightningCLI with our defaults and run folder."""

from __future__ import annotations

import csv
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, Literal, Optional, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from imprint_pl.cli.arguments import PROGRAM
from imprint_pl.cli.fit_parser import Parser, named_parts
from imprint_pl.cli.predictions import PredictionWriter
from imprint_pl.cli.summary import print_summary, print_weakest, summarise, write_summary
from imprint_pl.cli.wandb_results import WandbResults
from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.folders import ImageFiles
from imprint_pl.data.lightning_packages import run_folder
from imprint_pl.embedding import embed
from imprint_pl.errors import ImprintError
from imprint_pl.explain import explain_files
from imprint_pl.files import local_path
from imprint_pl.gallery import ImprintGallery
from imprint_pl.lightning.checkpoint import hyperparameters, read_checkpoint
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.lightning.evaluation import Evaluation
from imprint_pl.lightning.outsiders import Outsiders
from imprint_pl.method.recipes import KEYWORDS, drop_unused
from imprint_pl.numerics.large import within_budget
from imprint_pl.parts.by_name import import_parts, keywords_of_parts
from imprint_pl.training_set.kept_file import read_state, state_path

# How many of the skipped images the terminal lists.
UNREADABLE_SHOWN = 10
# The folder of all runs, where no other is given.
RUNS = "runs"
USAGE = "[--config FILE.yaml] [--data NAME] [--data.…] [--model.…] [--trainer.…]"
DESCRIPTIONS = {
    "fit": "Imprint a head on the training images in one epoch, and measure it.",
    "validate": "Measure a checkpoint on the validation images.",
    "test": "Measure a checkpoint on the test images.",
    "predict": "Label the images of a data set, of files or of folders; writes a CSV.",
}
EMBED = (
    "Fill the embedding cache with the images that `fit` would embed. Takes the options of fit, so "
    "that one configuration serves both."
)


def run(argv: list[str], cli: type[ImprintCLI] | None = None, description: str = "") -> None:
    """Runs one command.

    Args:
        argv: the name of the command and its arguments.
        cli: the class that runs a command which is not in `DESCRIPTIONS`, with the options of fit.
        description: the description of that command.
    """
    _quieten()
    command = argv[0]
    descriptions = {name: (name, text) for name, text in DESCRIPTIONS.items()}
    if command == "embed":
        cli, description = EmbedCLI, EMBED
    if cli is not None:
        argv = ["fit", *argv[1:]]
        descriptions["fit"] = (command, description)
    try:
        (cli or ImprintCLI)(
            ImprintedClassifier,
            LightningDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "max_epochs": 1,
                # Do not validate before the epoch, since the head is still empty.
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            parser_kwargs={"prog": PROGRAM}
            | {
                command: {"description": text, "usage": f"{PROGRAM} {name} {USAGE}"}
                for command, (name, text) in descriptions.items()
            },
            parser_class=Parser,
            args=argv,
        )
    except MisconfigurationException as error:
        raise ImprintError(str(error)) from error
    except SIGTERMException as error:
        # Lightning would exit with status 0.
        raise ImprintError(f"SIGTERM has ended `{command}` before its end: run it again") from error
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # Lightning does this for nccl only. Threads of gloo that still run when Python exits may
        # abort the process.
        torch.distributed.destroy_process_group()


class ImprintCLI(LightningCLI):
    """LightningCLI with a run folder and summary, files to predict, and a command line that
    overrides a checkpoint's hyperparameters."""

    # Set by `instantiate_classes`; LightningCLI does not declare the types.
    model: ImprintedClassifier
    datamodule: Any

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # In --help, show the model's options first and the Trainer's many options last.
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": v for name, v in self.trainer_defaults.items()})

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.add_argument(
            "--on_error",
            type=str,
            help="With image files: fail at one that cannot be read (default), or skip it; short "
            "for --data.on_error.",
        )
        if subcommand == "predict":
            parser.add_argument(
                "--images", nargs="+", type=str, help="Image files, folders or globs to label."
            )
            parser.add_argument(
                "--output",
                type=str,
                help="File to write: .csv, .json or .jsonl (default: a CSV in the run's folder).",
            )
            parser.add_argument(
                "--top", type=int, default=1, help="Write so many classes an image, best first."
            )
            parser.add_argument(
                "--sort_into",
                type=str,
                help="Folder to copy the images into, a folder for each class.",
            )
            parser.add_argument(
                "--coverage",
                type=float | None,
                default=None,
                help="Write for each image the classes that hold the truth with this probability.",
            )
            parser.add_argument(
                "--explain",
                type=str,
                help="Folder for explanations of the images: explanations.json and a PNG each.",
            )
            parser.set_defaults({"return_predictions": False})
        elif subcommand == "fit":
            parser.add_argument(
                "--cache_dir",
                type=str,
                help="Folder of the embedding cache: images are embedded once and read afterwards.",
            )
            parser.add_argument(
                "--gallery",
                type=Literal["file", "wandb"] | None,
                help="Draw what each proxy stands for into the run's folder; with wandb log the "
                "pictures there too: they leave this machine.",
            )
        else:
            parser.set_defaults({"verbose": False})
            parser.add_argument(
                "--images",
                type=str,
                help="Folder of images to measure, in a folder for each class, by name.",
            )
        if subcommand != "predict":
            parser.add_argument(
                "--evaluation",
                type=bool | Literal["wandb"],
                default=True,
                help="Write predictions, figures of each class, wrong images and a page that shows "
                "them into the run's folder (default), or not (false); with wandb log page and "
                "pictures there too: they leave this machine.",
            )
            parser.add_argument(
                "--outsiders",
                type=str,
                help="Folder of images that belong to no class: how well they are told apart.",
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        args = _configurations_first(_files_as_data(cast(list[str], args)))
        self._add_own_keywords(named_parts(args))
        for command, of_command in self._subcommand_parsers.items():
            own = {action.dest for action in of_command._actions}
            cast(Parser, of_command).of_others = {
                action.dest: action.default
                for other, of_other in self._subcommand_parsers.items()
                for action in of_other._actions
                if other != command and action.dest not in own
            }
        self.config = parser.parse_args(args)
        self.given: Namespace = parser.parse_args(args, defaults=False)
        if self.config[self.config.subcommand].get("on_error"):
            raise ImprintError("on_error in a configuration belongs to the init_args of data")
        for config in (self.config, self.given):
            for key, value in config.items():
                # A shell expands paths on the command line; those of a YAML file are expanded here.
                if isinstance(value, str) and value.startswith(("~/", "$", "file://")):
                    config[key] = local_path(value)

    def _add_own_keywords(self, parts: dict[str, Any]) -> None:
        """Adds options for the keywords of the user's own parts, named by their import paths."""
        import_parts(parts)
        own = {n: kind for n, kind in keywords_of_parts(parts).items() if n not in KEYWORDS}
        for parser in self._subcommand_parsers.values():
            taken = {action.dest for action in parser._actions}
            for name, kind in own.items():
                if f"model.{name}" in taken:
                    raise ImprintError(
                        f"{name} is an argument of {self._model_class.__name__} itself: give the "
                        "keyword of your part another name"
                    )
                parser.add_argument(f"--model.{name}", type=Optional[kind])  # noqa: UP045

    def _parse_ckpt_path(self) -> None:
        command = self.config.subcommand
        path = self.config[command].get("ckpt_path")
        if not path:
            return
        # LightningCLI prefers the file's hyperparameters; here those that the user types win.
        given = dict(self.given[command].get("model") or {})
        try:
            saved = hyperparameters(read_checkpoint(path), given)
        except ImprintError as error:
            raise ImprintError(f"--ckpt_path {error}") from error
        options = {action.dest for action in self._subcommand_parsers[command]._actions}
        # Leave out the keywords of a part that the user replaces.
        model = {n: v for n, v in saved.items() if f"model.{n}" in options} | given
        model = drop_unused(model.get("recipe"), model, kept=set(given))
        self.config = self.parser.parse_object({command: {"model": model}}, self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        logger = config.get("logger")
        # Always write a local CSV, in addition to the given loggers. Its logger comes first, so
        # that its folder is the run's folder.
        if logger is not False:
            given = logger if isinstance(logger, list) else [logger]
            loggers = [entry for entry in given if entry not in (None, True)]
            if not any(isinstance(entry, CSVLogger) for entry in loggers):
                name = type(self.datamodule).__name__
                loggers.insert(0, CSVLogger(config.get("default_root_dir") or RUNS, name=name))
            loggers = sorted(loggers, key=lambda entry: not isinstance(entry, CSVLogger))
            kwargs["logger"] = [_in_run_folder(entry, loggers[0]) for entry in loggers]
        callbacks = config.get("callbacks") or []
        callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
        if self.subcommand == "predict":
            self.writer = PredictionWriter(
                self._get(self.config, "output"),
                self._get(self.config, "top"),
                self._get(self.config, "sort_into"),
                self._get(self.config, "coverage"),
            )
            callbacks.append(self.writer)
        self.evaluation: Evaluation | None = None
        if self.subcommand != "predict" and self._get(self.config, "evaluation"):
            # With a cache the data are replaced by their embeddings, which have no images.
            has_images = isinstance(self.datamodule, ImageDataModule)
            self.evaluation = Evaluation(self.datamodule if has_images else None)
            callbacks.append(self.evaluation)
        self.gallery: ImprintGallery | None = None
        self.results: WandbResults | None = None
        if self.subcommand == "fit" and self._get(self.config, "gallery"):
            # With a cache the data are replaced by their embeddings, which have no images.
            self.gallery = ImprintGallery(self.datamodule)
            callbacks.append(self.gallery)
        if self.subcommand != "predict" and (places := self._get(self.config, "outsiders")):
            callbacks.append(Outsiders(ImageFiles(places)))
        if any(isinstance(entry, WandbLogger) for entry in kwargs.get("logger") or []):
            self.results = WandbResults()
            callbacks.append(self.results)
        # A fit's configuration may also be given to `test`, where its Checkpoint does nothing.
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            if self.subcommand != "fit":
                kwargs["enable_checkpointing"] = False
            elif config.get("enable_checkpointing") is not False:
                # Lightning's default name, epoch=0-step=1, is not helpful here.
                callbacks.append(ModelCheckpoint(filename="imprinted"))
        kwargs["callbacks"] = callbacks
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        cache_dir = self._get(self.config, "cache_dir")
        if not cache_dir or self._is_trial():
            return
        precision = str(self.trainer.precision)
        if precision != "32-true" and not precision.endswith("-mixed"):
            raise ImprintError(
                f"--cache_dir with --trainer.precision {precision}, which changes the backbone's "
                "weights only when the Trainer starts: give bf16-mixed, or --model.precision bf16"
            )
        # Embed on the device and in the precision of the Trainer.
        with (
            self.trainer.precision_plugin.forward_context(),
            within_budget(self.model.options.memory_budget),
        ):
            self.datamodule = embed(
                self.model.backbone,
                self.datamodule,
                cache_dir,
                device=self.trainer.strategy.root_device,
            )
        if self.trainer.is_global_zero:
            print(f"embedding cache: {self.datamodule.use}")

    def after_fit(self) -> None:
        self._finish("val")

    def after_validate(self) -> None:
        self._finish("val")

    def after_test(self) -> None:
        self._finish("test")

    def before_predict(self) -> None:
        named = getattr(self.datamodule, "sample_names", lambda split: None)
        for option in ("explain", "sort_into"):
            if self._get(self.config, option) and named("predict") is None:
                raise ImprintError(f"--{option} needs image files: give --images FILES")

    def after_predict(self) -> None:
        if self.trainer.is_global_zero:
            print(self.writer.summary())
            if self.writer.unread and not self.writer.count:
                print("warning: none of the images can be read", file=sys.stderr)
            self._say_unreadable()
            self._explain()

    def _explain(self) -> None:
        folder = self._get(self.config, "explain")
        if not folder:
            return
        paths = self.datamodule.sample_names("predict")
        beside = state_path(self._get(self.config, "ckpt_path"))
        state = read_state(beside) if beside.is_file() else None
        side = self.datamodule.max_side
        print(f"explanations: {explain_files(self.model, paths, folder, state, side)}")

    def _is_trial(self) -> bool:
        # Lightning sets this attribute without declaring it.
        return bool(getattr(self.trainer, "fast_dev_run", False))

    def _finish(self, stage: str) -> None:
        folder = run_folder(self.trainer)
        if not self.trainer.is_global_zero:
            return
        summary = summarise(self.trainer, self.model, stage)
        self._save_state(summary["checkpoint"])
        use = getattr(self.datamodule, "use", None)
        if use is not None:
            summary["embed_seconds"] = (summary["embed_seconds"] or 0) + use.seconds
            summary["images_per_second"] = use.embedded / use.seconds if use.embedded else None
            summary["embedded_images"], summary["cached_images"] = use.embedded, use.read
        if unreadable := getattr(self.datamodule, "unreadable", {}):
            summary["skipped_images"] = len(unreadable)
        if self._is_trial():
            print_summary(summary)
            print("run: none (fast_dev_run keeps nothing)")
            return
        drawn = self.gallery.gallery if self.gallery is not None else None
        if drawn and drawn.purity is not None:
            summary["purity"], summary["purity_of_one_proxy"] = drawn.purity, drawn.chance
        evaluated = {} if self.evaluation is None else self.evaluation.written
        # Do not overwrite the evaluation's table of classes in this folder, which has more columns.
        in_folder = any(one.page.parent == folder for one in evaluated.values())
        write_summary(folder, summary, self.model, with_classes=not in_folder)
        if self.results is not None:
            pictures = self._get(self.config, "gallery") == "wandb"
            sent = self.evaluation if self._get(self.config, "evaluation") == "wandb" else None
            self.results.send(summary, self.gallery, pictures, sent)
        print_summary(summary)
        for number, written in evaluated.items():
            print_weakest(written.measured, str(number) if len(evaluated) > 1 else "")
            print(f"next: {written.next_step.text}")
            print(f"evaluation: {written.page}")
        if self.gallery is not None and drawn:
            print(f"gallery: {self.gallery.path}")
        self._say_unreadable(folder)
        print(f"run: {folder}")

    def _say_unreadable(self, folder: Path | None = None) -> None:
        """Lists images that --on_error skip has left out; a file of the run lists all of them."""
        reasons = list(getattr(self.datamodule, "unreadable", {}).items())
        if not reasons:
            return
        print(f"skipped {len(reasons)} images that cannot be read:")
        for _, reason in reasons[:UNREADABLE_SHOWN]:
            print(f"  {reason}")
        if len(reasons) > UNREADABLE_SHOWN:
            print(f"  and {len(reasons) - UNREADABLE_SHOWN} more")
        if folder is not None:
            path = folder / "skipped.csv"
            # As in the CSV of `predict`, keep the bytes of a name that is not UTF-8.
            with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
                csv.writer(file).writerows([("file", "reason"), *reasons])
            print(f"skipped: {path}")

    def _save_state(self, checkpoint: str | None) -> None:
        if self.subcommand == "fit" and self.model.state is not None and checkpoint:
            print(f"state: {self.model.save_state(checkpoint)}")


class EmbedCLI(ImprintCLI):
    """`fit` up to the embedding cache."""

    def before_fit(self) -> None:
        if not self._get(self.config, "cache_dir"):
            raise ImprintError("embed needs --cache_dir DIR, the folder to keep the embeddings in")
        super().before_fit()

    def fit(self, **_: Any) -> None:
        """Replaces the Trainer's `fit`: there is nothing left to do."""

    def after_fit(self) -> None:
        self._say_unreadable()
        for folder in self.datamodule.use.folders:
            print(f"cache: {folder}")


def _in_run_folder(logger: Any, first: CSVLogger) -> Any:
    """Makes a TensorBoardLogger that would write into the folder of all runs write into the folder
    of this run, which is that of the first logger; returns other loggers unchanged."""
    if not isinstance(logger, TensorBoardLogger) or logger.save_dir not in (RUNS, first.root_dir):
        return logger
    return TensorBoardLogger(first.log_dir, name="", version="")


def _configurations_first(args: list[str]) -> list[str]:
    """Moves configurations before options: jsonargparse lets the last value win, and options must
    override configurations wherever they are."""
    first, left = args[:1], args[1:]
    rest: list[str] = []
    while left:
        argument = left.pop(0)
        if argument in ("--config", "-c") and left:
            first += [argument, left.pop(0)]
        else:
            (first if argument.startswith("--config=") else rest).append(argument)
    return [*first, *rest]


def _files_as_data(args: list[str]) -> list[str]:
    """Writes two short options in full, wherever they are.

    `--images a.jpg b/` becomes `--data ImageFiles --data.paths '["a.jpg", "b/"]'`, and
    for `test` and `validate` `--data LabelledFolder --data.root …`, and
    `--on_error skip` becomes `--data.on_error skip`.
    """
    # `--images=a.jpg` is split into two words.
    joined = ("--images=", "--on_error=")
    args = [part for a in args for part in (a.split("=", 1) if a.startswith(joined) else [a])]
    last = []
    while "--on_error" in args[:-1]:
        place = args.index("--on_error")
        last = ["--data.on_error", args[place + 1]]
        args = [*args[:place], *args[place + 2 :]]
    if "--images" not in args:
        return [*args, *last]
    start = args.index("--images")
    before, paths, rest, option = args[:start], [], [], None
    for argument in args[start:]:
        option = argument if argument.startswith("--") else option
        if option != "--images":
            rest.append(argument)
        elif argument != option:
            paths.append(argument)
    if args[:1] in (["test"], ["validate"]):
        if len(paths) != 1:
            raise ImprintError(
                f"{args[0]} --images takes one folder, with a folder for each class in it"
            )
        return [*before, "--data", "LabelledFolder", "--data.root", paths[0], *rest, *last]
    # Do not escape to ASCII: YAML does not know JSON's surrogate pairs for an emoji.
    names = json.dumps(paths, ensure_ascii=False)
    return [*before, "--data", "ImageFiles", "--data.paths", names, *rest, *last]


def _quieten() -> None:
    """Hides messages of Lightning that appear in every run and do not help users."""
    for message in (
        # Our data modules serve images from memory, or start workers themselves.
        ".*does not have many workers.*",
        # Our metrics count each sample once.
        ".*it is recommended to use .*devices=1.*",
        ".*LeafSpec.*",
        ".*callbacks used to create the checkpoint need to be provided.*",
    ):
        warnings.filterwarnings("ignore", message)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_is_worth_saying)


def _is_worth_saying(record: logging.LogRecord) -> bool:
    advertisements = ("💡 Tip", "TPU available", "HPU available", "`Trainer.fit` stopped")
    return not record.getMessage().startswith(advertisements)
