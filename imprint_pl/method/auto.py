"""`auto`: chooses the recipe and its parameters from the training embeddings alone.

Every candidate is imprinted on the same part of the embeddings and labels the same held-out rest.
The first candidate, `kernel`, is kept unless another is better beyond doubt; the winner is then
imprinted on all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from imprint_pl.method.calibration import ENOUGH, folds
from imprint_pl.method.holdout import held_out_scores
from imprint_pl.method.pipeline import Request
from imprint_pl.method.recipes import Recipe, resolve
from imprint_pl.numerics.draws import place_in_class, sample

# In the order of preference. `kernel` comes first: from two samples a class to thousands, on
# features that are positive and on ones that have a sign, nothing else was the best so often, or so
# seldom far from it. Its other form leaves out the square root, which suits positive features; the
# rest is there for embeddings that are unlike those.
CANDIDATES: tuple[dict[str, Any], ...] = (
    dict(recipe="kernel"),
    dict(recipe="kernel", norm_pre="l2+nystrom"),
    dict(recipe="ridge"),
    dict(recipe="lda"),
    dict(recipe="robust", k=20),
    dict(recipe="robust", k=1),
)
# Samples that candidates are imprinted on, and landmarks of `kernel` there: enough to rank them,
# in a fraction of the time that the winner takes on all samples.
TRAINED = 2000
LANDMARKS = 500
# Samples that they then label: the standard error of a difference is about half a point.
LABELLED = 3000
# Standard errors by which another candidate has to beat the first. With six candidates and few
# samples the best of them by chance is often better by one.
CLEARLY = 2.0


class Chosen(NamedTuple):
    """The recipe that `auto` chose, and a row for each candidate, for `head.tried`."""

    parts: Recipe
    tried: list[dict[str, Any]]


def choose(x: Tensor, y: Tensor, request: Request, layer_widths: list[int] | None = None) -> Chosen:
    """Chooses the recipe for embeddings `x (N, d)`, labels `y (N,)` that were checked.

    With fewer than 3,000 samples candidates are compared by cross-validation, over two to five
    stratified folds; so, too, with so many classes that two samples of each are nearly all. With
    more, 2,000 random samples are imprinted and up to 3,000 others labelled.
    A candidate replaces `kernel` if its accuracy there is higher by more than two standard errors
    of the paired difference, √(n₊ + n₋ + 1 − (n₊ − n₋)²/(n + 2)) / (n + 2), n₊ and n₋ the samples
    that only one or only the other has right, of n. Where nothing can be held out (one sample a
    class), it is `kernel`. Every candidate takes `layer_widths`.

    Returns:
        The recipe, and for each candidate its keywords, `accuracy`, `difference` from the first and
        its `standard_error` (all fractions), and `chosen`.

    Source: Agresti & Min 2005, "Simple improved confidence intervals for comparing matched
    proportions" (the standard error).
    """
    rows, held = _comparison(y, request.seed)
    widths = {"layer_widths": layer_widths}
    x, y = x[rows], y[rows]
    tried: list[dict[str, Any]] = []
    first: Tensor | None = None
    shown = tqdm(CANDIDATES, "auto", leave=False, disable=not request.progress, delay=2)
    for candidate in shown if held else []:
        shown.set_postfix_str(candidate["recipe"], refresh=False)
        correct = _labelled(x, y, candidate | widths, request, held)
        first = first if tried else correct
        tried.append(dict(candidate) | _compared(correct, first))
    clear = [i for i, row in enumerate(tried) if _is_clearly_better(row)]
    best = max(clear, key=lambda i: tried[i]["accuracy"], default=0)
    for i, row in enumerate(tried):
        row["chosen"] = i == best
    return Chosen(_parts(CANDIDATES[best] | widths), tried)


def _comparison(y: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The samples `(n,)` to compare on, and the places among them of those to hold out."""
    everything = torch.arange(len(y), device=y.device)
    if len(y) < 1.5 * TRAINED:
        return everything, _places(folds(y, seed, enough=len(y)))
    order = sample(len(y), len(y), seed).to(y.device)
    # Two samples of each class come first: every candidate then knows every class.
    first = place_in_class(y, order) < 2
    order = torch.cat([order[first[order]], order[~first[order]]])
    trained = max(TRAINED, int(first.sum()))
    if len(y) - trained < ENOUGH:
        # So many classes that their first samples leave none to label.
        return everything, _places(folds(y, seed, enough=LABELLED))
    rows = order[: trained + LABELLED]
    return rows, [torch.arange(trained, len(rows), device=y.device)]


def _places(masks: list[Tensor]) -> list[Tensor]:
    return [mask.nonzero().flatten() for mask in masks]


def _parts(keywords: dict[str, Any]) -> Recipe:
    parts = resolve(**keywords)
    assert isinstance(parts, Recipe)  # no candidate is "auto"
    return parts


def _labelled(
    x: Tensor, y: Tensor, candidate: dict[str, Any], request: Request, held: list[Tensor]
) -> Tensor | None:
    """Which held-out samples the candidate labels right; `None` if it cannot be imprinted."""
    keywords = dict(candidate)
    if keywords["recipe"] == "kernel":
        keywords["projection_dim"] = LANDMARKS
    held_out = held_out_scores(x, y, _parts(keywords), request, held)
    # Where a fold fails (such as a within-class covariance of one sample a class), the candidate
    # would be compared on other samples than the first.
    return None if held_out.error else held_out.scores.argmax(1) == held_out.y


def _compared(correct: Tensor | None, first: Tensor | None) -> dict[str, float | None]:
    if correct is None or first is None:
        return {"accuracy": None, "difference": None, "standard_error": None}
    n, gained, lost = len(correct), int((correct & ~first).sum()), int((first & ~correct).sum())
    # Half a sample more on both sides: four gained and none lost, of fifty, is no clear case.
    error = (gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) ** 0.5 / (n + 2)
    return {
        "accuracy": int(correct.sum()) / n,
        "difference": (gained - lost) / n,
        "standard_error": error,
    }


def _is_clearly_better(row: dict[str, Any]) -> bool:
    return row["accuracy"] is not None and row["difference"] > CLEARLY * row["standard_error"]
