"""Fits the limits of a head on held-out training samples: its familiarity (`familiarity.py`) with
the threshold below which `predict` says "none of these", and its prediction sets (`sets.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.method.calibration import ENOUGH, HeldOut, folds
from imprint_pl.method.familiarity import MOST_BYTES, Familiarity, unit_sums
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.holdout import HELD, copies_of, held_out_rows, held_out_scores
from imprint_pl.method.inputs import checked
from imprint_pl.method.pipeline import Request, Sums, holds_out_of_sums, keywords_of
from imprint_pl.method.recipes import Recipe, resolve
from imprint_pl.method.sets import checked_coverage
from imprint_pl.numerics.large import taken
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.order import in_order
from imprint_pl.parts.gen.ridge import CHOICES

# Number of folds without and with sums, where heads are cheap. More folds are better: the scores of
# `lda` shrink with the number of samples, so a head of four fifths of them gives too small scores.
FOLDS, FOLDS_OF_SUMS = 5, 20


@dataclass(frozen=True)
class Limits:
    """The optional outputs of a head beside class scores, and how they are fitted.

    Attributes:
        accept: share of training samples that the threshold accepts, or `None` for no threshold.
        coverage: probability that a prediction set holds the truth, or `None` for no sets.
        most_bytes: bytes that the familiarity may take in the head: a quarter of the backbone's. If
            the backbone is not known, a quarter of EfficientNet-Lite0's.

    Raises:
        ImprintError: a value that is not above 0 and at most 1.
    """

    accept: float | None = None
    coverage: float | None = None
    most_bytes: int = MOST_BYTES

    def __post_init__(self) -> None:
        if self.accept is not None and not 0 < self.accept <= 1:
            raise ImprintError(
                f"accept={self.accept}: give a share above 0 and at most 1, such as 0.95"
            )
        if self.coverage is not None:
            checked_coverage(self.coverage)

    def __bool__(self) -> bool:
        return self.accept is not None or self.coverage is not None

    @property
    def name(self) -> str:
        """The keyword that error messages name, "accept" or "coverage"."""
        return "coverage" if self.accept is None else "accept"


def set_threshold(
    head: ImprintedHead,
    x: Tensor,
    y: Tensor,
    accept: float,
    classifier: Tensor | None = None,
) -> ImprintedHead:
    """Fits `head.familiar`, and sets `head.threshold` to a familiarity that `accept` of the
    training samples reach.

    Each sample is scored by a head that has seen neither the sample nor a near-copy of it, since
    its own proxy would make it look too familiar. Such a head is made of four fifths of the
    samples, or of 95 % if sums suffice. This takes one to five times as long as imprinting. With
    more than 2,000 samples, a random sample of them is scored.

    Args:
        head: imprinted from x and y, which were checked then. Recipe and seed are taken from it.
        x: `(N, d)`, the training embeddings.
        y: `(N,)`, their labels 0..C−1.
        accept: a share in (0, 1], such as 0.95.
        classifier: as for `imprint`.

    Returns:
        The head.

    Raises:
        ImprintError: a share out of range, or no class with two samples.
    """
    return set_limits(head, x, y, Limits(accept), classifier)


def set_coverage(
    head: ImprintedHead,
    x: Tensor,
    y: Tensor,
    coverage: float,
    classifier: Tensor | None = None,
) -> ImprintedHead:
    """Fits `head.sets`, so that `head.prediction_sets` hold the truth with this probability.

    Another probability can be asked for later, without a new fit.

    The arguments, the time and the errors are those of `set_threshold`.
    """
    return set_limits(head, x, y, Limits(coverage=coverage), classifier)


def set_limits(
    head: ImprintedHead,
    x: Tensor,
    y: Tensor,
    limits: Limits,
    classifier: Tensor | None = None,
) -> ImprintedHead:
    """Does the work of `set_threshold` and `set_coverage` in the time of one of them; does nothing
    without limits."""
    if not limits:
        return head
    x, y, _ = checked(x, y, head.num_classes, None, allow_empty=True, values_checked=True)
    rows = in_order(x, y)
    x, y = taken(x, rows), y[rows]
    parts = _parts_of(head)
    request = Request(head.num_classes, seed=head.settings.get("seed", 0), classifier=classifier)
    unit = None
    if limits.accept is not None:
        unit = unit_sums(x, y, head.num_classes, parts.layer_widths)
    return set_limits_of_sums(head, x, y, parts, request, limits, len(y), unit)


def set_limits_of_sums(
    head: ImprintedHead,
    x: Tensor,
    y: Tensor,
    parts: Recipe,
    request: Request,
    limits: Limits,
    samples: int,
    unit: Moments | None = None,
    sums: Sums | None = None,
) -> ImprintedHead:
    """Does the work of `set_limits` with sums and a bounded sample of the samples.

    Args:
        head: made of all samples.
        x, y: embeddings and labels in the order of `in_order`: all samples, or a sample of them as
            `held_out_rows` takes it.
        parts, request: those of the head.
        limits: the limits to fit.
        samples: number of all samples.
        unit: the sums of all samples that `unit_sums` gives; needed for a threshold.
        sums: the sums of all samples, if x and y are only a part of them.

    Raises:
        ImprintError: no class with two samples.
    """
    of_sums = holds_out_of_sums(parts)
    if samples <= HELD:
        most = FOLDS_OF_SUMS if of_sums else FOLDS
        masks = folds(y, request.seed, enough=len(y), most=most)
        held = [mask.nonzero().flatten() for mask in masks]
    else:
        most = samples // FOLDS_OF_SUMS if of_sums else HELD
        held = held_out_rows(x, y, samples, request.seed, most)
    if not held:
        raise ImprintError(
            f"{limits.name}: no class has two samples, so that none can be held out for it; add "
            "samples, or leave it out"
        )
    copies = copies_of(x, y, held)
    enough = HELD if of_sums or samples <= HELD else 2 * ENOUGH
    held_out = held_out_scores(x, y, parts, request, held, sums, enough, copies)
    if not len(held_out.y):
        raise ImprintError(
            f"{limits.name}: without the held-out samples there is no head to go by "
            f"({held_out.error}); add samples, or leave it out"
        )
    if limits.coverage is not None:
        head.sets.fit(held_out.scores * head.log_scale.detach().exp(), held_out.y)
        head.coverage = limits.coverage
    if limits.accept is None or unit is None:
        return head
    head.familiar.fit(unit, request.seed, limits.most_bytes, parts.layer_widths)
    scores = _familiar_scores(x, y, unit, held, copies, held_out, parts, request, limits)
    head.familiar.standardise(scores)
    ascending = head.familiar.of_scores(scores).double().sort().values
    # The largest value that at least this share of the samples reaches.
    place = int((1 - limits.accept) * len(ascending) + 1e-9)
    head.threshold = ascending[min(place, len(ascending) - 1)].item()
    return head


def _familiar_scores(
    x: Tensor,
    y: Tensor,
    unit: Moments,
    held: list[Tensor],
    copies: list[Tensor],
    held_out: HeldOut,
    parts: Recipe,
    request: Request,
    limits: Limits,
) -> Tensor:
    """Return the three scores `(n, 3)` of held-out samples, each from sums without its fold."""
    best, found = held_out.scores.amax(1), []
    for fold, hidden in zip(held, copies, strict=True):
        of_fold = torch.isin(held_out.rows, fold)
        if not of_fold.any():
            continue
        out = torch.cat([fold, hidden.to(fold)])
        others = unit - unit_sums(x[out], y[out], request.num_classes, parts.layer_widths).to(
            unit.sums.device
        )
        fitted = Familiarity().fit(others, request.seed, limits.most_bytes, parts.layer_widths)
        found.append(fitted.scores(x[held_out.rows[of_fold]], best[of_fold]))
    return torch.cat(found)


def _parts_of(head: ImprintedHead) -> Recipe:
    """Return the recipe of a head, with the λ that it chose."""
    settings, chosen = keywords_of(head), head.settings.get("chosen_lam")
    if chosen is not None and settings.get("lam") in CHOICES:
        settings["lam"] = chosen
        settings.pop("metric", None)
    parts = resolve(**settings)
    assert isinstance(parts, Recipe)  # a head's settings name the recipe that auto has chosen
    return parts
