"""The grid of a sweep: its single configurations, without those that are the same.

A configuration is a task of a data set, embedded by a backbone, under the parameters of `imprint`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from imprint_pl.data.tasks import resolve_task
from imprint_pl.files import digest
from imprint_pl.method.recipes import Auto, Recipe
from imprint_pl.parts.by_name import steps_of


@dataclass(frozen=True)
class Task:
    """One task: which classes under which labels. `shots` are drawn for each row, by its seed."""

    name: str
    classes: Any = "all"
    d: int | None = None
    num_labels: int | None = None
    task_seed: int | None = None
    shots: int | None = None

    def groups(self, class_names: list[str]) -> list[tuple[int, ...]]:
        """The original classes of each label."""
        seed = self.task_seed or 0
        return [
            tuple(sorted(group))
            for group in resolve_task(self.classes, class_names, self.d, self.num_labels, seed)
        ]


@dataclass(frozen=True)
class Variant:
    """One entry of the grid: parts, ready to use, and the plain parameters that name them."""

    parts: Recipe | Auto
    parameters: dict[str, Any]
    shots: int | None
    weibull: tuple[float, float] | None = None

    @property
    def k(self) -> int | None:
        return self.parameters.get("k")

    @property
    def uses_seed(self) -> bool:
        """Whether anything but the shots is random."""
        if isinstance(self.parts, Auto):
            return True
        draws = {"random_projection", "nystrom"} & {s.name for s in steps_of(self.parts.norm_pre)}
        # One cluster is the mean, one medoid the best of all samples.
        single = self.parts.gen.name in ("kmeans", "kmedoids", "kls") and self.k == 1
        fixed = self.parts.gen.from_moments or self.parts.gen.name in ("all", "cov_max")
        random = not (single or fixed) or self.parameters.get("lam") == "holdout"
        return random or bool(draws)


@dataclass(frozen=True)
class Configuration:
    """One row of the results. `seed` is `None` where nothing is random."""

    backbone: str
    data: str
    task: Task
    variant: Variant
    shots: int | None
    seed: int | None
    id: str = field(default="", compare=False)

    def columns(self) -> dict[str, Any]:
        """The row's parameters."""
        names = ("d", "num_labels", "task_seed")
        parameters = dict(self.variant.parameters)
        for name in ("lam", "weibull"):
            if parameters.get(name) is not None:
                parameters[name] = str(parameters[name])
        return {
            **{"backbone": self.backbone, "data": self.data, "task": self.task.name},
            **{name: getattr(self.task, name) for name in names},
            **parameters,
            **{"shots": self.shots, "seed": self.seed, "id": self.id},
        }


@dataclass
class Sweep:
    """What the YAML says, checked.

    Attributes:
        sources: pairs of a backbone's and a data set's entry; the backbone's is `None` where the
            data are embeddings.
        full: combinations a source, before pruning.
    """

    name: str
    sources: list[tuple[dict | None, dict]]
    tasks: list[Task]
    variants: list[Variant]
    seeds: list[int]
    prune: bool
    full: int

    def configurations(
        self, source: tuple[dict | None, dict], class_names: list[str], num_train: int
    ) -> list[Configuration]:
        """The configurations of one source, each once, without those that the paper leaves out."""
        kept: dict[str, Configuration] = {}
        backbone, data = names_of(source)
        sizes = {task: len(task.groups(class_names)) for task in self.tasks}
        for task, variant, seed in itertools.product(self.tasks, self.variants, self.seeds):
            shots = task.shots if variant.shots is None else variant.shots
            if self.prune and _left_out(variant, shots, sizes[task], num_train):
                continue
            seed = seed if variant.uses_seed or shots else None
            parameters = {n: v for n, v in variant.parameters.items() if n != "recipe"}
            if isinstance(variant.parts, Auto):
                parameters = variant.parameters
            key = {
                **{"backbone": backbone, "data": data, "classes": task.classes, "d": task.d},
                **{"num_labels": task.num_labels, "task_seed": task.task_seed},
                **{"shots": shots, "seed": seed, "parameters": parameters},
            }
            name = digest(key)[:16]
            kept.setdefault(
                name, Configuration(backbone, data, task, variant, shots, seed, id=name)
            )
        return list(kept.values())


def _left_out(variant: Variant, shots: int | None, labels: int, num_train: int) -> bool:
    """The paper's rules: what cannot differ from another configuration, or makes no sense."""
    parameters = variant.parameters
    if variant.k is not None and shots is not None and variant.k > shots:
        return True
    proxies = num_train if parameters.get("gen") == "all" else labels * (variant.k or 1)
    if parameters.get("m") is not None and parameters["m"] > proxies:
        return True
    return parameters.get("norm_pre") == "l2" and parameters["norm_inf"] not in ("l2", "same")


def names_of(source: tuple[dict | None, dict]) -> tuple[str, str]:
    """The columns `backbone` and `data`."""
    backbone, data = source
    if backbone is None:
        return data.get("backbone", "embeddings"), data["name"]
    size = backbone.get("image_size")
    return backbone["name"] + (f"@{size}" if size else ""), data.get("label", data["name"])
