"""`add-class`, `add-examples`, `remove-class`, `export`: commands that take a checkpoint and image
files, and need no Trainer.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from torch import Tensor

from imprint_pl.cli.arguments import PROGRAM, ArgumentParser
from imprint_pl.data import Digits, ImageFiles
from imprint_pl.errors import ImprintError
from imprint_pl.export import FORMATS, check, export
from imprint_pl.files import write_whole
from imprint_pl.lightning.checkpoint import read_checkpoint, with_head
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.training_set.kept import KeptRows
from imprint_pl.training_set.kept_file import state_path

# How many images an exported file is compared on.
CHECKED = 200


def run_on_file(argv: list[str]) -> None:
    """Parses and runs one of the commands.

    Args:
        argv: the name of the command and its arguments.
    """
    options = _parser().parse_args(argv)
    if not Path(options.checkpoint).is_file():
        raise ImprintError(f"{options.checkpoint}: there is no such file")
    model = load_classifier(options.checkpoint)
    if options.command == "export":
        _export(model, options)
        return
    model.load_state(options.checkpoint)
    images, paths = None, list[str]()
    if options.images:
        data = ImageFiles(options.images, on_error=options.on_error)
        if data.on_error == "skip":
            print(data.leave_out_unreadable(), end="")
        data.setup()
        data.shrink_for(model.max_side, model.backbone.least_side)
        images, paths = data.predict_dataloader(), data.paths
    # Keep the names of new files only if the state has names for the others.
    state = model.kept_state()
    named = isinstance(state, KeptRows) and bool(state.sources)
    sources = [str(path) for path in paths] if named else []
    if options.command == "add-class":
        model.add_class(options.name, images, sources)
    elif options.command == "add-examples":
        model.add_examples(options.name, images, sources)
    else:
        model.remove_class(options.name, images)
    target = Path(options.output or options.checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Write the head first: if the process is stopped before the state is written, the command can
    # be repeated with the old state.
    write_whole(target, with_head(read_checkpoint(options.checkpoint), model.head))
    model.save_state(target)
    state = model.kept_state()
    names, counts = state.class_names, state.counts.tolist()
    shown = ", ".join(f"{n} ({c})" for n, c in zip(names[-10:], counts[-10:], strict=True))
    print(f"{len(names)} classes: {'… ' if len(names) > 10 else ''}{shown}")
    print(f"checkpoint: {target}\nstate: {state_path(target)}")


def load_classifier(checkpoint: str | Path) -> ImprintedClassifier:
    """Loads the classifier of a checkpoint that `fit` wrote, in eval mode, on the CPU."""
    return ImprintedClassifier.load_from_checkpoint(checkpoint, map_location="cpu").eval()


def _export(model: ImprintedClassifier, options: argparse.Namespace) -> None:
    suffix = FORMATS[options.format].suffix
    beside = Path(options.checkpoint).with_suffix("")
    path = Path(options.output or f"{beside}{suffix or '-head'}")
    if not suffix:
        # The head alone takes no images, so there is nothing to compare.
        export(model.backbone, model.head, path, options.format)
        print(f"{options.format}: {path}")
        return
    if path.is_dir():
        raise ImprintError(f"--output {path} is a folder: name a file in it")
    # Read the images before the export, which takes long: one may be missing or damaged.
    images = _images_to_check(options.images)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Move the file to its final name only after the comparison with the classifier succeeded.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="unfinished-") as folder:
        written = export(model.backbone, model.head, Path(folder, path.name), options.format)
        result = check(written, options.format, model.backbone, model.head, images, folder)
        os.replace(written, os.path.realpath(path))
    print(f"{options.format}: {path}\n{result}")


def _images_to_check(places: list[str] | None) -> list[Tensor]:
    """Reads the images of files and folders; without any, the test digits."""
    if not places:
        digits = Digits()
        digits.setup()
        images = [digits.test_dataset[i][0] for i in range(CHECKED)]
    else:
        files = ImageFiles(places, num_workers=0)
        files.setup()
        images = [files.predict_dataset[i] for i in range(min(CHECKED, len(files.paths)))]
    # The file takes only RGB, so repeat grey and drop alpha, as Preprocess does.
    colours = [image[: 1 if len(image) < 3 else 3] for image in images]
    return [image.expand(3, -1, -1).contiguous() for image in colours]


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=PROGRAM)
    commands = parser.add_subparsers(dest="command", required=True)
    growing = {
        "add-class": "Add a class to a checkpoint that was fitted with --model.keep.",
        "add-examples": "Add images to a class of a checkpoint that was fitted with --model.keep.",
        "remove-class": "Remove a class from a checkpoint that was fitted with --model.keep.",
    }
    for command, text in growing.items():
        sub = commands.add_parser(command, description=text)
        sub.add_argument("checkpoint", help="What fit wrote; its state lies beside it.")
        sub.add_argument("--name", required=True, help="The class.")
        sub.add_argument(
            "--images",
            nargs="+",
            required=command != "remove-class",
            help="Image files, folders or globs"
            + (", all of the class; only sums ask for them." if command == "remove-class" else "."),
        )
        sub.add_argument("--output", help="Write here instead of over the checkpoint.")
        sub.add_argument(
            "--on_error",
            default="fail",
            help="fail at an image that cannot be read (default), or skip it.",
        )
    sub = commands.add_parser("export", description="Write a classifier as one file.")
    sub.add_argument("checkpoint", help="What fit wrote.")
    sub.add_argument(
        "--format", choices=list(FORMATS), default="onnx", help="onnx where not given."
    )
    sub.add_argument("--output", help="The file, or for safetensors the folder.")
    sub.add_argument(
        "--images",
        nargs="+",
        help="Real images to compare the file with the classifier on (default: 200 digits).",
    )
    return parser
