"""Explains predictions by the proxy that decided, its share of the class's score, and the nearest
training images; as data and as pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from imprint_pl.data.decode import read_image
from imprint_pl.drawing import height, style, wrapped
from imprint_pl.errors import ImprintError
from imprint_pl.files import local_path
from imprint_pl.method.head import ImprintedHead
from imprint_pl.parts.agg.logsumexp import LogSumExp
from imprint_pl.parts.agg.nearest import NearestProxies
from imprint_pl.parts.by_name import steps_of
from imprint_pl.parts.norm.layers import JoinLayers, LastLayer
from imprint_pl.training_set.kept import KeptRows, State

if TYPE_CHECKING:
    from imprint_pl.lightning.classifier import ImprintedClassifier

# Inches in a picture: the side of an image, the space around it, and the least width.
CELL, GAP, NARROWEST = 1.7, 0.12, 3.6


@dataclass(frozen=True)
class Neighbour:
    """A training image: its source (file or "train 17"), class and cosine to the sample.

    The cosine is that of the embeddings. If they hold several layers, it is computed after the
    head's `join`, which makes the layers count alike, or after its `last`, which keeps the last
    layer alone.
    """

    source: str
    class_name: str
    cosine: float


@dataclass(frozen=True)
class Explanation:
    """The explanation of one prediction.

    Attributes:
        class_name: the class, "none of these" included.
        nearest_class: the class with the best score, even if it does not reach the threshold.
        proxy: index of the proxy that contributes most to that score.
        proxy_of: "2 of 20": which of the class's proxies it is.
        share: the proxy's part of the class's score: 1 for `max`, where one proxy decides alone;
            its part of the class's votes for `mnn`; its softmax weight within the class for
            `logsumexp`.
        neighbours: the nearest training images, nearest first; empty where none were kept.
    """

    class_name: str
    nearest_class: str
    proxy: int
    proxy_of: str
    share: float
    neighbours: tuple[Neighbour, ...] = ()


@torch.no_grad()
def explain(
    head: ImprintedHead, x: Tensor, state: State | None = None, neighbours: int = 5
) -> list[Explanation]:
    """Explains the predictions for embeddings `x (B, d)`.

    Args:
        head: the head that predicts.
        x: embeddings, as they come from the backbone.
        state: the state of a fit with `keep="embeddings"`, for the nearest training images.
        neighbours: how many of them to name.

    Returns:
        An explanation for each row.

    Raises:
        ImprintError: the state holds sums instead of embeddings.
    """
    if not isinstance(state, KeptRows | None):
        raise ImprintError(
            'the state holds sums, which know no image: fit with keep="embeddings" and '
            "keep_sources=True to be shown the nearest training images"
        )
    scores = head.scores(x)
    labels, best = head.label(x).tolist(), scores.argmax(1)
    parts = _contributions(head, x).cpu()
    near = [()] * len(x) if state is None else _neighbours(head, x, state, neighbours)
    classes, explained = head.proxy_classes.cpu(), []
    for row, label, winner, close in zip(parts, labels, best.tolist(), near, strict=True):
        own = (classes == winner).nonzero().flatten()
        place = int(row[own].argmax())
        explained.append(
            Explanation(
                class_name=head.name_of(label),
                nearest_class=head.name_of(winner),
                proxy=int(own[place]),
                proxy_of=f"{place + 1} of {len(own)}",
                share=_share(head, row[own]),
                neighbours=close,
            )
        )
    return explained


def picture(
    image: Tensor | str, explanation: Explanation, path: str | Path, images: Sequence[Tensor] = ()
) -> Path:
    """Draws an image `(C, H, W)` or a file, and its nearest training images beside it, as PNG.

    Args:
        image: the image that was predicted.
        explanation: the explanation of its prediction.
        path: the file to write.
        images: the neighbours' images; if not given, their sources are read as files.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    near = explanation.neighbours
    shown = [image, *(images[: len(near)] if images else (n.source for n in near))]
    with style():
        pixels = [_pixels(one) for one in shown]
        # Everything below is in inches, from the bottom left.
        width = max(len(shown) * (CELL + GAP) + GAP, NARROWEST)
        lines = (explanation.class_name, _which_proxy(explanation))
        headline = "\n".join(wrapped(line, width - 2 * GAP, 10, most=4) for line in lines)
        captions = ["the image"]
        for neighbour in near:
            name = wrapped(neighbour.class_name, CELL, 9, most=3)
            captions.append(f"{name}\ncos {neighbour.cosine:.2f}")
        tall = max(min(CELL, CELL * image.shape[0] / image.shape[1]) for image in pixels)
        above = tall + 1.5 * GAP
        top = above + max(height(caption, 9) for caption in captions) + GAP
        whole = top + height(headline, 10) + GAP
        figure = Figure(figsize=(width, whole))
        figure.text(0.5, 1 - GAP / whole, headline, fontsize=10, ha="center", va="top")
        left = (width - len(shown) * (CELL + GAP) + GAP) / 2
        for values, caption in zip(pixels, captions, strict=True):
            axes = figure.add_axes((left / width, GAP / whole, CELL / width, tall / whole))
            axes.imshow(values)
            axes.set_anchor("N")
            axes.set_axis_off()
            middle = (left + CELL / 2) / width
            figure.text(middle, above / whole, caption, fontsize=9, ha="center", va="bottom")
            left += CELL + GAP
        figure.savefig(path, dpi=120)
    return Path(path)


