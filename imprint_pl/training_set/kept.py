"""What is kept of the training set beside a head, so that classes and examples can come and go:
embeddings, from which everything can be made anew, or sums, which say nothing of single samples.

A `State` never changes: each step gives a new one, and `head()` makes the head that imprinting its
samples at once would give, whatever the order in which they came.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError, did_you_mean, warn
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.pipeline import head_of_sums, keywords_of
from imprint_pl.method.recipes import Recipe, resolve
from imprint_pl.method.selection import weibull_typical
from imprint_pl.numerics.labels import check_name, place_of
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.order import in_order
from imprint_pl.numerics.values import check_values, to_json_value
from imprint_pl.parts.by_name import steps_of
from imprint_pl.parts.norm.base import sums_of
from imprint_pl.parts.norm.random_projection import RandomProjection

KEEP = ("moments", "embeddings")


@dataclass(frozen=True)
class State:
    """The training set of a head, or its sums; on the CPU.

    Attributes:
        settings: the recipe and its keywords, as `resolve` takes them.
        seed: fixes every random choice.
        class_names: C names.
        embedding_dim: d.
        x: `(N, d)` float32 (float16 in files of earlier versions), in an order that depends on the
            rows alone, and `y` `(N,)`; or `None`.
        sources: N words that name the samples, such as their files; empty where not asked for.
        moments: the sums of NORM_pre(x), or `None`.
        temperature, threshold: of the head; sums keep them, embeddings fit them anew.
        calibrated: whether the temperature suits the head of these samples.
        capped: whether `random_projection` has at most half as many features as there are samples:
            the rule of earlier versions, by which a state that those have written goes on.
        accept: share of training samples that the threshold is to let pass; see `threshold.py`.
        weibull: as for `imprint`.
        classifier: the backbone's original classifier, where NORM_post is "quantile".
    """

    settings: dict[str, Any]
    seed: int
    class_names: list[str]
    embedding_dim: int
    x: Tensor | None = None
    y: Tensor | None = None
    sources: tuple[str, ...] = ()
    moments: Moments | None = None
    temperature: float = 1.0
    calibrated: bool = True
    capped: bool = False
    threshold: float | None = None
    accept: float | None = None
    weibull: tuple[float, float] | None = None
    classifier: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: Tensor,
        head: ImprintedHead,
        keep: str,
        *,
        sources: Sequence[str] = (),
        accept: float | None = None,
        weibull: tuple[float, float] | None = None,
        classifier: Tensor | None = None,
    ) -> State:
        """The state of a head that was imprinted from `x (N, d)`, `y (N,)`.

        Args:
            x, y: as `imprint` took them, before any choice by `weibull`.
            head: gives recipe, seed and class names.
            keep: "moments" or "embeddings".
            sources: what names the samples; embeddings only.
            accept, weibull, classifier: see the attributes.

        Raises:
            ImprintError: an unknown `keep`, or sums that do not suffice for the recipe.
        """
        if keep not in KEEP:
            raise ImprintError(
                f"keep={keep!r}{did_you_mean(keep, KEEP)}: give one of {', '.join(KEEP)}"
            )
        settings = keywords_of(head)
        quantile = settings.get("norm_post") == "quantile"
        state = cls(
            settings=json.loads(json.dumps(settings, default=to_json_value)),
            seed=int(head.settings.get("seed", 0)),
            class_names=[head.name_of(label) for label in range(head.num_classes)],
            embedding_dim=x.shape[1],
            temperature=head.temperature,
            calibrated=head.settings.get("calibrated", True),
            threshold=head.threshold,
            accept=accept,
            weibull=None if weibull is None else (float(weibull[0]), float(weibull[1])),
            classifier=classifier.detach().cpu() if quantile and classifier is not None else None,
        )
        x, y = x.detach().cpu(), y.detach().cpu().long()
        if keep == "embeddings":
            return state._with_rows(x.float(), y, tuple(sources))
        parts = state.parts
        _refuse_moments(parts, weibull)
        norm_pre = state._norm_pre(parts, len(y))[0]
        gram = "pooled" if parts.gen.needs_gram else "none"
        return replace(state, moments=sums_of(norm_pre, x.float(), y, head.num_classes, gram))

    @property
    def keep(self) -> str:
        return "moments" if self.x is None else "embeddings"

    @property
    def parts(self) -> Recipe:
        parts = resolve(**self.settings)
        for step in steps_of(parts.norm_pre):
            if isinstance(step, RandomProjection):
                # NORM_inf "same" is the same object.
                step.capped = self.capped
        return parts

    @property
    def counts(self) -> Tensor:
        """`(C,)` int64, the samples of each class."""
        if self.x is None:
            return self.moments.counts.long()
        return torch.bincount(self.y, minlength=len(self.class_names))

    def head(self) -> ImprintedHead:
        """The head of these samples, on the CPU."""
        parts, names = self.parts, list(self.class_names)
        if self.x is None:
            _, head = self._norm_pre(parts, int(self.counts.sum()))
            head = head_of_sums(self.moments, parts, head, names, self.seed, self.classifier)
            head.temperature, head.threshold = self.temperature, self.threshold
            if not self.calibrated:
                head.settings["calibrated"] = False
            return head
        x, y = self.x.float(), self.y
        if self.weibull is not None:
            rows = weibull_typical(x, y, *self.weibull)
            x, y = x[rows], y[rows]
        head = imprint_parts(
            x, y, parts, len(names), names, self.seed, self.classifier, allow_empty=True
        )
        if self.accept is not None:
            from imprint_pl.method.threshold import set_threshold

            set_threshold(head, x, y, self.accept, self.classifier)
        return head

    def add_class(
        self, name: str, x: Tensor, place: int | None = None, sources: Sequence[str] = ()
    ) -> State:
        """With a new class of embeddings `x (n, d)`, as label `place`; the last by default.

        Raises:
            ImprintError: the class is there already, no sample, other dimensions, or sums that do
                not suffice.
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
        return self._renamed(names, places + (places >= label)).add_examples(name, x, sources)

    def add_examples(self, name: str, x: Tensor, sources: Sequence[str] = ()) -> State:
        """With more samples `x (n, d)` of a class. Errors as of `add_class`."""
        label, x = self._label(name), self._checked(x, name)
        y = torch.full((len(x),), label)
        if self.x is not None:
            sources = tuple(sources) or ("",) * len(x)
            known = self.sources or ("",) * len(self.x)
            sources = (*known, *sources) if any(sources) or self.sources else ()
            rows = torch.cat([self.x.float(), x.float()])
            return self._with_rows(rows, torch.cat([self.y, y]), sources)
        return self._with_sums(self.moments + self._sums(x, y, len(x)))

    def remove_class(self, name: str, x: Tensor | None = None) -> State:
        """Without a class.

        Args:
            name: the class.
            x: its embeddings `(n, d)`, all of them: sums with a Gram matrix, which is one for all
                classes, ask for them.

        Raises:
            ImprintError: no such class, the last class, or sums that do not suffice.
        """
        label = self._label(name)
        if len(self.class_names) == 1:
            raise ImprintError(f"class {name!r} is the last one: a head needs a class")
        names = [*self.class_names[:label], *self.class_names[label + 1 :]]
        places = torch.arange(len(names) + 1)
        places = torch.where(places == label, -1, places - (places > label).long())
        if self.x is not None:
            rows = self.y != label
            sources = tuple(s for s, kept in zip(self.sources, rows.tolist(), strict=False) if kept)
            left = replace(self, x=self.x[rows], y=self.y[rows], sources=sources)
            return left._renamed(names, places)
        moments = self.moments
        if moments.gram is not None:
            moments = self._less(moments, label, name, x)
        else:
            self._check_features(int(self.counts.sum() - self.counts[label]))
        return self._with_sums(moments)._renamed(names, places)

    def _with_sums(self, moments: Moments) -> State:
        """With other sums: none of the samples is there to fit a temperature on."""
        if self.calibrated and len(self.class_names) > 1:
            kept = "temperature" if self.threshold is None else "temperature and the threshold"
            warn(
                f'the probabilities are not calibrated: keep="moments" has no samples to fit the '
                f'{kept} of another head on, which stay as they were; keep="embeddings" fits them '
                "anew"
            )
        return replace(self, moments=moments, calibrated=False)

    def _less(self, moments: Moments, label: int, name: str, x: Tensor | None) -> Moments:
        count = int(self.counts[label])
        if x is None:
            raise ImprintError(
                f"cannot remove class {name!r} from sums: gen={self.settings['gen']!r} needs the "
                "Gram matrix, which is one for all classes. Give the class's own images (all "
                f'{count}), or keep="embeddings" from the start, which suffices for every step'
            )
        x = self._checked(x, name)
        own = self._sums(x, torch.full((len(x),), label), -count)
        scale = moments.sums[label].abs().max().clamp(min=1e-12)
        far = (own.sums[label] - moments.sums[label]).abs().max() / scale
        if len(x) != count or far > 1e-3:
            raise ImprintError(
                f"the {len(x)} images given for class {name!r} are not the {count} that its sums "
                "were made of: give exactly those"
            )
        return moments - own

    def _sums(self, x: Tensor, y: Tensor, more: int) -> Moments:
        before = int(self.counts.sum())
        self._check_features(before + more)
        norm_pre = self._norm_pre(self.parts, before)[0]
        gram = "none" if self.moments.gram is None else "pooled"
        return sums_of(norm_pre, x.float(), y, len(self.class_names), gram)

    def _norm_pre(self, parts: Recipe, samples: int) -> tuple[Any, ImprintedHead]:
        """NORM_pre, and an empty head with its NORM_inf, as they are for so many samples."""
        norm_pre, head = parts.fresh()
        for step in steps_of(norm_pre):
            if isinstance(step, RandomProjection):
                step.draw(torch.empty(0, self.embedding_dim), samples, self.seed)
        return norm_pre, head

    def _check_features(self, samples: int) -> None:
        """Raises where another number of samples would draw another random projection."""
        before = int(self.counts.sum())
        for step in steps_of(self.parts.norm_pre):
            if not isinstance(step, RandomProjection):
                continue
            then, now = (step.features(self.embedding_dim, n) for n in (before, samples))
            if then != now:
                raise ImprintError(
                    f"{before} samples had {then} random features, {samples} would have {now}, "
                    f'others, which sums of the old ones cannot give: keep="embeddings" suffices, '
                    f"or projection_dim of at most {min(then, now)}"
                )

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
        return x

    def _renamed(self, names: list[str], places: Tensor) -> State:
        """With other classes, where label c becomes `places[c]`, or goes where that is −1: its rows
        went before. New classes are empty."""
        if self.x is not None:
            return replace(self, class_names=names, y=places[self.y])
        kept = places >= 0
        counts = self.moments.counts.new_zeros(len(names))
        sums = self.moments.sums.new_zeros(len(names), self.moments.sums.shape[1])
        counts[places[kept]] = self.moments.counts[kept]
        sums[places[kept]] = self.moments.sums[kept]
        moments = Moments(counts, sums, self.moments.gram)
        return replace(self, class_names=names, moments=moments)

    def _with_rows(self, x: Tensor, y: Tensor, sources: tuple[str, ...]) -> State:
        # As a head sees them: a file does not depend on the order in which they came, either.
        order = in_order(x, y)
        sources = tuple(sources[i] for i in order.tolist()) if sources else ()
        return replace(self, x=x[order], y=y[order], sources=sources)


def _refuse_moments(parts: Recipe, weibull: Any) -> None:
    """Raises where sums of the samples do not suffice to make the head of more samples."""
    learned = [
        step.name
        for step in steps_of(parts.norm_pre)
        if getattr(step, "learns", False) and not isinstance(step, RandomProjection)
    ]
    reason = None
    if not parts.gen.from_moments:
        reason = f"gen={parts.gen.name!r} has to see every sample"
    elif learned:
        reason = f"norm_pre={learned[0]!r} learns from the samples and would learn anew"
    elif weibull is not None:
        reason = "weibull chooses among the samples"
    if reason:
        raise ImprintError(
            f'keep="moments" does not suffice: {reason}. Give keep="embeddings", or one of the '
            "recipes that need sums alone: qi, hosoda, janson, ls, ridge, lda, ranpac"
        )
