"""GEN in a sweep: each class is clustered once for all tasks, recipes and k that can share it.

The Gram matrix of a task is the sum of those of its classes. For some generators the first proxies
of a large k are the proxies of a smaller k. The results are the same as without sharing.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from imprint_pl.experiments.sweep.grid import Configuration
from imprint_pl.experiments.sweep.plan import class_key, first_k, grouped, is_per_class
from imprint_pl.experiments.sweep.samples import Group, Samples
from imprint_pl.experiments.sweep.timed import Timed
from imprint_pl.numerics.kmeans import kmeans_classes
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.by_name import declared, parameters_of
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.gen.choice_of_lam import LeftOut, rows_left_out
from imprint_pl.parts.gen.kls import clusters_of

Key = tuple[Hashable, ...]


class SharedProxies:
    """The results of GEN for classes, kept for a unit, and as many Gram matrices as fit.

    Args:
        samples: the samples of one backbone and one data set.
        chunk_bytes: bounds the kept Gram matrices, and the copies of classes while they are
            clustered.

    Attributes:
        made: the proxies of a class and their seconds, by `key`.
    """

    def __init__(self, samples: Samples, chunk_bytes: int) -> None:
        self.samples, self.chunk_bytes = samples, chunk_bytes
        self.grams: OrderedDict[Key, Timed[Tensor]] = OrderedDict()
        self.forget()

    def forget(self) -> None:
        """Drops the results of a unit."""
        self.made: dict[Key, Timed[Tensor]] = {}
        self.sums: dict[Key, Timed[Moments]] = {}
        self.clusters: dict[Key, Timed[Moments]] = {}
        # Holds the Gram matrix of the last task only.
        self.task_grams: dict[Key, Timed[Tensor]] = {}

    def prepare(self, unit: list[Configuration]) -> None:
        """Clusters, or selects from, every class of a unit."""
        # Prepare all configurations, also those that are done, so that the proxies do not depend
        # on what is left to do.
        for same in grouped(unit, lambda c: self.key((), c)).values():
            gen = same[0].variant.recipe.gen
            tasks = dict.fromkeys(c.task for c in same)
            groups = [group for task in tasks for group in self.samples.groups(task)]
            if declared(gen, "clusters"):
                self._cluster(groups, same[0])
            elif is_per_class(same[0]) and not declared(gen, "selection"):
                self._make(groups, same[0], max(c.variant.k or 0 for c in same))
        self._select([c for c in unit if declared(c.variant.recipe.gen, "selection")])

    def of_task(self, groups: list[Group], c: Configuration) -> Timed[Proxies]:
        """Returns the proxies of a task before NORM_post."""
        gen = c.variant.recipe.gen
        if is_per_class(c):
            made = [self._of_class(g, c) for g in groups]
            weights = torch.cat([of_class.value for of_class in made])
            classes = _repeated([len(of_class.value) for of_class in made])
            bias = weights.new_zeros(len(weights))
            return Timed(Proxies(weights, bias, classes), sum(m.seconds for m in made))
        gram = self._task_gram(groups, c)
        if not declared(gen, "clusters"):
            sums = [self.sum_of(g, c) for g in groups]
            start = time.perf_counter()
            moments = _together([of_group.value for of_group in sums], gram.value)
            if getattr(gen, "needs_rows", False):
                proxies = gen(moments, left=self._left_out(groups, c))
            else:
                proxies = gen(moments)
        else:
            sums = [self._clustered(g, c) for g in groups]
            start = time.perf_counter()
            classes = _repeated([of_group.value.num_classes for of_group in sums])
            moments = _together([of_group.value for of_group in sums], gram.value)
            proxies = gen.of_clusters(moments, classes)
        seconds = gram.seconds + sum(s.seconds for s in sums) + time.perf_counter() - start
        return Timed(proxies, seconds)

    def key(self, group: Group, c: Configuration) -> Key:
        """Returns a key of GEN's work on a class, or on the classes of a label."""
        return (*class_key(c), group, c.shots, c.seed)

    def _of_class(self, group: Group, c: Configuration) -> Timed[Tensor]:
        weights, seconds = self.made[self.key(group, c)]
        return Timed(weights[: first_k(c)], seconds)

    def _make(self, groups: list[Group], c: Configuration, k: int) -> None:
        """Makes the proxies of classes one by one, for `k` if those of a smaller k are a prefix."""
        gen = c.variant.recipe.gen
        if first_k(c) is not None:
            plain = {name: getattr(gen, name) for name in parameters_of(type(gen))}
            gen = type(gen)(**plain | {"k": k})
        for group in dict.fromkeys(groups):
            start = time.perf_counter()
            if gen.from_moments:
                weights = gen(self.sum_of(group, c).value).weights
            else:
                weights = gen.of_class(self.samples.training(group, c), c.seed or 0)
            self.made[self.key(group, c)] = Timed(weights, time.perf_counter() - start)

    def _cluster(self, groups: list[Group], c: Configuration) -> None:
        """Clusters classes by k-means, as many at a time as fit into memory."""
        gen, missing = c.variant.recipe.gen, list(dict.fromkeys(groups))
        width = 4 * self.samples.x.shape[1]
        batch: list[Group] = []
        for i, group in enumerate(missing):
            batch.append(group)
            following = [*batch, *missing[i + 1 : i + 2]]
            held = width * sum(self.samples.count(g, c.shots) for g in following)
            if i + 1 == len(missing) or held > self.chunk_bytes:
                start = time.perf_counter()
                xs = [self.samples.training(g, c) for g in batch]
                centroids = kmeans_classes(xs, gen.k, seed=c.seed or 0, engine=gen.engine)
                seconds = time.perf_counter() - start
                total = sum(map(len, xs))
                for g, x, weights in zip(batch, xs, centroids, strict=True):
                    self.made[self.key(g, c)] = Timed(weights, seconds * len(x) / total)
                batch = []

    def _select(self, unit: list[Configuration]) -> None:
        """Selects proxies for all k and seeds with shared work on each class, such as one matrix of
        distances for k-medoids."""
        ks = [c.variant.recipe.gen.k for c in unit]
        for group in dict.fromkeys(g for c in unit for g in self.samples.groups(c.task)):
            start = time.perf_counter()
            x = self.samples.training(group, unit[0])
            selection = unit[0].variant.recipe.gen.selection(x, min(ks), max(ks))
            shared = time.perf_counter() - start
            for c in unit:
                key = self.key(group, c)
                if key not in self.made:
                    start = time.perf_counter()
                    weights = x[selection.choose(c.variant.recipe.gen.k, c.seed or 0)]
                    self.made[key] = Timed(weights, shared + time.perf_counter() - start)

    def _clustered(self, group: Group, c: Configuration) -> Timed[Moments]:
        """Returns counts and sums of the clusters of a class."""
        key = self.key(group, c)
        if key not in self.clusters:
            start = time.perf_counter()
            x, (centroids, seconds) = self.samples.training(group, c), self.made[key]
            moments = Moments.of(x, *clusters_of(x, centroids), gram="none")
            self.clusters[key] = Timed(moments, seconds + time.perf_counter() - start)
        return self.clusters[key]

    def _left_out(self, groups: list[Group], c: Configuration) -> LeftOut:
        """Returns the rows of a task that GEN leaves out in turn, the same as in `imprint`."""
        x, counts = self.samples.together(groups, c.shots, c.seed)
        norm = c.variant.recipe.norm_pre
        return rows_left_out(x, _repeated(counts), lambda rows: norm(x[rows]), c.seed or 0)

    # Sums

    def sum_of(self, group: Group, c: Configuration) -> Timed[Moments]:
        """Returns count and sum of a label's training rows after NORM_pre."""
        seed = c.seed if c.shots else None
        return self.sum_after(
            c.variant.recipe.norm_pre, c.variant.keys["norm_pre"], group, c.shots, seed
        )

    def sum_after(
        self,
        norm: nn.Module,
        name: str,
        group: Group,
        shots: int | None = None,
        seed: int | None = None,
    ) -> Timed[Moments]:
        """Returns count and sum of a label's training rows after any NORM, identified by `name`."""
        key = name, group, shots, seed
        if key not in self.sums:
            start = time.perf_counter()
            x = norm(self.samples.x[self.samples.rows(group, shots, seed)])
            moments = Moments.of(x, torch.zeros(len(x), dtype=torch.int64), 1, gram="none")
            self.sums[key] = Timed(moments, time.perf_counter() - start)
        return self.sums[key]

    def gram_of(self, c: int, norm: nn.Module, name: str) -> Timed[Tensor]:
        """Returns Σ z zᵀ over a class, `(d, d)` float64; the latest results are kept."""
        key = name, c
        if key not in self.grams:
            start = time.perf_counter()
            gram = _gram(norm(self.samples.x[self.samples.slices[c]]))
            self.grams[key] = Timed(gram, time.perf_counter() - start)
            while len(self.grams) * gram.numel() * 8 > max(self.chunk_bytes, gram.numel() * 8):
                self.grams.popitem(last=False)
        self.grams.move_to_end(key)
        return self.grams[key]

    def _task_gram(self, groups: list[Group], c: Configuration) -> Timed[Tensor]:
        norm, name = c.variant.recipe.norm_pre, c.variant.keys["norm_pre"]
        key = name, tuple(groups), c.shots, c.seed if c.shots else None
        if key not in self.task_grams:
            total, seconds = torch.zeros(()), 0.0
            if c.shots is None:
                for of_class in sorted({member for group in groups for member in group}):
                    gram, spent = self.gram_of(of_class, norm, name)
                    total, seconds = total + gram, seconds + spent
            else:
                start = time.perf_counter()
                for group in groups:
                    total = total + _gram(self.samples.training(group, c))
                seconds = time.perf_counter() - start
            found = Timed(total, seconds)
            self.task_grams = {key: found}
        return self.task_grams[key]


def _gram(x: Tensor) -> Tensor:
    """Returns Σ z zᵀ over the rows `(n, d)`, `(d, d)` float64."""
    gram = Moments.of(x, torch.zeros(len(x), dtype=torch.int64), 1).gram
    assert gram is not None
    return gram


def _repeated(sizes: list[int]) -> Tensor:
    """Returns 0, 1, …, where i is repeated `sizes[i]` times."""
    return torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))


def _together(sums: list[Moments], gram: Tensor) -> Moments:
    """Combines the sums of several labels into those of their task."""
    counts, totals = (torch.cat([getattr(m, n) for m in sums]) for n in ("counts", "sums"))
    return Moments(counts, totals, gram)