def _which_proxy(explanation: Explanation) -> str:
    """Returns a text that says which proxy decided, with its class if that was not predicted."""
    share = f"proxy {explanation.proxy_of}, {100 * explanation.share:.0f} % of the score"
    if explanation.class_name == explanation.nearest_class:
        return share
    return f"nearest: {explanation.nearest_class}, {share}"


def _pixels(image: Tensor | str) -> np.ndarray:
    """Returns an image as `(H, W, 3)`, for matplotlib."""
    image = image if isinstance(image, Tensor) else read_image(image)
    return image[: 1 if len(image) < 3 else 3].expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def explain_files(
    model: ImprintedClassifier,
    paths: list[str],
    folder: str | Path,
    state: State | None = None,
    max_side: int | None = None,
) -> Path:
    """Writes `explanations.json` and a PNG for each image file into a folder.

    Files that cannot be read are left out. Training images are drawn if the state names their files
    and the files can still be read. A file name that is not UTF-8 is written as in the JSON of
    `predict`.

    Args:
        model: the classifier that predicts.
        paths: the image files.
        folder: made where it does not exist.
        state: kept with the classifier; without rows no training images are drawn.
        max_side: longest side in pixels to which the images are shrunk; by default that of the fit.

    Returns:
        The folder.
    """
    folder = Path(local_path(folder))
    folder.mkdir(parents=True, exist_ok=True)
    rows = state if isinstance(state, KeptRows) else None
    records = []
    for i, path in enumerate(paths):
        try:
            image = read_image(path, max_side or model.max_side, model.backbone.least_side)
        except ImprintError:
            continue
        x = model.embed([image.to(model.device)])
        (found,) = explain(model.head, x, rows)
        near = [
            (n, pixels) for n in found.neighbours if (pixels := _image_at(n.source)) is not None
        ]
        drawn = picture(
            image,
            replace(found, neighbours=tuple(neighbour for neighbour, _ in near)),
            folder / f"{i:05d}.png",
            [pixels for _, pixels in near],
        )
        records.append({"file": path, "picture": drawn.name} | asdict(found))
    (folder / "explanations.json").write_text(json.dumps(records, indent=2) + "\n")
    return folder


def _image_at(source: str) -> Tensor | None:
    """Reads a training image; `None` where its file is gone or cannot be read."""
    try:
        return read_image(source) if Path(source).is_file() else None
    except ImprintError:
        return None


def _contributions(head: ImprintedHead, x: Tensor) -> Tensor:
    """Returns the contribution of each proxy to its class's score, `(B, P)`. In each class, the
    proxy with the largest one decided."""
    z = head.norm_inf(x.to(head.proxies.dtype))
    if not isinstance(head.agg, NearestProxies):
        return torch.addmm(head.bias, z, head.proxies.T)
    far, nearest = (t.cpu() for t in head.agg.nearest(z, head.proxies))
    # Among equal votes, let the nearest proxy be the largest.
    places = torch.arange(far.shape[1], dtype=torch.float64)
    votes = head.agg.vote_weights(far) * (1 - 1e-9 * places)
    return votes.new_zeros(len(z), len(head.proxies)).scatter(1, nearest, votes)


def _share(head: ImprintedHead, own: Tensor) -> float:
    if isinstance(head.agg, LogSumExp):
        return torch.softmax(own.double() / head.agg.temperature, 0).max().item()
    if isinstance(head.agg, NearestProxies):
        return (own.max() / own.sum().clamp(min=1e-30)).item()
    return 1.0


def _of_layers(head: ImprintedHead, x: Tensor) -> Tensor:
    """Returns embeddings `(n, d)` unchanged or, for several layers, after the head's `join` or
    `last`; on the CPU."""
    steps = steps_of(head.norm_inf)
    for i, step in enumerate(steps):
        if isinstance(step, JoinLayers | LastLayer):
            x = x.to(head.proxies.device)
            for before in steps[: i + 1]:
                x = before(x)
    return x.cpu()


@torch.no_grad()
def unit_rows(head: ImprintedHead, x: Tensor) -> Tensor:
    """Turns embeddings `(n, d)` into unit vectors `(n, d')` on the CPU, whose inner products are
    the cosines of `Neighbour`."""
    return functional.normalize(_of_layers(head, x.float()), dim=1)


def _neighbours(
    head: ImprintedHead, x: Tensor, state: KeptRows, count: int
) -> list[tuple[Neighbour, ...]]:
    cosines = unit_rows(head, x) @ unit_rows(head, state.x).T
    nearest = cosines.topk(min(count, len(state.x)), dim=1)
    sources = state.sources or ("",) * len(state.x)
    return [
        tuple(
            Neighbour(sources[i], state.class_names[int(state.y[i])], value)
            for i, value in zip(rows, values, strict=True)
        )
        for rows, values in zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
    ]
