"""Reads images from the form of a request, and decodes them as `predict` decodes files."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from torch import Tensor

from imprint_pl.data.decode import HEIF_CURE, decode_image, stated_size
from imprint_pl.embedding.preprocess import Preprocess
from imprint_pl.errors import ImprintError, shown
from imprint_pl.serve.limits import Limits, Refused

# Most characters of a file's or a class's name.
LONGEST_NAME = 200
# The fields of the form with the images and with a class's name.
IMAGES, NAME = "images", "name"


@dataclass(frozen=True)
class Upload:
    """An image file that a client has sent: the client's name for it, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Form:
    """The form of a request: image files, and the name of a class, which may be empty."""

    images: list[Upload]
    name: str


async def read_form(request: Request, limits: Limits) -> Form:
    """Reads the form of a request.

    Raises:
        Refused: the body is not a form (415), a field is missing or unknown (422), or there are too
            many images (413).
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refused(415, f"send a form, multipart/form-data, not {kind or 'nothing'!r:.100}")
    try:
        # Let the parser accept one more file than allowed, so that our own message is shown.
        form = await request.form(max_files=limits.images + 1, max_fields=2)
    except Refused:
        raise
    except ClientDisconnect as error:
        raise Refused(400, "the request has broken off") from error
    except Exception as error:
        text = getattr(error, "message", None) or getattr(error, "detail", None) or "damaged"
        if "Too many files" in str(text):
            raise _too_many(limits) from error
        raise Refused(400, f"the form cannot be read: {text}") from error
    try:
        return await _checked(form, limits)
    finally:
        await form.close()


async def _checked(form: FormData, limits: Limits) -> Form:
    images: list[Upload] = []
    name = ""
    for field, value in form.multi_items():
        if field == IMAGES and isinstance(value, UploadFile):
            if len(images) == limits.images:
                raise _too_many(limits)
            own = shown(value.filename or f"image {len(images)}")[-LONGEST_NAME:]
            images.append(Upload(own, await value.read()))
        elif field == NAME and isinstance(value, str):
            name = value.strip()
        else:
            raise Refused(
                422, f"field {field!r:.100}: send files as {IMAGES!r}, and text as {NAME!r}"
            )
    if not images:
        raise Refused(422, f"no image: send at least one file as {IMAGES!r}")
    if len(name) > LONGEST_NAME:
        raise Refused(422, f"a class name of {len(name)} characters: at most {LONGEST_NAME}")
    return Form(images, name)


def prepared(
    upload: Upload, preprocess: Preprocess, max_side: int | None, limits: Limits
) -> Tensor:
    """Decodes an image and turns it into the backbone's input, `(1, C, H, W)`.

    The decoded image, which may be large, is not kept in memory.

    Raises:
        Refused: the file is not an image (415), too large (413), or damaged (422).
    """
    try:
        size = stated_size(upload.content)
    except ImprintError as error:
        raise Refused(413, f"{upload.name}: {error}") from error
    if size is None:
        raise Refused(
            415,
            f"{upload.name}: no image of a kind that is read here, or damaged (HEIC and HEIF need "
            f"pillow-heif: {HEIF_CURE})",
        )
    if size[0] * size[1] > limits.megapixels * 1e6:
        raise Refused(
            413,
            f"{upload.name} has {size[0]:,} x {size[1]:,} pixels: at most {limits.megapixels:g} "
            "million",
        )
    try:
        image = decode_image(upload.content, upload.name, max_side, preprocess.least_side)
        return preprocess([image])
    except ImprintError as error:
        raise Refused(422, str(error)) from error


def _too_many(limits: Limits) -> Refused:
    return Refused(413, f"more than {limits.images} images: send them in several requests")
