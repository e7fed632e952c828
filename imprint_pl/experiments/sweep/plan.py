"""How a sweep's configurations are dealt into units of work that share what is expensive.

A unit is what one process does at a time, and what a kill can cost. It is made of all
configurations, done or not: its results do not depend on what was done before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from imprint_pl.experiments.sweep.grid import Configuration
from imprint_pl.files import digest
from imprint_pl.method.recipes import Auto
from imprint_pl.parts.agg.table import AGGS
from imprint_pl.parts.by_name import describe, steps_of
from imprint_pl.parts.gen import GENERATORS
from imprint_pl.parts.norm.table import PROXY_NORMS

# What is known of the package's own GENs, by name; any other part runs alone, see `is_shared`.
# Their first k proxies are those of any larger k.
PREFIX = ("random", "fps", "cov_max")
CLUSTERS = ("kmeans", "kls", "kridge")
PER_CLASS = ("mean", "kmeans", "kmedoids", "random", "fps", "cov_max", "all")
REGRESSIONS = ("ls", "kls", "ridge", "kridge", "lda")
KNOWN = {GENERATORS[name] for name in (*PER_CLASS, *REGRESSIONS)}
KNOWN |= {*PROXY_NORMS.values(), *AGGS.values()}


def is_shared(c: Configuration) -> bool:
    """Whether parts of its work serve other tasks: every part has to be one whose shortcuts are
    known here, and NORM_pre looks at one row at a time. The class is asked, since a subclass may
    have the name that it inherits."""
    parts = c.variant.parts
    if isinstance(parts, Auto) or c.variant.weibull is not None:
        return False
    norms = (parts.norm_pre, parts.norm_post, parts.norm_inf)
    steps = [parts.gen, parts.agg, *(step for norm in norms for step in steps_of(norm))]
    if any(type(step) not in KNOWN for step in steps):
        return False
    return c.variant.parameters.get("lam") != "holdout"


def generator_key(c: Configuration) -> str:
    """What decides on the proxies before NORM_post, besides the task."""
    parts, plain = c.variant.parts, {"recipe": "auto"}
    if not isinstance(parts, Auto):
        steps = [*describe(parts.norm_pre), *describe(parts.gen)]
        plain = {
            f"{i} {name}": value for i, step in enumerate(steps) for name, value in step.items()
        }
    return digest({**plain, "weibull": c.variant.weibull, "shots": c.shots, "seed": c.seed})


def unit_key(c: Configuration) -> tuple[Any, ...]:
    if not is_shared(c):
        return ("alone", c.task.name, c.task.task_seed, generator_key(c))
    p = c.variant.parameters
    draw = (p["norm_pre"], c.shots, c.seed if c.shots else None)
    if p["gen"] in PREFIX:
        return ("prefix", p["gen"], *draw, c.seed)
    if p["gen"] in CLUSTERS:
        return ("clusters", p["k"], p["engine"], *draw, c.seed)
    if p["gen"] in ("all", "kmedoids"):
        return (p["gen"], *draw)
    return ("sums", *draw)


def grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Items by key, in the order in which keys first occur."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def units(configurations: list[Configuration]) -> list[list[Configuration]]:
    return list(grouped(configurations, unit_key).values())


def cost(unit: list[Configuration], train: int, test: int, dim: int) -> float:
    """Roughly the multiplications of a unit, for an estimate: `train` and `test` rows of `dim`."""
    total = 0.0
    p = unit[0].variant.parameters
    if unit[0].shots:
        train = min(train, 10 * unit[0].shots)  # ten classes, as below
    if not is_shared(unit[0]):
        p_dim = p.get("projection_dim", 0)
        width = max(dim, min(p_dim or dim, train))
        return train * width * (dim + width) + width**3 * 8 + len(unit) * test * width * dim
    k = max(c.variant.k or 1 for c in unit)
    if unit_key(unit[0])[0] == "clusters":
        total += train * (35 * 32 * k + 2 * k * dim + 80 * dim)
    elif p["gen"] == "fps":
        total += 4.0 * train * k * dim
    elif p["gen"] == "kmedoids":
        total += train * dim * train / 10
    if any(c.variant.parameters["gen"] in REGRESSIONS for c in unit):
        total += 4.0 * train * dim**2
    for same in grouped(unit, lambda c: (generator_key(c), c.task)).values():
        if same[0].variant.parameters["gen"] in REGRESSIONS:
            total += 4.0 * dim**3
        proxies = train if p["gen"] == "all" else 10 * k
        far = {c.variant.parameters.get("distance") for c in same}
        slow = {"manhattan": 10, "chebyshev": 10, None: 0.5}
        total += sum(test * proxies * dim * slow.get(d, 2) for d in far)
        total += len(same) * test * dim * 4
    return total
