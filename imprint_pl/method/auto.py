"""`auto`: chooses the recipe and its parameters from the training embeddings alone.

Every candidate is imprinted on the same part of the embeddings and labels the same held-out rest.
The first candidate, a `kernel`, is kept unless another is better beyond doubt; the winner is then
imprinted on all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprint_pl.method.calibration import ENOUGH, folds
from imprint_pl.method.holdout import copies_of, held_out_scores
from imprint_pl.method.pipeline import Request
from imprint_pl.method.recipes import RECIPES, Recipe, resolve
from imprint_pl.numerics.draws import place_in_class, sample
from imprint_pl.numerics.large import chosen_room
from imprint_pl.numerics.measures import ACCURACY, difference, measured_by
from imprint_pl.numerics.passes import bar
from imprint_pl.parts.by_name import class_named, parameters_of

# The candidates for one layer, in order of preference. `kernel` comes first: from two samples per
# class to thousands, and on features of one sign or of both, no other recipe was the best so often
# or so seldom far from the best. The second form leaves out the square root, which suits positive
# features only. The other recipes are there for embeddings of other kinds.
ONE_LAYER: tuple[dict[str, Any], ...] = (
    dict(recipe="kernel"),
    dict(recipe="kernel", norm_pre="l2+nystrom"),
    dict(recipe="ridge"),
    dict(recipe="lda"),
    dict(recipe="knn"),
    dict(recipe="robust", k=20),
    dict(recipe="robust", k=1),
)
# The candidates for several layers. Joined layers have features of both signs and of one scale, so
# the square root and the unit length do not help where there are many samples. The last layer alone
# stays a candidate, since it may be best for images like those that the backbone was trained on.
SEVERAL_LAYERS: tuple[dict[str, Any], ...] = (
    dict(recipe="kernel", norm_pre="join+nystrom"),
    dict(recipe="kernel", norm_pre="join+power+l2+nystrom"),
    dict(recipe="ridge", norm_pre="join"),
    dict(recipe="lda", norm_pre="join"),
    dict(recipe="kernel", norm_pre="last+power+l2+nystrom"),
    dict(recipe="knn", norm_pre="last+l2"),
)
# NORM_pre of the candidate that comes first in `SEVERAL_LAYERS`, for up to this many samples. A
# feature that hardly varies among few samples may be large in other images and then dominate the
# joined layers; the square root limits this. Mean accuracy over four sets of images:
#     images   joined   and square root   last layer
#         12     31 %              47 %         49 %
#         30     55 %              63 %         61 %
#        120     76 %              78 %         75 %
# From 800 images on the joined layers are as good without the square root.
FIRST_OF_FEW = ((20, "last+power+l2+nystrom"), (500, "join+power+l2+nystrom"))
# Most numbers in the proxies of `knn`, which are all samples: 128 MB in the head.
NEIGHBOURS = 2**25
# `lda` is not tried if there are at least this many features for each imprinted sample: inverting
# its covariance would take longer than all other candidates together.
FEATURES_OF_LDA = 2
# Candidates are imprinted on a third of the samples, at most 2,000, on which `kernel` has 1,000
# landmarks. This suffices to rank them and takes a fraction of the time of the final fit. With
# fewer landmarks `kernel` would look worse beside `ridge` than it is.
SHARE = 3
TRAINED = 2000
LANDMARKS = 1000
# With many classes at most this many samples of each are imprinted instead. 2,000 samples of 1,000
# classes would rank the recipes as if all had two samples a class: on synthetic embeddings with 100
# a class, the recipe that led with two was right on 48 %, another one on 75 %.
PER_CLASS = 20
# Most samples that candidates label: the standard error of a difference is then about half a point.
LABELLED = 3000
# Standard errors by which another candidate has to beat the first. With six candidates and few
# samples, the best one is often ahead by one standard error through chance alone.
CLEARLY = 2.0


class Chosen(NamedTuple):
    """The recipe that `auto` chose, and a row for each candidate, for `head.tried`."""

    parts: Recipe
    tried: list[dict[str, Any]]


def choose(
    x: Tensor,
    y: Tensor,
    request: Request,
    layer_widths: list[int] | None = None,
    metric: str = ACCURACY,
    class_weight: str | None = None,
    weights: Tensor | None = None,
) -> Chosen:
    """Chooses the recipe for embeddings `x (N, d)`, labels `y (N,)` that were checked.

    A random third of the samples, at most 2,000 or 20 for each class, is imprinted and up to 3,000
    others are labelled.
    If fewer than 500 would be left to label (with fewer than 749 samples, or where two samples per
    class are nearly all), candidates are cross-validated over two to five stratified folds instead.
    No candidate sees a near-copy of a sample that it labels.

    The candidates are `ONE_LAYER`, or `SEVERAL_LAYERS`, in an order that depends on the number of
    samples. A candidate replaces the first, a `kernel`, if its accuracy is higher by more than two
    standard errors of the paired difference, √(n₊ + n₋ + 1 − (n₊ − n₋)²/(n + 2)) / (n + 2). Here n
    is the number of labelled samples, and n₊ and n₋ count those that only the one or only the other
    candidate labels correctly. If nothing can be held out (one sample per class), the first
    candidate is taken.

    With another `metric`, the difference is that of the metric, its standard error is that of
    `measures.difference`, and candidates that choose λ choose it by the metric, too. With
    `class_weight` or `weights (N,)`, only candidates that take them are compared.

    Returns:
        The recipe, and for each candidate its keywords, `accuracy`, the metric where it is another,
        the `difference` from the first and its `standard_error` (all fractions), and `chosen`.

    Source: Agresti & Min 2005, "Simple improved confidence intervals for comparing matched
    proportions" (the standard error).
    """
    samples, (rows, held) = len(y), _comparison(y, request.seed)
    x, y, weights = x[rows], y[rows], None if weights is None else weights[rows.to(weights.device)]
    copies = copies_of(x, y, held)
    tried: list[dict[str, Any]] = []
    first: Labelled | None = None
    candidates = _candidates(
        x.shape[1], samples, layer_widths, len(y) - len(held[0]) if held else 0
    )
    if class_weight is not None or weights is not None:
        candidates = [one for one in candidates if _generator(one).takes_weights]
    # Keywords that each candidate gets besides its own.
    asked = [
        {"layer_widths": layer_widths}
        | ({} if metric == ACCURACY or not _takes(one, "metric") else {"metric": metric})
        | ({} if class_weight is None else {"class_weight": class_weight})
        for one in candidates
    ]
    shown = bar(list(zip(candidates, asked, strict=True)), "auto", show=request.progress)
    for candidate, more in shown if held else []:
        shown.set_postfix_str(candidate["recipe"], refresh=False)
        labelled = _labelled(x, y, candidate | more, request, held, copies, weights)
        first = first if tried else labelled
        tried.append(dict(candidate) | _compared(labelled, first, metric))
    clear = [i for i, row in enumerate(tried) if _is_clearly_better(row)]
    best = max(clear, key=lambda i: tried[i][metric], default=0)
    for i, row in enumerate(tried):
        row["chosen"] = i == best
    return Chosen(_parts(candidates[best] | asked[best]), tried)


def _comparison(y: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Return the indices `(n,)` of the samples to compare on, and the positions among them of the
    samples to hold out, fold by fold."""
    order = sample(len(y), len(y), seed).to(y.device)
    # Put two samples of each class first, so that every candidate knows every class.
    first = place_in_class(y, order) < 2
    order = torch.cat([order[first[order]], order[~first[order]]])
    enough = max(TRAINED, PER_CLASS * len(y.unique()))
    trained = max(min(enough, len(y) // SHARE), int(first.sum()))
    if len(y) - trained < ENOUGH:
        everything = torch.arange(len(y), device=y.device)
        return everything, _places(folds(y, seed, enough=LABELLED))
    rows = order[: trained + LABELLED]
    return rows, [torch.arange(trained, len(rows), device=y.device)]


def _candidates(
    dim: int, samples: int, layer_widths: list[int] | None, trained: int
) -> list[dict[str, Any]]:
    """Return the candidates for `samples` embeddings of `dim` numbers, of which `trained` are
    imprinted in the comparison."""
    several = layer_widths is not None and len(layer_widths) > 1
    last = layer_widths[-1] if layer_widths else dim
    candidates = list(SEVERAL_LAYERS if several else ONE_LAYER)
    if several:
        first = next((norm_pre for most, norm_pre in FIRST_OF_FEW if samples <= most), None)
        candidates.sort(key=lambda one: one["norm_pre"] != first)
    if samples * last > NEIGHBOURS or 4 * samples * last > chosen_room():
        candidates = [one for one in candidates if one["recipe"] != "knn"]
    if several and dim > FEATURES_OF_LDA * trained:
        candidates = [one for one in candidates if one["recipe"] != "lda"]
    return candidates


def _places(masks: list[Tensor]) -> list[Tensor]:
    return [mask.nonzero().flatten() for mask in masks]


def _parts(keywords: dict[str, Any]) -> Recipe:
    parts = resolve(**keywords)
    assert isinstance(parts, Recipe)  # no candidate is "auto"
    return parts


def _generator(candidate: dict[str, Any]) -> Any:
    return class_named("gen", RECIPES[candidate["recipe"]]["gen"])


def _takes(candidate: dict[str, Any], keyword: str) -> bool:
    return keyword in parameters_of(_generator(candidate))


class Labelled(NamedTuple):
    """The labels that a candidate predicts for held-out samples, and the true ones, `(n,)` each."""

    predicted: Tensor
    y: Tensor


def _labelled(
    x: Tensor,
    y: Tensor,
    candidate: dict[str, Any],
    request: Request,
    held: list[Tensor],
    copies: list[Tensor],
    weights: Tensor | None,
) -> Labelled | None:
    """Predict the labels of the held-out samples; `None` if the candidate cannot be imprinted."""
    keywords = dict(candidate)
    if keywords["recipe"] == "kernel":
        keywords["projection_dim"] = LANDMARKS
    parts = _parts(keywords)
    held_out = held_out_scores(x, y, parts, request, held, copies=copies, weights=weights)
    # Drop the candidate if a fold fails (such as a within-class covariance with one sample per
    # class): it would be compared with the first candidate on different samples.
    return None if held_out.error else Labelled(held_out.scores.argmax(1), held_out.y)


def _compared(
    labelled: Labelled | None, first: Labelled | None, metric: str
) -> dict[str, float | None]:
    if labelled is None or first is None:
        return dict.fromkeys([ACCURACY, metric, "difference", "standard_error"])
    predicted, y = labelled
    found = difference(metric, predicted, first.predicted, y)
    figures: dict[str, float | None] = {}
    figures |= {name: measured_by(name, predicted, y) for name in (ACCURACY, metric)}
    return figures | {"difference": found.value, "standard_error": found.standard_error}


def _is_clearly_better(row: dict[str, Any]) -> bool:
    return row["accuracy"] is not None and row["difference"] > CLEARLY * row["standard_error"]
