"""The grid of a sweep: its configurations, without duplicates.

A configuration is a task of a data set, embedded by a backbone, with parameters of `imprint`.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from imprint_pl.data.tasks import resolve_task
from imprint_pl.experiments.results import COLUMNS, TEXT, USUAL
from imprint_pl.files import digest
from imprint_pl.method.recipes import AUTO, Auto, Recipe, resolve
from imprint_pl.parts.by_name import SLOTS, declared, describe, steps_of


class Source(NamedTuple):
    """The entries of a backbone (`None` if the data are embeddings) and of a data set."""

    backbone: dict[str, Any] | None
    data: dict[str, Any]

    @property
    def wide(self) -> dict[str, str]:
        """`layers` and `views`, if they are not "last" and "none"."""
        entry = self.data if self.backbone is None else self.backbone
        return {name: _as_text(entry[name]) for name in USUAL if name in entry}


def _as_text(layers: Any) -> str:
    return ",".join(map(str, layers)) if isinstance(layers, list | tuple) else str(layers)


@dataclass(frozen=True)
class Task:
    """One task: the classes of each label. `shots` are drawn for each row, by its seed."""

    name: str
    classes: Any = "all"
    d: int | None = None
    num_labels: int | None = None
    task_seed: int | None = None
    shots: int | None = None

    def groups(self, class_names: list[str]) -> list[tuple[int, ...]]:
        """Return the original classes of each label."""
        seed = self.task_seed or 0
        return [
            tuple(sorted(group))
            for group in resolve_task(self.classes, class_names, self.d, self.num_labels, seed)
        ]


@dataclass(frozen=True)
class Variant:
    """One entry of the grid: parts that are ready to use, and the parameters that name them."""

    parts: Recipe | Auto
    parameters: dict[str, Any]
    shots: int | None
    weibull: tuple[float, float] | None = None

    @property
    def recipe(self) -> Recipe:
        """The parts; only for a variant whose recipe is not `auto`."""
        assert isinstance(self.parts, Recipe)
        return self.parts

    def on(self, layer_widths: list[int]) -> Variant:
        """Return the variant for embeddings of these layers, with the parameters of the grid."""
        keywords = {n: v for n, v in self.parameters.items() if n not in ("recipe", "weibull")}
        if isinstance(self.parts, Auto):
            return replace(self, parts=resolve(AUTO, **keywords, layer_widths=layer_widths))
        name = self.parameters.get("recipe") or "qi"
        return replace(self, parts=resolve(name, **keywords, layer_widths=layer_widths))

    @property
    def k(self) -> int | None:
        """The k of GEN."""
        return None if isinstance(self.parts, Auto) else getattr(self.parts.gen, "k", None)

    @cached_property
    def keys(self) -> dict[str, str]:
        """For each slot, a text that identifies its part with its keywords."""
        return {slot: json.dumps(describe(getattr(self.recipe, slot))) for slot in SLOTS}

    @property
    def uses_seed(self) -> bool:
        """Whether anything besides the shots is random."""
        if isinstance(self.parts, Auto):
            return True
        learned = [s for s in steps_of(self.parts.norm_pre) if getattr(s, "learns", False)]
        gen = self.parts.gen
        sums = getattr(gen, "from_moments", False) and not getattr(gen, "needs_rows", False)
        fixed = sums or declared(gen, "fixed")
        return not (fixed and all(declared(step, "fixed") for step in learned))


@dataclass(frozen=True)
class Configuration:
    """One row of the results. `seed` is `None` if nothing is random; `wide` is that of the source,
    as pairs."""

    backbone: str
    data: str
    task: Task
    variant: Variant
    shots: int | None
    seed: int | None
    wide: tuple[tuple[str, str], ...] = ()
    id: str = field(default="", compare=False)

    def columns(self) -> dict[str, Any]:
        """The row's parameters."""
        return {
            "backbone": self.backbone,
            "data": self.data,
            **dict(self.wide),
            "task": self.task.name,
            "d": self.task.d,
            "num_labels": self.task.num_labels,
            "task_seed": self.task.task_seed,
            **cells(self.variant.parameters),
            "shots": self.shots,
            "seed": self.seed,
            "id": self.id,
        }


def cells(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a recipe as cells of a row: text in columns of text."""
    texts = {name for name, kind in COLUMNS.items() if kind == TEXT} | {"weibull"}
    return {
        name: str(value) if name in texts and value is not None else value
        for name, value in parameters.items()
    }


@dataclass
class Sweep:
    """The checked content of a sweep's YAML.

    Attributes:
        sources: backbones and data sets to combine.
        full: the number of combinations for each source, before pruning.
    """

    name: str
    sources: list[Source]
    tasks: list[Task]
    variants: list[Variant]
    seeds: list[int]
    prune: bool
    full: int

    def configurations(
        self, source: Source, class_names: list[str], num_train: int
    ) -> list[Configuration]:
        """Return the configurations of one source, each once, without the pruned ones."""
        kept: dict[str, Configuration] = {}
        backbone, data = names_of(source)
        sizes = {task: len(task.groups(class_names)) for task in self.tasks}
        for task, variant, seed in itertools.product(self.tasks, self.variants, self.seeds):
            shots = task.shots if variant.shots is None else variant.shots
            if self.prune and _left_out(variant, shots, sizes[task], num_train):
                continue
            drawn = seed if variant.uses_seed or shots else None
            parameters = {n: v for n, v in variant.parameters.items() if n != "recipe"}
            if isinstance(variant.parts, Auto):
                parameters = variant.parameters
            key = {
                "backbone": backbone,
                "data": data,
                **source.wide,
                "classes": task.classes,
                "d": task.d,
                "num_labels": task.num_labels,
                "task_seed": task.task_seed,
                "shots": shots,
                "seed": drawn,
                "parameters": parameters,
            }
            name = digest(key)[:16]
            wide = tuple(source.wide.items())
            kept.setdefault(
                name, Configuration(backbone, data, task, variant, shots, drawn, wide, id=name)
            )
        return list(kept.values())


def _left_out(variant: Variant, shots: int | None, labels: int, num_train: int) -> bool:
    """Whether the paper's rules leave out a configuration, since it cannot differ from another one
    or makes no sense."""
    parameters = variant.parameters
    if variant.k is not None and shots is not None and variant.k > shots:
        return True
    every = isinstance(variant.parts, Recipe) and declared(variant.parts.gen, "every_sample")
    proxies = num_train if every else labels * (variant.k or 1)
    if parameters.get("m") is not None and parameters["m"] > proxies:
        return True
    return parameters.get("norm_pre") == "l2" and parameters["norm_inf"] not in ("l2", "same")


def names_of(source: Source) -> tuple[str, str]:
    """Return the values of the columns `backbone` and `data`."""
    backbone, data = source
    if backbone is None:
        return data.get("backbone", "embeddings"), data["name"]
    size = backbone.get("image_size")
    return backbone["name"] + (f"@{size}" if size else ""), data.get("label", data["name"])
