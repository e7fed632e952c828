"""From proxies to labels in a sweep: NORM_post, NORM_inf and AGG, for many configurations at once.

A class's scores by inner product serve every task with that class; one matrix of distances serves
every m and every kind of vote.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from imprint_pl.experiments.sweep.grid import Configuration
from imprint_pl.experiments.sweep.plan import PER_CLASS, generator_key, grouped
from imprint_pl.experiments.sweep.proxies import SharedProxies
from imprint_pl.experiments.sweep.samples import Group, Samples
from imprint_pl.numerics.values import SMALLEST_LENGTH
from imprint_pl.parts.agg.nearest import BLOCK, NearestProxies
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.norm.base import NoNorm

SCALINGS = ("none", "l2")
# Of a product with test rows, at least.
COLUMNS = 256


def by_class(c: Configuration) -> bool:
    """Whether a class's score depends on that class alone, by inner products."""
    p = c.variant.parameters
    scaled = p["norm_post"] in SCALINGS and p["norm_inf"] in SCALINGS
    return p["gen"] in PER_CLASS and p["agg"] == "max" and scaled


def class_scores(
    shared: SharedProxies, unit: list[Configuration], chunk_bytes: int
) -> dict[tuple, tuple[Tensor, float, float]]:
    """Scores of classes by inner product `(N_test,)`, for AGG max; seconds of these, of GEN.

    NORM_post l2 scales columns of the products, NORM_inf l2 their rows, which changes no argmax.
    Keys: `generator_key`, NORM_post, the class.
    """
    scores, test_x = {}, shared.samples.test_x
    alike = grouped(filter(by_class, unit), lambda c: shared.key((), c))
    for same in alike.values():
        wanted = {(generator_key(c), c.variant.parameters["norm_post"], c.variant.k) for c in same}
        made = {
            group: shared.made[shared.key(group, same[0])]
            for task in dict.fromkeys(c.task for c in same)
            for group in shared.samples.groups(task)
        }
        for batch in _wide_enough(made):
            start = time.perf_counter()
            found = _best_products([made[g][0] for g in batch], wanted, test_x, chunk_bytes)
            seconds = time.perf_counter() - start
            columns = sum(len(made[g][0]) for g in batch)
            for (key, post, _), best in found.items():
                for group, of_group in zip(batch, best, strict=True):
                    weights, gen_seconds = made[group]
                    share = seconds * len(weights) / columns
                    scores[key, post, group] = of_group, share, gen_seconds
    return scores


def _best_products(
    of_groups: list[Tensor], wanted: set[tuple], test_x: Tensor, chunk_bytes: int
) -> dict[tuple, list[Tensor]]:
    """For each of `wanted` the largest products with the proxies of each group."""
    weights = of_groups[0] if len(of_groups) == 1 else torch.cat(of_groups)
    sizes = [len(w) for w in of_groups]
    scales = (1 / weights.norm(dim=1).clamp_min(SMALLEST_LENGTH)).split(sizes)
    found: dict[tuple, list[list[Tensor]]] = {key: [[] for _ in sizes] for key in wanted}
    for z in test_x.split(_block_rows(weights, None, chunk_bytes)):
        for i, products in enumerate((z @ weights.T).split(sizes, 1)):
            for key in wanted:
                columns = products[:, : key[2]]
                if key[1] == "l2":
                    columns = columns * scales[i][: key[2]]
                found[key][i].append(columns.amax(1))
    return {key: [torch.cat(parts) for parts in lists] for key, lists in found.items()}


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


def labels_of(
    samples: Samples,
    proxies: Proxies,
    same: list[Configuration],
    rows: Tensor,
    num_classes: int,
    chunk_bytes: int,
) -> dict[str, tuple[Tensor, float]]:
    """Labels of the test rows, and the seconds, for configurations that share their proxies: by
    their ids, for every NORM_post, NORM_inf and AGG."""
    found, biased = {}, bool(proxies.bias.any())
    for of_post in grouped(same, _post).values():
        norm_post = of_post[0].variant.parts.norm_post
        start = time.perf_counter()
        weights = norm_post.of_proxies(proxies.weights, proxies.classes, samples.classifier)
        spent = time.perf_counter() - start
        done = Proxies(weights, proxies.bias, proxies.classes)

        for (inf, _), of_agg in grouped(of_post, lambda c: _scored_alike(c, biased)).items():
            norm_inf = NoNorm() if inf == "none" else of_agg[0].variant.parts.norm_inf
            results = _labels(samples, done, of_agg, norm_inf, rows, num_classes, chunk_bytes)
            for c, (labels, seconds) in zip(of_agg, results, strict=True):
                found[c.id] = labels, seconds + spent
    return found


def _labels(
    samples: Samples,
    proxies: Proxies,
    same: list[Configuration],
    norm_inf,
    rows: Tensor,
    num_classes: int,
    chunk_bytes: int,
) -> list[tuple[Tensor, float]]:
    """For configurations that share one matrix of products or distances."""
    aggs = [c.variant.parts.agg for c in same]
    start = time.perf_counter()
    test_x = samples.test_x
    blocks = rows.split(_block_rows(proxies.weights, aggs[0], chunk_bytes))
    if isinstance(aggs[0], NearestProxies):
        distances = NearestProxies(1, aggs[0].distance)
        # Selected for each m by itself: of proxies that are as far, another number has others.
        parts = {agg.m: [] for agg in aggs}
        for b in blocks:
            far = distances.far(norm_inf(test_x[b]), proxies.weights)
            for m, of_m in parts.items():
                of_m.append(NearestProxies(m).nearest_of(far))
        shared, results = time.perf_counter() - start, []
        for agg in aggs:
            start = time.perf_counter()
            far, places = (torch.cat(part) for part in zip(*parts[agg.m], strict=True))
            scores = agg.vote(far, proxies.classes[places], num_classes)
            labels = scores.to(test_x.dtype).argmax(1)
            results.append((labels, shared + time.perf_counter() - start))
        return results
    labels = [
        aggs[0](norm_inf(test_x[b]), *proxies[:2], proxies.classes, num_classes).argmax(1)
        for b in blocks
    ]
    return [(torch.cat(labels), time.perf_counter() - start)] * len(same)


def _block_rows(weights: Tensor, agg, chunk_bytes: int) -> int:
    proxies, dim = weights.shape
    rows = BLOCK // max(proxies, 1)
    if getattr(agg, "distance", None) in ("manhattan", "chebyshev"):
        rows //= 8
    return max(1, min(rows, chunk_bytes // (8 * (proxies + 2 * dim))))


def _post(c: Configuration) -> tuple:
    return c.variant.parameters["norm_post"], c.variant.parameters.get("as_published")


def _scored_alike(c: Configuration, biased: bool) -> tuple[str, str]:
    """NORM_inf, and what tells scores or distances from others. The argmax of plain inner products
    does not see the length of a sample."""
    p = c.variant.parameters
    if p["agg"] == "max":
        return "none" if not biased and p["norm_inf"] in SCALINGS else p["norm_inf"], "max"
    return p["norm_inf"], "mnn " + p["distance"] if p["agg"] == "mnn" else c.id
