"""The functions that the routes call: predictions, changes, and pictures of training images."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import joblib
import torch
from PIL import Image
from torch import Tensor

from imprint_pl.data.decode import read_image
from imprint_pl.errors import ImprintError
from imprint_pl.files import write_whole
from imprint_pl.serve.batching import MOST, MOST_ON_CPU, Batcher
from imprint_pl.serve.changes import Changes
from imprint_pl.serve.limits import Limits, Refused
from imprint_pl.serve.uploads import Form, Upload, prepared
from imprint_pl.serve.version import Prediction, Version

# Longest side of a training image's picture on the page, in pixels.
SMALL = 192
# The expected number of images for `runtime="auto"`, large because a server runs for a long time.
MANY = 10**9

T = TypeVar("T")


class Predicted(NamedTuple):
    """Predictions, and the version that made all of them."""

    version: Version
    predictions: list[Prediction]


class Service:
    """A classifier that answers many clients at the same time.

    One thread per core decodes images, one thread embeds them in batches (`Batcher`), and one more
    thread makes changes.

    Args:
        changes: the versions of the classifier.
        limits: see `Limits`.
        keep_images: folder for the images of added classes; without it they are not kept.

    Raises:
        ImprintError: the classifier takes embeddings.
    """

    def __init__(
        self, changes: Changes, limits: Limits, keep_images: str | Path | None = None
    ) -> None:
        self.changes, self.limits = changes, limits
        self.model = changes.model
        if self.model.backbone.preprocess is None:
            raise ImprintError(
                "this classifier takes embeddings, not images: serve one that was fitted on images"
            )
        self._preprocess = self.model.backbone.preprocess
        self.keep_images = None if keep_images is None else Path(keep_images).resolve()
        if self.keep_images is not None:
            self.keep_images.mkdir(parents=True, exist_ok=True)
        self._threads = ThreadPoolExecutor(joblib.cpu_count(), "images")
        self._changing = ThreadPoolExecutor(1, "changes")
        self.model.backbone.expect(MANY)
        on_cpu = self.model.device.type == "cpu"
        self._batcher = Batcher(self._embed, MOST_ON_CPU if on_cpu else MOST)
        self._warm_up()

    def close(self) -> None:
        """Waits for the work in progress, and ends the threads."""
        self._threads.shutdown()
        self._changing.shutdown()
        self._batcher.close()
        self.changes.close()

    async def predict(self, form: Form, top: int, neighbours: int) -> Predicted:
        """Predicts the images of a form.

        Args:
            form: the form of a request.
            top: most classes to name.
            neighbours: most training images to name.

        Raises:
            Refused: an image cannot be read, or it took too long (504).
            ImprintError: an embedding is not finite.
        """
        files = [upload.name for upload in form.images]
        async with self._in_time():
            x = await self._embedded(form.images)
            # Use one version for all images of a request.
            version = self.changes.current
            found = await _in(self._threads, lambda: version.predict(x, files, top, neighbours))
        return Predicted(version, found)

    async def add_class(self, form: Form, expected: str | None) -> Version:
        """Adds a class from the images of a form. See `Changes.add_class`."""
        x, sources = await self._to_add(form)
        step = self.changes.add_class
        return await _in(self._changing, lambda: step(form.name, x, sources, expected))

    async def add_examples(self, form: Form, expected: str | None) -> Version:
        """Adds a form's images to a class. See `Changes.add_examples`."""
        x, sources = await self._to_add(form)
        step = self.changes.add_examples
        return await _in(self._changing, lambda: step(form.name, x, sources, expected))

    async def remove_class(self, name: str, expected: str | None) -> Version:
        """Removes a class. See `Changes.remove_class`."""
        return await _in(self._changing, lambda: self.changes.remove_class(name, expected))

    async def undo(self, expected: str | None) -> Version:
        """Undoes the last change. See `Changes.undo`."""
        return await _in(self._changing, lambda: self.changes.undo(expected))

    async def picture(self, key: str) -> bytes:
        """Returns a training image as a small JPEG file, by the key of `NearImage.picture`.

        Raises:
            Refused: there is no such image, or it can no longer be read (404).
        """
        source = self.changes.current.picture(key)
        if source is None:
            raise Refused(404, "there is no such picture")
        return await _in(self._threads, lambda: _small(source))

    async def _to_add(self, form: Form) -> tuple[Tensor, list[str]]:
        """Returns embeddings and sources of the images to add to a class."""
        async with self._in_time():
            x = (await self._embedded(form.images)).cpu()
            folder = self.keep_images
            if folder is None:
                return x, []
            return x, await _in(self._threads, lambda: [_kept(u, folder) for u in form.images])

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self.limits.seconds):
                yield
        except TimeoutError:
            raise Refused(
                504, f"no answer within {self.limits.seconds:g} seconds: send fewer images"
            ) from None

    async def _embedded(self, uploads: list[Upload]) -> Tensor:
        """Returns the embeddings `(n, d)` of n image files."""
        preprocess, side, limits = self._preprocess, self.model.max_side, self.limits
        decoding = [
            _in(self._threads, partial(prepared, upload, preprocess, side, limits))
            for upload in uploads
        ]
        try:
            images = torch.cat(await asyncio.gather(*decoding))
        finally:
            # If one image is refused, the whole request is, so cancel decoding the others.
            for one in decoding:
                one.cancel()
        return await asyncio.wrap_future(self._batcher.submit(images))

    @torch.inference_mode()
    def _embed(self, images: Tensor) -> Tensor:
        return self.model.embed(images)

    def _warm_up(self) -> None:
        """Embeds an image, so that runtimes build their graph, and torch its kernels, before the
        first request."""
        grey = torch.zeros(1, *self._preprocess.size, dtype=torch.uint8)
        self._batcher.submit(self._preprocess([grey])).result()


def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> asyncio.Future[T]:
    return asyncio.get_running_loop().run_in_executor(pool, work)


def _kept(upload: Upload, folder: Path) -> str:
    """Writes an image to a file that is named by its content, not by the client; returns it."""
    path = folder / hashlib.sha256(upload.content).hexdigest()
    if not path.is_file():
        write_whole(path, upload.content)
    return str(path)


def _small(source: str) -> bytes:
    try:
        image = read_image(source, SMALL)
    except ImprintError as error:
        raise Refused(404, "this picture can no longer be read") from error
    # Repeat grey and drop alpha, as for the backbone.
    colours = image[: 1 if len(image) < 3 else 3].expand(3, -1, -1).permute(1, 2, 0)
    content = io.BytesIO()
    Image.fromarray(colours.contiguous().numpy()).save(content, "JPEG", quality=85)
    return content.getvalue()
