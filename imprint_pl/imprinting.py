"""The paper in one function: embeddings and labels in, an imprinted head out. Read this first.

    embeddings ─ NORM_pre ─ GEN (per class) ─ NORM_post ─ proxies ┐
    embedding  ─ NORM_inf ───────────────────────────────── AGG ──┴ class scores

A recipe names the five parts; a published imprinting method is one of them, or a keyword away.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imprint_pl.agg import AGGS
from imprint_pl.errors import ImprintError, near
from imprint_pl.gen import GENERATORS, Proxies
from imprint_pl.head import ImprintedHead
from imprint_pl.moments import CHUNK, Moments
from imprint_pl.norm import NORMS, PROXY_NORMS, Chain, Norm, transform
from imprint_pl.norm_learned import LEARNED
from imprint_pl.select import draw_shots, weibull_typical

# The slots of a recipe, in the order of the figure, and the parts that fit each.
SLOTS = {
    "norm_pre": NORMS | LEARNED,
    "gen": GENERATORS,
    "norm_post": PROXY_NORMS,
    "norm_inf": NORMS | LEARNED,
    "agg": AGGS,
}

RECIPES: dict[str, dict[str, Any]] = {
    # Qi et al. 2018: the mean.
    "qi": dict(norm_pre="l2", gen="mean", norm_post="l2", norm_inf="l2", agg="max"),
    # Hosoda et al. 2024: the mean, with the weights of a proxy redistributed.
    "hosoda": dict(norm_pre="none", gen="mean", norm_post="quantile", norm_inf="none", agg="max"),
    # Janson et al. 2022: the nearest class mean.
    "janson": dict(
        norm_pre="none",
        gen="mean",
        norm_post="none",
        norm_inf="none",
        agg="mnn",
        m=1,
        distance="euclidean",
        votes="uniform",
    ),
    # Westerhoff et al. 2025: the paper's best.
    "robust": dict(norm_pre="l2", gen="kmeans", k=20, norm_post="l2", norm_inf="l2", agg="max"),
    # Westerhoff et al. 2025: least squares, the paper's "oracle".
    "ls": dict(norm_pre="none", gen="ls", norm_post="none", norm_inf="none", agg="max"),
    # Wu et al. 2018: nearest neighbours among all samples, weighted by exp(cos / T).
    "knn": dict(
        norm_pre="l2",
        gen="all",
        norm_post="l2",
        norm_inf="l2",
        agg="mnn",
        m=20,
        distance="cosine",
        votes="softmax",
    ),
    # The mean by cosine where the classes are round: Fisher 1936 (the metric), Qi et al. 2018.
    "whitened": dict(
        norm_pre=["whiten", "l2"], gen="mean", norm_post="l2", norm_inf="same", agg="max"
    ),
    # Hoerl & Kennard 1970; Golub, Heath & Wahba 1979 (λ by generalised cross-validation).
    "ridge": dict(norm_pre="none", gen="ridge", norm_post="none", norm_inf="none", agg="max"),
    # Fisher 1936; Rao 1948.
    "lda": dict(norm_pre="none", gen="lda", norm_post="none", norm_inf="none", agg="max"),
    # McDonnell et al. 2023 (RanPAC): ridge regression behind a random layer.
    "ranpac": dict(
        norm_pre="random_projection",
        gen="ridge",
        lam=1e-2,
        intercept=False,
        norm_post="none",
        norm_inf="same",
        agg="max",
    ),
    # Perronnin et al. 2010 (power, l2); Williams & Seeger 2001 (Nyström): kernel ridge regression.
    "kernel": dict(
        norm_pre=["power", "l2", "nystrom"],
        gen="ridge",
        norm_post="none",
        norm_inf="same",
        agg="max",
    ),
}


@dataclass(frozen=True)
class Parts:
    """The five parts of a recipe, ready to use, and the plain parameters that name them.

    Parts that learn are not fitted here: every head gets its own copy.
    """

    norm_pre: nn.Module
    gen: Any
    norm_post: nn.Module
    norm_inf: nn.Module
    agg: nn.Module
    parameters: dict[str, Any]

    def empty_head(self) -> ImprintedHead:
        """A head with these NORM_inf and AGG, to be filled, or to load a state dict."""
        return self.fresh()[1]

    def fresh(self) -> tuple[nn.Module, ImprintedHead]:
        """A copy of NORM_pre, and an empty head whose NORM_inf shares what that copy will learn."""
        # In one go: what the two share stays shared.
        norm_pre, norm_inf = copy.deepcopy((self.norm_pre, self.norm_inf))
        return norm_pre, ImprintedHead(norm_inf, self.agg)


def resolve(recipe: str = "robust", **overrides: Any) -> Parts:
    """Builds the parts of a recipe; an explicit keyword beats the recipe's.

    Args:
        recipe: a name in `RECIPES`.
        overrides: `norm_pre, gen, norm_post, norm_inf, agg` (a name or an instance) and their
            parameters (`k, lam, engine, m, distance, votes, temperature, as_published, shrinkage,
            projection_dim, width, prior, intercept`). `None` means not given. A norm may be several
            names, `["whiten", "l2"]` or `"whiten+l2"`: applied in this order. `norm_inf="same"`
            reuses NORM_pre, with what it has learned; it is the default where NORM_pre learns.

    Raises:
        ImprintError: an unknown recipe, part or keyword (near names are given), a keyword that none
            of the chosen parts uses, or a step of NORM_inf that learns and is not in NORM_pre.

    >>> resolve("robust", k=5).parameters["k"]
    5
    >>> resolve("qi", m=5)
    Traceback (most recent call last):
    imprint_pl.errors.ImprintError: m=5 is not used by norm_pre='l2', gen='mean', norm_post='l2', \
