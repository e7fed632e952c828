"""Reads and checks the YAML of a sweep; errors name the place and say what to change."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from imprint_pl.data.tasks import SUBSETS
from imprint_pl.embedding.layers import VIEWS
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.experiments.results import USUAL
from imprint_pl.experiments.sweep.grid import Source, Sweep, Task, Variant, names_of
from imprint_pl.files import digest, local_path
from imprint_pl.method.recipes import AUTO, RECIPES, UNNAMED, Auto, Recipe, drop_unused, resolve
from imprint_pl.method.selection import checked_bounds
from imprint_pl.numerics.values import is_count
from imprint_pl.parts.by_name import (
    SLOTS,
    every_parameter,
    import_parts,
    keywords_of_parts,
    step_names,
)
from imprint_pl.parts.norm.layers import checked_widths

KEYS = ("name", "backbones", "data", "tasks", "grid", "seeds", "prune")
TASK_KEYS = ("name", "classes", "d", "num_labels", "task_seed", "shots")
OF_EMBEDDINGS = ("name", "embeddings", "backbone", "class_names", "layer_widths", *USUAL)
# Most classes in the name of a task.
CLASSES_SHOWN = 10


def read_sweep(path: str | Path) -> Sweep:
    """Reads a sweep's YAML.

    Raises:
        ImprintError: a file that cannot be read, unknown keys and keywords (with near names),
            values that no part takes.
    """
    try:
        given = yaml.safe_load(Path(local_path(path)).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ImprintError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ImprintError(f"{path}: expected the keys {', '.join(KEYS)}")
    return checked_sweep(given, str(path))


def checked_sweep(given: dict[str, Any], place: str = "the sweep") -> Sweep:
    """Checks the content of a sweep's YAML, see `read_sweep`.

    Args:
        given: the content.
        place: the name of the file in errors.

    Raises:
        ImprintError: as for `read_sweep`.
    """
    _known(given, KEYS, place)
    for key in ("name", "data", "grid"):
        if not given.get(key):
            raise ImprintError(f"{place}: {key} is missing")
    sources: list[Source] = []
    for data in map(_named, _list(given["data"])):
        if "embeddings" in data:
            _known(data, OF_EMBEDDINGS, f"{place}, data")
            sources.append(Source(None, _of_layers(data, place)))
            continue
        backbones = [b for e in _list(given.get("backbones")) for b in _wide(_named(e), place)]
        if not backbones:
            raise ImprintError(f"{place}: data {data['name']!r} asks for backbones")
        sources += [Source(backbone, data) for backbone in backbones]
    columns = [(*names_of(source), source.wide) for source in sources]
    for pair in columns:
        if columns.count(pair) > 1:
            raise ImprintError(
                f"{place}: backbone {pair[0]!r} with data {pair[1]!r} stands there twice: give "
                "one of the two data entries another name (label, for a data set)"
            )
    tasks = [t for entry in _list(given.get("tasks") or ["all"]) for t in _tasks(entry, place)]
    names: dict[str, Any] = {}
    for task in tasks:
        if names.setdefault(task.name, task.classes) != task.classes:
            raise ImprintError(f"{place}: two tasks are called {task.name!r}: give each a name")
    seeds = _list(given.get("seeds", [0]))
    if not seeds:
        raise ImprintError(f"{place}: seeds has no value: give one, or leave seeds out")
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ImprintError(f"{place}: seeds holds {seed!r}: give whole numbers from 0")
    variants: list[Variant] = []
    full = 0
    several = any("layers" in source.wide for source in sources)
    for number, block in enumerate(_list(given["grid"]), 1):
        where = f"{place}, grid block {number}"
        if not isinstance(block, dict):
            raise ImprintError(f"{where}: expected keywords, such as recipe: [qi, robust]")
        found = list(_variants(block, where, several))
        variants += [variant for variant in found if variant is not None]
        full += len(found)
    full *= len(tasks) * len(seeds)
    prune = given.get("prune", True)
    if not isinstance(prune, bool):
        raise ImprintError(f"{place}: prune={prune!r}: give true or false")
    return Sweep(str(given["name"]), sources, tasks, _different(variants), seeds, prune, full)


def _tasks(entry: Any, place: str) -> Iterator[Task]:
    """Yield the tasks of an entry: a subset's name, or keywords with values or lists of values."""
    if isinstance(entry, str):
        entry = {"classes": entry}
    if not isinstance(entry, dict):
        raise ImprintError(f"{place}: the task {entry!r} is not a name, such as even, or keywords")
    _known(entry, TASK_KEYS, f"{place}, tasks")
    if entry.get("classes") == []:
        raise ImprintError(f"{place}: tasks: classes has no class: name some, or leave it out")
    classes = _hashable(entry.get("classes") or "all")
    if isinstance(classes, str) and not classes.startswith("paper-") and classes not in SUBSETS:
        near_name = did_you_mean(classes, SUBSETS)
        raise ImprintError(
            f"{place}: unknown task {classes!r}{near_name} (known: {', '.join(SUBSETS)})"
        )
    keys = [key for key in entry if key not in ("classes", "name")]
    for values in itertools.product(*(_list(entry[key]) for key in keys)):
        options = dict(zip(keys, values, strict=True))
        for key, value in options.items():
            least = 0 if key == "task_seed" else 1
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is not None and not (whole and value >= least):
                raise ImprintError(
                    f"{place}: tasks, {key}={value!r}: give a whole number of at least {least}"
                )
        if options.get("d") is not None:
            options.setdefault("task_seed", 0)
        if options.get("task_seed") is not None and options.get("d") is None:
            raise ImprintError(f"{place}: tasks: task_seed is for d-in-1 tasks: give d, too")
        name = entry.get("name") or _classes_name(classes, place)
        if options.get("d") is not None:
            name = f"{name} {options['d']}-in-1"
        yield Task(name, classes, **options)


