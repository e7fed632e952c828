"""The work of a sweep on one backbone's embeddings of one data set, each piece of it done once.

Classes are clustered once for all tasks; a class's scores by inner product serve every task with
that class; Gram matrices of tasks are sums of those of classes; one matrix of distances serves
every m and every kind of vote. What comes out is what `pipeline.make_head` gives for each
configuration alone.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imprint_pl.agg import BLOCK, NearestProxies
from imprint_pl.collapse import nc1_of, vci_of_moments
from imprint_pl.errors import ImprintError
from imprint_pl.gen import Proxies, ls, ridge
from imprint_pl.gen.kls import clusters_of
from imprint_pl.gen.kmedoids import Medoids
from imprint_pl.imprinting import imprint_parts
from imprint_pl.kmeans import kmeans_classes
from imprint_pl.moments import Moments
from imprint_pl.norm import L2, NORMS, NoNorm
from imprint_pl.pipeline import make_head
from imprint_pl.recipes import Auto
from imprint_pl.select import sample
from imprint_pl.sweep_data import Embeddings, tensor
from imprint_pl.sweep_grid import Configuration, Task
from imprint_pl.sweep_plan import CLUSTERS, PER_CLASS, PREFIX, generator_key, grouped, is_shared

Group = tuple[int, ...]
SCALINGS = ("none", "l2")
# Of a product with test rows, at least.
COLUMNS = 256


class Work:
    """Runs units of configurations.

    Args:
        embeddings: of one backbone and one data set.
        chunk_bytes: bounds what is held besides the embeddings: kept Gram matrices, copies of
            classes while they are clustered, blocks of scores. One class, one Gram matrix and one
            task's proxies are held in any case.
    """

    def __init__(self, embeddings: Embeddings, chunk_bytes: int) -> None:
        self.embeddings, self.chunk_bytes = embeddings, chunk_bytes
        self.x, self.test_x = tensor(embeddings.train_x), tensor(embeddings.test_x)
        self.test_y, self.order = tensor(embeddings.test_y), tensor(embeddings.order)
        classes, counts = torch.unique_consecutive(tensor(embeddings.train_y), return_counts=True)
        ends = counts.cumsum(0)
        self.slices = {
            c: slice(end - n, end)
            for c, n, end in zip(classes.tolist(), counts.tolist(), ends.tolist(), strict=True)
        }
        self.grams: OrderedDict[tuple, tuple[Tensor, float]] = OrderedDict()
        self.forget()

    def forget(self) -> None:
        """Drops what belongs to a unit."""
        self.made: dict[tuple, tuple[Tensor, float]] = {}
        self.sums: dict[tuple, tuple[Moments, float]] = {}
        self.clusters: dict[tuple, tuple[Moments, float]] = {}
        self.task_gram: tuple[tuple, Tensor, float] | None = None

    # Which rows

    def groups(self, task: Task) -> list[Group]:
        return task.groups(self.embeddings.class_names)

    def rows(self, group: Group, shots: int | None, seed: int | None) -> slice | Tensor:
        """The training rows of a label, in the data set's order."""
        if len(group) == 1 and shots is None:
            return self.slices[group[0]]
        rows = torch.cat([torch.arange(s.start, s.stop) for s in map(self.slices.get, group)])
        rows = rows[self.order[rows].argsort()]
        return rows if shots is None else rows[sample(len(rows), shots, seed).sort().values]

    def training(self, group: Group, c: Configuration) -> Tensor:
        """`(n, d)`, after NORM_pre."""
        return c.variant.parts.norm_pre(self.x[self.rows(group, c.shots, c.seed)])

    def count(self, group: Group, shots: int | None) -> int:
        n = sum(self.slices[c].stop - self.slices[c].start for c in group)
        return n if shots is None else min(n, shots)

    def test(self, groups: list[Group]) -> tuple[Tensor, Tensor]:
        """The task's test rows, ascending, and their labels."""
        label = torch.full((len(self.embeddings.class_names),), -1)
        for j, group in enumerate(groups):
            label[list(group)] = j
        y = label[self.test_y]
        rows = (y >= 0).nonzero().flatten()
        if len(rows) == 0:
            raise ImprintError("the task has no test sample")
        return rows, y[rows]

    # Units

    def collapse(self, task: Task) -> tuple[float, float]:
        """NC1 and VCI of the task's l2-normalised training embeddings, whatever the shots."""
        groups = self.groups(task)
        if len(groups) < 2:
            return float("nan"), float("nan")
        sums = [self._sum(g, "l2", L2(), None, None)[0] for g in groups]
        counts = torch.cat([s.counts for s in sums])
        gram = sum(
            sum(self._gram(c, "l2", L2())[0] for c in group) / n
            for group, n in zip(groups, counts.tolist(), strict=True)
        )
        moments = Moments(counts, torch.cat([s.sums for s in sums]), gram, 1 / counts)
        return nc1_of(moments), vci_of_moments(moments)

    def run(
        self, unit: list[Configuration], todo: set[str]
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows of those configurations of a unit whose ids are in `todo`, and what failed."""
        self.forget()
        rows, failed = [], []
        try:
            fast = self._class_scores(unit)
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
        self.forget()
        return rows, failed

    def _rows(self, task: Task, same: list[Configuration], fast: dict) -> list[dict[str, Any]]:
        """Configurations of one task and one GEN."""
        groups = self.groups(task)
        rows, y = self.test(groups)
        size = {"num_classes": len(groups), "num_test": len(rows)}
        size["num_train"] = sum(self.count(g, same[0].shots) for g in groups)
        if not is_shared(same[0]):
            results = self._alone(groups, same, rows)
        else:
            results = []
            slow = [c for c in same if not _by_class(c)]
            proxies = self._proxies(groups, slow[0]) if slow else None
            later = self._after_gen(proxies[0], slow, rows, len(groups)) if slow else {}
            for c in same:
                if c.id in later:
                    results.append((c, *later[c.id], proxies[1], {}))
                    continue
                start = time.perf_counter()
                key = generator_key(c), c.variant.parameters["norm_post"]
                scores = torch.stack([fast[(*key, g)][0] for g in groups], 1)
                labels = scores[rows].argmax(1)
                seconds = time.perf_counter() - start
                share = len(rows) / len(self.test_y)
                seconds += share * sum(fast[(*key, g)][1] for g in groups)
                gen = sum(fast[(*key, g)][2] for g in groups)
                results.append((c, labels, seconds, gen, {}))
        return [
            c.columns()
            | found
            | size
            | _measured(labels, y, len(groups))
            | {"gen_seconds": gen, "inference_seconds": seconds}
            for c, labels, seconds, gen, found in results
        ]

    # GEN

    def _proxies(self, groups: list[Group], c: Configuration) -> tuple[Proxies, float]:
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
        sums = [self._sum(g, norm, parts.norm_pre, c.shots, c.seed) for g in groups]
        seconds = sum(s for _, s in sums)
        gram, gram_seconds = self._task_gram(groups, c)
        start = time.perf_counter()
        if name not in CLUSTERS:
            counts, totals = (torch.cat([getattr(m, n) for m, _ in sums]) for n in _SUMS)
            proxies = gen(Moments(counts, totals, gram))
            return proxies, seconds + gram_seconds + time.perf_counter() - start
        self._make(groups, c, gen.k)
        found = [self._clustered(g, c) for g in groups]
        start = time.perf_counter()
        counts, totals = (torch.cat([getattr(m, n) for m, _ in found]) for n in _SUMS)
        sizes = torch.tensor([m.num_classes for m, _ in found])
        classes = torch.arange(len(groups)).repeat_interleave(sizes)
        moments = Moments(counts, totals, gram)
        if name == "kls":
            weights = ls.solve(moments, gen.lam)
            bias = weights.new_zeros(len(weights))
        else:
            weights, bias, _ = ridge.solve(moments, gen.lam, gen.intercept)
        seconds = gram_seconds + sum(s for _, s in found) + time.perf_counter() - start
        return Proxies(weights, bias, classes), seconds

    def _made_key(self, group: Group, c: Configuration) -> tuple:
        name = c.variant.parts.gen.name
        k = c.variant.k if name == "kmedoids" else None
        return "kmeans" if name in CLUSTERS else name, k, group, c.shots, c.seed

    def _of_class(self, group: Group, c: Configuration) -> tuple[Tensor, float]:
        weights, seconds = self.made[self._made_key(group, c)]
        return (weights[: c.variant.k] if c.variant.parts.gen.name in PREFIX else weights), seconds

    def _make(self, groups: list[Group], c: Configuration, k: int | None) -> None:
        """Makes the proxies of classes that have none yet. A unit has one k, but for prefixes."""
        gen = c.variant.parts.gen
        missing = [g for g in dict.fromkeys(groups) if self._made_key(g, c) not in self.made]
        if gen.name not in CLUSTERS:
            if gen.name in PREFIX:
                gen = type(gen)(k)
            for group in missing:
                start = time.perf_counter()
                if gen.name == "mean":
                    norm = c.variant.parameters["norm_pre"]
                    pre = c.variant.parts.norm_pre
                    weights = gen(self._sum(group, norm, pre, c.shots, c.seed)[0]).weights
                else:
                    weights = gen.of_class(self.training(group, c), c.seed or 0)
                self.made[self._made_key(group, c)] = weights, time.perf_counter() - start
            return
        width = 4 * self.x.shape[1]
        batch: list[Group] = []
        for i, group in enumerate(missing):
            batch.append(group)
            following = [*batch, *missing[i + 1 : i + 2]]
            held = width * sum(self.count(g, c.shots) for g in following)
            if i + 1 == len(missing) or held > self.chunk_bytes:
                start = time.perf_counter()
                xs = [self.training(g, c) for g in batch]
                centroids = kmeans_classes(xs, k, seed=c.seed or 0, engine=gen.engine)
                seconds = time.perf_counter() - start
                total = sum(map(len, xs))
                for g, x, weights in zip(batch, xs, centroids, strict=True):
                    self.made[self._made_key(g, c)] = weights, seconds * len(x) / total
                batch = []

    def _make_medoids(self, same: list[Configuration]) -> None:
        """k-medoids for all k and seeds from one matrix of distances a class."""
        ks = [c.variant.k for c in same]
        for group in dict.fromkeys(g for c in same for g in self.groups(c.task)):
            start = time.perf_counter()
            x = self.training(group, same[0])
            medoids = Medoids(x, min(ks), max(ks))
            shared = time.perf_counter() - start
            for c in same:
                key = self._made_key(group, c)
                if key not in self.made:
                    start = time.perf_counter()
                    weights = x[medoids.choose(c.variant.k, c.seed or 0)]
                    self.made[key] = weights, shared + time.perf_counter() - start

    def _clustered(self, group: Group, c: Configuration) -> tuple[Moments, float]:
        """Counts and sums of the clusters of a class."""
        key = self._made_key(group, c)
        if key not in self.clusters:
            start = time.perf_counter()
            x, (centroids, seconds) = self.training(group, c), self.made[key]
            moments = Moments.of(x, *clusters_of(x, centroids), gram="none")
            self.clusters[key] = moments, seconds + time.perf_counter() - start
        return self.clusters[key]

    # Sums

    def _sum(self, group: Group, norm: str, module, shots, seed) -> tuple[Moments, float]:
        """Count and sum of a label's training rows."""
        key = norm, group, shots, seed
        if key not in self.sums:
            start = time.perf_counter()
            x = module(self.x[self.rows(group, shots, seed)])
            moments = Moments.of(x, torch.zeros(len(x), dtype=torch.int64), 1, gram="none")
            self.sums[key] = moments, time.perf_counter() - start
        return self.sums[key]

    def _gram(self, c: int, norm: str, module) -> tuple[Tensor, float]:
        """Σ z zᵀ over a class, `(d, d)` float64; the last ones are kept."""
        key = norm, c
        if key not in self.grams:
            start = time.perf_counter()
            x = module(self.x[self.slices[c]])
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
                    gram, spent = self._gram(of_class, norm, module)
                    total, seconds = total + gram, seconds + spent
            else:
                start = time.perf_counter()
                for group in groups:
                    x = self.training(group, c)
                    zeros = torch.zeros(len(x), dtype=torch.int64)
                    total = total + Moments.of(x, zeros, 1).gram
                seconds = time.perf_counter() - start
            self.task_gram = key, total, seconds
        return self.task_gram[1:]

    # NORM_post, NORM_inf, AGG

    def _class_scores(self, unit: list[Configuration]) -> dict[tuple, tuple[Tensor, float, float]]:
        """Scores of classes by inner product `(N_test,)`, for AGG max; seconds of these, of GEN.

        NORM_post l2 scales columns of the products, NORM_inf l2 their rows, which changes no
        argmax. Keys: `generator_key`, NORM_post, the class.
        """
        unit = [c for c in unit if is_shared(c)]
        # Whatever is left to do: the proxies shall not depend on it.
        largest: dict[tuple, int] = {}
        for c in unit:
            key = self._made_key((), c)
            largest[key] = max(largest.get(key, 0), c.variant.k or 0)
        self._make_medoids([c for c in unit if c.variant.parts.gen.name == "kmedoids"])
        for key, same in grouped(unit, lambda c: self._made_key((), c)).items():
            if same[0].variant.parts.gen.name in (*PER_CLASS, *CLUSTERS):
                groups = [
                    g for task in dict.fromkeys(c.task for c in same) for g in self.groups(task)
                ]
                self._make(groups, same[0], largest[key])
        scores: dict[tuple, tuple[Tensor, float, float]] = {}
        by_class = [c for c in unit if _by_class(c)]
        for same in grouped(by_class, lambda c: self._made_key((), c)).values():
            wanted = {
                (generator_key(c), c.variant.parameters["norm_post"], c.variant.k) for c in same
            }
            made = {
                g: self.made[self._made_key(g, same[0])]
                for task in dict.fromkeys(c.task for c in same)
                for g in self.groups(task)
            }
            for batch in _wide_enough(made):
                start = time.perf_counter()
                found = self._best_products([made[g][0] for g in batch], wanted)
                seconds = time.perf_counter() - start
                columns = sum(len(made[g][0]) for g in batch)
                for (key, post, _), best in found.items():
                    for group, of_group in zip(batch, best, strict=True):
                        weights, gen_seconds = made[group]
                        share = seconds * len(weights) / columns
                        scores[key, post, group] = of_group, share, gen_seconds
        return scores

    def _best_products(
        self, of_groups: list[Tensor], wanted: set[tuple]
    ) -> dict[tuple, list[Tensor]]:
        """For each of `wanted` the largest products with the proxies of each group."""
        weights = of_groups[0] if len(of_groups) == 1 else torch.cat(of_groups)
        sizes = [len(w) for w in of_groups]
        scales = (1 / weights.norm(dim=1).clamp_min(1e-12)).split(sizes)
        found: dict[tuple, list[list[Tensor]]] = {key: [[] for _ in sizes] for key in wanted}
        for z in self.test_x.split(self._block_rows(len(weights), None)):
            for i, products in enumerate((z @ weights.T).split(sizes, 1)):
                for key in wanted:
                    columns = products[:, : key[2]]
                    if key[1] == "l2":
                        columns = columns * scales[i][: key[2]]
                    found[key][i].append(columns.amax(1))
        return {key: [torch.cat(parts) for parts in lists] for key, lists in found.items()}

    def _after_gen(
        self, proxies: Proxies, same: list[Configuration], rows: Tensor, num_classes: int
    ) -> dict[str, tuple[Tensor, float]]:
        """Labels of the test rows for every NORM_post, NORM_inf and AGG, and their seconds."""
        classifier = self.embeddings.classifier
        classifier = None if classifier is None else tensor(classifier)
        found, biased = {}, bool(proxies.bias.any())
        for of_post in grouped(
            same, lambda c: (_text(c, "norm_post"), _text(c, "as_published"))
        ).values():
            norm_post = of_post[0].variant.parts.norm_post
            start = time.perf_counter()
            weights = norm_post.of_proxies(proxies.weights, proxies.classes, classifier)
            spent = time.perf_counter() - start
            done = Proxies(weights, proxies.bias, proxies.classes)

            for (inf, _), of_agg in grouped(of_post, lambda c: _scored_alike(c, biased)).items():
                norm_inf = NoNorm() if inf == "none" else of_agg[0].variant.parts.norm_inf
                for c, (labels, seconds) in zip(
                    of_agg, self._labels(done, of_agg, norm_inf, rows, num_classes), strict=True
                ):
                    found[c.id] = labels, seconds + spent
        return found

    def _labels(
        self, proxies: Proxies, same: list[Configuration], norm_inf, rows: Tensor, num_classes: int
    ) -> list[tuple[Tensor, float]]:
        """For configurations that share one matrix of products or distances."""
        aggs = [c.variant.parts.agg for c in same]
        start = time.perf_counter()
        blocks = rows.split(self._block_rows(len(proxies.weights), aggs[0]))
        if isinstance(aggs[0], NearestProxies):
            nearest = NearestProxies(max(agg.m for agg in aggs), aggs[0].distance)
            parts = [nearest.nearest(norm_inf(self.test_x[b]), proxies.weights) for b in blocks]
            far, places = (torch.cat(part) for part in zip(*parts, strict=True))
            classes = proxies.classes[places]
            shared, results = time.perf_counter() - start, []
            for agg in aggs:
                start = time.perf_counter()
                scores = agg.vote(far[:, : agg.m], classes[:, : agg.m], num_classes)
                labels = scores.to(self.test_x.dtype).argmax(1)
                results.append((labels, shared + time.perf_counter() - start))
            return results
        labels = [
            aggs[0](norm_inf(self.test_x[b]), *proxies[:2], proxies.classes, num_classes).argmax(1)
            for b in blocks
        ]
        return [(torch.cat(labels), time.perf_counter() - start)] * len(same)

    def _block_rows(self, proxies: int, agg) -> int:
        rows = BLOCK // max(proxies, 1)
        if getattr(agg, "distance", None) in ("manhattan", "chebyshev"):
            rows //= 8
        return max(1, min(rows, self.chunk_bytes // (8 * (proxies + 2 * self.x.shape[1]))))

    # Without sharing

    def _alone(self, groups: list[Group], same: list[Configuration], rows: Tensor) -> list[tuple]:
        """NORM_pre that learns, a λ by held-out samples, auto: as `imprint` does it."""
        places = [self.rows(g, same[0].shots, same[0].seed) for g in groups]
        places = [torch.arange(p.start, p.stop) if isinstance(p, slice) else p for p in places]
        y = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(p) for p in places]))
        places = torch.cat(places)
        order = self.order[places].argsort()
        x, y = self.x[places[order]], y[order]
        seed, results = same[0].seed or 0, []
        classifier = self.embeddings.classifier
        classifier = None if classifier is None else tensor(classifier)
        for of_inf in grouped(same, lambda c: _text(c, "norm_inf")).values():
            parts = of_inf[0].variant.parts
            start = time.perf_counter()
            if isinstance(parts, Auto):
                head = imprint_parts(
                    x, y, parts, len(groups), seed=seed, classifier=classifier, calibrate=False
                )
                gen = time.perf_counter() - start
                start = time.perf_counter()
                labels = [head.scores(self.test_x[b]).argmax(1) for b in self._wide(rows, head)]
                chosen = {n: v for n, v in head.settings.items() if n in _CHOSEN}
                if "lam" in chosen:
                    chosen["lam"] = str(chosen["lam"])
                seconds = time.perf_counter() - start
                results.append((of_inf[0], torch.cat(labels), seconds, gen, chosen))
                continue
            raw = replace(parts, norm_post=NORMS["none"]())
            head = make_head(x, y, raw, len(groups), seed=seed, classifier=classifier)
            gen = time.perf_counter() - start
            proxies = Proxies(head.proxies.data, head.bias, head.proxy_classes)
            for c in of_inf:
                start = time.perf_counter()
                post = c.variant.parts.norm_post
                weights = post.of_proxies(proxies.weights, proxies.classes, classifier)
                labels = [
                    c.variant.parts.agg(
                        head.norm_inf(self.test_x[b]),
                        weights,
                        proxies.bias,
                        proxies.classes,
                        len(groups),
                    ).argmax(1)
                    for b in self._wide(rows, head)
                ]
                results.append((c, torch.cat(labels), time.perf_counter() - start, gen, {}))
        return results

    def _wide(self, rows: Tensor, head) -> tuple[Tensor, ...]:
        width = self.x.shape[1] + 2 * head.feature_dim
        return rows.split(max(1, self.chunk_bytes // (4 * width)))


_SUMS = ("counts", "sums")
# Columns that `auto` fills with what it has chosen.
_CHOSEN = ("norm_pre", "gen", "k", "norm_post", "norm_inf", "agg", "lam", "shrinkage", "engine")
_CHOSEN = (*_CHOSEN, "projection_dim", "width", "prior", "intercept")


def _wide_enough(made: dict[Group, tuple[Tensor, float]]) -> Iterator[list[Group]]:
    """Groups by `COLUMNS` proxies or more: few columns of a product take as long as many."""
    batch, columns = [], 0
    for group, (weights, _) in made.items():
        batch.append(group)
        columns += len(weights)
        if columns >= COLUMNS:
            yield batch
            batch, columns = [], 0
    if batch:
        yield batch


def _by_class(c: Configuration) -> bool:
    """Whether a class's score depends on that class alone, by inner products."""
    p = c.variant.parameters
    scaled = p["norm_post"] in SCALINGS and p["norm_inf"] in SCALINGS
    return p["gen"] in PER_CLASS and p["agg"] == "max" and scaled


def _scored_alike(c: Configuration, biased: bool) -> tuple[str, str]:
    """NORM_inf, and what tells scores or distances from others. The argmax of plain inner products
    does not see the length of a sample."""
    p = c.variant.parameters
    if p["agg"] == "max":
        return "none" if not biased and p["norm_inf"] in SCALINGS else p["norm_inf"], "max"
    return p["norm_inf"], "mnn " + p["distance"] if p["agg"] == "mnn" else c.id


def _text(c: Configuration, name: str) -> Any:
    return c.variant.parameters.get(name)


def _measured(labels: Tensor, y: Tensor, num_classes: int) -> dict[str, float]:
    """Accuracy and macro F1, fractions; a class that is neither there nor predicted counts not."""
    confusion = torch.bincount(y * num_classes + labels, minlength=num_classes**2)
    confusion = confusion.reshape(num_classes, num_classes).double()
    right, sizes = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    f1 = (2 * right / sizes)[sizes > 0]
    return {"accuracy": (right.sum() / len(y)).item(), "macro_f1": f1.mean().item()}
