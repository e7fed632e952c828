"""Image files as a data set, and the loader that receives their batches from the workers.

A batch is a list of images of different sizes. A worker sends it to the main process as one flat
tensor, since a shared-memory file for each image would soon exhaust the number of open files.
"""

import copy
import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from imprint_pl.data.decode import read_image
from imprint_pl.data.splits import SplitDataset
from imprint_pl.errors import ImprintError, shown

SKIP_ADVICE = 'Or leave out what cannot be read: on_error="skip" (--on_error skip).'


class DecodedDataset(SplitDataset):
    """Images that are decoded for each batch.

    A batch, `__getitems__(indices)`, is `(images, labels)`: a list of uint8 `(C, H, W)` tensors and
    int64 `(B,)`; without labels the list alone. If a DataLoader's worker cannot read an image, the
    batch is an `ImprintError`, which `ImageFileLoader` raises: torch would wrap an exception in the
    worker's traceback.

    A subclass writes `read`, `select`, `fingerprint` and `__len__`.

    Args:
        labels: `(N,)` int64; None for images to predict, which then have no attribute `labels`.
        max_side: Longest side in pixels; larger images are shrunk.
        least_side: Pixels below which `max_side` does not shrink the shorter side.
        on_error: "fail", or "skip" for images to predict: an image that cannot be read is replaced
            by a black one, and its batch is a dict of `images` and of `skipped`, which maps the
            place in the batch to the reason. Use `unreadable_at` for images with labels.
        advice: A sentence that ends the error of an image that cannot be read.
    """

    from_files = True

    def __init__(
        self,
        labels: Tensor | None = None,
        max_side: int | None = None,
        on_error: str = "fail",
        advice: str = "",
        least_side: int | None = None,
    ) -> None:
        self.has_labels = labels is not None
        if labels is not None:
            self.labels = labels
        self.max_side = max_side
        self.least_side = least_side
        self.on_error = on_error
        self.advice = advice

    def read(self, index: int) -> Tensor:
        """Decode an image to uint8 `(C, H, W)`.

        Raises:
            ImprintError: If it cannot be read.
        """
        raise NotImplementedError

    def select(self, positions: Tensor, labels: Tensor) -> Self:
        """Return the samples at `positions` `(M,)`, with new labels `(M,)`."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | Tensor:
        image = self.read(index)
        return (image, self.labels[index]) if self.has_labels else image

    def __getitems__(self, indices: Sequence[int]) -> Any:
        if self.on_error == "skip":
            return self._readable(indices)
        try:
            images = [self.read(index) for index in indices]
        except ImprintError as error:
            advised = ImprintError(f"{error} {self.advice}".rstrip())
            if get_worker_info() is None:
                raise advised from None
            return advised
        return (images, self.labels[list(indices)]) if self.has_labels else images

    def _readable(self, indices: Sequence[int]) -> dict[str, Any] | list[Tensor]:
        images: list[Tensor] = []
        skipped: dict[int, str] = {}
        for place, index in enumerate(indices):
            try:
                images.append(self.read(index))
            except ImprintError as error:
                images.append(torch.zeros(3, 8, 8, dtype=torch.uint8))
                skipped[place] = str(error)
        return {"images": images, "skipped": skipped} if skipped else images

    def _labelled(self, labels: Tensor) -> Self:
        """Return a copy for `select`, with other labels."""
        selected = copy.copy(self)
        selected.labels, selected.has_labels, selected.on_error = labels, True, "fail"
        # The original labels are those of all samples, so the copy must not keep them.
        selected.__dict__.pop("original_labels", None)
        return selected

    def sized(self, max_side: int | None, least_side: int | None) -> Self:
        """Return the data set as a model wants its images read.

        Args:
            max_side: Longest side in pixels, where the data set has no `max_side` of its own.
            least_side: Pixels below which the shorter side is not shrunk.
        """
        sized = copy.copy(self)
        sized.max_side = max_side if self.max_side is None else self.max_side
        sized.least_side = least_side
        return sized

    def how_read(self) -> str:
        """Return what the pixels depend on besides the images' files, for `fingerprint`.

        Where `max_side` is set, `least_side` belongs to it.
        """
        least = "" if None in (self.max_side, self.least_side) else f" {self.least_side}"
        return f"{self.max_side}{least}"


class ImageFileDataset(DecodedDataset):
    """Image files.

    Args:
        paths: One file for each sample.
        labels: As for `DecodedDataset`, like all that follow.
        max_side: Longest side in pixels.
        on_error: "fail" or "skip".
        advice: A sentence that ends the error of a file that cannot be read.
        least_side: Pixels below which `max_side` does not shrink the shorter side.
    """

    paths: list[str]

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor | None = None,
        max_side: int | None = None,
        on_error: str = "fail",
        advice: str = "",
        least_side: int | None = None,
    ) -> None:
        super().__init__(labels, max_side, on_error, advice, least_side)
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.max_side, self.least_side)

    def select(self, positions: Tensor, labels: Tensor) -> Self:
        selected = self._labelled(labels)
        selected.paths = [self.paths[position] for position in positions.tolist()]
        return selected

    def fingerprint(self) -> str:
        """Return a hash of the files' names below their folder, sizes and times, and of `max_side`.

        The files are not read: for a million images that would take longer than embedding them.
        """
        digest = hashlib.sha256(f"files {self.how_read()}".encode())
        root = os.path.commonpath(self.paths) if len(self.paths) > 1 else ""
        for path in self.paths:
            try:
                status = os.stat(path)
            except OSError as error:
                raise ImprintError(
                    f"cannot read the image {shown(path)}: {error.strerror}. Replace or remove the "
                    f"file. {self.advice}".rstrip()
                ) from error
            name = os.path.relpath(path, root) if root else os.path.basename(path)
            line = f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n"
            # Hash the raw bytes of names that are not UTF-8.
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class _Reasons(Dataset):
    """For each image the reason why it cannot be read, or None."""

    def __init__(self, images: DecodedDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str | None:
        try:
            self.images.read(index)
        except ImprintError as error:
            return str(error)
        return None


def unreadable_at(images: DecodedDataset, num_workers: int = 0) -> dict[int, str]:
    """Find the images that cannot be read.

    Each image is decoded whole: the pixels may be damaged behind a good header.

    Args:
        images: The images.
        num_workers: Processes that decode.

    Returns:
        The reason for each place of an image that cannot be read.
    """
    count = len(images)
    # At least two batches for each worker, so that none is idle.
    size = max(1, min(64, count // (2 * num_workers) if num_workers else 64))
    reasons: list[str | None] = []
    with tqdm(
        total=count, desc="looking for broken images", delay=2, leave=False, disable=None
    ) as progress:
        for batch in ImageFileLoader(
            _Reasons(images),
            batch_size=size,
            num_workers=num_workers if count > size else 0,
            collate_fn=list,
            # Pass a generator: otherwise the loader draws from the global one.
            generator=torch.Generator(),
        ):
            reasons += batch
            progress.update(len(batch))
    return {place: reason for place, reason in enumerate(reasons) if reason}


def unreadable(
    paths: Sequence[str], max_side: int | None = None, num_workers: int = 0
) -> dict[str, str]:
    """Find the image files that cannot be read; the reason for each of them.

    Args:
        paths: Image files.
        max_side: As for `read_image`.
        num_workers: Processes that decode.
    """
    found = unreadable_at(ImageFileDataset(paths, max_side=max_side), num_workers)
    return {paths[place]: reason for place, reason in found.items()}


class PackedBatch(NamedTuple):
    """A batch of images as one tensor.

    Args:
        flat: The images' bytes one after the other, `(sum of C*H*W,)` uint8.
        shapes: The images' shapes.
        labels: `(B,)` int64, or None without labels.
        skipped: The reasons for files that cannot be read, by place in the batch.
    """

    flat: Tensor
    shapes: list[torch.Size]
    labels: Tensor | None
    skipped: dict[int, str] | None = None


def pack(batch: Any) -> Any:
    """Collate for `ImageFileLoader`: pack the batch in a worker, but not in the main process."""
    if get_worker_info() is None or isinstance(batch, ImprintError):
        return batch
    skipped = None
    if isinstance(batch, dict):
        batch, skipped = batch["images"], batch["skipped"]
    images, labels = batch if isinstance(batch, tuple) else (batch, None)
    flat = torch.cat([image.flatten() for image in images])
    return PackedBatch(flat, [image.shape for image in images], labels, skipped)


def unpack(batch: Any) -> Any:
    """Undo `pack`; the images are views of the flat tensor."""
    if not isinstance(batch, PackedBatch):
        return batch
    parts = batch.flat.split([shape.numel() for shape in batch.shapes])
    images = [part.view(shape) for part, shape in zip(parts, batch.shapes, strict=True)]
    if batch.skipped:
        return {"images": images, "skipped": batch.skipped}
    return images if batch.labels is None else (images, batch.labels)


class ImageFileLoader(DataLoader):
    """A DataLoader over image files, mostly an `ImageFileDataset` with `collate_fn=pack`.

    It raises a worker's `ImprintError` without the worker's traceback, when the batch is due.
    """

    def __iter__(self) -> Any:
        batches = super().__iter__()
        failure = None
        try:
            for batch in batches:
                if isinstance(batch, ImprintError):
                    failure = batch
                    break
                yield unpack(batch)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise
            failure = ImprintError(
                f"a process that decodes images was killed ({error}). Most often memory, or "
                "shared memory (/dev/shm), ran out: lower batch_size or num_workers, or set "
                "max_side to shrink the images."
            )
        # Stop the workers before raising: a traceback would keep them alive for the garbage
        # collector, which waits five seconds for each of them.
        del batches
        if failure is not None:
            raise failure
