"""The training set as it is kept beside a head, so that classes and examples can be added and
removed.

`KeptRows` keeps the embeddings, from which every head can be made. `KeptSums` keeps their sums,
which are smaller and suffice for some recipes. A `State` is immutable: each step returns a new one.
`head()` returns the head that imprinting the same samples at once would give; the order in which
they came does not matter.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError, did_you_mean, warn
from imprint_pl.method.familiarity import MOST_BYTES
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.pipeline import (
    Request,
    Sums,
    kept_sums,
    keywords_of,
    learns_from_sums,
)
from imprint_pl.method.recipes import Recipe, resolve
from imprint_pl.method.selection import weibull_typical
from imprint_pl.method.threshold import Limits, set_limits
from imprint_pl.numerics.labels import check_name, place_of
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.order import in_order
from imprint_pl.numerics.values import check_values, to_json_value
from imprint_pl.parts.by_name import name_of, steps_of
from imprint_pl.parts.norm.random_projection import RandomProjection

KEEP = ("moments", "embeddings")


def check_keep(keep: str, limits: bool) -> None:
    """Raises if `keep` is not in `KEEP`, or cannot update the limits of a head.

    Args:
        keep: the user's value.
        limits: whether the head has a familiarity or prediction sets.

    Raises:
        ImprintError: an unknown value, or sums together with limits.
    """
    if keep not in KEEP:
        raise ImprintError(
            f"keep={keep!r}{did_you_mean(keep, KEEP)}: give one of {', '.join(KEEP)}"
        )
    if keep == "moments" and limits:
        raise ImprintError(
            'keep="moments" does not go with accept and coverage: sums have no samples to hold '
            "out, and could not keep the familiarity and the prediction sets right when classes "
            'come or go. Give keep="embeddings", which fits them anew, or leave accept and '
            "coverage out"
        )


@dataclass(frozen=True, kw_only=True)
class State(ABC):
    """The kept training set of a head, on the CPU: `KeptRows` or `KeptSums`.

    Attributes:
        keep: the value of `KEEP` for this kind.
        settings: the recipe and its keywords, as `resolve` takes them.
        seed: fixes every random choice.
        class_names: C names.
        embedding_dim: d.
        capped: whether `random_projection` has at most half as many features as there are samples.
            Earlier versions had this rule, and it still holds for the states that they wrote.
        classifier: the backbone's original classifier, where NORM_post is "quantile".
    """

    keep: ClassVar[str]

    settings: dict[str, Any]
    seed: int
    class_names: list[str]
    embedding_dim: int
    capped: bool = False
    classifier: Tensor | None = None

    @staticmethod
    def of(
        x: Tensor,
        y: Tensor,
        head: ImprintedHead,
        keep: str,
        *,
        sources: Sequence[str] = (),
        limits: Limits | None = None,
        weibull: tuple[float, float] | None = None,
        classifier: Tensor | None = None,
    ) -> State:
        """Returns the state of a head that was imprinted from `x (N, d)`, `y (N,)`.

        Args:
            x, y: as `imprint` took them, before `weibull` chose among them.
            head: gives the recipe, the seed and the class names.
            keep: "moments" or "embeddings".
            sources: see `KeptRows`; sums do not keep them.
            limits: the limits that were fitted with the head.
            weibull: see `KeptRows`.
            classifier: see the attributes.

        Raises:
            ImprintError: an unknown `keep`, or sums that do not suffice for the recipe, or for the
                familiarity and the prediction sets of the head.
        """
        check_keep(keep, not (head.familiar.is_empty and head.sets.is_empty))
        settings = keywords_of(head)
        quantile = settings.get("norm_post") == "quantile"
        shared: dict[str, Any] = dict(
            settings=json.loads(json.dumps(settings, default=to_json_value)),
            seed=int(head.settings.get("seed", 0)),
            class_names=[head.name_of(label) for label in range(head.num_classes)],
            embedding_dim=x.shape[1],
            classifier=classifier.detach().cpu() if quantile and classifier is not None else None,
        )
        x, y = x.detach().cpu().float(), y.detach().cpu().long()
        if keep == "embeddings":
            return KeptRows(
                x=x,
                y=y,
                sources=tuple(sources),
                **asdict(limits or Limits()),
                weibull=None if weibull is None else (float(weibull[0]), float(weibull[1])),
                **shared,
            )._in_order()
        if getattr(_parts_of(shared["settings"]).gen, "needs_rows", False):
            # Without rows λ cannot be chosen again, so it stays fixed like the temperature.
            shared["settings"]["lam"] = float(head.settings["chosen_lam"])
            shared["settings"].pop("metric", None)
        parts = _parts_of(shared["settings"])
        _refuse_moments(parts, weibull)
        norm_pre, _ = _fresh(parts, x.shape[1], len(y), shared["seed"])
        return KeptSums(
            moments=kept_sums(parts, norm_pre, x, y, head.num_classes),
            temperature=head.temperature,
            calibrated=head.settings.get("calibrated", True),
            threshold=head.threshold,
            **shared,
        )

    @property
    def parts(self) -> Recipe:
        """The parts of the recipe, not fitted."""
        return _parts_of(self.settings, self.capped)

    @property
    @abstractmethod
    def counts(self) -> Tensor:
        """`(C,)` int64, how many samples each class has."""

    @abstractmethod
    def head(self) -> ImprintedHead:
        """Returns the head of these samples, on the CPU."""

    def add_class(
        self, name: str, x: Tensor, place: int | None = None, sources: Sequence[str] = ()
    ) -> Self:
        """Returns the state with a new class.

        Args:
            name: the new class.
            x: its embeddings `(n, d)`.
            place: the label of the new class; by default it comes last.
            sources: see `KeptRows`; sums do not keep them.

        Raises:
            ImprintError: the class exists already, no sample was given, the embeddings have another
                width, or sums do not suffice.
        """
        check_name(name)
        if place_of(name, self.class_names) is not None:
            raise ImprintError(
                f"class {name!r} is there already: add-examples (add_examples in Python) gives it "
                "more samples, or choose another name"
            )
        names, label = list(self.class_names), len(self.class_names) if place is None else place
        names.insert(label, name)
        places = torch.arange(len(names) - 1)
        grown = self._relabelled(names, places + (places >= label))
        return grown.add_examples(name, x, sources)

    def add_examples(self, name: str, x: Tensor, sources: Sequence[str] = ()) -> Self:
        """Returns the state with more samples of a class. Arguments and errors as `add_class`."""
        label, x = self._label(name), self._checked(x, name)
        return self._with(x, torch.full((len(x),), label), tuple(sources))

    def remove_class(self, name: str, x: Tensor | None = None) -> Self:
        """Returns the state without a class.

        Args:
            name: the class.
            x: all its embeddings `(n, d)`. Only sums with a Gram matrix need them, since that
                matrix is one for all classes.

        Raises:
            ImprintError: there is no such class, it is the last one, or sums do not suffice.
        """
        label = self._label(name)
        if len(self.class_names) == 1:
            raise ImprintError(f"class {name!r} is the last one: a head needs a class")
        names = [*self.class_names[:label], *self.class_names[label + 1 :]]
        places = torch.arange(len(self.class_names))
        places = torch.where(places == label, -1, places - (places > label).long())
        return self._without(label, x)._relabelled(names, places)

    @abstractmethod
    def _with(self, x: Tensor, y: Tensor, sources: tuple[str, ...]) -> Self:
        """Adds samples `x (n, d)` of the class that `y (n,)` repeats."""

    @abstractmethod
    def _without(self, label: int, x: Tensor | None) -> Self:
        """Removes the samples of a class, which `_relabelled` then leaves out."""

    @abstractmethod
    def _relabelled(self, names: list[str], places: Tensor) -> Self:
        """Changes the labels: label c becomes `places[c]`.

        A class with `places[c] == -1` is left out; its samples were removed before. A new label
        that is not in `places` is a class without samples.
        """

    def _label(self, name: str) -> int:
        label = place_of(name, self.class_names)
        if label is None:
            raise ImprintError(
                f"there is no class {name!r}{did_you_mean(name, self.class_names)} "
                f"({len(self.class_names)} classes: {', '.join(self.class_names[:10])}"
                f"{', …' if len(self.class_names) > 10 else ''})"
            )
        if self.class_names.count(self.class_names[label]) > 1:
            raise ImprintError(
                f"{self.class_names.count(self.class_names[label])} classes are called {name!r}: "
                "fit with class names that tell them apart"
            )
        return label

    def _checked(self, x: Tensor, name: str) -> Tensor:
        x = torch.as_tensor(x).detach().cpu()
        if x.ndim != 2 or not x.is_floating_point() or x.shape[1] != self.embedding_dim:
            raise ImprintError(
                f"embeddings of shape {tuple(x.shape)} and type {x.dtype} for class {name!r}: "
                f"expected floats (n, {self.embedding_dim}), by the backbone of the head"
            )
        if not len(x):
            raise ImprintError(f"class {name!r}: no sample was given; add some")
        check_values(x, f"class {name!r}: ")
        return x.float()


@dataclass(frozen=True, kw_only=True)
class KeptRows(State):
    """The training embeddings: every head can be made from them, its temperature included.

    Attributes:
        x: `(N, d)` float32 (float16 in files of earlier versions), sorted by content, so that a
            file does not depend on the order in which the rows came.
        y: `(N,)` int64, their labels.
        sources: N names of the samples, such as their files; empty if no names were given.
        accept: share of training samples that the threshold lets pass; see `method/threshold.py`.
        coverage: probability that a prediction set holds the truth; see `method/sets.py`.
        most_bytes: see `Limits`.
        weibull: as for `imprint`.
    """

    keep: ClassVar[str] = "embeddings"

    x: Tensor
    y: Tensor
    sources: tuple[str, ...] = ()
    accept: float | None = None
    coverage: float | None = None
    most_bytes: int = MOST_BYTES
    weibull: tuple[float, float] | None = None

    @property
    def counts(self) -> Tensor:
        return torch.bincount(self.y, minlength=len(self.class_names))

    def head(self) -> ImprintedHead:
        names, x, y = list(self.class_names), self.x.float(), self.y
        if self.weibull is not None:
            rows = weibull_typical(x, y, *self.weibull)
            x, y = x[rows], y[rows]
        head = imprint_parts(
            x, y, self.parts, len(names), names, self.seed, self.classifier, allow_empty=True
        )
        limits = Limits(self.accept, self.coverage, self.most_bytes)
        return set_limits(head, x, y, limits, self.classifier)

    def _with(self, x: Tensor, y: Tensor, sources: tuple[str, ...]) -> Self:
        named = (self.sources or ("",) * len(self.x)) + (sources or ("",) * len(x))
        return replace(
            self,
            x=torch.cat([self.x.float(), x]),
            y=torch.cat([self.y, y]),
            sources=named if any(named) else (),
        )._in_order()

    def _without(self, label: int, x: Tensor | None) -> Self:
        return self._taking((self.y != label).nonzero().flatten())

    def _relabelled(self, names: list[str], places: Tensor) -> Self:
        return replace(self, class_names=names, y=places[self.y])

    def _in_order(self) -> Self:
        return self._taking(in_order(self.x, self.y))

    def _taking(self, rows: Tensor) -> Self:
        """Keeps the rows at the indices `(n,)`, in this order."""
        sources = tuple(self.sources[row] for row in rows.tolist()) if self.sources else ()
        return replace(self, x=self.x[rows], y=self.y[rows], sources=sources)


@dataclass(frozen=True, kw_only=True)
class KeptSums(State):
    """The sums of the training embeddings, from which single samples cannot be recovered.

    They are sums after NORM_pre, or before it if NORM_pre learns from sums (`join`).

    Attributes:
        moments: the sums, with a pooled Gram matrix where GEN needs one; see `kept_sums`.
        temperature, threshold: those of the head. Sums cannot fit them again, so they never change.
            The same is true of a λ that was chosen by leaving out rows; `settings` then holds it as
            a number.
        calibrated: whether the temperature was fitted on exactly these samples.
    """

    keep: ClassVar[str] = "moments"

    moments: Moments
    temperature: float = 1.0
    calibrated: bool = True
    threshold: float | None = None

    @property
    def counts(self) -> Tensor:
        return self.moments.counts.long()

    def head(self) -> ImprintedHead:
        parts, names = self.parts, list(self.class_names)
        norm_pre, empty = _fresh(parts, self.embedding_dim, int(self.counts.sum()), self.seed)
        request = Request(len(names), names, self.seed, self.classifier)
        head = Sums.of_kept(norm_pre, empty.norm_inf, self.moments).head(parts, request)
        head.temperature, head.threshold = self.temperature, self.threshold
        if not self.calibrated:
            head.settings["calibrated"] = False
        return head

    def _with(self, x: Tensor, y: Tensor, sources: tuple[str, ...]) -> Self:
        return self._changed(self.moments + self._sums(x, y, len(x)))

    def _without(self, label: int, x: Tensor | None) -> Self:
        if self.moments.gram is not None:
            return self._changed(self.moments - self._own_sums(label, x))
        # Counts and sums are stored by class, so `_relabelled` only has to leave them out.
        self._check_features(-int(self.counts[label]))
        return self._changed(self.moments)

    def _relabelled(self, names: list[str], places: Tensor) -> Self:
        moments = self.moments.relabelled(places, len(names))
        return replace(self, class_names=names, moments=moments)

    def _changed(self, moments: Moments) -> Self:
        """Replaces the sums, and warns that there are no samples to fit a temperature on."""
        if self.calibrated and len(self.class_names) > 1:
            kept = "temperature" if self.threshold is None else "temperature and the threshold"
            warn(
                f'the probabilities are not calibrated: keep="moments" has no samples to fit the '
                f'{kept} of another head on, which stay as they were; keep="embeddings" fits them '
                "anew"
            )
        return replace(self, moments=moments, calibrated=False)

    def _own_sums(self, label: int, x: Tensor | None) -> Moments:
        """Returns the sums of a class from all its embeddings, and checks that they are the samples
        that were kept."""
        name, count = self.class_names[label], int(self.counts[label])
        if x is None:
            reason = f"gen={self.settings['gen']!r} needs the Gram matrix, which is one"
            if not self.parts.gen.needs_gram:
                reason = f"norm_pre={self.settings['norm_pre']!r} needs the squares, one sum"
            raise ImprintError(
                f"cannot remove class {name!r} from sums: {reason} for all classes. Give the "
                f'class\'s own images (all {count}), or keep="embeddings" from the start, which '
                "suffices for every step"
            )
        x = self._checked(x, name)
        own = self._sums(x, torch.full((len(x),), label), -count)
        scale = self.moments.sums[label].abs().max().clamp(min=1e-12)
        far = (own.sums[label] - self.moments.sums[label]).abs().max() / scale
        if len(x) != count or far > 1e-3:
            raise ImprintError(
                f"the {len(x)} images given for class {name!r} are not the {count} that its sums "
                "were made of: give exactly those"
            )
        return own

    def _sums(self, x: Tensor, y: Tensor, more: int) -> Moments:
        """Returns the sums of samples that are added, or removed if `more` is negative."""
        self._check_features(more)
        samples = int(self.counts.sum())
        norm_pre, _ = _fresh(self.parts, self.embedding_dim, samples, self.seed)
        return kept_sums(self.parts, norm_pre, x, y, len(self.class_names))

    def _check_features(self, more: int) -> None:
        """Raises if `more` samples would change the number of random features."""
        before = int(self.counts.sum())
        for step in _projections(self.parts.norm_pre):
            then, now = (step.features(self.embedding_dim, n) for n in (before, before + more))
            if then != now:
                raise ImprintError(
                    f"{before} samples had {then} random features, {before + more} would have "
                    f'{now}, others, which sums of the old ones cannot give: keep="embeddings" '
                    f"suffices, or projection_dim of at most {min(then, now)}"
                )


def _projections(norm_pre: nn.Module) -> list[RandomProjection]:
    """Returns the random projections among the steps of NORM_pre.

    They depend only on the seed, d and N, so they can be drawn again without samples.
    """
    return [step for step in steps_of(norm_pre) if isinstance(step, RandomProjection)]


def _parts_of(settings: dict[str, Any], capped: bool = False) -> Recipe:
    parts = resolve(**settings)
    if not isinstance(parts, Recipe):
        raise ValueError("the settings of a head name the recipe that auto chose, not auto")
    for step in _projections(parts.norm_pre):
        # With norm_inf="same" NORM_inf is the same object, so only NORM_pre has to be changed.
        step.capped = capped
    return parts


def _fresh(parts: Recipe, dim: int, samples: int, seed: int) -> tuple[nn.Module, ImprintedHead]:
    """Returns NORM_pre and an empty head with its NORM_inf, as they are after a fit on `samples`
    embeddings of `dim` numbers. It is for recipes for which sums suffice."""
    norm_pre, head = parts.fresh()
    for step in _projections(norm_pre):
        step.draw(torch.empty(0, dim), samples, seed)
    return norm_pre, head


def _refuse_moments(parts: Recipe, weibull: tuple[float, float] | None) -> None:
    """Raises if sums do not suffice to update the head when samples are added."""
    drawn = _projections(parts.norm_pre)
    learned = [
        step.name
        for step in steps_of(parts.norm_pre)
        if getattr(step, "learns", False) and step not in drawn
        if not learns_from_sums(parts.norm_pre)
    ]
    reason, recipes = None, "qi, hosoda, janson, ls, ridge, lda, ranpac"
    if "join" in learned:
        recipes = "hosoda, janson, ls, ridge, lda"
    if not parts.gen.from_moments:
        reason = f"gen={parts.gen.name!r} has to see every sample"
    elif getattr(parts.gen, "class_weight", None) is not None:
        reason = "class_weight changes what every sample weighs as more of them come"
    elif learned:
        part = name_of(parts.norm_pre) if learned[0] == "join" else learned[0]
        reason = f"norm_pre={part!r} learns from the samples and would learn anew"
    elif weibull is not None:
        reason = "weibull chooses among the samples"
    if reason:
        raise ImprintError(
            f'keep="moments" does not suffice: {reason}. Give keep="embeddings", or one of the '
            f"recipes that need sums alone: {recipes}"
        )
