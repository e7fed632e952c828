"""Facts of each image: its size, its channels, whether it is blank, and a hash of its bytes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.decode import read_image
from imprint_pl.data.image_files import ImageFileLoader
from imprint_pl.data.splits import SplitDataset
from imprint_pl.errors import ImprintError

# Photographs are decoded with about this many pixels per side to see whether they are blank.
SMALL = 64
# An image is blank if the standard deviation of its pixels is below this, on the scale of 255.
BLANK = 3.0
# An image is tiny if its shorter side is below the first number, in pixels, and that of the usual
# image is at least the second number times as long.
TINY, TIMES = 32, 4
# An image is a strip if its longer side is at least this many times the shorter one, and the usual
# image has at most half of this ratio.
STRIP = 4.0
# A mode is unusual if a smaller share of the images has it.
RARE = 0.02
MODES = {1: "grey", 2: "grey with alpha", 3: "RGB", 4: "RGB with alpha"}


class ImageFacts(NamedTuple):
    """Facts about an image.

    Attributes:
        width, height: in pixels, as stored.
        mode: Pillow's name of its channels, or ours if the image is in memory.
        spread: standard deviation of its pixels, on the scale of 255.
        digest: hash of the file's bytes, or of the pixels without a file.
    """

    width: int
    height: int
    mode: str
    spread: float
    digest: bytes


class _Facts(Dataset):
    """The facts of image files, to be read in workers; `None` for a file that cannot be read."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> ImageFacts | None:
        path = self.paths[index]
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            pixels = read_image(path, SMALL)
            # `read_image` has registered all formats, and found this one readable.
            with Image.open(path) as image:
                return ImageFacts(*image.size, image.mode, _spread(pixels), digest)
        except (ImprintError, OSError):
            return None


def image_facts(
    data: ImageDataModule, dataset: SplitDataset, progress: bool = False
) -> list[ImageFacts | None]:
    """Reads the facts of a split's images, in its order.

    Args:
        data: loads the images.
        dataset: a split of it.
        progress: show a bar on stderr.

    Returns:
        Facts; `None` for a file that cannot be read (any more).
    """
    paths = getattr(dataset, "paths", None)
    loader: Any
    if paths is None:
        loader = ([_of_pixels(image) for image in batch[0]] for batch in data.loader(dataset))
    else:
        workers = data._free_processors() if data.num_workers is None else data.num_workers
        loader = ImageFileLoader(
            _Facts(paths),
            batch_size=32,
            num_workers=workers if len(paths) > 64 else 0,
            collate_fn=list,
            generator=torch.Generator(),
        )
    facts: list[ImageFacts | None] = []
    with tqdm(
        total=len(dataset),
        desc="looking at images",
        delay=2,
        leave=False,
        disable=None if progress else True,
    ) as bar:
        for batch in loader:
            facts += batch
            bar.update(len(batch))
    return facts


def _of_pixels(image: Tensor) -> ImageFacts:
    shape = tuple(image.shape)
    text = f"{shape}".encode() + image.contiguous().numpy().tobytes()
    mode = MODES.get(shape[0], f"{shape[0]} channels")
    return ImageFacts(shape[2], shape[1], mode, _spread(image), hashlib.sha256(text).digest())


def _spread(pixels: Tensor) -> float:
    # Ignore alpha, since a blank picture may have a transparent shape in it.
    colours = pixels[: 1 if len(pixels) < 3 else 3]
    # Take the deviation over the area, not over the channels: an image of one colour is blank.
    return colours.float().flatten(1).std(1, correction=0).max().item()


def unusual(facts: Sequence[ImageFacts | None]) -> dict[int, str]:
    """Finds unusual images: blank, tiny, a strip, or of a mode that few images have.

    Args:
        facts: the facts of all images.

    Returns:
        The reason, by the index of the image.
    """
    known = [fact for fact in facts if fact is not None]
    if not known:
        return {}
    sides = sorted(min(fact.width, fact.height) for fact in known)
    ratios = sorted(_ratio(fact) for fact in known)
    usual_side, usual_ratio = sides[len(sides) // 2], ratios[len(ratios) // 2]
    modes = Counter(fact.mode for fact in known)
    found: dict[int, str] = {}
    for place, fact in enumerate(facts):
        if fact is None:
            continue
        reasons, size = [], f"{fact.width} × {fact.height} pixels"
        if fact.spread < BLANK:
            reasons.append("blank: its pixels hardly differ")
        side = min(fact.width, fact.height)
        if side < TINY and side * TIMES <= usual_side:
            reasons.append(f"tiny: {size}")
        elif _ratio(fact) >= max(STRIP, 2 * usual_ratio):
            reasons.append(f"a strip: {size}")
        if modes[fact.mode] < RARE * len(known):
            of = f"{modes[fact.mode]} of {len(known):,} images have it"
            reasons.append(f"unusual mode {fact.mode} ({of})")
        if reasons:
            found[place] = "; ".join(reasons)
    return found


def _ratio(fact: ImageFacts) -> float:
    return max(fact.width, fact.height) / max(1, min(fact.width, fact.height))
