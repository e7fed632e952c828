"""The figure, run once from left to right: checked embeddings through the five parts into a head.

Below `imprinting.py`, which says what is asked of the user, and `auto.py`, which runs it for many
candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError
from imprint_pl.gen import Proxies
from imprint_pl.head import ImprintedHead
from imprint_pl.moments import CHUNK, Moments
from imprint_pl.norm import transform
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
) -> ImprintedHead:
    """Embeddings `x (N, d)`, labels `y (N,)` that `checked` has seen → a head, temperature 1.

    A class without samples gets no proxy.
    """
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
    head = head.to(x.device).fill(proxies, num_classes, class_names)
    head.settings = dict(parts.parameters) | {"seed": seed}
    if getattr(parts.gen, "chosen_lam", None) is not None:
        head.settings["chosen_lam"] = parts.gen.chosen_lam
    return head


def _moments(norm: nn.Module, x: Tensor, y: Tensor, num_classes: int, gram: str) -> Moments:
    """The sums of `norm(x)`, which is never kept: it may be many times the size of `x`."""
    moments = None
    for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
        z = norm(rows)
        if moments is None:
            moments = Moments.zeros(num_classes, z.shape[1], gram=gram, device=z.device)
        moments.add(z, labels)
    return moments


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
