"""The commands: `python -m imprint_pl fit | validate | test | predict | embed | sweep | …`.

This is Lightning's own command line with our module, data sets and run folder. A user's mistake
ends in one line that says what to change, instead of a traceback.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from imprint_pl import __version__
from imprint_pl.errors import ImprintError

COMMANDS = (
    *("fit", "validate", "test", "predict", "embed"),
    *("audit", "compare", "serve", "sweep", "report", "dashboard"),
)
# These commands take a checkpoint and files, and need no Trainer.
FILE_COMMANDS = ("add-class", "add-examples", "remove-class", "export")
HELP = f"""\
imprint_pl {__version__}: an image classifier on a frozen foundation model, imprinted in one pass

usage: python -m imprint_pl COMMAND [options]

commands:
  fit        imprint a head on the training images and measure it
  validate   measure a checkpoint on the validation images
  test       measure a checkpoint on the test images
  predict    label the images of a data set, of files or of folders; writes a CSV
  audit      look for wrong labels, duplicates and unusual images; writes a page
  compare    say which backbone is best for a data set, and how fast each is here; writes a page
  embed      fill the embedding cache with a data set, for `fit --cache_dir`
  export     write a checkpoint as one file: onnx, torch_export, or the head as safetensors
  serve      answer over HTTP, with a page to drop photographs on
  add-class, add-examples, remove-class
             change the classes of a checkpoint that was fitted with --model.keep
  sweep      run a grid of recipes on many backbones, data sets and tasks
  report     tables, figures and a page from the results of a sweep
  dashboard  the wandb workspace that compares recipes; a run for each result

examples:
  python -m imprint_pl fit --config configs/quickstart.yaml
  python -m imprint_pl fit --data FashionMNIST --model.backbone torchvision/resnet18
  python -m imprint_pl fit --config configs/image_folder.yaml --data.root photos
  python -m imprint_pl test --data Digits --ckpt_path CHECKPOINT
  python -m imprint_pl predict --ckpt_path CHECKPOINT --images photo.jpg holiday/
  python -m imprint_pl audit photos --fix_list fix.csv
  python -m imprint_pl compare --data.root photos
  python -m imprint_pl fit --config configs/d_in_1_digits.yaml --cache_dir cache
  python -m imprint_pl add-class CHECKPOINT --name fox --images foxes/
  python -m imprint_pl export CHECKPOINT --format onnx
  python -m imprint_pl serve CHECKPOINT --allow_changes
  python -m imprint_pl sweep --config configs/sweeps/quick.yaml
  python -m imprint_pl report results/section_5_1

`python -m imprint_pl COMMAND --help` lists every option.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments after the program's name. Default: those of this process.

    Returns:
        The exit status: 0, or 2 for a user's mistake.
    """
    own_process, argv = argv is None, sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):
        # A name that the terminal cannot show must not stop a command. Python's stderr already
        # escapes such characters.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(HELP)
        return 0
    if argv[0] == "--version":
        print(f"imprint_pl {__version__}")
        return 0
    if argv[0] not in (*COMMANDS, *FILE_COMMANDS):
        known = ", ".join((*COMMANDS, *FILE_COMMANDS))
        return _fail(f"unknown command {argv[0]!r}: give one of {known}")
    try:
        with _without_collections() if own_process else nullcontext():
            run, arguments = _command([argv[0], *map(_as_shell, argv[1:])])
        # Set here, since the import of Lightning changes how warnings are formatted.
        with _plain_warnings():
            run(arguments)
    except Exception as error:
        mistake = _users_mistake(error)
        if mistake is None:
            raise
        return _fail(str(mistake))
    finally:
        if own_process:
            # Otherwise Python would collect garbage in all modules several times at its end.
            gc.freeze()
    return 0


@contextmanager
def _without_collections() -> Iterator[None]:
    """Imports without garbage collection, and excludes imported objects from later collections.

    An import creates a million objects that stay. Garbage collection among them takes a third of
    the time of importing Lightning.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _command(argv: list[str]) -> tuple[Callable[[list[str]], None], list[str]]:
    """Imports the function that runs a command, and returns it with its arguments."""
    if argv[0] == "report":
        from imprint_pl.cli.report import run

        return run, argv[1:]
    if argv[0] == "dashboard":
        from imprint_pl.cli.dashboard import run

        return run, argv[1:]
    if argv[0] == "serve":
        from imprint_pl.cli.serve import run

        return run, argv[1:]
    if argv[0] in FILE_COMMANDS:
        from imprint_pl.cli.checkpoint import run_on_file

        return run_on_file, argv
    # Import Lightning only here: it takes seconds, and `report` and `dashboard` do not need it.
    arguments = [_packaged_config(argument) for argument in argv]
    if argv[0] == "sweep":
        from imprint_pl.cli.sweep import run

        return run, arguments[1:]
    if argv[0] == "compare":
        from imprint_pl.cli.compare import run

        return run, arguments[1:]
    if argv[0] == "audit":
        from imprint_pl.cli.audit import run

        return run, arguments[1:]
    from imprint_pl.cli.fit import run

    return run, arguments


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints warnings in one line, without their place in the code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


def _users_mistake(error: BaseException | None) -> ImprintError | None:
    """Returns the user's mistake that caused an error, if there is one."""
    # jsonargparse wraps what a constructor raises.
    while error is not None and not isinstance(error, ImprintError):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return ImprintError(f"the disk is full ({error}): make room, and run it again")
        error = error.__cause__ or error.__context__
    return error


def _as_shell(argument: str) -> str:
    """Expands a path that shells do not expand, as in `--data.root=~/photos` or in quotes."""
    name, equals, value = argument.partition("=") if argument[:1] == "-" else ("", "", argument)
    if not value.startswith(("~", "$", "file://")):
        return argument
    from imprint_pl.files import local_path

    return f"{name}{equals}{local_path(value)}"


def _packaged_config(argument: str) -> str:
    """Turns `configs/x.yaml` into the package's file if the current folder has no such file."""
    name, equals, value = argument.rpartition("=")
    package = Path(__file__).parent.parent
    path = Path(value)
    if path.parts[:1] == ("configs",) and path.suffix == ".yaml" and not path.exists():
        # The configs are inside the package in a wheel, and beside it in a source tree.
        for folder in (package, package.parent):
            if (folder / path).is_file():
                return f"{name}{equals}{folder / path}"
    return argument


def _fail(message: str) -> int:
    # All ranks of a distributed run fail; let only one print the reason.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    return 2