def _hashable(classes: Any) -> Any:
    return tuple(map(_hashable, classes)) if isinstance(classes, list) else classes


def _classes_name(classes: Any, place: str) -> str:
    if isinstance(classes, str):
        return classes
    if len(classes) > CLASSES_SHOWN:
        raise ImprintError(f"{place}: a task of {len(classes)} classes needs a name: give name: …")
    return ",".join("+".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in classes)


def _wide(entry: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
    """Yield a backbone's entry for each combination of its `layers` and `views`, which may be
    lists. The usual values are left out, so that these entries are the same as without them."""
    values = [_list(entry.get(name, usual)) for name, usual in USUAL.items()]
    for name, given in zip(USUAL, values, strict=True):
        if not given or (name == "views" and set(given) - set(VIEWS)):
            raise ImprintError(
                f"{place}: backbone {entry['name']!r}: {name}={entry[name]!r}: give "
                + ("last, all or names of modules" if name == "layers" else "none or flip")
            )
    for chosen in itertools.product(*values):
        wide = dict(zip(USUAL, chosen, strict=True))
        unusual = {name: value for name, value in wide.items() if value != USUAL[name]}
        yield {name: value for name, value in entry.items() if name not in USUAL} | unusual


def _of_layers(data: dict[str, Any], place: str) -> dict[str, Any]:
    """Return the entry of embeddings, with `layers` if they hold several."""
    usual = {name: value for name, value in data.items() if value != USUAL.get(name, ...)}
    widths = data.get("layer_widths")
    if widths is None:
        if "layers" in usual:
            raise ImprintError(
                f"{place}: data {data['name']!r}: layers={data['layers']!r} needs layer_widths, "
                "the number of columns of each layer, such as [320, 1280]"
            )
        return usual
    try:
        several = len(checked_widths(widths)) > 1
    except ImprintError as error:
        raise ImprintError(f"{place}: data {data['name']!r}: {error}") from error
    return ({"layers": "all"} if several else {}) | usual


def _variants(block: dict[str, Any], place: str, several: bool = False) -> Iterator[Variant | None]:
    """Yield the product of a block's values; `None` for a combination that is equal to another one.

    If a source has `several` layers, `join` and `last` may be among the NORMs. Their widths are
    only known when the embeddings have been made.
    """
    widths: dict[str, Any] = {"layer_widths": [1]} if several else {}
    try:
        own = _own_keywords(block)
    except ImprintError as error:
        raise ImprintError(f"{place}: {error}") from error
    known = dict.fromkeys([*SLOTS, *sorted(every_parameter()), *own])
    _known(block, ("recipe", "shots", "weibull", *known), place)
    if "recipe" not in block and not all(slot in block for slot in SLOTS):
        missing = [slot for slot in SLOTS if slot not in block]
        raise ImprintError(f"{place}: give recipe, or every part (missing: {', '.join(missing)})")
    values_of = {key: _list(value) for key, value in block.items()}
    # A list of two numbers is one value, the two bounds.
    if len(values_of.get("weibull", [])) == 2 and not any(
        isinstance(bound, list | tuple | None) for bound in values_of["weibull"]
    ):
        values_of["weibull"] = [values_of["weibull"]]
    empty = [key for key, values in values_of.items() if not values and block[key] is not None]
    if empty:
        raise ImprintError(f"{place}: {empty[0]} has no value: give one, or leave {empty[0]} out")
    used: set[str] = set()
    refused = ""
    for values in itertools.product(*(values or [None] for values in values_of.values())):
        given = {
            key: value if key == "weibull" else _value(value)
            for key, value in zip(block, values, strict=True)
            if value is not None
        }
        recipe, shots = given.pop("recipe", None), given.pop("shots", None)
        if shots is not None and not is_count(shots):
            raise ImprintError(f"{place}: shots={shots!r}: give a whole number of at least 1")
        weibull = given.pop("weibull", None)
        if isinstance(weibull, list | tuple):
            weibull = [_value(bound) for bound in weibull]
        try:
            weibull = None if weibull is None else checked_bounds(weibull)
        except ImprintError as error:
            raise ImprintError(f"{place}: {error}") from error
        chosen = {} if weibull is None else {"weibull": list(weibull)}
        if recipe == AUTO:
            kept = {name: value for name, value in given.items() if name in UNNAMED}
            used |= set(kept)
            refused = refused or (_refusal(recipe, given) if len(kept) < len(given) else "")
            try:
                auto = resolve(AUTO, **kept)
            except ImprintError as error:
                raise ImprintError(f"{place}: {error}") from error
            yield Variant(auto, auto.parameters | chosen, shots, weibull)
            continue
        if recipe is None and not all(slot in given for slot in SLOTS):
            raise ImprintError(f"{place}: without a recipe every part needs a value")
        # If all five parts are given, any recipe can serve as the base.
        kept = drop_unused(recipe or "qi", given, kept=set(SLOTS), own=own)
        kept = _without_temperature(recipe, kept)
        used |= set(kept)
        refused = refused or (_refusal(recipe or "qi", given) if len(kept) < len(given) else "")
        try:
            parts = resolve(recipe or "qi", **kept, **widths)
        except ImprintError as error:
            raise ImprintError(f"{place}: {error}") from error
        assert isinstance(parts, Recipe)
        parameters = {
            n: v for n, v in parts.parameters.items() if v is not None and n not in widths
        }
        parameters["recipe"] = recipe or _recipe_of(parameters)
        # Combinations that differ only in keywords that were left out are equal, and yielded once.
        yield Variant(parts, parameters | chosen, shots, weibull)
    unused = [key for key in block if key not in {*used, "recipe", "shots", "weibull"}]
    if unused:
        # `resolve` does not report a keyword without a value.
        reason = f"; of the first, {refused}" if refused else ": leave it out"
        raise ImprintError(f"{place}: {unused[0]} is not used by any of its combinations{reason}")


def _own_keywords(block: dict[str, Any]) -> set[str]:
    """Imports the parts of a block that are named by import paths; returns the keywords of all its
    parts."""
    named = {
        slot: [step for value in _list(block.get(slot)) for step in step_names(_value(value))]
        for slot in SLOTS
    }
    import_parts(named)
    return set(keywords_of_parts(named))


def _refusal(recipe: Any, given: dict[str, Any]) -> str:
    """Return the error of `imprint` for a combination whose unused keywords were dropped here."""
    try:
        resolve(recipe, **given)
    except ImprintError as error:
        return str(error)
    return ""


def _without_temperature(recipe: str | None, given: dict[str, Any]) -> dict[str, Any]:
    # `mnn` takes a temperature, but only for votes by softmax.
    chosen = RECIPES.get(recipe or "", {}) | given
    if chosen.get("agg") == "mnn" and chosen.get("votes") != "softmax":
        return {name: value for name, value in given.items() if name != "temperature"}
    return given


def _recipe_of(parameters: dict[str, Any]) -> str | None:
    """Return the recipe that has exactly these parts and parameters, if there is one."""
    plain = {name: value for name, value in parameters.items() if name != "recipe"}
    for name in RECIPES:
        of_recipe = resolve(name).parameters.items()
        if {n: v for n, v in of_recipe if n != "recipe" and v is not None} == plain:
            return name
    return None


def _different(variants: list[Variant]) -> list[Variant]:
    kept: dict[str, Variant] = {}
    for variant in variants:
        plain = {n: v for n, v in variant.parameters.items() if n != "recipe"}
        if isinstance(variant.parts, Auto):
            plain = variant.parameters
        kept.setdefault(digest({"shots": variant.shots, "parameters": plain}), variant)
    return list(kept.values())


def _value(value: Any) -> Any:
    """Convert a value of the YAML: text such as 1e-4 to a number, inner lists to NORM chains."""
    if isinstance(value, list):
        return "+".join(map(str, value))
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _named(entry: Any) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ImprintError(f"the entry {entry!r} needs a name")
    return entry


def _known(given: dict[str, Any], known: Iterable[str], place: str) -> None:
    for key in given:
        if key not in known:
            raise ImprintError(
                f"{place}: unknown key {key!r}{did_you_mean(key, known)} "
                f"(known: {', '.join(known)})"
            )
