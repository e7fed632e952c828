"""Finds labels that are likely wrong, by the scores of heads that have not seen the sample."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from imprint_pl.errors import ImprintError
from imprint_pl.method.calibration import SCORES, fit_temperature, folds
from imprint_pl.method.holdout import held_out_scores, with_lam
from imprint_pl.method.inputs import checked
from imprint_pl.method.pipeline import Request, Sums, holds_out_of_sums
from imprint_pl.method.recipes import AUTO, Recipe, resolve
from imprint_pl.numerics.order import in_order
from imprint_pl.parts.gen.ridge import CHOICES

# Number of folds without and with sums, where heads are cheap. Twenty folds find more wrong labels
# than five, since each head has seen more samples.
FOLDS, FOLDS_OF_SUMS = 5, 20


class LabelScores(NamedTuple):
    """The scores of labels, each by a head that has not seen the sample.

    Attributes:
        given: `(N,)`, the probability of the sample's label; NaN if it was not checked, as in a
            class of one sample.
        likely: `(N,)` int64, the class with the highest probability; −1 if not checked.
        probability: `(N,)`, the probability of that class.
    """

    given: Tensor
    likely: Tensor
    probability: Tensor

    def ranking(self) -> Tensor:
        """Returns the indices `(n,)` of the checked samples, the most suspicious first."""
        checked_ones = (~self.given.isnan()).nonzero().flatten()
        return checked_ones[self.given[checked_ones].argsort(stable=True)]

    @property
    def doubted(self) -> Tensor:
        """Returns `(N,)` bool, whether another class is more probable than the label."""
        return ~self.given.isnan() & (self.probability > self.given)


@torch.no_grad()
def label_scores(
    x: Tensor,
    y: Tensor,
    recipe: str = "kernel",
    *,
    num_classes: int | None = None,
    layer_widths: list[int] | None = None,
    seed: int = 0,
    progress: bool = False,
    **overrides: Any,
) -> LabelScores:
    """Scores every label by a head that has not seen its sample.

    Labels are ranked by the probability of the given label, after a temperature was fitted. This
    ranking found the most deliberately flipped labels among those that were tried (also by margin,
    margin of probabilities, and both relative to the class).

    Args:
        x: `(N, d)`, embeddings.
        y: `(N,)`, labels 0..C−1.
        recipe: the recipe of the heads; "auto" stands for "kernel", which it mostly chooses.
        num_classes: C; the largest label + 1 by default.
        layer_widths: widths of the layers that the embeddings have side by side.
        seed: fixes the folds.
        progress: show a bar on stderr.
        overrides: as for `imprint`.

    Returns:
        The scores, in the order of `x`.

    Raises:
        ImprintError: shapes, labels or values that do not fit, or no class with two samples.

    Source: Northcutt, Jiang & Chuang 2021, "Confident learning" (ranking by self-confidence).

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.9, 0.0], [0.0, 1.0], [0.1, 1.0], [0.0, 0.9]])
    >>> scores = label_scores(x, torch.tensor([0, 0, 0, 1, 1, 0]), "qi")
    >>> int(scores.ranking()[0])
    5
    """
    x, y, C = checked(x, y, num_classes, None, allow_empty=True)
    keywords = overrides | ({} if layer_widths is None else {"layer_widths": layer_widths})
    parts = resolve("kernel" if recipe == AUTO else recipe, **keywords)
    assert isinstance(parts, Recipe)  # "auto" was replaced
    rows = in_order(x, y)
    x, y = x[rows], y[rows]
    request, sums = Request(C, seed=seed), None
    from_sums = holds_out_of_sums(parts)
    most = FOLDS_OF_SUMS if from_sums else FOLDS
    masks = folds(y, seed, enough=len(y), most=most)
    if not masks:
        raise ImprintError(
            "no class has two samples, so that no label can be checked by the others of its class"
        )
    # Limit the folds, so that the scores of all classes fit into memory.
    size = max(1, SCORES // C)
    held = [part for mask in masks for part in mask.nonzero().flatten().split(size)]
    if from_sums:
        norm_pre, head = parts.fresh()
        sums = Sums.fitted(norm_pre, head.norm_inf, parts.gen, x, y, request)
        if getattr(parts.gen, "lam", None) in CHOICES:
            parts = with_lam(parts, parts.gen(sums.moments.present()).chosen["lam"])
    given = torch.full((len(y),), torch.nan)
    likely = torch.full((len(y),), -1)
    probability = given.clone()
    temperature: float | None = None
    waiting: list[tuple[Tensor, Tensor]] = []
    error: ImprintError | None = None

    def finish() -> None:
        nonlocal temperature
        if temperature is None and waiting:
            places = torch.cat([place for place, _ in waiting])
            temperature = fit_temperature(torch.cat([s for _, s in waiting]), y[places].cpu())
        for place, scores in waiting:
            p = (scores / (temperature or 1.0)).softmax(1)
            given[place] = p.gather(1, y[place].cpu()[:, None])[:, 0]
            probability[place], likely[place] = p.max(1)
        waiting.clear()

    for fold in tqdm(
        held, "checking labels", delay=2, leave=False, disable=None if progress else True
    ):
        found = held_out_scores(x, y, parts, request, [fold], sums)
        if len(found.y) < len(fold):
            error = found.error or error
            continue
        waiting.append((fold.cpu(), found.scores.float().cpu()))
        # Collect folds until there are enough scores to fit the temperature; then finish each fold
        # at once.
        if temperature is not None or sum(s.numel() for _, s in waiting) >= SCORES:
            finish()
    finish()
    if given.isnan().all():
        raise ImprintError(f"no label can be checked: without the held-out samples {error}")
    back = torch.empty_like(rows.cpu())
    back[rows.cpu()] = torch.arange(len(rows))
    return LabelScores(given[back], likely[back], probability[back])
