"""The named recipes, and how a name with keywords becomes the five parts that do the work."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_type_hints

from torch import nn

from imprint_pl.errors import ImprintError
from imprint_pl.method.head import ImprintedHead
from imprint_pl.numerics.measures import ACCURACY, checked_metric
from imprint_pl.parts.by_name import (
    SLOTS,
    class_named,
    classes_named,
    every_parameter,
    name_of,
    near_names,
    parameters_of,
    step_names,
    steps_of,
)
from imprint_pl.parts.gen.base import checked_balance
from imprint_pl.parts.norm.base import Chain, Norm
from imprint_pl.parts.norm.layers import JoinLayers, LastLayer, checked_widths

# The recipe that chooses one of the others; see `auto.py`.
AUTO: Literal["auto"] = "auto"

# The names, for help texts, editors and type checkers. Each type allows any other text, too: the
# import path of a part of one's own, or names joined by `+`. `resolve` refuses unknown names.
RecipeName: TypeAlias = (
    Literal["auto", "kernel", "robust", "qi", "hosoda", "janson", "ls", "knn", "whitened"]
    | Literal["ridge", "lda", "ranpac"]
    | str
)
NormNames: TypeAlias = (
    Literal["none", "l2", "power", "centre", "whiten", "random_projection", "nystrom"]
    | Literal["join", "last"]
    | str
    | list[str]
)
InferenceNormNames: TypeAlias = Literal["same"] | NormNames
ProxyNormNames: TypeAlias = Literal["none", "l2", "power", "quantile"] | str | list[str]
GenName: TypeAlias = (
    Literal["mean", "kmeans", "kmedoids", "random", "fps", "cov_max", "all"]
    | Literal["ls", "kls", "ridge", "kridge", "lda"]
    | str
)
AggName: TypeAlias = Literal["max", "mnn", "logsumexp"] | str
DistanceName: TypeAlias = (
    Literal["euclidean", "cosine", "manhattan", "chebyshev", "mahalanobis"] | str
)
VotesName: TypeAlias = Literal["uniform", "weighted_by_distance", "softmax"] | str
LamName: TypeAlias = Literal["loo", "gcv", "holdout"] | str
ShrinkageName: TypeAlias = Literal["oas"] | str
EngineName: TypeAlias = Literal["auto", "faiss", "torch", "exact"] | str
MetricName: TypeAlias = Literal["accuracy", "balanced_accuracy", "macro_f1"] | str
ClassWeightName: TypeAlias = Literal["balanced"] | str
PriorName: TypeAlias = Literal["empirical", "uniform"] | str

# Keywords that are True or False. They are checked, since any text would count as True.
SWITCHES = {"intercept", "as_published"}

# Keywords that settings, ids and results name only if they differ from these values.
UNNAMED: dict[str, Any] = {"metric": ACCURACY, "class_weight": None}

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
class Recipe:
    """The five parts of a recipe, ready to use, and the plain parameters that name them.

    Parts that learn are not fitted here; every head gets its own copy. `layer_widths` are those of
    the embeddings that the recipe takes, or `None` for embeddings of any width.
    """

    norm_pre: nn.Module
    gen: Any
    norm_post: Norm
    norm_inf: nn.Module
    agg: nn.Module
    parameters: dict[str, Any]
    layer_widths: list[int] | None = None

    def empty_head(self) -> ImprintedHead:
        """A head with these NORM_inf and AGG, to be filled, or to load a state dict."""
        return self.fresh()[1]

    def fresh(self) -> tuple[nn.Module, ImprintedHead]:
        """A copy of NORM_pre, and an empty head whose NORM_inf shares what that copy will learn.

        Its AGG is a copy, too, since it may keep what it has computed of the head's proxies.
        """
        # Deep-copy both together so that shared submodules remain shared.
        norm_pre, norm_inf = copy.deepcopy((self.norm_pre, self.norm_inf))
        return norm_pre, ImprintedHead(norm_inf, copy.deepcopy(self.agg))


@dataclass(frozen=True)
class Auto:
    """A placeholder for the `Recipe` that `auto` will choose from embeddings."""

    parameters: dict[str, Any] = field(default_factory=lambda: {"recipe": AUTO})
    layer_widths: list[int] | None = None
    metric: str = ACCURACY
    class_weight: str | None = None

    def empty_head(self) -> ImprintedHead:
        """A head that takes its parts from the state dict that it loads."""
        return ImprintedHead()


def resolve(
    recipe: RecipeName = AUTO,
    *,
    norm_pre: NormNames | None = None,
    gen: GenName | None = None,
    k: int | None = None,
    norm_post: ProxyNormNames | None = None,
    norm_inf: InferenceNormNames | None = None,
    agg: AggName | None = None,
    m: int | None = None,
    distance: DistanceName | None = None,
    votes: VotesName | None = None,
    lam: float | LamName | None = None,
    shrinkage: float | ShrinkageName | None = None,
    projection_dim: int | None = None,
    temperature: float | None = None,
    engine: EngineName | None = None,
    width: float | None = None,
    prior: PriorName | None = None,
    intercept: bool | None = None,
    as_published: bool | None = None,
    metric: MetricName | None = None,
    class_weight: ClassWeightName | None = None,
    layer_widths: list[int] | None = None,
    **own: Any,
) -> Recipe | Auto:
    """Builds the parts of a recipe; an explicit keyword beats the recipe's.

    This signature is where the keywords are declared: the command line, the columns of a sweep's
    results and the checks of all others follow it. `None` means not given. A part is a name, an
    instance, or the import path of a class of your own, such as `my_parts.Trimmed`, whose module
    has been imported.

    Args:
        recipe: "auto" (compares recipes on held-out embeddings and takes the best; it takes no
            other keywords than metric, class_weight and layer_widths), "kernel" (what auto mostly
            takes), "robust" (the paper's best: k-means, 20 proxies a class), "qi" (the class mean),
            "hosoda", "janson", "ls" (least squares), "knn" (nearest neighbours), "whitened",
            "ridge", "lda" or "ranpac".
        norm_pre: normalisation before GEN, or a list of several, `[whiten, l2]`, which may also be
            written "whiten+l2". Default, as for all keywords below: that of the recipe.
        gen: generator of the proxies.
        k: proxies a class.
        norm_post: normalisation of the proxies.
        norm_inf: normalisation of embeddings at inference; "same" is the fitted NORM_pre, which is
            the default if NORM_pre learns.
        agg: turns proxies into class scores; "mnn" is a vote of the m nearest proxies.
        m: number of proxies that vote in mnn.
        distance: distance between embeddings and proxies in mnn.
        votes: weights of the votes in mnn.
        lam: λ of ls, kls, ridge and kridge; for ridge also "loo" (leave-one-out, near-copies
            left out together), for ridge and kridge "gcv" (generalised cross-validation) or
            "holdout".
        shrinkage: shrinkage of the covariance in whiten and lda, from 0 to 1, or "oas" (chosen from
            the embeddings).
        projection_dim: number of features of random_projection and nystrom.
        temperature: temperature of softmax votes and logsumexp.
        engine: the implementation of k-means.
        width: width of the kernel in nystrom, in median distances.
        prior: prior probabilities of the classes in lda.
        intercept: whether ridge and kridge have an intercept.
        as_published: run quantile and mnn exactly as the paper's code does, faults included.
        metric: the metric on held-out samples by which auto compares recipes and ridge chooses λ:
            "accuracy", "balanced_accuracy" (all classes count alike, however few samples they have)
            or "macro_f1". "accuracy" is the default, and can be given with every recipe.
        class_weight: "balanced" gives all classes the same weight in ridge and ls, however few
            samples they have.
        layer_widths: features of each layer in the embeddings, the last layer's included, where
            they hold several layers side by side. Any recipe takes them: `join` then comes before
            NORM_pre and NORM_inf, unless NORM_pre has `join` or `last` already. One width changes
            nothing.
        own: keywords of parts of your own.

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
    typed = locals()
    overrides = {name: typed[name] for name in KEYWORDS} | own
    given = {
        name: value
        for name, value in overrides.items()
        if value is not None and not (name in UNNAMED and value == UNNAMED[name])
    }
    widths = None if layer_widths is None else checked_widths(layer_widths)
    several = {"layer_widths": widths} if widths is not None and len(widths) > 1 else {}
    if recipe == AUTO:
        given.pop("layer_widths", None)
        choice = {name: given.pop(name) for name in UNNAMED if name in given}
        checked_metric(choice.get("metric", ACCURACY))
        checked_balance(choice.get("class_weight"))
        if given:
            name = next(iter(given))
            raise ImprintError(
                f"{name}={given[name]!r} is not used by recipe='auto', which chooses every part "
                f"from the embeddings: leave it out, or name a recipe ({', '.join(RECIPES)})"
            )
        return Auto({"recipe": AUTO} | choice | several, widths, **choice)
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ImprintError(f"unknown recipe {recipe!r}{near_names(recipe, [AUTO, *RECIPES])}")
    chosen: dict[str, Any] = RECIPES[recipe] | given
    joined = bool(several) and not _takes_layers("norm_pre", chosen["norm_pre"])
    for slot in ("norm_pre", "norm_inf") if joined else ():
        if chosen[slot] != "same" and not _takes_layers(slot, chosen[slot]):
            chosen[slot] = _after_join(chosen[slot])
    parts: dict[str, Any] = {}
    parameters: dict[str, Any] = {"recipe": recipe}
    used: set[str] = set()
    for slot in SLOTS:
        learned: dict[str, Any] = {}
        if slot == "norm_inf":
            learned = {
                name_of(s): s
                for s in steps_of(parts["norm_pre"])
                if getattr(s, "learns", False) or isinstance(s, LastLayer)
            }
            # Do not count a `join` that was put before both of them.
            own_steps = set(learned) - ({JoinLayers.name} if joined else set())
            if slot not in given and (own_steps or (joined and chosen[slot] == chosen["norm_pre"])):
                chosen[slot] = "same"
            if chosen[slot] == "same":
                parts[slot], parameters[slot] = parts["norm_pre"], "same"
                continue
        steps = [_part(slot, step, chosen, used, learned) for step in step_names(chosen[slot])]
        if len(steps) != 1 and (not steps or not slot.startswith("norm")):
            raise ImprintError(f"{slot}={chosen[slot]!r}: give one part")
        parts[slot] = Chain(steps) if len(steps) > 1 else steps[0]
        if slot == "norm_inf":
            _check_same_space(parts["norm_pre"], parts[slot])
        parameters[slot] = name_of(parts[slot])
        for step in steps_of(parts[slot]):
            for name in parameters_of(type(step)):
                value = getattr(step, name)
                if name in UNNAMED and value == UNNAMED[name]:
                    continue
                # Two parts that share a keyword have one value, unless they came as instances.
                same = parameters.get(name, value) == value
                parameters[name if same else f"{step.name}_{name}"] = value
    if widths is not None and (not several or parameters.get("layer_widths") == widths):
        used.add("layer_widths")
    unused = set(given) - set(SLOTS) - used
    if unused:
        raise ImprintError(_unused_message(unused, given, parameters))
    return Recipe(
        **parts, parameters=parameters, layer_widths=widths or parameters.get("layer_widths")
    )


# The keywords in their order and their types, such as `int | None`.
KEYWORDS: dict[str, Any] = {
    name: kind
    for name, kind in get_type_hints(resolve).items()
    if name not in ("recipe", "own", "return")
}


def drop_unused(
    recipe: str | None,
    overrides: dict[str, Any],
    kept: set[str],
    own: Collection[str] = (),
) -> dict[str, Any]:
    """Return `overrides` without the parameters that none of its parts takes.

    It is for the keywords of a checkpoint after one part was exchanged. Those in `kept` stay, so
    that `resolve` can refuse them. `own` are parameters of users' own parts.
    """
    chosen = RECIPES.get(recipe or "", {}) | {n: v for n, v in overrides.items() if v is not None}
    taken = {name for part in classes_named(chosen) for name in parameters_of(part)}
    # Every recipe takes them.
    taken.add("layer_widths")
    every = every_parameter() | set(own)
    return {n: v for n, v in overrides.items() if n in taken or n not in every or n in kept}


def _takes_layers(slot: str, norm: Any) -> bool:
    """Whether a NORM already has a step for embeddings of several layers."""
    kinds = [
        class_named(slot, step) if isinstance(step, str) else type(step)
        for part in step_names(norm)
        for step in steps_of(part)
    ]
    return any(issubclass(kind, JoinLayers | LastLayer) for kind in kinds)


def _after_join(norm: Any) -> list[Any]:
    """Return the steps of a NORM with `join` before them."""
    steps = [step for part in step_names(norm) for step in steps_of(part)]
    return [JoinLayers.name, *(step for step in steps if step != "none")]


def _part(
    slot: str, part: Any, chosen: dict[str, Any], used: set[str], learned: dict[str, Any]
) -> Any:
    """Build the part of a name and add its keywords to `used`; return an instance unchanged."""
    if isinstance(part, str):
        if part in learned:
            return learned[part]
        kind = class_named(slot, part)
        keywords = {name: chosen[name] for name in parameters_of(kind) if name in chosen}
        for name in SWITCHES & set(keywords):
            if keywords[name] not in (True, False):
                raise ImprintError(f"{name}={keywords[name]!r}: give True or False")
        used |= set(keywords)
        part = kind(**keywords)
    if not callable(part) or not isinstance(getattr(part, "name", None), str):
        raise ImprintError(f"{slot}={part!r}: give a name ({', '.join(SLOTS[slot])}), or a part")
    for step in steps_of(part) if slot == "norm_inf" else []:
        name = name_of(step)
        if getattr(step, "learns", False) and step is not learned.get(name):
            raise ImprintError(
                f"norm_inf={name!r} learns from the training embeddings, but NORM_pre has no "
                f'such step: give norm_pre={name!r}, too, or norm_inf="same"'
            )
    return part


def _check_same_space(norm_pre: nn.Module, norm_inf: nn.Module) -> None:
    """Raises an `ImprintError` if proxies and embeddings would be in different spaces."""
    if _maps(norm_pre) != _maps(norm_inf):
        raise ImprintError(
            f"norm_inf={name_of(norm_inf)!r} leaves embeddings in another space than the proxies, "
            f"which norm_pre={name_of(norm_pre)!r} maps: give norm_inf='same', or leave it out"
        )


def _maps(norm: nn.Module) -> list[str]:
    return [name_of(step) for step in steps_of(norm) if getattr(step, "maps", False)]


def _unused_message(unused: set[str], given: dict[str, Any], parameters: dict[str, Any]) -> str:
    takers = {
        name: [n for table in SLOTS.values() for n, p in table.items() if name in parameters_of(p)]
        for name in unused
    }
    unknown = sorted(name for name in unused if not takers[name])
    if unknown:
        known = [*SLOTS, *sorted(every_parameter())]
        return f"unknown keyword {unknown[0]!r}{near_names(unknown[0], known)}"
    name = sorted(unused)[0]
    chosen = ", ".join(f"{slot}={parameters[slot]!r}" for slot in SLOTS)
    takers_of = list(dict.fromkeys(takers[name]))
    message = (
        f"{name}={given[name]!r} is not used by {chosen}: leave it out, or choose a part that "
        f"takes it ({name}: {', '.join(takers_of)}"
    )
    if name in UNNAMED:
        # A recipe with a fixed λ has no choice to make by a metric.
        recipes = [
            recipe
            for recipe, parts in RECIPES.items()
            if parts["gen"] in takers_of and not (name == "metric" and "lam" in parts)
        ]
        message += f"; recipe: {', '.join([AUTO, *recipes])}"
    if name == "class_weight" and parameters["gen"] == "lda":
        message += "; lda balances classes by prior='uniform'"
    return message + ")"
