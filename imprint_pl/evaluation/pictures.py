"""The pictures of an evaluation: the confusion matrix, and the wrongly predicted images."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from imprint_pl.data.batch import images_of
from imprint_pl.data.decode import read_image
from imprint_pl.drawing import height as height_of
from imprint_pl.drawing import style, width, wrapped
from imprint_pl.drawing.page import data_url
from imprint_pl.errors import ImprintError, shown
from imprint_pl.evaluation.classes import Measured
from imprint_pl.evaluation.next_step import certainty
from imprint_pl.evaluation.predictions import Predictions

# Most classes that a confusion matrix shows, and most classes with which it shows numbers.
CLASSES_SHOWN, NUMBERED = 40, 20
# Most images in `errors.png`, and how many in each row.
ERRORS_SHOWN, IN_ROW = 24, 6
# Longest side of a thumbnail in pixels. Up to the second size it is a PNG, shown without smoothing.
SIDE, SMALL = 144, 48
# A function that takes the number of an image and returns its pixels, `(H, W)` or `(H, W, 3)`,
# uint8, or `None` where the image cannot be read.
Thumbnails = Callable[[int], np.ndarray | None]


def of_files(paths: Sequence[str]) -> Thumbnails:
    """Return a function that reads thumbnails from files."""

    def read(index: int) -> np.ndarray | None:
        try:
            return thumbnail(read_image(paths[index], SIDE))
        except ImprintError:
            return None

    return read


def of_dataset(dataset: Any) -> Thumbnails | None:
    """Return a function that makes thumbnails of a data set's items; `None` for embeddings."""

    def read(index: int) -> np.ndarray | None:
        try:
            return thumbnail(images_of(dataset[index]))
        except (ImprintError, OSError):
            return None

    return None if len(dataset) == 0 or read(0) is None else read


def thumbnail(image: Any) -> np.ndarray | None:
    """Turn an image of any kind into a thumbnail.

    Values outside of 0 to 255, such as preprocessed ones, are stretched to that range.

    Args:
        image: a tensor `(C, H, W)` or `(H, W)`, or an object such as a Pillow image that NumPy
            converts to `(H, W)` or `(H, W, C)`.

    Returns:
        Pixels `(H, W)` or `(H, W, 3)`, uint8; `None` if it is not an image.
    """
    from PIL import Image

    if isinstance(image, Tensor):
        image = image.detach().cpu()
        pixels = (image.float() if image.is_floating_point() else image).numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    else:
        pixels = np.asarray(image)
    if pixels.ndim not in (2, 3) or not pixels.size or pixels.dtype.kind not in "uif":
        return None
    if pixels.ndim == 3:
        pixels = pixels[..., 0] if pixels.shape[2] < 3 else pixels[..., :3]
    if pixels.dtype != np.uint8:
        pixels = np.nan_to_num(pixels.astype(np.float64))
        low, span = pixels.min(), np.ptp(pixels)
        pixels = (255 * (pixels - low) / (span or 1)).round().astype(np.uint8)
    small = Image.fromarray(np.ascontiguousarray(pixels))
    small.thumbnail((SIDE, SIDE))
    return np.asarray(small)


def as_url(pixels: np.ndarray) -> str:
    """Return a thumbnail as a data URL, in JPEG, or in PNG for few pixels."""
    from PIL import Image

    content, tiny = io.BytesIO(), max(pixels.shape[:2]) <= SMALL
    kind = "png" if tiny else "jpeg"
    Image.fromarray(pixels).save(content, kind, **({} if tiny else {"quality": 78}))
    return data_url(content.getvalue(), f"image/{kind}")


