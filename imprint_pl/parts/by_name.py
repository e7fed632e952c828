"""Parts by their names: the slots of a recipe, what fits each, and which parameters a part takes.

A recipe, a command line and a saved head name parts; this is where names become modules. A part of
this package has a short name, such as `kmeans`; a user's own is named by the import path of its
class, such as `my_parts.Trimmed`.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.parts.agg.base import Aggregation
from imprint_pl.parts.agg.table import AGGS
from imprint_pl.parts.gen import GENERATORS
from imprint_pl.parts.gen.base import Generator
from imprint_pl.parts.norm.base import Chain, Norm
from imprint_pl.parts.norm.table import LAYERS, LEARNED, NORMS, PROXY_NORMS

# The slots of a recipe, in the order of the figure, and the parts that fit each.
SLOTS: dict[str, dict[str, Any]] = {
    "norm_pre": NORMS | LEARNED | LAYERS,
    "gen": GENERATORS,
    "norm_post": PROXY_NORMS,
    "norm_inf": NORMS | LEARNED | LAYERS,
    "agg": AGGS,
}


def base_of(slot: str) -> type:
    """Return the class that a user's own part for a slot has to inherit from."""
    return {"gen": Generator, "agg": Aggregation}.get(slot, Norm)


def step_names(part: Any) -> list[Any]:
    """Split a slot's value into its steps.

    Args:
        part: A name, several names joined by `+`, a list of names or an instance.

    Returns:
        The steps as a list.
    """
    if isinstance(part, str):
        return part.split("+")
    return list(part) if isinstance(part, list | tuple) else [part]


def steps_of(part: Any) -> list[Any]:
    """The steps of a chain of NORMs; any other part is its only step."""
    return list(part.steps) if isinstance(part, Chain) else [part]


def name_of(part: Any) -> str:
    """Return the name of a part in recipes, files and tables: a short name, or an import path."""
    if isinstance(part, Chain):
        return "+".join(map(name_of, part.steps))
    kind, short = type(part), getattr(part, "name", None)
    if isinstance(short, str) and any(table.get(short) is kind for table in SLOTS.values()):
        return short
    return f"{kind.__module__}.{kind.__qualname__}"


def import_parts(keywords: Mapping[str, Any]) -> None:
    """Imports the modules of the parts that `keywords` name by an import path.

    This runs the modules' code, so call it only with keywords that the user has typed, never with
    those of a file.

    Raises:
        ImprintError: a module that cannot be imported.
    """
    for slot, path in _paths(keywords):
        module = path.rpartition(".")[0]
        # `python -m` looks into the current folder, the command `imprint-pl` does not.
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImprintError(
                f"{slot}={path!r}: {module} cannot be imported ({error}): give the import path of "
                "a class, such as my_parts.Trimmed for a file my_parts.py in the current folder or "
                "on PYTHONPATH"
            ) from error


def check_imported(keywords: Mapping[str, Any]) -> None:
    """Raises an `ImprintError` where keywords of a file name a part that is not imported yet."""
    for slot, path in _paths(keywords):
        class_named(slot, path)


def _paths(keywords: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return `(slot, path)` for each slot whose value is an import path."""
    return [
        (slot, name)
        for slot, table in SLOTS.items()
        for name in step_names(keywords.get(slot))
        if isinstance(name, str) and "." in name and name not in table
    ]


def class_named(slot: str, name: str) -> Any:
    """The class that a name stands for; one with an import path has to be imported already.

    Raises:
        ImprintError: the name is unknown, or its module is not imported or has no such part.
    """
    table = SLOTS[slot]
    if name in table:
        return table[name]
    if "." not in name:
        known = [*table, "same"] if slot == "norm_inf" else table
        raise ImprintError(f"unknown {slot}={name!r}{near_names(name, known)}")
    # Do not use `import_module` or `getattr` here: both run code, and the name may come from a
    # stranger's file.
    module, _, own = name.rpartition(".")
    if module not in sys.modules:
        raise ImprintError(
            f"{slot}={name!r} is not a part of this package, and a file never imports code: import "
            f"{module} first, if you trust it (a command takes --model.{slot} {name})"
        )
    found, base = vars(sys.modules[module]).get(own), base_of(slot)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ImprintError(
            f"{slot}={name!r}: {module} has no class {own!r} that inherits from "
            f"{base.__module__}.{base.__name__}"
        )
    return found


def classes_named(keywords: Mapping[str, Any]) -> list[Any]:
    """Return the classes of the parts that `keywords` name; unknown names are left out."""
    classes = []
    for slot in SLOTS:
        for name in step_names(keywords.get(slot)):
            try:
                classes += [class_named(slot, name)] if isinstance(name, str) else []
            except ImprintError:
                continue
    return classes


def parameters_of(part: Any) -> list[str]:
    """The keywords that the constructor of a part's class takes."""
    return list(_signature(part))


def _signature(part: Any, eval_str: bool = False) -> dict[str, inspect.Parameter]:
    if part.__init__ in (object.__init__, nn.Module.__init__):
        return {}
    parameters = inspect.signature(part.__init__, eval_str=eval_str).parameters
    return {name: parameter for name, parameter in parameters.items() if name != "self"}


def keywords_of_parts(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords, with types, of the parts that `keywords` name, users' parts included.

    A keyword without an annotation has the type of its default, or `Any`.
    """
    found: dict[str, Any] = {}
    for part in classes_named(keywords):
        for name, parameter in _signature(part, eval_str=True).items():
            kind, default = parameter.annotation, parameter.default
            if kind is parameter.empty:
                kind = type(default) if isinstance(default, bool | int | float | str) else Any
            found[name] = kind
    return found


def every_parameter() -> set[str]:
    """The keywords of all parts in `SLOTS`."""
    return {n for table in SLOTS.values() for part in table.values() for n in parameters_of(part)}


def declared(part: Any, name: str) -> Any:
    """Return a class attribute that the part's class sets in its own body, `False` if it does not.

    Inherited values do not count, since a subclass may override the method that they describe.
    """
    return getattr(part, name) if name in vars(type(part)) else False


def near_names(name: Any, known: Iterable[str]) -> str:
    """Return the end of an error message: similar known names, then all known names."""
    return f"{did_you_mean(name, known)} (known: {', '.join(known)})"


def describe(part: Any) -> list[dict[str, Any]]:
    """Return the steps of a part as plain values for a file, `[{"name": …, parameter: …}]`."""
    return [
        {"name": name_of(step)} | {name: getattr(step, name) for name in parameters_of(type(step))}
        for step in steps_of(part)
    ]


def build(slot: str, description: list[dict[str, Any]]) -> nn.Module:
    """Build the part that `describe` described; it is not fitted.

    Raises:
        ImprintError: a part is neither of this package nor imported, or does not take its keywords.
    """
    steps = []
    for step in description:
        keywords = dict(step) if isinstance(step, dict) else {}
        name = keywords.pop("name", None)
        try:
            if not isinstance(name, str):
                raise ImprintError(f"{slot}={name!r} is no name")
            kind = class_named(slot, name)
        except ImprintError as error:
            raise ImprintError(f"the head was saved with another part: {error}") from error
        try:
            steps.append(kind(**keywords))
        except TypeError as error:
            raise ImprintError(
                f"the head was saved with {slot}={step!r:.200}, keywords that {name!r} does not "
                "take: the file is damaged, or of another version"
            ) from error
    if not steps:
        raise ImprintError(f"the head was saved without {slot}: the file is damaged")
    return Chain(steps) if len(steps) > 1 else steps[0]
