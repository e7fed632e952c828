"""The figure, run once from left to right: checked embeddings through the five parts into a head.

Below `imprinting.py`, which says what is asked of the user, and `auto.py`, which runs it for many
candidates.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError
from imprint_pl.method.calibration import (
    ENOUGH,
    HeldOut,
    rows_to_score,
    score_folds,
    set_temperature,
)
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.holdout import HELD, held_out_rows
from imprint_pl.method.recipes import Recipe
from imprint_pl.numerics.factorisations import double
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.by_name import steps_of
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.gen.ridge import CHOICES
from imprint_pl.parts.norm.base import Norm, sums_of, transform
from imprint_pl.parts.norm.random_projection import RandomProjection

# Settings of a head that are results, not keywords of its recipe.
RESULTS = ("seed", "chosen_lam", "chosen_by", "calibrated")

# Samples to hold out of sums at a time, and in all.
OF_SUMS = ENOUGH, 2 * ENOUGH

# What λ is multiplied by where the others of held-out samples do not suffice for it.
LARGER = (10.0, 100.0, 1e3, 1e4)


def make_head(
    x: Tensor,
    y: Tensor,
    parts: Recipe,
    num_classes: int,
    class_names: list[str] | None = None,
    seed: int = 0,
    classifier: Tensor | None = None,
    progress: bool = False,
    calibrate: bool = False,
    norms: tuple[nn.Module, nn.Module] | None = None,
) -> ImprintedHead:
    """Embeddings `x (N, d)`, labels `y (N,)` that `checked` has seen → a head.

    `norms` are NORM_pre and NORM_inf, where they have been fitted before and stay.

    Random choices go by the places of the rows: `in_order` makes them depend on the set of rows
    alone. A class without samples gets no proxy. The temperature is 1, or with `calibrate` the one
    that suits samples which were held out for it; a warning says where none can be found.
    """
    present, labels = torch.unique(y, return_inverse=True)
    # GEN notes the λ that it chose: a copy, since another thread may use these parts.
    parts = replace(parts, gen=copy.copy(parts.gen))
    norm_pre, head = parts.fresh()
    if norms is not None:
        norm_pre, head = norms[0], ImprintedHead(norms[1], copy.deepcopy(parts.agg))
    summed = None
    if parts.gen.from_moments:
        rest = (x, labels, len(present), parts.gen, seed, norms is None)
        summed = Summed.of(norm_pre, head.norm_inf, *rest)
        proxies = summed.proxies(parts.gen)
    else:
        if getattr(norm_pre, "learns", False) and norms is None:
            norm_pre.to(x.device).fit(x, labels, len(present), seed)
        z = transform(norm_pre, x)
        proxies = parts.gen(z, labels, len(present), seed, progress)
        del z
    proxies = _finished(proxies, parts, present, classifier)
    head = head.to(x.device).fill(proxies, num_classes, class_names)
    head.settings = _settings(parts, parts.gen, seed)
    if calibrate:
        most, enough = OF_SUMS if holds_out_of_sums(parts) else (HELD, ENOUGH)
        held = held_out_rows(x, y, len(y), seed, most)
        parts = replace(parts, gen=with_chosen_lam(parts.gen))
        rest = (num_classes, held, seed, classifier, summed, enough)
        set_temperature(head, held_out_scores(x, y, parts, *rest))
    return head


@dataclass(frozen=True)
class Summed:
    """Training embeddings `(N, d)` as sums after NORM_pre, from which samples can be taken out.

    Of fewer samples than features, the sums are those of coordinates in the space that the samples
    span: their Gram matrix is `(N, N)`, and the proxies are the same.

    Attributes:
        norm_pre, norm_inf: fitted.
        moments: the sums, of the classes that have samples.
        coordinates, basis: `(N, N)` and `(N, p)`, whose product is NORM_pre(x); or `None`.
        device: of the embeddings, for proxies that a basis gives.
    """

    norm_pre: nn.Module
    norm_inf: nn.Module
    moments: Moments
    coordinates: Tensor | None = None
    basis: Tensor | None = None
    device: torch.device | None = None

    @classmethod
    def of(
        cls,
        norm_pre: nn.Module,
        norm_inf: nn.Module,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        gen: Any,
        seed: int,
        fit: bool = True,
    ) -> Summed:
        """Fits NORM_pre (and what NORM_inf shares with it) on `x (N, d)`, `y (N,)` in 0..C−1, or
        takes it as it is."""
        norm_pre, gram = norm_pre.to(x.device), "pooled" if gen.needs_gram else "none"
        fit = fit and isinstance(norm_pre, Norm)
        if not few_for(gen, norm_pre, x):
            if fit:
                return cls(norm_pre, norm_inf, norm_pre.fit_sums(x, y, num_classes, seed, gram))
            return cls(norm_pre, norm_inf, sums_of(norm_pre, x, y, num_classes, gram))
        if fit and norm_pre.learns:
            norm_pre.fit(x, y, num_classes, seed)
        basis, coordinates = torch.linalg.qr(double(transform(norm_pre, x)).T)
        moments = Moments.of(coordinates.T, y.to(coordinates.device), num_classes, gram=gram)
        return cls(norm_pre, norm_inf, moments, coordinates.T, basis.T, x.device)

    def proxies(self, gen: Any, moments: Moments | None = None) -> Proxies:
        """The proxies of these sums, or of others in the same space."""
        proxies = gen(moments or self.moments)
        if self.basis is None:
            return proxies
        weights = (double(proxies.weights) @ self.basis).float()
        return Proxies(*(t.to(self.device) for t in (weights, *proxies[1:])))


def few_for(gen: Any, norm_pre: nn.Module, x: Tensor) -> bool:
    """Whether GEN makes of `x (N, d)`, fewer than features, the same in the space that they span:
    its proxies lie there, and turn with it."""
    spans = getattr(gen, "spans", False) and gen.lam != 0 and isinstance(norm_pre, Norm)
    return spans and len(x) < norm_pre.features(x.shape[1], len(x))


def held_out_scores(
    x: Tensor,
    y: Tensor,
    parts: Recipe,
    num_classes: int,
    held: list[Tensor],
    seed: int = 0,
    classifier: Tensor | None = None,
    summed: Summed | None = None,
    enough: float = math.inf,
) -> HeldOut:
    """Scores of held-out samples by a head that is made of the others, fold by fold of `held`.

    Where GEN asks for sums, the held-out samples are taken out of the sums of all; a NORM_pre that
    does not look at labels, and a λ, are then fitted once, on all samples. A fold whose head cannot
    be made is tried with a larger λ.

    Args:
        x, y, parts, num_classes, seed, classifier: as for `make_head`.
        held: places `(n,)` of the samples to hold out.
        summed: of all samples, where that is known.
        enough: samples with a score, after which no further fold is looked at.
    """
    present, labels = torch.unique(y, return_inverse=True)
    parts = replace(parts, gen=copy.copy(parts.gen))
    # Rows to sum up: each time the others, or all of them once and the held-out ones again.
    out = sum(map(len, held))
    worth_it = summed is not None or len(held) * len(y) - out > len(y) + out
    if not (holds_out_of_sums(parts) and worth_it):

        def head_without(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            others = torch.ones(len(y), dtype=torch.bool, device=y.device)
            others[rows] = False

            def make(gen: Any) -> ImprintedHead:
                changed = replace(parts, gen=gen)
                return make_head(x[others], y[others], changed, num_classes, None, seed, classifier)

            rows, head = rows_to_score(rows, num_classes), with_larger_lam(make, parts.gen)
            return head.scores(x[rows]), y[rows], head.proxy_classes

        return score_folds(held, head_without, enough)
    if summed is None:
        norm_pre, head = parts.fresh()
        rest = (x, labels, len(present), parts.gen, seed)
        summed = Summed.of(norm_pre, head.norm_inf, *rest)
    if getattr(parts.gen, "lam", None) in CHOICES:
        parts.gen(summed.moments)
    gen = with_chosen_lam(parts.gen)

    def sums_without(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norm_pre, norm_inf, moments = summed.norm_pre, summed.norm_inf, summed.moments
        z = transform(norm_pre, x[rows])
        own = z if summed.coordinates is None else summed.coordinates[rows]
        kept, proxies = others_of(
            moments,
            own,
            labels[rows].to(own.device),
            gen,
            lambda gen, sums: summed.proxies(gen, sums),
        )
        proxies = _finished(proxies, parts, present[kept.to(present.device)], classifier)
        shown = rows_to_score(rows, num_classes)
        if norm_inf is not norm_pre:
            z = transform(norm_inf, x[shown])
        elif len(shown) < len(rows):
            z = transform(norm_pre, x[shown])
        scores = parts.agg(z, proxies.weights, proxies.bias, proxies.classes, num_classes)
        return scores, y[shown], proxies.classes

    return score_folds(held, sums_without, enough)


def others_of(
    moments: Moments,
    z: Tensor,
    y: Tensor,
    gen: Any,
    make: Callable[[Any, Moments], Any],
) -> tuple[Tensor, Any]:
    """What `make(gen, sums)` makes of sums less those of the samples `z (n, p)`, `y (n,)`, and the
    classes that are left, `(C',)`.

    Raises:
        ImprintError: there is none, even with a larger λ.
    """
    gram = "none" if moments.gram is None else "pooled"
    others = moments - Moments.of(z, y, moments.num_classes, gram=gram)
    kept = (others.counts > 0).nonzero().flatten()
    if not len(kept):
        raise ImprintError("the held-out samples are all there are")
    others = others.present()
    return kept, with_larger_lam(lambda gen: make(gen, others), gen)


def with_larger_lam(make: Callable[[Any], Any], gen: Any) -> Any:
    """`make(gen)`, or where that fails with a λ that is larger, up to ten thousand times."""
    lam = getattr(gen, "lam", None)
    larger = [factor * lam for factor in LARGER] if isinstance(lam, int | float) and lam > 0 else []
    try:
        return make(gen)
    except ImprintError as error:
        for value in larger:
            other = copy.copy(gen)
            other.lam = value
            try:
                return make(other)
            except ImprintError:
                continue
        raise error


def holds_out_of_sums(parts: Recipe) -> bool:
    """Whether held-out samples can be taken out of sums: another fold is then cheap."""
    return parts.gen.from_moments and not getattr(parts.norm_pre, "uses_labels", False)


def head_of_sums(
    moments: Moments,
    parts: Recipe,
    head: ImprintedHead,
    class_names: list[str] | None = None,
    seed: int = 0,
    classifier: Tensor | None = None,
    gen: Any = None,
) -> ImprintedHead:
    """Fills an empty head from the sums of NORM_pre(x), temperature 1; returns it.

    A class without samples gets no proxy. `gen` takes the place of the parts' own, say with
    another λ.
    """
    gen = gen or parts.gen
    present = (moments.counts > 0).nonzero().flatten()
    proxies = _finished(gen(moments.present()), parts, present, classifier)
    head = head.to(proxies.weights.device).fill(proxies, moments.num_classes, class_names)
    head.settings = _settings(parts, gen, seed)
    return head


def calibrate_from_sums(
    head: ImprintedHead,
    moments: Moments,
    parts: Recipe,
    norm_pre: nn.Module,
    sample: tuple[Tensor, Tensor],
    samples: int,
    seed: int,
    classifier: Tensor | None = None,
) -> None:
    """Fits the temperature of a head that `head_of_sums` made, or warns that there is none.

    Args:
        sample: rows and labels, as `held_out_rows` takes them.
        samples: number of all samples.
    """
    x, y = sample
    gen = with_chosen_lam(parts.gen)

    def score(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own, labels = (t[rows].to(moments.sums.device) for t in (x, y))
        kept, proxies = others_of(
            moments, transform(norm_pre, own), labels, gen, lambda gen, sums: gen(sums)
        )
        proxies = _finished(proxies, parts, kept, classifier)
        without = ImprintedHead(head.norm_inf, copy.deepcopy(parts.agg)).to(proxies.weights.device)
        scores = without.fill(proxies, moments.num_classes).scores(own)
        return scores, labels, proxies.classes

    most, enough = OF_SUMS
    with torch.no_grad():
        held_out = score_folds(held_out_rows(x, y, samples, seed, most), score, enough)
        set_temperature(head, held_out)


def with_chosen_lam(gen: Any) -> Any:
    """The GEN, or where it has chosen λ a copy that takes this λ as given: to choose again takes as
    long as the head itself."""
    if getattr(gen, "chosen_lam", None) is None:
        return gen
    gen = copy.copy(gen)
    gen.lam = gen.chosen_lam
    return gen


def keywords_of(head: ImprintedHead) -> dict[str, Any]:
    """The keywords of the recipe of a head, for `resolve`. Of a head of an earlier version, which
    had a random projection of fewer features than were asked for, with as many as it has."""
    keywords = {name: v for name, v in head.settings.items() if name not in RESULTS}
    for step in steps_of(head.norm_inf):
        if isinstance(step, RandomProjection) and step.input_dim and "projection_dim" in keywords:
            keywords["projection_dim"] = step.projection.shape[1]
    return keywords


def _settings(parts: Recipe, gen: Any, seed: int) -> dict[str, Any]:
    settings = parts.parameters | {"seed": seed}
    if getattr(gen, "chosen_lam", None) is not None:
        settings["chosen_lam"] = gen.chosen_lam
    return settings


def _finished(
    proxies: Proxies, parts: Recipe, present: Tensor, classifier: Tensor | None
) -> Proxies:
    """After NORM_post, with the labels of the task instead of places among the present."""
    weights = parts.norm_post.of_proxies(proxies.weights, proxies.classes, classifier)
    return Proxies(weights, proxies.bias, present[proxies.classes])
