"""The score that the best class has to reach, so that `predict` can say "none of these"."""

from __future__ import annotations

from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.method.calibration import folds
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.holdout import held_out_scores
from imprint_pl.method.inputs import checked
from imprint_pl.method.pipeline import Request, holds_out_of_sums, keywords_of
from imprint_pl.method.recipes import Recipe, resolve
from imprint_pl.numerics.order import in_order
from imprint_pl.parts.gen.ridge import CHOICES

# How many parts are held out, one a head: many where that is cheap. Scores of `lda` shrink with
# the number of samples, so that those of a head of four fifths of them are too small.
FOLDS, FOLDS_OF_SUMS = 5, 20


def set_threshold(
    head: ImprintedHead,
    x: Tensor,
    y: Tensor,
    accept: float,
    classifier: Tensor | None = None,
) -> ImprintedHead:
    """Sets `head.threshold` to a best score that `accept` of the training samples reach.

    Each sample is scored by a head that has not seen it, made of four fifths of the samples, or of
    95 % where sums suffice: its own proxy would say nothing. That takes one to five times as long
    as imprinting.

    Args:
        head: imprinted from x and y, whose values were checked then; gives the recipe and the seed.
        x: `(N, d)`, the training embeddings.
        y: `(N,)`, their labels 0..C−1.
        accept: a share in (0, 1], such as 0.95.
        classifier: as for `imprint`.

    Returns:
        The head.

    Raises:
        ImprintError: a share out of range, or no class with two samples.
    """
    best = _held_out(head, x, y, accept, classifier).amax(1).double().sort().values
    # The largest value that at least this share of the samples reaches.
    place = int((1 - accept) * len(best) + 1e-9)
    head.threshold = best[min(place, len(best) - 1)].item()
    return head


def _held_out(
    head: ImprintedHead, x: Tensor, y: Tensor, accept: float, classifier: Tensor | None
) -> Tensor:
    if not 0 < accept <= 1:
        raise ImprintError(
            f"accept={accept}: give the share of training samples to accept, above 0 and at most "
            "1, such as 0.95"
        )
    x, y, _ = checked(x, y, head.num_classes, None, allow_empty=True, values_checked=True)
    seed, chosen = head.settings.get("seed", 0), head.settings.get("chosen_lam")
    settings = keywords_of(head)
    if chosen is not None and settings.get("lam") in CHOICES:
        settings["lam"] = chosen
        settings.pop("metric", None)
    parts = resolve(**settings)
    assert isinstance(parts, Recipe)  # a head's settings name the recipe that auto has chosen
    most = FOLDS_OF_SUMS if holds_out_of_sums(parts) else FOLDS
    rows = in_order(x, y)
    x, y = x[rows], y[rows]
    held = [mask.nonzero().flatten() for mask in folds(y, seed, enough=len(y), most=most)]
    if not held:
        raise ImprintError(
            "accept: no class has two samples, so that none can be held out to set a threshold; "
            "add samples, or set head.threshold yourself"
        )
    request = Request(head.num_classes, seed=seed, classifier=classifier)
    held_out = held_out_scores(x, y, parts, request, held)
    if not len(held_out.y):
        raise ImprintError(
            "accept: without the held-out samples there is no head to set a threshold by "
            f"({held_out.error}); add samples, or set head.threshold yourself"
        )
    return held_out.scores
