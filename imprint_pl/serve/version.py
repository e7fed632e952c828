"""A version of the served classifier: its head, its kept training set, and the training images that
can be shown. A version is immutable; a change makes a new one.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError, shown
from imprint_pl.explain import unit_rows
from imprint_pl.method.head import NONE, ImprintedHead
from imprint_pl.training_set.kept import KeptRows, State


@dataclass(frozen=True)
class ClassProbability:
    """A class and how probable it is."""

    class_name: str
    probability: float


@dataclass(frozen=True)
class NearImage:
    """A training image near to the one that was sent.

    Attributes:
        class_name: its class.
        cosine: that of the two embeddings; see `explain`.
        picture: where the server has it, `None` where it is not known or its file is gone.
    """

    class_name: str
    cosine: float
    picture: str | None


@dataclass(frozen=True)
class Prediction:
    """The prediction for an image.

    Attributes:
        file: the name that the client gave it.
        class_name: the best class, or "none of these".
        label: its number; −1 for none of these.
        probability: of that class; `None` for none of these.
        classes: the most probable classes, best first.
        familiarity: about 0 for images like those of the training set, the lower, the stranger;
            `None` where none was fitted.
        prediction_set: the classes that may be true; `None` where none was fitted.
        neighbours: the nearest training images, nearest first; empty where none were kept.
    """

    file: str
    class_name: str
    label: int
    probability: float | None
    classes: list[ClassProbability]
    familiarity: float | None
    prediction_set: list[str] | None
    neighbours: list[NearImage]


@dataclass(frozen=True)
class ServedClass:
    """A class of the head and its number of training images, `None` where nothing was kept."""

    name: str
    images: int | None


@dataclass(frozen=True)
class Version:
    """A head and what belongs to it.

    Attributes:
        head: the head, in eval mode, on the device for predictions.
        state: the kept training set, if there is one.
        number: how many changes were made since the checkpoint.
        id: a unique id of the version.
        change: a description of the last change; empty for the checkpoint itself.
    """

    head: ImprintedHead
    state: State | None
    number: int
    id: str
    change: str = ""

    @property
    def classes(self) -> list[ServedClass]:
        """Returns the classes in the order of their labels."""
        head = self.head
        counts = [None] * head.num_classes if self.state is None else self.state.counts.tolist()
        return [ServedClass(shown(head.name_of(label)), n) for label, n in enumerate(counts)]

    @torch.inference_mode()
    def predict(self, x: Tensor, files: list[str], top: int, neighbours: int) -> list[Prediction]:
        """Predicts embeddings.

        Args:
            x: `(n, d)`, on the head's device.
            files: the n names of the images.
            top: most classes to name.
            neighbours: most training images to name.

        Raises:
            ImprintError: an embedding is not finite.
        """
        head = self.head
        scores = head.scores(x)
        logits = scores * head.log_scale.exp()
        known = None if head.familiar.is_empty else head.familiarity(x, scores)
        labels = head.decide(scores, known).tolist()
        probabilities = logits.softmax(1)
        best = probabilities.topk(min(top, head.num_classes), dim=1)
        sets = None if head.coverage is None else head.sets_of(logits, head.bounds())
        near = self._nearest(x, neighbours)
        found = []
        for i, (file, label) in enumerate(zip(files, labels, strict=True)):
            values = best.values[i].tolist()
            if math.isnan(values[0]):
                raise ImprintError(f"{file}: its embedding is not finite; look at that image")
            names = [shown(head.name_of(label)) for label in best.indices[i].tolist()]
            inside = None
            if sets is not None:
                places = [] if label == NONE else sets[i].nonzero().flatten().tolist()
                inside = [shown(head.name_of(place)) for place in places]
            found.append(
                Prediction(
                    file=file,
                    class_name=shown(head.name_of(label)),
                    label=label,
                    probability=None if label == NONE else round(values[0], 6),
                    classes=[
                        ClassProbability(name, round(value, 6))
                        for name, value in zip(names, values, strict=True)
                    ],
                    familiarity=None if known is None else float(f"{known[i].item():.6g}"),
                    prediction_set=inside,
                    neighbours=near[i],
                )
            )
        return found

    def picture(self, key: str) -> str | None:
        """Returns the file of a training image, by the key at the end of `NearImage.picture`."""
        return self._files.get(key)

    @cached_property
    def _files(self) -> dict[str, str]:
        sources = self.state.sources if isinstance(self.state, KeptRows) else ()
        return {_key(source): source for source in sources if source}

    @cached_property
    def _units(self) -> Tensor | None:
        return unit_rows(self.head, self.state.x) if isinstance(self.state, KeptRows) else None

    def prepare(self) -> Version:
        """Computes the cached values of predictions, so that the first one need not wait."""
        _ = self._files, self._units
        return self

    def _nearest(self, x: Tensor, count: int) -> list[list[NearImage]]:
        state, kept = self.state, self._units
        if count < 1 or kept is None or not isinstance(state, KeptRows):
            return [[] for _ in x]
        found = (unit_rows(self.head, x) @ kept.T).topk(min(count, len(kept)), dim=1)
        return [
            [
                NearImage(
                    shown(state.class_names[int(state.y[row])]),
                    round(cosine, 4),
                    _picture_of(state.sources[row]) if state.sources else None,
                )
                for row, cosine in zip(rows, cosines, strict=True)
            ]
            for rows, cosines in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]


def _key(source: str) -> str:
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _picture_of(source: str) -> str | None:
    return f"/pictures/{_key(source)}" if source and os.path.isfile(source) else None