def draw_confusion(measured: Measured, path: Path) -> Path:
    """Writes the confusion matrix as a PNG; colours are shares of the true class.

    With more than 40 classes it shows those with the most errors, and says so.
    """
    from matplotlib.figure import Figure

    C = len(measured.classes)
    chosen = list(range(C))
    title = "true class (row), given class (column)"
    if C > CLASSES_SHOWN:
        errors = measured.confusion.without_diagonal()
        most = errors.sums(errors.true) + errors.sums(errors.predicted)
        chosen = most.argsort(descending=True, stable=True)[:CLASSES_SHOWN].sort().values.tolist()
        title += f"; {len(chosen)} of {C:,} classes, those with the most errors"
    matrix = measured.confusion.dense(chosen).numpy()
    sizes = np.array([measured.classes[label].images for label in chosen])
    shares = np.divide(matrix, sizes[:, None], out=np.zeros(matrix.shape), where=matrix > 0)
    cell = min(0.62, max(0.19, 7.5 / len(chosen)))
    size = min(9.0, 72 * 0.68 * cell)
    lines = max(1, int(cell * 72 / (1.25 * size)))
    with style():
        names = [
            wrapped(shown(measured.classes[label].name), 1.7, size, most=lines) for label in chosen
        ]
        beside = max(width(name, size) for name in names)
        side = cell * len(chosen)
        left = beside + 0.25
        across = left + max(side, 3.4 - left) + 0.2
        headline = wrapped(title, across - 0.2, 9)
        top = height_of(headline, 9) + 0.25
        high = top + side + beside + 0.25
        figure = Figure(figsize=(across, high), dpi=150)
        figure.text(0.1 / across, 1 - 0.1 / high, headline, va="top", fontsize=9)
        box = (left / across, 1 - (top + side) / high, side / across, side / high)
        axes = figure.add_axes(box)
        axes.grid(False)
        axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="#dddddd", linewidth=0.4)
        places = np.arange(len(chosen)) + 0.5
        axes.set_xticks(places, names, rotation=90, fontsize=size)
        axes.set_yticks(places, names, fontsize=size)
        axes.tick_params(length=0, pad=3)
        axes.set_ylim(len(chosen), 0)
        if len(chosen) <= NUMBERED:
            _write_counts(axes, matrix, shares, cell)
        figure.savefig(path)
    return path


def _write_counts(axes: Any, matrix: np.ndarray, shares: np.ndarray, cell: float) -> None:
    # Choose a font size with which the longest number fits its cell; a digit is about 0.64 times as
    # wide as the font size.
    digits = len(str(matrix.max()))
    size = min(10.0, 72 * cell * 0.9 / (0.64 * digits), 72 * cell * 0.6)
    for row, column in zip(*matrix.nonzero(), strict=True):
        axes.text(
            column + 0.5,
            row + 0.5,
            str(matrix[row, column]),
            ha="center",
            va="center",
            fontsize=size,
            color="white" if shares[row, column] > 0.55 else "black",
        )


def draw_errors(
    predictions: Predictions, thumbnails: Thumbnails, path: Path, most: int = ERRORS_SHOWN
) -> Path | None:
    """Writes the worst errors as a PNG, each with its true and its given class.

    Args:
        predictions: the predictions of a loader.
        thumbnails: thumbnails of its images; those that cannot be read are left out.
        path: the PNG.
        most: most images to draw.

    Returns:
        The path; `None` if there is nothing to draw.
    """
    from matplotlib.figure import Figure

    worst = predictions.worst().tolist()
    drawn: list[tuple[int, np.ndarray]] = []
    for index in worst:
        if len(drawn) == most:
            break
        if (pixels := thumbnails(index)) is not None:
            drawn.append((index, pixels))
    if not drawn:
        return None
    columns = min(IN_ROW, max(3, len(drawn)))
    rows = -(-len(drawn) // columns)
    side, gap, size = 1.25, 0.15, 7.5
    with style():
        captions = [_caption(predictions, index, side, size) for index, _ in drawn]
        under = max(height_of(text, size) for text in captions) + 0.12
        across = gap + columns * (side + gap)
        which = f"{len(drawn)} of {len(worst):,}" if len(drawn) < len(worst) else f"{len(worst)}"
        headline = f"Errors, by how far the given class leads the true one: {which}"
        headline = wrapped(headline, across - 2 * gap, 9)
        top = height_of(headline, 9) + 0.3
        high = top + rows * (side + under)
        figure = Figure(figsize=(across, high), dpi=120)
        figure.text(gap / across, 1 - 0.12 / high, headline, va="top", fontsize=9)
        for place, ((_, pixels), text) in enumerate(zip(drawn, captions, strict=True)):
            row, column = divmod(place, columns)
            left = gap + column * (side + gap)
            upper = top + row * (side + under)
            box = (left / across, 1 - (upper + side) / high, side / across, side / high)
            axes = figure.add_axes(box)
            axes.axis("off")
            axes.set_anchor("S")
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            figure.text(
                left / across, 1 - (upper + side + 0.04) / high, text, va="top", fontsize=size
            )
        figure.savefig(path)
    return path


def _caption(predictions: Predictions, index: int, side: float, size: float) -> str:
    names = predictions.class_names
    sure = certainty(float(predictions.probabilities[index]))
    file = shown(Path(predictions.name_of(index)).name)
    return "\n".join(
        [
            wrapped(f"true: {shown(names[predictions.labels[index]])}", side, size, most=2),
            wrapped(f"given: {shown(names[predictions.predicted[index]])}", side, size, most=2),
            wrapped(f"{sure}, {file}", side, size, most=2),
        ]
    )
