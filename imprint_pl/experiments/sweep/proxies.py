"""GEN in a sweep: each class is clustered once for all tasks, recipes and k that can share it.

Gram matrices of tasks are sums of those of classes, and the first proxies of some generators are
those of a smaller k. What comes out is what the generator gives alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict

import torch
from torch import Tensor

from imprint_pl.experiments.sweep.grid import Configuration
from imprint_pl.experiments.sweep.plan import CLUSTERS, PER_CLASS, PREFIX, grouped
from imprint_pl.experiments.sweep.samples import Group, Samples
from imprint_pl.numerics.kmeans import kmeans_classes
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.gen import Proxies, ls, ridge
from imprint_pl.parts.gen.kls import clusters_of
from imprint_pl.parts.gen.kmedoids import Medoids

SUMS = ("counts", "sums")


class SharedProxies:
    """What GEN makes of classes, kept for a unit; Gram matrices of classes as long as they fit.

    Args:
        samples: of one backbone and one data set.
        chunk_bytes: bounds the kept Gram matrices, and the copies of classes while they are
            clustered.

    Attributes:
        made: the proxies of a class and their seconds, by `key`.
    """

    def __init__(self, samples: Samples, chunk_bytes: int) -> None:
        self.samples, self.chunk_bytes = samples, chunk_bytes
        self.grams: OrderedDict[tuple, tuple[Tensor, float]] = OrderedDict()
        self.forget()

    def forget(self) -> None:
        """Drops what belongs to a unit."""
        self.made: dict[tuple, tuple[Tensor, float]] = {}
        self.sums: dict[tuple, tuple[Moments, float]] = {}
        self.clusters: dict[tuple, tuple[Moments, float]] = {}
        self.task_gram: tuple[tuple, Tensor, float] | None = None

    def prepare(self, unit: list[Configuration]) -> None:
        """Clusters, or selects from, every class that a unit asks for."""
        # Whatever is left to do: the proxies shall not depend on it.
        largest: dict[tuple, int] = {}
        for c in unit:
            key = self.key((), c)
            largest[key] = max(largest.get(key, 0), c.variant.k or 0)
        self._make_medoids([c for c in unit if c.variant.parts.gen.name == "kmedoids"])
        for key, same in grouped(unit, lambda c: self.key((), c)).items():
            if same[0].variant.parts.gen.name in (*PER_CLASS, *CLUSTERS):
                tasks = dict.fromkeys(c.task for c in same)
                groups = [group for task in tasks for group in self.samples.groups(task)]
                self._make(groups, same[0], largest[key])

    def of_task(self, groups: list[Group], c: Configuration) -> tuple[Proxies, float]:
        """The proxies of a task before NORM_post, and the seconds that they would take alone."""
        gen = c.variant.parts.gen
        name = gen.name
        if name in PER_CLASS:
            self._make(groups, c, c.variant.k)
            made = [self._of_class(g, c) for g in groups]
            weights = torch.cat([w for w, _ in made])
            sizes = torch.tensor([len(w) for w, _ in made])
            classes = torch.arange(len(groups)).repeat_interleave(sizes)
            bias = weights.new_zeros(len(weights))
            return Proxies(weights, bias, classes), sum(s for _, s in made)
        norm, parts = c.variant.parameters["norm_pre"], c.variant.parts
        sums = [self.sum_of(g, norm, parts.norm_pre, c.shots, c.seed) for g in groups]
        seconds = sum(s for _, s in sums)
        gram, gram_seconds = self._task_gram(groups, c)
        start = time.perf_counter()
        if name not in CLUSTERS:
            counts, totals = (torch.cat([getattr(m, n) for m, _ in sums]) for n in SUMS)
            proxies = gen(Moments(counts, totals, gram))
            return proxies, seconds + gram_seconds + time.perf_counter() - start
        self._make(groups, c, gen.k)
        found = [self._clustered(g, c) for g in groups]
        start = time.perf_counter()
        counts, totals = (torch.cat([getattr(m, n) for m, _ in found]) for n in SUMS)
        sizes = torch.tensor([m.num_classes for m, _ in found])
        classes = torch.arange(len(groups)).repeat_interleave(sizes)
        moments = Moments(counts, totals, gram)
        if name == "kls":
            weights = ls.solve(moments, gen.lam)
            bias = weights.new_zeros(len(weights))
        else:
            weights, bias, *_ = ridge.solve(moments, gen.lam, gen.intercept, classes)
        seconds = gram_seconds + sum(s for _, s in found) + time.perf_counter() - start
        return Proxies(weights, bias, classes), seconds

    def key(self, group: Group, c: Configuration) -> tuple:
        name = c.variant.parts.gen.name
        k = c.variant.k if name == "kmedoids" else None
        return "kmeans" if name in CLUSTERS else name, k, group, c.shots, c.seed

    def _of_class(self, group: Group, c: Configuration) -> tuple[Tensor, float]:
        weights, seconds = self.made[self.key(group, c)]
        return (weights[: c.variant.k] if c.variant.parts.gen.name in PREFIX else weights), seconds

    def _make(self, groups: list[Group], c: Configuration, k: int | None) -> None:
        """Makes the proxies of classes that have none yet. A unit has one k, but for prefixes."""
        gen = c.variant.parts.gen
        missing = [g for g in dict.fromkeys(groups) if self.key(g, c) not in self.made]
        if gen.name not in CLUSTERS:
            if gen.name in PREFIX:
                gen = type(gen)(k)
            for group in missing:
                start = time.perf_counter()
                if gen.name == "mean":
                    norm = c.variant.parameters["norm_pre"]
                    pre = c.variant.parts.norm_pre
                    weights = gen(self.sum_of(group, norm, pre, c.shots, c.seed)[0]).weights
                else:
                    weights = gen.of_class(self.samples.training(group, c), c.seed or 0)
                self.made[self.key(group, c)] = weights, time.perf_counter() - start
            return
        width = 4 * self.samples.x.shape[1]
        batch: list[Group] = []
        for i, group in enumerate(missing):
            batch.append(group)
            following = [*batch, *missing[i + 1 : i + 2]]
            held = width * sum(self.samples.count(g, c.shots) for g in following)
            if i + 1 == len(missing) or held > self.chunk_bytes:
                start = time.perf_counter()
                xs = [self.samples.training(g, c) for g in batch]
                centroids = kmeans_classes(xs, k, seed=c.seed or 0, engine=gen.engine)
                seconds = time.perf_counter() - start
                total = sum(map(len, xs))
                for g, x, weights in zip(batch, xs, centroids, strict=True):
                    self.made[self.key(g, c)] = weights, seconds * len(x) / total
                batch = []

    def _make_medoids(self, same: list[Configuration]) -> None:
        """k-medoids for all k and seeds from one matrix of distances a class."""
        ks = [c.variant.k for c in same]
        for group in dict.fromkeys(g for c in same for g in self.samples.groups(c.task)):
            start = time.perf_counter()
            x = self.samples.training(group, same[0])
            medoids = Medoids(x, min(ks), max(ks))
            shared = time.perf_counter() - start
            for c in same:
                key = self.key(group, c)
                if key not in self.made:
                    start = time.perf_counter()
                    weights = x[medoids.choose(c.variant.k, c.seed or 0)]
                    self.made[key] = weights, shared + time.perf_counter() - start

    def _clustered(self, group: Group, c: Configuration) -> tuple[Moments, float]:
        """Counts and sums of the clusters of a class."""
        key = self.key(group, c)
        if key not in self.clusters:
            start = time.perf_counter()
            x, (centroids, seconds) = self.samples.training(group, c), self.made[key]
            moments = Moments.of(x, *clusters_of(x, centroids), gram="none")
            self.clusters[key] = moments, seconds + time.perf_counter() - start
        return self.clusters[key]

    # Sums

    def sum_of(self, group: Group, norm: str, module, shots, seed) -> tuple[Moments, float]:
        """Count and sum of a label's training rows."""
        key = norm, group, shots, seed
        if key not in self.sums:
            start = time.perf_counter()
            x = module(self.samples.x[self.samples.rows(group, shots, seed)])
            moments = Moments.of(x, torch.zeros(len(x), dtype=torch.int64), 1, gram="none")
            self.sums[key] = moments, time.perf_counter() - start
        return self.sums[key]

    def gram_of(self, c: int, norm: str, module) -> tuple[Tensor, float]:
        """Σ z zᵀ over a class, `(d, d)` float64; the last ones are kept."""
        key = norm, c
        if key not in self.grams:
            start = time.perf_counter()
            x = module(self.samples.x[self.samples.slices[c]])
            gram = Moments.of(x, torch.zeros(len(x), dtype=torch.int64), 1).gram
            self.grams[key] = gram, time.perf_counter() - start
            while len(self.grams) * gram.numel() * 8 > max(self.chunk_bytes, gram.numel() * 8):
                self.grams.popitem(last=False)
        self.grams.move_to_end(key)
        return self.grams[key]

    def _task_gram(self, groups: list[Group], c: Configuration) -> tuple[Tensor, float]:
        norm, module = c.variant.parameters["norm_pre"], c.variant.parts.norm_pre
        key = norm, tuple(groups), c.shots, c.seed
        if self.task_gram is None or self.task_gram[0] != key:
            total, seconds = 0, 0.0
            if c.shots is None:
                for of_class in sorted({member for group in groups for member in group}):
                    gram, spent = self.gram_of(of_class, norm, module)
                    total, seconds = total + gram, seconds + spent
            else:
                start = time.perf_counter()
                for group in groups:
                    x = self.samples.training(group, c)
                    zeros = torch.zeros(len(x), dtype=torch.int64)
                    total = total + Moments.of(x, zeros, 1).gram
                seconds = time.perf_counter() - start
            self.task_gram = key, total, seconds
        return self.task_gram[1:]
