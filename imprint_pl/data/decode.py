"""From an image file to a uint8 tensor of the channels that the file has.

The workers of the image folders run this; resizing for a backbone is not done here. Whatever goes
wrong with a file comes out as one error that names the file.
"""

import functools
import os

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from imprint_pl.errors import ImprintError

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)

# Pillow's names. It knows more, but hands some of them to other programs (EPS to Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# Tag value -> what turns the stored pixels upright (EXIF 2.32, tag 0x0112).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

EIGHT_BIT = {
    "1": "L",
    "L": "L",
    "LA": "LA",
    "La": "LA",
    "PA": "RGBA",
    "RGBA": "RGBA",
    "RGBa": "RGBA",
}


def read_image(path: str | os.PathLike, max_side: int | None = None) -> Tensor:
    """Decode an image file, upright.

    Args:
        path: the file, of one of `FORMATS`, whatever its name; of several frames the first.
        max_side: shrink the image so that neither side exceeds this many pixels; never enlarges.
            JPEG files are then decoded at a fraction of their size, which is also faster.

    Returns:
        uint8 `(C, H, W)`: one channel for grey and bilevel files, two for grey with alpha, four for
        RGB with alpha and palettes with transparency, three for everything else. 16-bit grey is
        scaled to 8 bit (65535 becomes 255).

    Raises:
        ImprintError: naming the file, if it is missing, truncated, no image, larger than Pillow's
            decompression-bomb limit, or of a number range that cannot be known (floats).
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            if max_side is not None:
                image.draft(None, (max_side, max_side))
            image.load()
            orientation = _orientation(image)
            image = _to_eight_bit(image)
        if max_side is not None:
            image.thumbnail((max_side, max_side), Image.Resampling.BICUBIC, reducing_gap=None)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        pixels = np.array(image)
    except Image.DecompressionBombError as error:
        raise ImprintError(
            f"will not decode the image {os.fspath(path)}: {error} Shrink the file, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    # Decoders of foreign bytes raise whatever their parsers stumble over.
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise ImprintError(
            f"cannot read the image {os.fspath(path)}: {reason}. Replace or remove the file."
        ) from error
    channels_first = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    # By numpy: torch would wake all its threads for so small a copy, which is slower.
    return torch.from_numpy(np.ascontiguousarray(channels_first))


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that Pillow was built with here."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    # A damaged tag block says nothing about the pixels, which have been decoded.
    except Exception:
        return 1


def _to_eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"its values run from {low} to {high}, beyond 16 bit, so that their scale is "
                "unknown; save it as 8-bit or 16-bit grey"
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError(
            "it holds floating-point values, whose scale is unknown; save it as 8-bit or 16-bit"
        )
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    return image.convert(EIGHT_BIT.get(image.mode, "RGB"))
