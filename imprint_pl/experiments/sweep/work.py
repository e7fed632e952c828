"""The work of a sweep on one backbone's embeddings of one data set, each piece of it done once.

What comes out is what `pipeline.make_head` gives for each configuration alone.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from imprint_pl.collapse import nc1_of, vci_of_moments
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.sweep.embeddings import Embeddings
from imprint_pl.experiments.sweep.grid import Configuration, Task
from imprint_pl.experiments.sweep.plan import generator_key, grouped, is_shared
from imprint_pl.experiments.sweep.proxies import SharedProxies
from imprint_pl.experiments.sweep.samples import Samples
from imprint_pl.experiments.sweep.scores import by_class, class_scores, labels_of
from imprint_pl.experiments.sweep.unshared import alone
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.norm.l2 import L2


class Work:
    """Runs units of configurations.

    Args:
        embeddings: of one backbone and one data set.
        chunk_bytes: bounds what is held besides the embeddings: kept Gram matrices, copies of
            classes while they are clustered, blocks of scores. One class, one Gram matrix and one
            task's proxies are held in any case.
    """

    def __init__(self, embeddings: Embeddings, chunk_bytes: int) -> None:
        self.samples, self.chunk_bytes = Samples(embeddings), chunk_bytes
        self.proxies = SharedProxies(self.samples, chunk_bytes)

    def collapse(self, task: Task) -> tuple[float, float]:
        """NC1 and VCI of the task's l2-normalised training embeddings, whatever the shots."""
        groups = self.samples.groups(task)
        if len(groups) < 2:
            return float("nan"), float("nan")
        sums = [self.proxies.sum_of(g, "l2", L2(), None, None)[0] for g in groups]
        counts = torch.cat([s.counts for s in sums])
        gram = sum(
            sum(self.proxies.gram_of(c, "l2", L2())[0] for c in group) / n
            for group, n in zip(groups, counts.tolist(), strict=True)
        )
        moments = Moments(counts, torch.cat([s.sums for s in sums]), gram, 1 / counts)
        return nc1_of(moments), vci_of_moments(moments)

    def run(
        self, unit: list[Configuration], todo: set[str]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows of those configurations of a unit whose ids are in `todo`, and what failed."""
        self.proxies.forget()
        rows, failed = [], []
        try:
            shared = [c for c in unit if is_shared(c)]
            self.proxies.prepare(shared)
            fast = class_scores(self.proxies, shared, self.chunk_bytes)
        except ImprintError as error:
            return [], [f"{unit[0].columns()}: {error}"]
        for (_, task), same in grouped(unit, lambda c: (generator_key(c), c.task)).items():
            same = [c for c in same if c.id in todo]
            if not same:
                continue
            try:
                rows += self._rows(task, same, fast)
            except ImprintError as error:
                failed.append(f"{task.name}, {same[0].variant.parameters}: {error}")
        self.proxies.forget()
        return rows, failed

    def _rows(self, task: Task, same: list[Configuration], fast: dict) -> list[dict[str, Any]]:
        """Configurations of one task and one GEN."""
        groups = self.samples.groups(task)
        rows, y = self.samples.test(groups)
        size = {"num_classes": len(groups), "num_test": len(rows)}
        size["num_train"] = sum(self.samples.count(g, same[0].shots) for g in groups)
        if not is_shared(same[0]):
            results = alone(self.samples, groups, same, rows, self.chunk_bytes)
        else:
            results = []
            slow = [c for c in same if not by_class(c)]
            later = {}
            if slow:
                proxies, gen_seconds = self.proxies.of_task(groups, slow[0])
                later = labels_of(self.samples, proxies, slow, rows, len(groups), self.chunk_bytes)
            for c in same:
                if c.id in later:
                    results.append((c, *later[c.id], gen_seconds, {}))
                    continue
                start = time.perf_counter()
                key = generator_key(c), c.variant.parameters["norm_post"]
                scores = torch.stack([fast[(*key, g)][0] for g in groups], 1)
                labels = scores[rows].argmax(1)
                seconds = time.perf_counter() - start
                share = len(rows) / len(self.samples.test_y)
                seconds += share * sum(fast[(*key, g)][1] for g in groups)
                gen = sum(fast[(*key, g)][2] for g in groups)
                results.append((c, labels, seconds, gen, {}))
        return [
            c.columns()
            | size
            | found
            | _measured(labels, y, len(groups))
            | {"gen_seconds": gen, "inference_seconds": seconds}
            for c, labels, seconds, gen, found in results
        ]


def _measured(labels: Tensor, y: Tensor, num_classes: int) -> dict[str, float]:
    """Accuracy and macro F1, fractions; a class that is neither there nor predicted counts not."""
    confusion = torch.bincount(y * num_classes + labels, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes).double()
    right, sizes = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    f1 = (2 * right / sizes)[sizes > 0]
    return {"accuracy": (right.sum() / len(y)).item(), "macro_f1": f1.mean().item()}
