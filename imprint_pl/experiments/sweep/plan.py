"""Groups a sweep's configurations into units of work that share expensive results.

A process works on one unit at a time; if it is killed, the work on this unit is lost. Units are
made from all configurations, also from those that are done, so that results do not depend on what
was done before.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from imprint_pl.experiments.sweep.grid import Configuration
from imprint_pl.method.recipes import Auto
from imprint_pl.parts.by_name import declared, describe, steps_of
from imprint_pl.parts.norm.base import Norm

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)


def is_shared(c: Configuration) -> bool:
    """Whether a part of its work can be used for other tasks. This is so if GEN declares how to
    share, and NORM_pre and NORM_inf process each row on its own."""
    parts = c.variant.parts
    if isinstance(parts, Auto) or c.variant.weibull is not None:
        return False
    if getattr(parts.gen, "class_weight", None) is not None:
        # Shared sums have no sample weights.
        return False
    gen, norms = parts.gen, (*steps_of(parts.norm_pre), *steps_of(parts.norm_inf))
    shares = (
        getattr(gen, "from_moments", False)
        or declared(gen, "per_class")
        or declared(gen, "clusters")
    )
    return bool(shares) and all(declared(norm, "row_by_row") for norm in norms)


def is_per_class(c: Configuration) -> bool:
    """Whether GEN makes the proxies of a class only from its own samples, or their sum."""
    gen = c.variant.recipe.gen
    return bool(declared(gen, "per_class")) and not (gen.from_moments and gen.needs_gram)


def first_k(c: Configuration) -> int | None:
    """Return how many of the proxies for a larger k are those of this k; `None` means all."""
    return c.variant.k if declared(c.variant.recipe.gen, "prefix_of_larger_k") else None


def generator_key(c: Configuration) -> tuple[Hashable, ...]:
    """Return a key of everything that decides on the proxies before NORM_post, besides the task."""
    if isinstance(c.variant.parts, Auto):
        choice = (c.variant.parts.metric, c.variant.parts.class_weight)
        return ("auto", *choice, c.variant.weibull, c.shots, c.seed)
    keys = c.variant.keys
    return (keys["norm_pre"], keys["gen"], c.variant.weibull, c.shots, c.seed)


def class_key(c: Configuration, any_k: bool = False) -> tuple[Hashable, ...]:
    """Return a key of everything that decides on GEN's work on a class; `any_k` leaves out k."""
    gen = c.variant.recipe.gen
    if declared(gen, "clusters"):
        return ("clusters", gen.k, gen.engine)
    if any_k or declared(gen, "prefix_of_larger_k"):
        plain = {name: value for name, value in describe(gen)[0].items() if name != "k"}
        return ("any k", str(plain))
    return ("gen", c.variant.keys["gen"])


def unit_key(c: Configuration) -> tuple[Hashable, ...]:
    """Return a key that the configurations of a unit have in common."""
    if not is_shared(c):
        return ("alone", c.task.name, c.task.task_seed, generator_key(c))
    gen = c.variant.recipe.gen
    draw = (c.variant.keys["norm_pre"], c.shots, c.seed if c.shots else None)
    if declared(gen, "prefix_of_larger_k") or declared(gen, "clusters"):
        return (*class_key(c), *draw, c.seed)
    if is_per_class(c) and not gen.from_moments:
        return (*class_key(c, any_k=declared(gen, "selection")), *draw)
    return ("sums", *draw)


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Group items by key, in the order in which keys first occur."""
    groups: dict[Key, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def units(configurations: list[Configuration]) -> list[list[Configuration]]:
    """Divide the configurations into units."""
    return list(grouped(configurations, unit_key).values())


def cost(unit: list[Configuration], train: int, test: int, dim: int) -> float:
    """Estimate the multiplications of a unit for `train` and `test` rows of `dim` numbers."""
    total, first = 0.0, unit[0]
    if first.shots:
        train = min(train, 10 * first.shots)  # ten classes, as below
    if not is_shared(first):
        norm = None if isinstance(first.variant.parts, Auto) else first.variant.parts.norm_pre
        width = norm.features(dim, train) if isinstance(norm, Norm) else dim
        width = max(dim, min(width, train))
        return train * width * (dim + width) + width**3 * 8 + len(unit) * test * width * dim
    k, gen = max(c.variant.k or 1 for c in unit), first.variant.recipe.gen
    if declared(gen, "clusters"):
        total += train * (35 * 32 * k + 2 * k * dim + 80 * dim)
    elif declared(gen, "selection"):
        total += train * dim * train / 10
    elif is_per_class(first):
        total += 4.0 * train * k * dim
    if any(not is_per_class(c) for c in unit):
        total += 4.0 * train * dim**2
    for same in grouped(unit, lambda c: (generator_key(c), c.task)).values():
        if not is_per_class(same[0]):
            total += 4.0 * dim**3
        proxies = train if declared(same[0].variant.recipe.gen, "every_sample") else 10 * k
        far = {getattr(c.variant.recipe.agg, "distance", None) for c in same}
        slow = {"manhattan": 10, "chebyshev": 10, None: 0.5}
        total += sum(test * proxies * dim * slow.get(d, 2) for d in far)
        total += len(same) * test * dim * 4
    return total
