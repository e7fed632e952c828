"""Decodes an image file to a uint8 tensor with the channels that the file has.

The workers of image folders run this code. Backbones do the resizing. Every fault of a file becomes
one error that names the file.
"""

import functools
import io
import math
import os
from typing import cast

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor

from imprint_pl.errors import ImprintError, install, shown

EXTENSIONS = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pbm"),
    *(".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp"),
)
# Photos of phones; they are read where pillow-heif is installed.
HEIF_EXTENSIONS = (".heic", ".heif", ".hif")
HEIF_CURE = install("heif")

# Pillow's names. It knows more formats, but some start other programs (EPS starts Ghostscript).
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

# For each value of the orientation tag, how to turn the stored pixels upright (EXIF 2.32, 0x0112).
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
# Tags of TIFF 6.0 that tell how many bits a value has and whether it has a sign.
BITS_PER_SAMPLE, SAMPLE_FORMAT, UNSIGNED = 258, 339, 1


def read_image(
    path: str | os.PathLike, max_side: int | None = None, least_side: int | None = None
) -> Tensor:
    """Decode an image file, upright.

    Args:
        path: A file of one of `FORMATS`, or HEIF where pillow-heif is installed, whatever its name.
            The first of several frames is read.
        max_side: Shrink the image so that neither side exceeds this many pixels; never enlarges.
            A JPEG file is decoded at 1/2, 1/4 or 1/8 of its size where that is not below the size
            asked for, which is several times faster. Files of other formats are decoded whole.
        least_side: `max_side` does not shrink the shorter side below this many pixels; the longer
            side of a panorama may then exceed `max_side`.

    Returns:
        uint8 `(C, H, W)`: one channel for grey and bilevel files, two for grey with alpha, four for
        RGB with alpha and palettes with transparency, three for everything else. 16-bit grey is
        scaled to 8 bit (65535 becomes 255). Files do not tell the range of 32-bit grey: values in
        0..255 stay as they are, floats in 0..1 are multiplied by 255, all others are stretched so
        that the largest value becomes 255 and 0, or the smallest if it is negative, becomes 0.

    Raises:
        ImprintError: If the file is missing, truncated, no image, or larger than Pillow's
            decompression-bomb limit; the message names the file.
    """
    return _decoded(path, shown(path), max_side, least_side)


def decode_image(
    content: bytes, name: str, max_side: int | None = None, least_side: int | None = None
) -> Tensor:
    """Decode an image file that is in memory, as `read_image` decodes one on disk.

    Args:
        content: The bytes of the file.
        name: What errors call it.
        max_side: As in `read_image`.
        least_side: As in `read_image`.

    Returns:
        uint8 `(C, H, W)`.

    Raises:
        ImprintError: As `read_image` does.
    """
    return _decoded(io.BytesIO(content), shown(name), max_side, least_side)


