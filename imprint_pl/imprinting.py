"""The paper in one function: embeddings and labels in, an imprinted head out. Read this first.

    embeddings ─ NORM_pre ─ GEN (per class) ─ NORM_post ─ proxies ┐
    embedding  ─ NORM_inf ───────────────────────────────── AGG ──┴ class scores

A recipe names the five parts; a published imprinting method is one of them, or a keyword away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError
from imprint_pl.gen import Proxies
from imprint_pl.head import ImprintedHead
from imprint_pl.moments import CHUNK, Moments
from imprint_pl.norm import transform
from imprint_pl.recipes import Parts, resolve
from imprint_pl.select import draw_shots, weibull_typical


def imprint(
    x: Tensor,
    y: Tensor,
    recipe: str = "robust",
    *,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
    seed: int = 0,
    shots: int | None = None,
    weibull: tuple[float, float] | None = None,
    classifier: Tensor | None = None,
    progress: bool = False,
    **overrides: Any,
) -> ImprintedHead:
    """Imprints a head: one pass, no gradient.

    Args:
        x: `(N, d)`, embeddings of the training samples, float, finite.
        y: `(N,)`, labels 0..C−1.
        recipe: "robust" (the paper's best: k-means with 20 proxies a class) or another of
            `RECIPES`.
        num_classes: C; the largest label + 1 by default.
        class_names: C names, kept in the head and used in messages.
        seed: fixes every random choice; the global generators are left alone.
        shots: use this many samples a class, drawn at random; fewer where there are fewer.
        weibull: use the samples whose distance to their class mean lies between these two quantiles
            of a Weibull distribution, such as (0.1, 0.9); see `weibull_typical`.
        classifier: `(…, d)`, weights of the backbone's original classifier: the reference of
            `norm_post="quantile"`. Without it the proxies themselves are.
        progress: show a bar on stderr.
        overrides: `norm_pre, gen, k, norm_post, norm_inf, agg` and more; see `resolve`.

    Returns:
        An `ImprintedHead`, embeddings `(B, d)` → class scores `(B, C)`, on `x`'s device.

    Raises:
        ImprintError: shapes, labels or values that do not fit, a class without samples.

    Source: Westerhoff et al. 2025, Figure 1.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> head = imprint(x, torch.tensor([0, 0, 1, 1]), "qi")
    >>> head(torch.tensor([[5.0, 1.0], [1.0, 2.0]])).argmax(1)
    tensor([0, 1])
    """
    parts = resolve(recipe, **overrides)
    if shots is not None or weibull is not None:
        x, y, num_classes = _checked(x, y, num_classes, class_names, allow_empty=False)
    if shots is not None:
        rows = draw_shots(y, shots, seed)
        x, y = x[rows], y[rows]
    if weibull is not None:
        rows = weibull_typical(x, y, *weibull)
        x, y = x[rows], y[rows]
    return imprint_parts(x, y, parts, num_classes, class_names, seed, classifier, progress)


def imprint_parts(
    x: Tensor,
    y: Tensor,
    parts: Parts,
    num_classes: int | None = None,
    class_names: list[str] | None = None,
    seed: int = 0,
    classifier: Tensor | None = None,
    progress: bool = False,
    allow_empty: bool = False,
) -> ImprintedHead:
    """As `imprint`, from parts that `resolve` built.

    `allow_empty` accepts classes without samples, which get no proxy and the score −∞: for an
    epoch that was cut short on purpose.
    """
    x, y, num_classes = _checked(x, y, num_classes, class_names, allow_empty)
    present, y = torch.unique(y, return_inverse=True)
    norm_pre, head = parts.fresh()
    if getattr(norm_pre, "learns", False):
        norm_pre.to(x.device).fit(x, y, len(present), seed)
    if parts.gen.from_moments:
        gram = "pooled" if parts.gen.needs_gram else "none"
        proxies = parts.gen(_moments(norm_pre, x, y, len(present), gram))
    else:
        proxies = parts.gen(transform(norm_pre, x), y, len(present), seed, progress)
    weights = parts.norm_post.of_proxies(proxies.weights, proxies.classes, classifier)
    proxies = Proxies(weights, proxies.bias, present[proxies.classes])
    return head.to(x.device).fill(proxies, num_classes, class_names)


def _moments(norm: nn.Module, x: Tensor, y: Tensor, num_classes: int, gram: str) -> Moments:
    """The sums of `norm(x)`, which is never kept: it may be many times the size of `x`."""
    moments = None
    for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        z = norm(rows)
        if moments is None:
            moments = Moments.zeros(num_classes, z.shape[1], gram=gram, device=z.device)
        moments.add(z, labels)
    return moments


def _checked(
    x: Tensor,
    y: Tensor,
    num_classes: int | None,
    class_names: list[str] | None,
    allow_empty: bool,
) -> tuple[Tensor, Tensor, int]:
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if x.ndim != 2 or not x.is_floating_point() or 0 in x.shape:
        raise ImprintError(
            f"embeddings of shape {tuple(x.shape)} and type {x.dtype}: expected floats (N, d)"
        )
    if y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex():
        raise ImprintError(
            f"labels of shape {tuple(y.shape)} and type {y.dtype} for {len(x)} embeddings: "
            f"expected integers ({len(x)},)"
        )
    x, y = x.float(), y.long().to(x.device)
    bad = ~x.isfinite().all(1)
    if bad.any():
        raise ImprintError(
            f"{int(bad.sum())} of {len(x)} embeddings are not finite, the first is sample "
            f"{int(bad.nonzero()[0])}: look at that image, or at the backbone's precision"
        )
    if num_classes is None:
        num_classes = len(class_names) if class_names else int(y.max()) + 1
    if class_names and len(class_names) != num_classes:
        raise ImprintError(f"{len(class_names)} class_names for num_classes={num_classes}")
    outside = (y < 0) | (y >= num_classes)
    if outside.any():
        first = int(outside.nonzero()[0])
        raise ImprintError(
            f"label {int(y[first])} of sample {first} is out of range: labels are "
            f"0..{num_classes - 1} for num_classes={num_classes}"
        )
    empty = (torch.bincount(y, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if empty and not allow_empty:
        names = [f"{c} ({class_names[c]!r})" if class_names else str(c) for c in empty[:5]]
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise ImprintError(
            f"class {', '.join(names)}{more} has no training sample: add samples, "
            "or leave the class out and number the labels without gaps"
        )
    return x, y, num_classes
