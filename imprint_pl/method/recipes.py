"""The named recipes, and how a name with keywords becomes the five parts that do the work."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from imprint_pl.errors import ImprintError
from imprint_pl.method.head import ImprintedHead
from imprint_pl.parts.by_name import SLOTS, near_names, parameters_of, step_names, steps_of
from imprint_pl.parts.norm.base import Chain, Norm

# The recipe that chooses one of the others; see `auto.py`.
AUTO = "auto"

# Keywords that are on or off: any text would count as on.
SWITCHES = {"intercept", "as_published"}

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
        """A copy of NORM_pre, and an empty head whose NORM_inf shares what that copy will learn.

        Its AGG is a copy, too, since it may keep what it has computed of the head's proxies.
        """
        # In one go: what the two share stays shared.
        norm_pre, norm_inf = copy.deepcopy((self.norm_pre, self.norm_inf))
        return norm_pre, ImprintedHead(norm_inf, copy.deepcopy(self.agg))


@dataclass(frozen=True)
class Auto:
    """Stands for the `Recipe` that `auto` will choose, once it has seen embeddings."""

    parameters: dict[str, Any] = field(default_factory=lambda: {"recipe": AUTO})

    def empty_head(self) -> ImprintedHead:
        """A head that takes its parts from the state dict that it loads."""
        return ImprintedHead()


def resolve(recipe: str = AUTO, **overrides: Any) -> Recipe | Auto:
    """Builds the parts of a recipe; an explicit keyword beats the recipe's.

    Args:
        recipe: a name in `RECIPES`, or "auto", which takes no overrides.
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
    given = {name: value for name, value in overrides.items() if value is not None}
    if recipe == AUTO:
        if given:
            name = next(iter(given))
            raise ImprintError(
                f"{name}={given[name]!r} is not used by recipe='auto', which chooses every part "
                f"from the embeddings: leave it out, or name a recipe ({', '.join(RECIPES)})"
            )
        return Auto()
    if not isinstance(recipe, str) or recipe not in RECIPES:
        raise ImprintError(f"unknown recipe {recipe!r}{near_names(recipe, [AUTO, *RECIPES])}")
    chosen = RECIPES[recipe] | given
    parts, parameters, used = {}, {"recipe": recipe}, set()
    for slot in SLOTS:
        learned = {}
        if slot == "norm_inf":
            learned = {
                s.name: s for s in steps_of(parts["norm_pre"]) if getattr(s, "learns", False)
            }
            if learned and slot not in given:
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
        parameters[slot] = parts[slot].name
        for step in steps_of(parts[slot]):
            for name in parameters_of(type(step)):
                value = getattr(step, name)
                # Two parts that share a keyword have one value, unless they came as instances.
                same = parameters.get(name, value) == value
                parameters[name if same else f"{step.name}_{name}"] = value
    unused = set(given) - set(SLOTS) - used
    if unused:
        raise ImprintError(_unused_message(unused, given, parameters))
    return Recipe(**parts, parameters=parameters)


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
    taken = {name for part in parts for name in parameters_of(part)}
    every = {n for table in SLOTS.values() for part in table.values() for n in parameters_of(part)}
    return {n: v for n, v in overrides.items() if n in taken or n not in every or n in kept}


def _part(slot: str, part: Any, chosen: dict, used: set[str], learned: dict[str, Norm]) -> Any:
    """The part of a name, with its keywords, which are added to `used`; an instance as it is."""
    table = SLOTS[slot]
    if isinstance(part, str):
        if part not in table:
            known = [*table, "same"] if slot == "norm_inf" else table
            raise ImprintError(f"unknown {slot}={part!r}{near_names(part, known)}")
        if part in learned:
            return learned[part]
        keywords = {name: chosen[name] for name in parameters_of(table[part]) if name in chosen}
        for name in SWITCHES & set(keywords):
            if keywords[name] not in (True, False):
                raise ImprintError(f"{name}={keywords[name]!r}: give True or False")
        used |= set(keywords)
        part = table[part](**keywords)
    if not callable(part) or not isinstance(getattr(part, "name", None), str):
        raise ImprintError(f"{slot}={part!r}: give a name ({', '.join(table)}), or a part")
    for step in steps_of(part) if slot == "norm_inf" else []:
        if getattr(step, "learns", False) and step is not learned.get(step.name):
            raise ImprintError(
                f"norm_inf={step.name!r} learns from the training embeddings, but NORM_pre has no "
                f'such step: give norm_pre={step.name!r}, too, or norm_inf="same"'
            )
    return part


def _check_same_space(*norms: nn.Module) -> None:
    """NORM_pre and NORM_inf; raises where proxies and embeddings would be in different spaces."""
    maps = [[s.name for s in steps_of(norm) if getattr(s, "maps", False)] for norm in norms]
    if maps[0] != maps[1]:
        raise ImprintError(
            f"norm_inf={norms[1].name!r} leaves embeddings in another space than the proxies, "
            f"which norm_pre={norms[0].name!r} maps: give norm_inf='same', or leave it out"
        )


def _unused_message(unused: set[str], given: dict, parameters: dict) -> str:
    takers = {
        name: [n for table in SLOTS.values() for n, p in table.items() if name in parameters_of(p)]
        for name in unused
    }
    unknown = sorted(name for name in unused if not takers[name])
    if unknown:
        known = {n for table in SLOTS.values() for p in table.values() for n in parameters_of(p)}
        return f"unknown keyword {unknown[0]!r}{near_names(unknown[0], [*SLOTS, *sorted(known)])}"
    name = sorted(unused)[0]
    chosen = ", ".join(f"{slot}={parameters[slot]!r}" for slot in SLOTS)
    return (
        f"{name}={given[name]!r} is not used by {chosen}: leave it out, or choose a part that "
        f"takes it ({name}: {', '.join(dict.fromkeys(takers[name]))})"
    )