def stated_size(content: bytes) -> tuple[int, int] | None:
    """Return the width and height that an image file states, without decoding it.

    Args:
        content: The bytes of the file.

    Returns:
        Pixels; None where the file is of no kind that is read here.

    Raises:
        ImprintError: If the image is larger than Pillow's decompression-bomb limit.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            return image.size
    except Image.DecompressionBombError as error:
        raise ImprintError(str(error)) from error
    # Parsers raise errors of many kinds for damaged files.
    except Exception:
        return None


def _decoded(
    source: str | os.PathLike | io.BytesIO,
    name: str,
    max_side: int | None,
    least_side: int | None,
) -> Tensor:
    try:
        with Image.open(source, formats=_formats()) as opened:
            longest = _longest(opened.size, max_side, least_side)
            if longest is not None:
                ratio = longest / max(opened.size)
                # JPEG decodes at 1/2, 1/4 or 1/8: `draft` takes the smallest that is large enough.
                width, height = (max(1, math.ceil(side * ratio)) for side in opened.size)
                opened.draft(None, (width, height))
            opened.load()
            orientation = _orientation(opened)
            image = _to_eight_bit(opened)
        if longest is not None:
            image.thumbnail((longest, longest), Image.Resampling.BICUBIC, reducing_gap=None)
        if orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[orientation])
        pixels = np.array(image)
    except Image.DecompressionBombError as error:
        raise ImprintError(
            f"will not decode the image {name}: {error} Shrink the file, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it."
        ) from error
    # Decoders raise errors of many kinds for damaged files.
    except Exception as error:
        raise ImprintError(
            f"cannot read the image {name}: {_reason(error, source)}. Replace or remove the file."
        ) from error
    channels_first = pixels.transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    # NumPy is faster here: torch would wake all its threads for so small a copy.
    return torch.from_numpy(np.ascontiguousarray(channels_first))


def _longest(size: tuple[int, int], max_side: int | None, least_side: int | None) -> int | None:
    """Return to how many pixels the longer side is shrunk, or None where the image stays."""
    short, long = sorted(size)
    if max_side is None or short == 0:
        return None
    longest = max(max_side, math.ceil((least_side or 1) * long / short))
    return longest if longest < long else None


def extensions() -> tuple[str, ...]:
    """Return the endings of file names, in lower case, that are read as images."""
    return EXTENSIONS + (HEIF_EXTENSIONS if "HEIF" in _formats() else ())


def holds_image(path: str | os.PathLike) -> bool:
    """Return whether a file's first bytes are an image's, for names without an ending."""
    if not os.path.isfile(path):
        return False
    try:
        # TGA files have no mark that would tell them from other files.
        with Image.open(path, formats=[name for name in _formats() if name != "TGA"]):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:
        return False


def is_heif(path: str | os.PathLike) -> bool:
    """Return whether a file's first bytes are those of HEIC and HEIF (ISO/IEC 23008-12)."""
    try:
        with open(path, "rb") as file:
            head = file.read(12)
    except OSError:
        return False
    return _starts_as_heif(head)


def _starts_as_heif(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")


@functools.cache
def _formats() -> list[str]:
    """Return the `FORMATS` that this Pillow can read, and HEIF where pillow-heif is installed."""
    Image.init()
    try:
        import pillow_heif
    except ImportError:
        return [name for name in FORMATS if name in Image.OPEN]
    pillow_heif.register_heif_opener()
    return [name for name in (*FORMATS, "HEIF") if name in Image.OPEN]


def _reason(error: Exception, source: str | os.PathLike | io.BytesIO) -> str:
    if isinstance(error, UnidentifiedImageError):
        if isinstance(source, io.BytesIO):
            heif = _starts_as_heif(source.getvalue()[:12])
        else:
            heif = is_heif(source)
        if heif:
            return f"it is an HEIC or HEIF file, which pillow-heif reads ({HEIF_CURE})"
        return "cannot identify an image in it: it is damaged, or of a kind that is not read here"
    if isinstance(error, OSError) and error.errno is not None:
        # Leave the file name out: the message has it already.
        return f"[Errno {error.errno}] {error.strerror}"
    return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    # The pixels are decoded already, so a damaged tag block is no reason to refuse the file.
    except Exception:
        return 1


def _to_eight_bit(image: Image.Image) -> Image.Image:
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format != "TIFF"):
        white = 4095 if tags.get(BITS_PER_SAMPLE) in (12, (12,)) else 65535
        values = np.asarray(image).astype(np.int64).clip(0, white)
        return Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if image.mode == "I" and tags.get(SAMPLE_FORMAT, UNSIGNED) in (UNSIGNED, (UNSIGNED,)):
            # Pillow has no mode for unsigned values: it returns large ones as negative numbers.
            values = values.view(np.uint32)
        return Image.fromarray(_eight_bit_of_32(values))
    if image.mode == "P":
        return image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode == "LAB":
        # convert() refuses this mode.
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        # None is returned only for inPlace=True.
        return cast(Image.Image, ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB"))
    return image.convert(EIGHT_BIT.get(image.mode, "RGB"))


def _eight_bit_of_32(values: np.ndarray) -> np.ndarray:
    """Scale 32-bit values `(H, W)` to uint8, as `read_image` describes."""
    is_float, values = values.dtype.kind == "f", values.astype(np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("none of its values is a finite number")
    low, high = min(finite.min(), 0.0), finite.max()
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    if low < 0 or high > 255:
        values = (values - low) * 255 / ((high - low) or 1.0)
    elif is_float and high <= 1:
        values = values * 255
    return np.floor(values + 0.5).clip(0, 255).astype(np.uint8)
