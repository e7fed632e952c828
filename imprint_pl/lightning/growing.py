"""Adds and removes classes and examples of a classifier after the fit. The kept training set, and
the maths, are in `training_set/kept.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from torch import Tensor

from imprint_pl.embedding.batches import embed_loader, readable, unlabelled
from imprint_pl.errors import ImprintError
from imprint_pl.method.head import ImprintedHead
from imprint_pl.numerics.labels import warn_of_alike
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.kept_file import read_state, state_path, write_state

# How many images are embedded at a time.
BATCH = 64


class Growing(LightningModule):
    """The part of `ImprintedClassifier` that adds and removes classes.

    Attributes:
        head: the head of the classifier.
        state: the kept training set, from a `fit` with `keep=` or from `load_state`.
    """

    head: ImprintedHead
    state: State | None = None

    def embed(self, images: Any) -> Tensor:
        """Embed a batch of images as `(B, d)`."""
        raise NotImplementedError

    def add_class(self, name: str, images: Any, sources: Sequence[str] = ()) -> None:
        """Adds a class as the last label. The head is then the one of all samples at once.

        Args:
            name: the name of the class.
            images: uint8 `(n, C, H, W)`, a list of `(C, H, W)` of any sizes, embeddings `(n, d)`,
                or an iterable of batches, whose labels are ignored.
            sources: n names of the images, such as their files; see `explain`.

        Raises:
            ImprintError: nothing was kept, or the kept data do not suffice (the message says what
                would); the class exists already; or there is no image.
        """
        grown = self.kept_state().add_class(name, self._embedded(images), sources=sources)
        self._become(grown)
        warn_of_alike(grown.class_names, "the head")

    def add_examples(self, name: str, images: Any, sources: Sequence[str] = ()) -> None:
        """Adds images to a class.

        Args:
            name: the name of the class.
            images, sources: as for `add_class`.

        Raises:
            ImprintError: as for `add_class`, or there is no such class.
        """
        self._become(self.kept_state().add_examples(name, self._embedded(images), sources))

    def remove_class(self, name: str, images: Any = None) -> None:
        """Removes a class; the labels above it move down by one.

        Args:
            name: the name of the class.
            images: all its training images, if `keep="moments"` needs them.

        Raises:
            ImprintError: nothing was kept, or the kept data do not suffice; there is no such class;
                or it is the last one.
        """
        x = None if images is None else self._embedded(images)
        self._become(self.kept_state().remove_class(name, x))

    def save_state(self, checkpoint: str | Path) -> Path:
        """Writes the state beside a checkpoint, `NAME.state.safetensors`, and returns its path."""
        return write_state(self.kept_state(), state_path(checkpoint))

    def load_state(self, checkpoint: str | Path) -> None:
        """Reads the state beside a checkpoint.

        Raises:
            ImprintError: there is no state, or it has other embeddings than the head takes.
        """
        path = state_path(checkpoint)
        state = read_state(path)
        if not self.head.is_empty:
            _check_same(path, state, self.head)
        self.state = state

    def kept_state(self) -> State:
        """Returns the kept training set.

        Raises:
            ImprintError: nothing was kept.
        """
        if self.state is None:
            raise ImprintError(
                'nothing was kept of the training set: fit with keep="embeddings" (suffices for '
                'every step) or keep="moments", or load_state(checkpoint) where one lies beside it'
            )
        return self.state

    def _become(self, state: State) -> None:
        # Make the head first, so that the classifier does not change if this fails.
        head = state.head()
        self.head.take(head)
        self.state = state

    def _embedded(self, images: Any) -> Tensor:
        def transfer(batch: Any) -> Any:
            return move_data_to_device(batch, self.device)

        x, _ = embed_loader(self.embed, _batches(images), transfer=transfer, unpack=unlabelled)
        return x.cpu()


def _check_same(path: Path, state: State, head: ImprintedHead) -> None:
    """Raises if a state has other embeddings than a head takes."""
    kept, taken = (
        f"{dim} numbers" + (f" of layers {widths}" if widths else "")
        for dim, widths in (
            (state.embedding_dim, state.settings.get("layer_widths")),
            (head.embedding_dim, head.layer_widths),
        )
    )
    if kept != taken:
        raise ImprintError(
            f"{path} keeps embeddings of {kept}, and the checkpoint's head takes {taken}: they are "
            "of different fits; fit again with keep=, or give the state of this checkpoint"
        )


def _batches(images: Any) -> Iterator[Any]:
    """Yields images, or embeddings, in batches: `BATCH` at a time from a tensor or a list; anything
    else is an iterable of batches already."""
    if isinstance(images, list) and all(isinstance(i, Tensor) and i.ndim == 3 for i in images):
        yield from (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    elif isinstance(images, Tensor):
        yield from images.split(BATCH) if len(images) else ()
    else:
        yield from (found for batch in images if len(found := readable(batch)))
