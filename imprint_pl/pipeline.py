"""The figure, run once from left to right: checked embeddings through the five parts into a head.

Below `imprinting.py`, which says what is asked of the user, and `auto.py`, which runs it for many
candidates.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imprint_pl.calibration import fit_temperature, folds, scored
from imprint_pl.errors import ImprintError
from imprint_pl.gen import Proxies
from imprint_pl.gen.ridge import CHOICES
from imprint_pl.head import ImprintedHead
from imprint_pl.labels import plain_labels
from imprint_pl.limits import check_classes, check_size, check_values
from imprint_pl.moments import Moments
from imprint_pl.norm import Norm, sums_of, transform
from imprint_pl.recipes import Parts


def make_head(
    x: Tensor,
    y: Tensor,
    parts: Parts,
    num_classes: int,
    class_names: list[str] | None = None,
    seed: int = 0,
    classifier: Tensor | None = None,
    progress: bool = False,
    calibrate: bool = False,
) -> ImprintedHead:
    """Embeddings `x (N, d)`, labels `y (N,)` that `checked` has seen → a head.

    A class without samples gets no proxy. The temperature is 1, or with `calibrate` the one that
    suits samples which were held out for it; 1 still where too few samples are left then.
    """
    present, labels = torch.unique(y, return_inverse=True)
    # GEN notes the λ that it chose: a copy, since another thread may use these parts.
    parts = replace(parts, gen=copy.copy(parts.gen))
    norm_pre, head = parts.fresh()
    held = folds(labels, seed) if calibrate else []
    moments = None
    if parts.gen.from_moments:
        moments = _sums(norm_pre.to(x.device), x, labels, len(present), parts.gen, seed)
        proxies = parts.gen(moments)
    else:
        if getattr(norm_pre, "learns", False):
            norm_pre.to(x.device).fit(x, labels, len(present), seed)
        z = transform(norm_pre, x)
        proxies = parts.gen(z, labels, len(present), seed, progress)
        del z
    proxies = _finished(proxies, parts, present, classifier)
    head = head.to(x.device).fill(proxies, num_classes, class_names)
    head.settings = _settings(parts, parts.gen, seed)
    if held:
        fitted = None if moments is None else (norm_pre, head.norm_inf, moments)
        parts = replace(parts, gen=with_chosen_lam(parts.gen))
        try:
            scores = held_out_scores(x, y, parts, num_classes, held, seed, classifier, fitted)
        except ImprintError:
            # Enough samples for the recipe, but not with some of them held out.
            return head
        labels = torch.cat([y[scored(mask, num_classes)] for mask in held])
        head.temperature = fit_temperature(torch.cat(scores), labels)
    return head


def held_out_scores(
    x: Tensor,
    y: Tensor,
    parts: Parts,
    num_classes: int,
    held: list[Tensor],
    seed: int = 0,
    classifier: Tensor | None = None,
    fitted: tuple[nn.Module, nn.Module, Moments] | None = None,
) -> list[Tensor]:
    """Scores of held-out samples by a head that is made of the others, for each mask of `held`.

    Where GEN asks for sums, the held-out samples are taken out of the sums of all; a NORM_pre that
    does not look at labels, and a λ, are then fitted once, on all samples.

    Args:
        x, y, parts, num_classes, seed, classifier: as for `make_head`.
        held: masks `(N,)`; every class keeps a sample outside of each.
        fitted: NORM_pre, NORM_inf and the sums of all samples after NORM_pre, where they are known.

    Returns:
        `(n, num_classes)` for each mask, of the samples that `scored` gives.
    """
    present, labels = torch.unique(y, return_inverse=True)
    norm_pre, head = parts.fresh()
    # Rows to sum up: each time the others, or all of them once and the held-out ones again.
    out = sum(int(mask.sum()) for mask in held)
    worth_it = fitted is not None or len(held) * len(y) - out > len(y) + out
    if not (holds_out_of_sums(parts) and worth_it):
        return [
            make_head(x[~mask], y[~mask], parts, num_classes, None, seed, classifier).scores(
                x[scored(mask, num_classes)]
            )
            for mask in held
        ]
    if fitted is None:
        norm_pre = norm_pre.to(x.device)
        moments = _sums(norm_pre, x, labels, len(present), parts.gen, seed)
        fitted = norm_pre, head.norm_inf, moments
    norm_pre, norm_inf, moments = fitted
    gen = parts.gen
    if getattr(gen, "lam", None) in CHOICES:
        gen = copy.copy(gen)
        gen(moments)
        gen = with_chosen_lam(gen)
    scores = []
    for mask in held:
        z = transform(norm_pre, x[mask])
        gram = "none" if moments.gram is None else "pooled"
        others = moments - Moments.of(z, labels[mask], len(present), gram=gram)
        proxies = _finished(gen(others), parts, present, classifier)
        rows = scored(mask, num_classes)
        if norm_inf is not norm_pre:
            z = transform(norm_inf, x[rows])
        elif len(rows) < len(z):
            z = transform(norm_pre, x[rows])
        scores.append(parts.agg(z, proxies.weights, proxies.bias, proxies.classes, num_classes))
    return scores


def holds_out_of_sums(parts: Parts) -> bool:
    """Whether held-out samples can be taken out of sums: another fold is then cheap."""
    return parts.gen.from_moments and not getattr(parts.norm_pre, "uses_labels", False)


def head_of_sums(
    moments: Moments,
    parts: Parts,
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


def with_chosen_lam(gen: Any) -> Any:
    """The GEN, or where it has chosen λ a copy that takes this λ as given: to choose again takes as
    long as the head itself."""
    if getattr(gen, "chosen_lam", None) is None:
        return gen
    gen = copy.copy(gen)
    gen.lam = gen.chosen_lam
    return gen


def _settings(parts: Parts, gen: Any, seed: int) -> dict[str, Any]:
    settings = parts.parameters | {"seed": seed}
    if getattr(gen, "chosen_lam", None) is not None:
        settings["chosen_lam"] = gen.chosen_lam
    return settings


def _sums(
    norm_pre: nn.Module, x: Tensor, y: Tensor, num_classes: int, gen: Any, seed: int
) -> Moments:
    gram = "pooled" if gen.needs_gram else "none"
    if isinstance(norm_pre, Norm):
        return norm_pre.fit_sums(x, y, num_classes, seed, gram)
    return sums_of(norm_pre, x, y, num_classes, gram)


def _finished(
    proxies: Proxies, parts: Parts, present: Tensor, classifier: Tensor | None
) -> Proxies:
    """After NORM_post, with the labels of the task instead of places among the present."""
    weights = parts.norm_post.of_proxies(proxies.weights, proxies.classes, classifier)
    return Proxies(weights, proxies.bias, present[proxies.classes])


def _tensor(values: Any, what: str) -> Tensor:
    try:
        if hasattr(values, "__array__") and not isinstance(values, Tensor):
            # Torch takes no frames, nor arrays that run backwards or may only be read.
            values = np.require(values, requirements=["C", "W"])
        # Embeddings may come with the graph that made them: nothing here asks for a gradient.
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ImprintError(
            f"{what} of type {type(values).__name__} ({' '.join(str(error).split())}): expected a "
            "tensor or an array of numbers; ImprintEstimator takes labels of any kind"
        ) from error


def checked_classifier(weights: Any) -> Tensor:
    """Weights `(…, d)` of a classifier, as a tensor; an `ImprintError` for anything else."""
    weights = _tensor(weights, "classifier")
    if weights.ndim != 2 or not weights.is_floating_point() or 0 in weights.shape:
        raise ImprintError(
            f"classifier of shape {tuple(weights.shape)} and type {weights.dtype}: expected the "
            "weights (C, d) of the backbone's own classifier, floats"
        )
    check_values(weights, "classifier: ")
    return weights


def checked(
    x: Tensor,
    y: Tensor,
    num_classes: int | None,
    class_names: list[str] | None,
    allow_empty: bool,
) -> tuple[Tensor, Tensor, int]:
    """`x (N, d)` in float32, `y (N,)` in int64 on its device, and C; or an `ImprintError`.

    `allow_empty` accepts classes without samples.
    """
    x, y = _tensor(x, "embeddings"), _tensor(plain_labels(y), "labels")
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        raise ImprintError(
            f"embeddings of shape {tuple(x.shape)} and type {x.dtype}: expected floats (N, d)"
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex():
        raise ImprintError(
            f"labels of shape {tuple(y.shape)} and type {y.dtype} for {len(x)} embeddings: "
            f"expected integers ({len(x)},)"
        )
    # In the type that they came in: float64 may hold what float32 cannot.
    check_size(check_values(x))
    x, y = x.float(), y.long().to(x.device)
    if num_classes is None:
        num_classes = len(class_names) if class_names else int(y.max()) + 1
    if class_names and len(class_names) != num_classes:
        raise ImprintError(f"{len(class_names)} class_names for num_classes={num_classes}")
    check_classes(num_classes)
    outside = (y < 0) | (y >= num_classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ImprintError(
            f"label {int(y[first])} of sample {first} is out of range: labels are "
            f"0..{num_classes - 1} for num_classes={num_classes}"
        )
    present = torch.unique(y).tolist()
    if len(present) < num_classes and not allow_empty:
        # Without a list of all classes: one absurd label would ask for memory that nobody has.
        some = itertools.islice(sorted(set(range(len(present) + 5)) - set(present)), 5)
        empty = [c for c in some if c < num_classes]
        names = [f"{c} ({class_names[c]!r})" if class_names else str(c) for c in empty]
        left = num_classes - len(present) - len(empty)
        more = f" and {left} more" if left else ""
        raise ImprintError(
            f"class {', '.join(names)}{more} has no training sample: add samples, "
            "or leave the class out and number the labels without gaps"
        )
    return x, y, num_classes
