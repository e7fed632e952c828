"""The command `compare`, which finds the best backbone for a data set: options and output."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule

from imprint_pl.cli.arguments import PROGRAM
from imprint_pl.cli.fit_parser import DATA, Parser
from imprint_pl.cli.tables import Side, print_table
from imprint_pl.errors import ImprintError, shown

if TYPE_CHECKING:
    from imprint_pl.experiments.compare.run import Comparison

DESCRIPTION = (
    "Say which backbone is best for a data set: each is embedded once, and gets the head that "
    "`auto` chooses, on the last layer and on all layers. With many images the first round looks "
    "at a part of them, and the best few are compared on all. Without --data, --data.root is a "
    "folder of images (ImageFolder)."
)
# Columns of the page that the terminal leaves out.
NOT_PRINTED = ("its interval", "parameters", "width")
# Data sets that have no labels, or no training images.
UNFIT = ("ImageFiles", "LabelledFolder")


def run(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: its arguments, without its name.
    """
    parser = _parser()
    if not any(word == "--data" or word.startswith("--data=") for word in argv):
        argv = ["--data", "ImageFolder", *argv]
    options = parser.parse_args(argv)
    for name in ("images", "finalists"):
        if options[name] < 1:
            raise ImprintError(f"--{name} {options[name]}: give a number of at least 1")
    entry = _entry(parser.parse_args(argv, defaults=False)["data"])
    # Import here, so that `--help` works without the packages of the extra `sweep`.
    from imprint_pl.experiments.compare import Question, compare
    from imprint_pl.experiments.compare.page import write_comparison

    question = Question(
        entry,
        backbones=list(options["backbones"] or []),
        images=options["images"],
        finalists=options["finalists"],
        name=options["name"] or _name(entry),
        results_dir=options["results_dir"],
        cache_dir=options["cache_dir"],
    )
    # Otherwise embedding would log a line for each batch of work.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    # The data set is opened for each backbone; show its warnings only once.
    warnings.filterwarnings("once", category=UserWarning)
    try:
        found = compare(question)
    except KeyboardInterrupt:
        print(
            f"stopped: {question.folder} keeps what is done, the same command goes on",
            file=sys.stderr,
        )
        sys.exit(130)  # the status that a shell gives to a program ended by Ctrl-C
    page = write_comparison(found)
    _print(found)
    print(f"page: {page}")


def _parser() -> Parser:
    parser = Parser(prog=f"{PROGRAM} compare", description=DESCRIPTION, allow_abbrev=False)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)
    parser.add_argument(
        "--backbones",
        nargs="+",
        type=str,
        help="Names, which are fetched where there is a network, and patterns such as "
        "'timm/resnet*', which mean the backbones whose weights are here (default: all of these).",
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="Images that the first round looks at."
    )
    parser.add_argument(
        "--finalists", type=int, default=3, help="Backbones that are compared on all images."
    )
    parser.add_argument(
        "--name", type=str | None, default=None, help="Results go to RESULTS_DIR/NAME/."
    )
    parser.add_argument("--results_dir", type=str, default="results", help="All results.")
    parser.add_argument("--cache_dir", type=str, default="cache", help="The embedding cache.")
    return parser


def _entry(data: Any) -> dict[str, Any]:
    """Returns the data set as an entry of a sweep's YAML, with the keywords that were given."""
    name = data["class_path"].rpartition(".")[2]
    if name not in DATA or name in UNFIT:
        known = ", ".join(name for name in DATA if name not in UNFIT)
        raise ImprintError(f"compare needs a data set with labels, not {name}: one of {known}")
    given = data.get("init_args")
    return {"name": name, **({} if given is None else given.as_dict())}


def _name(entry: dict[str, Any]) -> str:
    """Returns a name for the folder of results: the name of the images' folder or table, or of the
    data set."""
    place = entry.get("table") or entry.get("root")
    name = Path(str(place)).resolve().stem if place else entry["name"].lower()
    plain = re.sub(r"[^\w.-]+", "-", name)
    return f"compare-{plain}"


def _print(found: Comparison) -> None:
    from imprint_pl.experiments.compare.choice import chosen_of, sentences
    from imprint_pl.experiments.compare.page import COLUMNS, cells

    # Print only columns that fit a narrow screen beside a long name; the page has all.
    places = [i for i, name in enumerate(COLUMNS) if name not in NOT_PRINTED]
    names = [list(COLUMNS)[i] for i in places]
    sides: dict[str, Side] = {name: "right" if COLUMNS[name] else "left" for name in names}
    for one in found.rounds:
        title = f"{one.images:,} {found.on} images, {one.trained:,} to learn from"
        print_table(sides, ([row[i].text for i in places] for row in cells(one)), title)
    last = found.rounds[-1]
    for sentence in sentences(last, found.on):
        print(sentence)
    for name, reason in found.missing:
        print(f"not compared: {shown(name)}: {shown(reason)}")
    chosen = chosen_of(last).chosen
    print(f"fit it: {found.question.command(chosen.candidate, chosen.layers)}")
