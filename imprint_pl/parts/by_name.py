"""Parts by their names: the slots of a recipe, what fits each, and which parameters a part takes.

A recipe, a command line and a saved head name parts; this is where names become modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.parts.agg.table import AGGS
from imprint_pl.parts.gen import GENERATORS
from imprint_pl.parts.norm.base import Chain
from imprint_pl.parts.norm.table import LEARNED, NORMS, PROXY_NORMS

# The slots of a recipe, in the order of the figure, and the parts that fit each.
SLOTS = {
    "norm_pre": NORMS | LEARNED,
    "gen": GENERATORS,
    "norm_post": PROXY_NORMS,
    "norm_inf": NORMS | LEARNED,
    "agg": AGGS,
}


def step_names(part: Any) -> list[Any]:
    """A slot's value as a list: of a name, names joined by `+`, a list of names, an instance."""
    if isinstance(part, str):
        return part.split("+")
    return list(part) if isinstance(part, list | tuple) else [part]


def steps_of(part: Any) -> list[Any]:
    return list(part.steps) if isinstance(part, Chain) else [part]


def parameters_of(part: type) -> list[str]:
    if part.__init__ in (object.__init__, nn.Module.__init__):
        return []
    names = list(inspect.signature(part.__init__).parameters)
    return [name for name in names if name != "self"]


def every_parameter() -> set[str]:
    """The keywords of all parts in `SLOTS`."""
    return {n for table in SLOTS.values() for part in table.values() for n in parameters_of(part)}


def near_names(name: str, known: Iterable[str]) -> str:
    return f"{did_you_mean(name, known)} (known: {', '.join(known)})"


def describe(part: Any) -> list[dict[str, Any]]:
    """The steps of a part as plain names and numbers, `[{"name": …, parameter: …}]`, for a file."""
    return [
        {"name": step.name} | {name: getattr(step, name) for name in parameters_of(type(step))}
        for step in steps_of(part)
    ]


def build(slot: str, description: list[dict[str, Any]]) -> nn.Module:
    """The part that `describe` described, not fitted.

    Raises:
        ImprintError: a name that is not ours: the file was written with a part of the user's own.
    """
    steps = []
    for step in description:
        keywords = dict(step) if isinstance(step, dict) else {}
        name = keywords.pop("name", None)
        if not isinstance(name, str) or name not in SLOTS[slot]:
            raise ImprintError(
                f"the head was saved with {slot}={name!r}, which is not a part of this package "
                f"(known: {', '.join(SLOTS[slot])}): make the head with that part, then load"
            )
        try:
            steps.append(SLOTS[slot][name](**keywords))
        except TypeError as error:
            raise ImprintError(
                f"the head was saved with {slot}={step!r:.200}, keywords that {name!r} does not "
                "take: the file is damaged, or of another version"
            ) from error
    if not steps:
        raise ImprintError(f"the head was saved without {slot}: the file is damaged")
    return Chain(steps) if len(steps) > 1 else steps[0]
