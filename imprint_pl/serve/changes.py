"""Changes of the classes while the classifier is served.

Each change is written as a new checkpoint beside the original one, with its state:
`NAME.served-1.ckpt`, `NAME.served-2.ckpt`, …. The newest one is served, also after a restart.
Undoing a change deletes the newest one. The checkpoint of the fit is never changed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.files import damaged, sync, write_whole
from imprint_pl.lightning.checkpoint import read_checkpoint, with_head
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.numerics.labels import check_name, place_of
from imprint_pl.serve.limits import Refused
from imprint_pl.serve.version import Version
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.kept_file import read_state, state_path, write_state

# How many changes can be undone.
UNDO = 20
# The entry of a served checkpoint that describes the change.
SERVED = "served"


class Changes:
    """The version that is served, and the changes that make new versions.

    A change makes a new head, writes it, and then replaces the single reference `current`. A
    request that has taken `current` uses the same head to its end. Changes run one after the other.

    Args:
        checkpoint: a checkpoint of `fit`.
        model: its classifier, on the device for predictions. All versions share its backbone.
        allowed: whether changes are allowed. Only one process may then change this checkpoint.

    Attributes:
        current: the version that is served.

    Raises:
        ImprintError: a file is damaged or belongs to another checkpoint; or changes are allowed,
            but no training set was kept, or another process allows them, too.
    """

    def __init__(self, checkpoint: str | Path, model: ImprintedClassifier, allowed: bool) -> None:
        self.checkpoint = Path(checkpoint)
        self.model = model
        self.allowed = allowed
        self._lock = Lock()
        self._process = FileLock(self._beside("served.lock")) if allowed else None
        if self._process is not None:
            try:
                self._process.acquire(timeout=0)
            except Timeout:
                raise ImprintError(
                    f"{self.checkpoint} is served with --allow_changes by another process: stop "
                    "that one first, or serve without --allow_changes"
                ) from None
        try:
            with open(self.checkpoint, "rb") as file:
                self._base = hashlib.file_digest(file, "sha256").hexdigest()
            self.current = self._read(self._newest()).prepare()
            if allowed and self.current.state is None:
                # This raises, since nothing was kept, with a message on how to fit.
                read_state(state_path(self.checkpoint))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases the checkpoint, so that another process can change it."""
        if self._process is not None:
            self._process.release()

    @property
    def can_undo(self) -> bool:
        """Whether the version before the current one is still there."""
        number = self.current.number
        return number > 0 and self._path(number - 1).is_file()

    def add_class(
        self, name: str, x: Tensor, sources: Sequence[str] = (), expected: str | None = None
    ) -> Version:
        """Adds a class.

        Args:
            name: the name of the class.
            x: the embeddings of its images `(n, d)`.
            sources: n names of the images, or none.
            expected: the id of the version to change; `None` accepts any.

        Returns:
            The new version.

        Raises:
            Refused: another version is served by now (412), or the class exists already (409).
            ImprintError: the name is not valid.
        """
        check_name(name)

        def grown(state: State) -> State:
            if place_of(name, state.class_names) is not None:
                raise Refused(409, f"class {name!r} is there already: add images to it instead")
            return state.add_class(name, x, sources=sources)

        return self._change(f"added {name} ({_images(len(x))})", grown, expected)

    def add_examples(
        self, name: str, x: Tensor, sources: Sequence[str] = (), expected: str | None = None
    ) -> Version:
        """Adds images to a class. Arguments and errors are those of `add_class`; an unknown class
        is `Refused` (404)."""

        def grown(state: State) -> State:
            _check_there(name, state)
            return state.add_examples(name, x, sources)

        return self._change(f"added {_images(len(x))} to {name}", grown, expected)

    def remove_class(self, name: str, expected: str | None = None) -> Version:
        """Removes a class.

        Raises:
            Refused: there is no such class (404), it is the last one or was kept as sums that do
                not suffice (409), or another version is served by now (412).
        """

        def shrunk(state: State) -> State:
            _check_there(name, state)
            try:
                return state.remove_class(name)
            except ImprintError as error:
                raise Refused(409, str(error)) from error

        return self._change(f"removed {name}", shrunk, expected)

    def undo(self, expected: str | None = None) -> Version:
        """Returns to the previous version.

        Raises:
            Refused: there is no previous version (409), or another version is served by now (412).
        """
        with self._lock:
            self._check_expected(expected)
            number = self.current.number
            if not self.can_undo:
                raise Refused(409, "there is no change to undo")
            # Read the previous version first, since nothing has changed yet if this fails.
            before = self._read(number - 1).prepare()
            path = self._path(number)
            path.unlink()
            sync(path.parent)
            state_path(path).unlink(missing_ok=True)
            self.current = before
            return before

    def _change(self, change: str, step: Callable[[State], State], expected: str | None) -> Version:
        with self._lock:
            self._check_expected(expected)
            before = self.current
            assert before.state is not None
            state = step(before.state)
            head = state.head().to(self.model.device).eval()
            number, id = before.number + 1, secrets.token_hex(16)
            version = Version(head, state, number, id, change).prepare()
            self._write(version)
            self.current = version
            return version

    def _check_expected(self, expected: str | None) -> None:
        if expected is not None and expected != self.current.id:
            raise Refused(412, "the classes have changed meanwhile: look at them, and try again")

    def _write(self, version: Version) -> None:
        path, before = self._path(version.number), self._path(version.number - 1)
        assert version.state is not None
        checkpoint = read_checkpoint(before)
        checkpoint[SERVED] = {"of": self._base, "id": version.id, "change": version.change}
        try:
            # Write the state first: a version exists once its checkpoint does.
            sync(write_state(version.state, state_path(path)))
            write_whole(path, with_head(checkpoint, version.head), durable=True)
        except (ImprintError, OSError) as error:
            raise Refused(507, f"the change cannot be kept, and was not made: {error}") from error
        for number in self._numbers():
            if number < version.number - UNDO:
                self._path(number).unlink(missing_ok=True)
                state_path(self._path(number)).unlink(missing_ok=True)

    def _read(self, number: int) -> Version:
        path = self._path(number)
        if number == 0:
            own, model = {"id": self._base, "change": ""}, self.model
        else:
            own, backbone = self._own_entry(path), self.model.backbone
            model = ImprintedClassifier.load_from_checkpoint(path, backbone=backbone)
        if number or state_path(path).is_file():
            model.load_state(path)
        head = model.head.to(self.model.device).eval()
        return Version(head, model.state, number, own["id"], own["change"])

    def _own_entry(self, path: Path) -> dict[str, Any]:
        own = read_checkpoint(path).get(SERVED)
        with damaged(path, "a checkpoint that `serve` wrote"):
            if not isinstance(own, dict):
                raise ValueError("no entry of its own")
            of, id, change = (own[name] for name in ("of", "id", "change"))
            if not all(isinstance(value, str) for value in (of, id, change)):
                raise ValueError("values of other types")
        if of != self._base:
            raise ImprintError(
                f"{path} was made of another {self.checkpoint.name} than the one that is there "
                "now: remove it and its like, or serve it by its own name"
            )
        return {"id": id, "change": change}

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        """Returns the numbers of the versions beside the checkpoint."""
        pattern = re.compile(re.escape(self.checkpoint.stem) + r"\.served-([1-9]\d*)\.ckpt")
        names = (pattern.fullmatch(path.name) for path in self.checkpoint.parent.iterdir())
        return sorted(int(found[1]) for found in names if found)

    def _path(self, number: int) -> Path:
        return self._beside(f"served-{number}.ckpt") if number else self.checkpoint

    def _beside(self, end: str) -> Path:
        return self.checkpoint.with_name(f"{self.checkpoint.stem}.{end}")


def _check_there(name: str, state: State) -> None:
    if place_of(name, state.class_names) is None:
        known = state.class_names
        raise Refused(404, f"there is no class {name!r:.200}{did_you_mean(name, known)}")


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"
