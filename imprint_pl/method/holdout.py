"""Scores of held-out training samples, by heads that were made without them. The temperature of a
head, the threshold of `threshold.py` and the choice of `auto.py` are based on these scores.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.method.calibration import (
    ENOUGH,
    Fold,
    HeldOut,
    folds,
    rows_to_score,
    score_folds,
    set_temperature,
)
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.pipeline import (
    Request,
    Sums,
    gram_of,
    holds_out_of_sums,
    learns_from_sums,
    make_head,
    row_weights,
)
from imprint_pl.method.recipes import Recipe
from imprint_pl.numerics.copies import CopyFinder
from imprint_pl.numerics.draws import random_keys
from imprint_pl.numerics.large import taken
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.order import keys
from imprint_pl.parts.gen.ridge import CHOICES
from imprint_pl.parts.norm.base import sums_of, transform

# Most samples to hold out for a temperature. If there are more, a random sample of this size is
# used.
HELD = 2000

# How many samples are held out of sums at a time, and in total.
OF_SUMS = ENOUGH, 2 * ENOUGH

# Factors for λ, tried in turn if the remaining samples are too few for the original λ.
LARGER = (10.0, 100.0, 1e3, 1e4)

Result = TypeVar("Result")


def calibrate_head(
    head: ImprintedHead,
    x: Tensor,
    y: Tensor,
    parts: Recipe,
    request: Request,
    sums: Sums | None = None,
    samples: int | None = None,
    weights: Tensor | None = None,
) -> None:
    """Fits the temperature of a head on samples that were held out for it, or warns that there is
    none.

    Args:
        head: made of all samples; gives the λ that its GEN chose.
        x, y: embeddings and labels in the order of `in_order`: all samples, or a sample of them as
            `held_out_rows` takes it.
        parts, request: those of the head.
        sums: the sums of all samples, if samples can be held out by subtracting them.
        samples: number of all samples; `len(y)` by default.
        weights: as for `make_head`. Only the heads are weighted; the temperature is fitted on
            unweighted samples.
    """
    most, enough = (HELD, ENOUGH) if sums is None else OF_SUMS
    held = held_out_rows(x, y, len(y) if samples is None else samples, request.seed, most)
    lam = head.settings.get("chosen_lam")
    parts = parts if lam is None else with_lam(parts, lam)
    set_temperature(head, held_out_scores(x, y, parts, request, held, sums, enough, None, weights))


def held_out_rows(x: Tensor, y: Tensor, samples: int, seed: int, most: int = HELD) -> list[Tensor]:
    """Return the indices of the rows to hold out, fold by fold, in the order in which to use them.

    They are the same for all samples and for the bounded sample that a stream keeps. Up to `HELD`
    samples are divided by `folds`. With more samples, each fold is a tenth of all samples, at most
    `most`, drawn by the rows' contents.

    Args:
        x, y: embeddings and labels in the order of `in_order`: all samples, or a sample of them
            that has the `HELD` which come first by `random_keys`.
        samples: number of all samples.
        seed: fixes the draw.
        most: the largest fold, up to `HELD`. If further folds are cheap, smaller folds are better:
            their heads are closer to the head of all samples.
    """
    if samples <= HELD:
        return [mask.nonzero().flatten() for mask in folds(y, seed, spare=True)]
    first = random_keys(keys(x), seed).argsort()[:HELD].to(x.device)
    size = min(most, HELD, samples // 10)
    return [first[i : i + size] for i in range(0, HELD - size + 1, size)]


@torch.no_grad()
def held_out_scores(
    x: Tensor,
    y: Tensor,
    parts: Recipe,
    request: Request,
    held: list[Tensor],
    sums: Sums | None = None,
    enough: float = math.inf,
    copies: list[Tensor] | None = None,
    weights: Tensor | None = None,
) -> HeldOut:
    """Score the samples of each fold of `held` by a head that is made of the other samples.

    Near-copies of held-out samples are held out with them, but get no score: a head that has seen
    them would be overconfident.

    If `holds_out_of_sums`, the held-out samples are subtracted from the sums of all samples:
    NORM_pre is fitted once, on all samples, and λ is chosen once. If no head can be made for a
    fold, a larger λ is tried.

    Args:
        x, y, parts, request: as for `make_head`; with `sums`, x and y may be a part of the samples.
        held: the indices `(n,)` of the samples to hold out, fold by fold.
        sums: the sums of all samples, if samples can be held out by subtracting them.
        enough: no further fold is scored once this many samples have a score.
        copies: the near-copies of each fold, from `copies_of`; computed if not given.
        weights: `(N,)`, as for `make_head`.
    """
    weights = row_weights(y, parts.gen) if weights is None else weights
    finder = CopyFinder(x, y, torch.cat(held)) if held and copies is None else None

    def hidden(rows: Tensor) -> Tensor:
        if finder is not None:
            return copies_of_fold(finder, y, rows)
        place = next(i for i, fold in enumerate(held) if fold is rows)
        return (copies or [])[place]

    # Decide by the number of rows to add up: the other rows for each fold, or all rows once and
    # then the held-out ones.
    out = sum(map(len, held))
    fewer = len(held) * len(y) - out > len(y) + out
    if sums is None and not (fewer and holds_out_of_sums(parts)):
        return score_folds(
            held,
            lambda rows: _without_rows(x, y, rows, hidden(rows), parts, request, weights),
            enough,
        )
    if sums is None:
        norm_pre, head = parts.fresh()
        sums = Sums.fitted(norm_pre, head.norm_inf, parts.gen, x, y, request, weights)
        if getattr(parts.gen, "lam", None) in CHOICES:
            sums = sums.with_rows(parts.gen, x, y, request.seed, weights)
            parts = with_lam(parts, sums.generated(sums.moments, parts.gen).chosen["lam"])
    known = sums
    return score_folds(
        held,
        lambda rows: _out_of_sums(known, x, y, rows, hidden(rows), parts, request, weights),
        enough,
    )


def copies_of(x: Tensor, y: Tensor, held: list[Tensor]) -> list[Tensor]:
    """Return the near-copies of each fold of `held` among all rows, see `copies_of_fold`."""
    finder = CopyFinder(x, y, torch.cat(held)) if held else None
    return [] if finder is None else [copies_of_fold(finder, y, rows) for rows in held]


def copies_of_fold(finder: CopyFinder, y: Tensor, rows: Tensor) -> Tensor:
    """Return the indices `(m,)` of the near-copies of a fold's rows that are not in the fold.

    If they are all that is left of a class, they are not returned, since then all samples of the
    class are alike.
    """
    found = finder.find(rows).of(rows)
    left = torch.ones(len(y), dtype=torch.bool, device=y.device)
    left[rows] = False
    without = left.clone()
    without[found] = False
    lost = y[left].unique()
    lost = lost[~torch.isin(lost, y[without])]
    return found[~torch.isin(y[found], lost)]


def _without_rows(
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    hidden: Tensor,
    parts: Recipe,
    request: Request,
    weights: Tensor | None = None,
) -> Fold:
    """Scores samples by a head that is made of the other rows, without the `hidden`."""
    others = torch.ones(len(y), dtype=torch.bool, device=y.device)
    others[rows] = False
    others[hidden] = False
    left, left_x = None if weights is None else weights[others], taken(x, others)
    # This head is internal, so its messages name no classes.
    request = replace(request, class_names=None)
    head = with_larger_lam(
        parts, lambda changed: make_head(left_x, y[others], changed, request, left).head
    )
    rows = rows_to_score(rows, request.num_classes)
    return Fold(head.scores(x[rows]), y[rows], head.proxy_classes, rows)


def _out_of_sums(
    sums: Sums,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    hidden: Tensor,
    parts: Recipe,
    request: Request,
    weights: Tensor | None = None,
) -> Fold:
    """Scores samples by a head that is made of the sums of all samples, from which the sums of
    these samples and of the `hidden` are subtracted."""
    out = torch.cat([rows, hidden])
    if sums.rows is None or sums.basis is not None:
        z = transform(sums.norm_pre, x[out])
    else:
        z = sums.rows[out]
    C, gram = request.num_classes, gram_of(parts.gen)
    of_out = None if weights is None else weights[out]
    if sums.rows is None and learns_from_sums(sums.norm_pre):
        # Add these rows up in the way in which the sums of all were made, so that only rounding
        # errors of them are left after subtracting.
        held = sums_of(sums.norm_pre, x[out], y[out], C, gram, of_out)
    else:
        own = z if sums.rows is None else sums.rows[out.to(sums.rows.device)]
        held = Moments.of(own, y[out].to(own.device), C, of_out, gram=gram)
    z = z[: len(rows)]
    others = sums.moments - held
    if weights is not None:
        # Rounding leaves a small rest of a class whose samples are all held out.
        left = others.counts > 1e-9 * sums.moments.counts
        others = replace(others, counts=others.counts.where(left, 0))
    proxies = with_larger_lam(parts, lambda changed: sums.proxies(others, changed, request))
    shown = rows_to_score(rows, C)
    if sums.norm_inf is not sums.norm_pre:
        z = transform(sums.norm_inf, x[shown])
    elif len(shown) < len(rows):
        z = transform(sums.norm_pre, x[shown])
    scores = parts.agg(z, proxies.weights, proxies.bias, proxies.classes, C)
    return Fold(scores, y[shown], proxies.classes, shown)


def with_larger_lam(parts: Recipe, make: Callable[[Recipe], Result]) -> Result:
    """Return `make(parts)`; if that fails, try with a larger λ, up to ten thousand times larger."""
    lam = getattr(parts.gen, "lam", None)
    larger = [factor * lam for factor in LARGER] if isinstance(lam, int | float) and lam > 0 else []
    try:
        return make(parts)
    except ImprintError as error:
        for value in larger:
            try:
                return make(with_lam(parts, value))
            except ImprintError:
                continue
        raise error


def with_lam(parts: Recipe, lam: float) -> Recipe:
    """Return the recipe with a given λ. Choosing λ again would take as long as making the head."""
    gen = copy.copy(parts.gen)
    gen.lam = lam
    return replace(parts, gen=gen)
