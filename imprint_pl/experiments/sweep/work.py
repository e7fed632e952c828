"""The work of a sweep on one backbone's embeddings of one data set, without repeated steps.

The results are the same as those of `pipeline.make_head` for each configuration alone.
"""

from __future__ import annotations

import json
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprint_pl.collapse import nc1_of, vci_of_moments
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.sweep.embeddings import Embeddings
from imprint_pl.experiments.sweep.grid import Configuration, Task
from imprint_pl.experiments.sweep.plan import generator_key, grouped, is_shared
from imprint_pl.experiments.sweep.proxies import SharedProxies
from imprint_pl.experiments.sweep.samples import Group, Samples
from imprint_pl.experiments.sweep.scores import (
    ClassScores,
    Wanted,
    by_class,
    class_scores,
    labels_of,
    wanted_of,
)
from imprint_pl.experiments.sweep.timed import Timed
from imprint_pl.experiments.sweep.unshared import Result, alone
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.by_name import describe
from imprint_pl.parts.norm.base import Chain
from imprint_pl.parts.norm.l2 import L2
from imprint_pl.parts.norm.layers import LastLayer


class Collapse(NamedTuple):
    """NC1 and VCI of a task."""

    nc1: float
    vci: float


class Labels(NamedTuple):
    """The labels of a configuration's test samples, in the data set's order, `(N_test,)` each."""

    predicted: Tensor
    true: Tensor


class Done(NamedTuple):
    """The results of a unit: its rows, a message for each kind of configuration that failed, and
    the labels of each row by its id."""

    rows: list[dict[str, Any]]
    failed: list[str]
    labels: dict[str, Labels]


class Work:
    """Runs units of configurations.

    Args:
        embeddings: the embeddings of one backbone and one data set.
        chunk_bytes: bounds the memory besides the embeddings: kept Gram matrices, copies of classes
            while they are clustered, and blocks of scores. One class, one Gram matrix and the
            proxies of one task are always held.
    """

    def __init__(self, embeddings: Embeddings, chunk_bytes: int) -> None:
        self.samples, self.chunk_bytes = Samples(embeddings), chunk_bytes
        self.proxies = SharedProxies(self.samples, chunk_bytes)

    def collapse(self, task: Task) -> Collapse:
        """Compute NC1 and VCI of the task's l2-normalised training embeddings. Shots are ignored;
        with several layers the last one is used."""
        groups = self.samples.groups(task)
        if len(groups) < 2:
            return Collapse(float("nan"), float("nan"))
        norm: nn.Module = L2()
        if self.samples.layer_widths is not None:
            norm = Chain([LastLayer(self.samples.layer_widths), L2()])
        name = json.dumps(describe(norm))  # as in `Variant.keys`
        sums = [self.proxies.sum_after(norm, name, g).value for g in groups]
        counts = torch.cat([s.counts for s in sums])
        gram = torch.zeros(())
        for group, n in zip(groups, counts.tolist(), strict=True):
            gram = gram + sum(self.proxies.gram_of(c, norm, name).value for c in group) / n
        moments = Moments(counts, torch.cat([s.sums for s in sums]), gram, 1 / counts)
        return Collapse(nc1_of(moments), vci_of_moments(moments))

    def run(self, unit: list[Configuration], todo: set[str]) -> Done:
        """Run those configurations of a unit whose ids are in `todo`."""
        self.proxies.forget()
        rows: list[dict[str, Any]] = []
        failed: list[str] = []
        labels: dict[str, Labels] = {}
        try:
            shared = [c for c in unit if is_shared(c)]
            self.proxies.prepare(shared)
            fast = class_scores(self.proxies, shared, self.chunk_bytes)
        except ImprintError as error:
            return Done([], [f"{unit[0].columns()}: {error}"], {})
        for (_, task), same in grouped(unit, lambda c: (generator_key(c), c.task)).items():
            same = [c for c in same if c.id in todo]
            if not same:
                continue
            try:
                rows += self._rows(task, same, fast, labels)
            except ImprintError as error:
                failed.append(f"{task.name}, {same[0].variant.parameters}: {error}")
        self.proxies.forget()
        return Done(rows, failed, labels)

    def _rows(
        self,
        task: Task,
        same: list[Configuration],
        fast: dict[tuple[Wanted, Group], ClassScores],
        labels_of_rows: dict[str, Labels],
    ) -> list[dict[str, Any]]:
        """Run configurations of one task and one GEN; add their labels to `labels_of_rows`."""
        groups = self.samples.groups(task)
        rows, y = self.samples.test(groups)
        size = {"num_classes": len(groups), "num_test": len(rows)}
        size["num_train"] = sum(self.samples.count(g, same[0].shots) for g in groups)
        results: list[Result] = []
        if not is_shared(same[0]):
            results = alone(self.samples, groups, same, rows, self.chunk_bytes)
        else:
            slow = [c for c in same if not by_class(c)]
            later: dict[str, Timed[Tensor]] = {}
            gen_seconds = 0.0
            if slow:
                proxies, gen_seconds = self.proxies.of_task(groups, slow[0])
                later = labels_of(self.samples, proxies, slow, rows, len(groups), self.chunk_bytes)
            for c in same:
                if c.id in later:
                    labels, seconds = later[c.id]
                    results.append(Result(c, labels, seconds, gen_seconds, {}))
                    continue
                start = time.perf_counter()
                key = wanted_of(c)
                found = [fast[key, group] for group in groups]
                labels = torch.stack([f.scores for f in found], 1)[rows].argmax(1)
                seconds = time.perf_counter() - start
                share = len(rows) / len(self.samples.test_y)
                seconds += share * sum(f.seconds for f in found)
                results.append(Result(c, labels, seconds, sum(f.gen_seconds for f in found), {}))
        labels_of_rows |= {r.configuration.id: Labels(r.labels, y) for r in results}
        return [
            r.configuration.columns()
            | size
            | r.columns
            | _measured(r.labels, y, len(groups))
            | {"gen_seconds": r.gen_seconds, "inference_seconds": r.seconds}
            for r in results
        ]


def _measured(labels: Tensor, y: Tensor, num_classes: int) -> dict[str, float]:
    """Compute accuracy, balanced accuracy (over the classes with samples) and macro F1, as
    fractions. Classes without samples and predictions are left out."""
    confusion = torch.bincount(y * num_classes + labels, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes).double()
    right, there = confusion.diagonal(), confusion.sum(1)
    sizes = confusion.sum(0) + there
    f1 = (2 * right / sizes)[sizes > 0]
    return {
        "accuracy": (right.sum() / len(y)).item(),
        "balanced_accuracy": (right / there)[there > 0].mean().item(),
        "macro_f1": f1.mean().item(),
    }
