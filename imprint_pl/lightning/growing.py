"""Grow and forget: classes and examples that come and go after the fit, on a classifier. The maths,
and what is kept for it, is in `training_set/kept.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprint_pl.data.batch import images_of
from imprint_pl.errors import ImprintError
from imprint_pl.numerics.labels import warn_of_alike
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.kept_file import read_state, state_path, write_state

# Images that go through the backbone at a time.
BATCH = 64


class Growing:
    """Mixed into `ImprintedClassifier`, which brings `embed`, `head` and `device`.

    Attributes:
        state: what was kept of the training set, by `fit` with `keep=` or by `load_state`.
    """

    state: State | None = None

    def add_class(self, name: str, images: Any, sources: Sequence[str] = ()) -> None:
        """Adds a class, as the last label; the head is that of all samples at once.

        Args:
            name: its name.
            images: uint8 `(n, C, H, W)`, a list of `(C, H, W)` of any sizes, embeddings `(n, d)`,
                or an iterable of batches, whose labels are ignored.
            sources: n words that name the images, such as their files; see `explain`.

        Raises:
            ImprintError: nothing was kept, or what was kept does not suffice (it says what would);
                the class is there already; no image.
        """
        grown = self._kept().add_class(name, self._embedded(images), sources=sources)
        self._become(grown)
        warn_of_alike(grown.class_names, "the head")

    def add_examples(self, name: str, images: Any, sources: Sequence[str] = ()) -> None:
        """Adds images to a class. Arguments and errors as of `add_class`."""
        self._become(self._kept().add_examples(name, self._embedded(images), sources))

    def remove_class(self, name: str, images: Any = None) -> None:
        """Removes a class; the labels above it move down by one.

        Args:
            name: its name.
            images: all its training images, where `keep="moments"` asks for them.

        Raises:
            ImprintError: nothing was kept, or it does not suffice; no such class; the last one.
        """
        x = None if images is None else self._embedded(images)
        self._become(self._kept().remove_class(name, x))

    def save_state(self, checkpoint: str | Path) -> Path:
        """Writes the state beside a checkpoint, `NAME.state.safetensors`."""
        return write_state(self._kept(), state_path(checkpoint))

    def load_state(self, checkpoint: str | Path) -> None:
        """Reads the state beside a checkpoint."""
        self.state = read_state(state_path(checkpoint))

    def _kept(self) -> State:
        if self.state is None:
            raise ImprintError(
                'nothing was kept of the training set: fit with keep="embeddings" (suffices for '
                'every step) or keep="moments", or load_state(checkpoint) where one lies beside it'
            )
        return self.state

    def _become(self, state: State) -> None:
        # Made before anything changes: a step that fails leaves the classifier as it was.
        head = state.head()
        self.head.load_state_dict(head.state_dict())
        self.state = state

    def _embedded(self, images: Any) -> Tensor:
        if isinstance(images, Tensor):
            batches = images.split(BATCH) if len(images) else []
        elif isinstance(images, list) and all(
            isinstance(i, Tensor) and i.ndim == 3 for i in images
        ):
            batches = [images[i : i + BATCH] for i in range(0, len(images), BATCH)]
        else:
            batches = (_readable(batch) for batch in images)
        rows = []
        for batch in batches:
            single = isinstance(batch, Tensor)
            if not len(batch):
                continue
            batch = batch.to(self.device) if single else [image.to(self.device) for image in batch]
            rows.append(self.embed(batch).cpu())
        if not rows:
            raise ImprintError("no image was given: add some")
        return torch.cat(rows)


def _readable(batch: Any) -> Any:
    """The images of a batch, without the black ones in the place of files that were skipped."""
    images = images_of(batch)
    skipped = batch.get("skipped", {}) if isinstance(batch, dict) else {}
    return [image for i, image in enumerate(images) if i not in skipped] if skipped else images
