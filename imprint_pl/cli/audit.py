"""`audit`: looks for wrong labels, duplicates and unusual images in a folder, a data set or the
data of a run.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from imprint_pl.audit import Audit, audit
from imprint_pl.audit.find import NEAR
from imprint_pl.audit.page import summary
from imprint_pl.audit.write import write_audit
from imprint_pl.cli.fit import ImprintCLI
from imprint_pl.cli.fit import run as run_cli
from imprint_pl.data.exclude import write_names
from imprint_pl.data.lightning_packages import run_folder
from imprint_pl.embedding import embed
from imprint_pl.errors import ImprintError, shown
from imprint_pl.files import local_path
from imprint_pl.method.recipes import AUTO

DESCRIPTION = (
    "Look for labels that are likely wrong, duplicates and unusual images, and write a page of "
    "them. Nothing is moved or deleted. PLACE is a folder of images, the folder of a run, or a "
    "checkpoint; without it, the options of fit name the data."
)


def run(argv: list[str]) -> None:
    """Runs the command.

    Args:
        argv: its arguments, without its name.
    """
    run_cli(["audit", *_place_as_options(argv)], AuditCLI, DESCRIPTION)


def _place_as_options(argv: list[str]) -> list[str]:
    """Replaces the first argument, a place, by options; a run is replaced by its configuration."""
    if not argv or argv[0].startswith("-"):
        return argv
    place, rest = Path(local_path(argv[0])), argv[1:]
    if place.is_dir() and not (place / "config.yaml").is_file():
        return ["--data", "ImageFolder", "--data.root", str(place), *rest]
    if not place.exists():
        raise ImprintError(
            f"{shown(place)}: there is no such file or folder; give a folder of images, the folder "
            "of a run, or a checkpoint"
        )
    if place.is_dir():
        return ["--config", str(place / "config.yaml"), *rest]
    # A checkpoint of a run may be in a subfolder of the run's folder.
    beside = [folder / "config.yaml" for folder in (place.parent, place.parent.parent)]
    configurations = [["--config", str(path)] for path in beside if path.is_file()]
    return [*(configurations[0] if configurations else []), "--ckpt_path", str(place), *rest]


class AuditCLI(ImprintCLI):
    """`fit` up to the embeddings, which are audited instead of imprinted."""

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument(
                "--fix_list",
                type=str,
                help="CSV to write: the files that are best left out, for --data.exclude.",
            )
            parser.add_argument(
                "--output", type=str, help="Folder to write into (default: the run's folder)."
            )
            parser.add_argument(
                "--near", type=float, default=NEAR, help="Smallest cosine of near duplicates."
            )
        return parser

    def before_fit(self) -> None:
        if self.trainer.world_size > 1:
            raise ImprintError("audit works in one process: give --trainer.devices 1")
        images = self.datamodule
        if hasattr(images, "on_error"):
            # A file that cannot be read does not end the audit, but is listed.
            images.on_error = "skip"
        device = self.trainer.strategy.root_device
        with ExitStack() as stack:
            cache = self._get(self.config, "cache_dir") or stack.enter_context(
                tempfile.TemporaryDirectory(prefix="imprint-audit-")
            )
            with self.trainer.precision_plugin.forward_context():
                embeddings = embed(self.model.backbone, images, cache, device=device)
            if self._get(self.config, "cache_dir"):
                print(f"embedding cache: {embeddings.use}")
        recipe = self.model.parts.parameters["recipe"]
        self.found: Audit = audit(
            images,
            embeddings,
            "kernel" if recipe in (AUTO, None) else recipe,
            near=self._get(self.config, "near"),
            device=device,
            progress=True,
        )

    def fit(self, **_: Any) -> None:
        """Replaces the Trainer's `fit`: nothing is imprinted."""

    def after_fit(self) -> None:
        given = self._get(self.config, "output")
        folder = Path(local_path(given)) if given else run_folder(self.trainer)
        page = write_audit(self.found, folder, self.datamodule.name, progress=True)
        for sentence in summary(self.found):
            print(sentence)
        if fix_list := self._get(self.config, "fix_list"):
            names = self.found.leave_out()
            path = write_names(fix_list, names)
            print(f"fix list: {path} ({len(names)} file{'s' * (len(names) != 1)})")
        print(f"audit: {page}")