norm_inf='l2', agg='max': leave it out, or choose a part that takes it (m: mnn)
    """
    if recipe not in RECIPES:
        raise ImprintError(f"unknown recipe {recipe!r}{_near(recipe, RECIPES)}")
    given = {name: value for name, value in overrides.items() if value is not None}
    chosen = RECIPES[recipe] | given
    parts, parameters, used = {}, {"recipe": recipe}, set()
    for slot in SLOTS:
        learned = {}
        if slot == "norm_inf":
            learned = {s.name: s for s in _steps(parts["norm_pre"]) if getattr(s, "learns", False)}
            if learned and slot not in given:
                chosen[slot] = "same"
            if chosen[slot] == "same":
                parts[slot], parameters[slot] = parts["norm_pre"], "same"
                continue
        steps = [_part(slot, step, chosen, used, learned) for step in step_names(chosen[slot])]
        if len(steps) != 1 and (not steps or not slot.startswith("norm")):
            raise ImprintError(f"{slot}={chosen[slot]!r}: give one part")
        parts[slot] = Chain(steps) if len(steps) > 1 else steps[0]
        parameters[slot] = parts[slot].name
        for step in _steps(parts[slot]):
            for name in _parameters_of(type(step)):
                value = getattr(step, name)
                # Two parts that share a keyword have one value, unless they came as instances.
                same = parameters.get(name, value) == value
                parameters[name if same else f"{step.name}_{name}"] = value
    unused = set(given) - set(SLOTS) - used
    if unused:
        raise ImprintError(_unused_message(unused, given, parameters))
    return Parts(**parts, parameters=parameters)


def drop_unused(recipe: str, overrides: dict[str, Any], kept: set[str]) -> dict[str, Any]:
    """`overrides` without the parameters that the parts named in it do not take.

    For keywords that a checkpoint remembers, after one part was exchanged; those in `kept` stay, so
    that `resolve` can complain of them.
    """
    chosen = RECIPES.get(recipe, {}) | {n: v for n, v in overrides.items() if v is not None}
    parts = [
        table[part]
        for slot, table in SLOTS.items()
        for part in step_names(chosen.get(slot))
        if isinstance(part, str) and part in table
    ]
    taken = {name for part in parts for name in _parameters_of(part)}
    every = {n for table in SLOTS.values() for part in table.values() for n in _parameters_of(part)}
    return {n: v for n, v in overrides.items() if n in taken or n not in every or n in kept}


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


def step_names(part: Any) -> list[Any]:
    """A slot's value as a list: of a name, names joined by `+`, a list of names, an instance."""
    if isinstance(part, str):
        return part.split("+")
    return list(part) if isinstance(part, list | tuple) else [part]


def _steps(part: Any) -> list[Any]:
    return list(part.steps) if isinstance(part, Chain) else [part]


def _part(slot: str, part: Any, chosen: dict, used: set[str], learned: dict[str, Norm]) -> Any:
    """The part of a name, with its keywords, which are added to `used`; an instance as it is."""
    table = SLOTS[slot]
    if isinstance(part, str):
        if part not in table:
            known = [*table, "same"] if slot == "norm_inf" else table
            raise ImprintError(f"unknown {slot}={part!r}{_near(part, known)}")
        if part in learned:
            return learned[part]
        keywords = {name: chosen[name] for name in _parameters_of(table[part]) if name in chosen}
        used |= set(keywords)
        part = table[part](**keywords)
    for step in _steps(part) if slot == "norm_inf" else []:
        if getattr(step, "learns", False) and step is not learned.get(step.name):
            raise ImprintError(
                f"norm_inf={step.name!r} learns from the training embeddings, but NORM_pre has no "
                f'such step: give norm_pre={step.name!r}, too, or norm_inf="same"'
            )
    return part


def _parameters_of(part: type) -> list[str]:
    if part.__init__ in (object.__init__, nn.Module.__init__):
        return []
    names = list(inspect.signature(part.__init__).parameters)
    return [name for name in names if name != "self"]


def _near(name: str, known: Iterable[str]) -> str:
    return f"{near(name, known)} (known: {', '.join(known)})"


def _unused_message(unused: set[str], given: dict, parameters: dict) -> str:
    takers = {
        name: [n for table in SLOTS.values() for n, p in table.items() if name in _parameters_of(p)]
        for name in unused
    }
    unknown = sorted(name for name in unused if not takers[name])
    if unknown:
        known = {n for table in SLOTS.values() for p in table.values() for n in _parameters_of(p)}
        return f"unknown keyword {unknown[0]!r}{_near(unknown[0], [*SLOTS, *sorted(known)])}"
    name = sorted(unused)[0]
    chosen = ", ".join(f"{slot}={parameters[slot]!r}" for slot in SLOTS)
    return (
        f"{name}={given[name]!r} is not used by {chosen}: leave it out, or choose a part that "
        f"takes it ({name}: {', '.join(dict.fromkeys(takers[name]))})"
    )
