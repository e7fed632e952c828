"""The paper in one function: embeddings and labels in, an imprinted head out. Read this first.

    embeddings ─ NORM_pre ─ GEN (per class) ─ NORM_post ─ proxies ┐
    embedding  ─ NORM_inf ───────────────────────────────── AGG ──┴ class scores

A recipe names the five parts; a published imprinting method is one of them, or a keyword away.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.method.auto import choose
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.holdout import calibrate_head
from imprint_pl.method.inputs import checked, checked_classifier, checked_weights
from imprint_pl.method.pipeline import Request, make_head, row_weights
from imprint_pl.method.recipes import AUTO, Auto, Recipe, RecipeName, resolve
from imprint_pl.method.selection import checked_bounds, draw_shots, weibull_typical
from imprint_pl.numerics.copies import projected_bytes
from imprint_pl.numerics.labels import checked_names
from imprint_pl.numerics.large import FILES, check_disk, check_in_memory, fits, taken, within_budget
from imprint_pl.numerics.order import in_order
from imprint_pl.numerics.values import checked_seed
from imprint_pl.parts.by_name import import_parts
from imprint_pl.parts.norm.layers import check_width


def imprint(
    x: Tensor,
    y: Tensor,
    recipe: RecipeName = AUTO,
    *,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
    seed: int = 0,
    shots: int | None = None,
    weibull: tuple[float, float] | None = None,
    classifier: Tensor | None = None,
    progress: bool = False,
    calibrate: bool = True,
    sample_weight: Tensor | None = None,
    memory_budget: float | None = None,
    **overrides: Any,
) -> ImprintedHead:
    """Imprints a head: one pass, no gradient.

    Args:
        x: `(N, d)`, embeddings of the training samples, float, finite; a tensor or an array, such
            as a mapped file, `np.load(path, mmap_mode="r")`.
        y: `(N,)`, labels 0..C−1.
        recipe: "auto", which compares recipes on held-out samples (see `auto.py`), or a name in
            `RECIPES`, such as "kernel" (what auto mostly chooses) or "robust" (the paper's best).
        num_classes: C; the largest label + 1 by default.
        class_names: C names, kept in the head and used in messages.
        seed: fixes every random choice; the global generators are left alone.
        shots: use this many samples a class, drawn at random; fewer where there are fewer.
        weibull: use the samples whose distance to their class mean lies between these two quantiles
            of a Weibull distribution, such as (0.1, 0.9); see `weibull_typical`.
        classifier: `(…, d)`, weights of the backbone's original classifier: the reference of
            `norm_post="quantile"`. Without it the proxies themselves are.
        progress: show a bar on stderr.
        calibrate: fit a temperature on held-out samples, so that a softmax of what the head returns
            gives probabilities. Costs a second, smaller imprinting.
        sample_weight: `(N,)`, what each sample weighs, at least 0: a weight of 2 is the sample
            twice, 0 leaves it out. For ls, ridge, kernel and ranpac, and auto, which then compares
            these alone. Held-out samples and what NORM_pre learns have no weights.
        overrides: `norm_pre, gen, k, norm_post, norm_inf, agg` and more; see `resolve`. A part of
            your own is an instance, or the import path of its class: `gen="my_parts.Trimmed"`.
            `layer_widths` says that `x` holds several layers of a model side by side.

    Returns:
        An `ImprintedHead`, embeddings `(B, d)` → logits `(B, C)`, on `x`'s device.

    Raises:
        ImprintError: shapes, labels or values that do not fit, a class without samples.

    Source: Westerhoff et al. 2025, Figure 1.

    >>> import torch
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> head = imprint(x, torch.tensor([0, 0, 1, 1]), "qi")
    >>> head(torch.tensor([[5.0, 1.0], [1.0, 2.0]])).argmax(1)
    tensor([0, 1])
    """
    import_parts(overrides)
    parts, seed = resolve(recipe, **overrides), checked_seed(seed)
    class_names = None if class_names is None else checked_names(class_names)
    with within_budget(memory_budget, progress):
        if sample_weight is not None:
            sample_weight = checked_weights(sample_weight, len(x))
            if (sample_weight == 0).any():
                x, y, num_classes = checked(x, y, num_classes, class_names, allow_empty=False)
                rows = (sample_weight > 0).nonzero().flatten().to(x.device)
                x, y, sample_weight = taken(x, rows), y[rows], _taken(sample_weight, rows)
        chooses = shots is not None or weibull is not None
        if chooses:
            x, y, num_classes = checked(x, y, num_classes, class_names, allow_empty=False)
        if shots is not None:
            rows = draw_shots(y, shots, seed)
            x, y = taken(x, rows), y[rows]
            sample_weight = _taken(sample_weight, rows)
        if weibull is not None:
            rows = weibull_typical(x, y, *checked_bounds(weibull))
            x, y = taken(x, rows), y[rows]
            sample_weight = _taken(sample_weight, rows)
        return imprint_parts(
            x,
            y,
            parts,
            num_classes,
            class_names,
            seed,
            classifier,
            progress,
            calibrate=calibrate,
            values_checked=chooses,
            sample_weight=sample_weight,
        )


def imprint_parts(
    x: Tensor,
    y: Tensor,
    parts: Recipe | Auto,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
    seed: int = 0,
    classifier: Tensor | None = None,
    progress: bool = False,
    allow_empty: bool = False,
    calibrate: bool = True,
    values_checked: bool = False,
    sample_weight: Tensor | None = None,
) -> ImprintedHead:
    """Imprints a head as `imprint` does, from parts that `resolve` built.

    Args:
        allow_empty: accept classes without samples, which get no proxy and the score −∞: for an
            epoch that was cut short on purpose.
        values_checked: the values of `x` were checked on their way, batch by batch, by
            `check_values`.
        sample_weight: `(N,)`, above 0.

    Raises:
        ImprintError: as `imprint`; weights that the recipe cannot take.
    """
    x, y, num_classes = checked(x, y, num_classes, class_names, allow_empty, values_checked)
    check_width(parts.layer_widths, x.shape[1])
    if x.device.type == "cpu" and not fits(x.nbytes):
        # Before minutes of work: in order and, where GEN sees rows, without held-out samples and
        # normalised.
        of_sums = isinstance(parts, Recipe) and parts.gen.from_moments
        check_disk(x.nbytes * (1 if of_sums else FILES - 1) + projected_bytes(*x.shape))
    # Draws and folds then depend on the set of samples alone, not on the order in which they came.
    rows = in_order(x, y)
    x, y = taken(x, rows), y[rows]
    weights = _taken(sample_weight, rows)
    if weights is not None and len(weights) and (weights == weights[0]).all():
        weights = None  # alike: they change nothing, whatever the recipe
    classifier = None if classifier is None else checked_classifier(classifier)
    request = Request(num_classes, class_names, seed, classifier, progress)
    if isinstance(parts, Auto):
        recipe, tried = choose(
            x, y, request, parts.layer_widths, parts.metric, parts.class_weight, weights
        )
    else:
        recipe, tried = parts, []
    if weights is not None and not getattr(recipe.gen, "takes_weights", False):
        raise ImprintError(
            f"sample_weight is not used by gen={recipe.gen.name!r}: leave it out, or take recipe "
            "ls, ridge, kernel, ranpac or auto"
        )
    too_many = x.device.type == "cpu" and not fits(x.nbytes)
    if too_many and getattr(recipe.gen, "every_sample", False):
        check_in_memory(len(x), x.shape[1], f"gen={recipe.gen.name!r} makes each of them a proxy")
    weights = row_weights(y, recipe.gen, weights)
    head, sums = make_head(x, y, recipe, request, weights)
    if calibrate:
        calibrate_head(head, x, y, recipe, request, sums, weights=weights)
    if isinstance(parts, Auto):
        head.tried = tried
        head.settings["chosen_by"] = "auto"
    return head


def _taken(weights: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if weights is None else weights[rows.to(weights.device)]
