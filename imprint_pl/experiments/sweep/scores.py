"""Computes labels from proxies in a sweep: NORM_post, NORM_inf and AGG for many configurations.

The scores of a class by inner product are used for every task with that class. One matrix of
distances is used for every m and every kind of vote.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprint_pl.experiments.sweep.grid import Configuration
from imprint_pl.experiments.sweep.plan import first_k, generator_key, grouped, is_per_class
from imprint_pl.experiments.sweep.proxies import SharedProxies
from imprint_pl.experiments.sweep.samples import Group, Samples
from imprint_pl.experiments.sweep.timed import Timed
from imprint_pl.parts.agg.nearest import BLOCK
from imprint_pl.parts.by_name import declared
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.norm.base import NoNorm, Norm

# Smallest number of proxies in a matrix product with the test rows.
COLUMNS = 256


class ClassScores(NamedTuple):
    """The scores of a class `(N_test,)`, the seconds that they took, and those of GEN."""

    scores: Tensor
    seconds: float
    gen_seconds: float


class Wanted(NamedTuple):
    """The scores to compute for each class: its proxies, and how NORM_post scales them."""

    generator: tuple[Hashable, ...]
    norm_post: str


class Scaled(NamedTuple):
    """How many proxies of a class count (all if `None`), and the NORM_post that scales them."""

    k: int | None
    norm_post: Norm


def by_class(c: Configuration) -> bool:
    """Whether the score of a class is an inner product that depends only on that class."""
    parts = c.variant.recipe
    scaled = declared(parts.norm_post, "row_scale") and declared(parts.norm_inf, "row_scale")
    return is_per_class(c) and bool(scaled) and bool(declared(parts.agg, "best_product"))


def class_scores(
    shared: SharedProxies, unit: list[Configuration], chunk_bytes: int
) -> dict[tuple[Wanted, Group], ClassScores]:
    """Compute scores of classes by inner product, for AGG max.

    NORM_post scales columns of the products. NORM_inf scales rows, which does not change labels.
    """
    scores, test_x = {}, shared.samples.test_x
    alike = grouped(filter(by_class, unit), lambda c: shared.key((), c))
    for same in alike.values():
        wanted = {wanted_of(c): Scaled(first_k(c), c.variant.recipe.norm_post) for c in same}
        made = {
            group: shared.made[shared.key(group, same[0])]
            for task in dict.fromkeys(c.task for c in same)
            for group in shared.samples.groups(task)
        }
        for batch in _wide_enough(made):
            start = time.perf_counter()
            found = _best_products([made[g].value for g in batch], wanted, test_x, chunk_bytes)
            seconds = time.perf_counter() - start
            columns = sum(len(made[g].value) for g in batch)
            for key, best in found.items():
                for group, of_group in zip(batch, best, strict=True):
                    weights, gen_seconds = made[group]
                    share = seconds * len(weights) / columns
                    scores[key, group] = ClassScores(of_group, share, gen_seconds)
    return scores


def wanted_of(c: Configuration) -> Wanted:
    """Return the key of a configuration's scores in the result of `class_scores`."""
    return Wanted(generator_key(c), c.variant.keys["norm_post"])


def _best_products(
    of_groups: list[Tensor], wanted: dict[Wanted, Scaled], test_x: Tensor, chunk_bytes: int
) -> dict[Wanted, list[Tensor]]:
    """Compute, for each of `wanted`, the largest products with the proxies of each group."""
    weights = of_groups[0] if len(of_groups) == 1 else torch.cat(of_groups)
    sizes = [len(w) for w in of_groups]
    scales = {
        key.norm_post: None if scale is None else scale.split(sizes)
        for key, scaled in wanted.items()
        for scale in [scaled.norm_post.row_scale(weights)]
    }
    found: dict[Wanted, list[list[Tensor]]] = {key: [[] for _ in sizes] for key in wanted}
    for z in test_x.split(_block_rows(weights, None, chunk_bytes)):
        for i, products in enumerate((z @ weights.T).split(sizes, 1)):
            for key, (k, _) in wanted.items():
                columns, scale = products[:, :k], scales[key.norm_post]
                if scale is not None:
                    columns = columns * scale[i][:k]
                found[key][i].append(columns.amax(1))
    return {key: [torch.cat(parts) for parts in lists] for key, lists in found.items()}


def _wide_enough(made: dict[Group, Timed[Tensor]]) -> Iterator[list[Group]]:
    """Yield lists of groups with at least `COLUMNS` proxies together, since a matrix product with
    few columns takes as long as one with many."""
    batch: list[Group] = []
    columns = 0
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
) -> dict[str, Timed[Tensor]]:
    """Compute the labels of the test rows, by id, for configurations that share their proxies and
    differ in NORM_post, NORM_inf and AGG."""
    found, biased = {}, bool(proxies.bias.any())
    for of_post in grouped(same, lambda c: c.variant.keys["norm_post"]).values():
        norm_post = of_post[0].variant.recipe.norm_post
        start = time.perf_counter()
        weights = norm_post.of_proxies(proxies.weights, proxies.classes, samples.classifier)
        spent = time.perf_counter() - start
        done = Proxies(weights, proxies.bias, proxies.classes)

        for alike, of_agg in grouped(of_post, lambda c: _alike(c, biased)).items():
            norm_inf = NoNorm() if alike.norm_inf is None else of_agg[0].variant.recipe.norm_inf
            results = _labels(samples, done, of_agg, norm_inf, rows, num_classes, chunk_bytes)
            for c, (labels, seconds) in zip(of_agg, results, strict=True):
                found[c.id] = Timed(labels, seconds + spent)
    return found


def _labels(
    samples: Samples,
    proxies: Proxies,
    same: list[Configuration],
    norm_inf: nn.Module,
    rows: Tensor,
    num_classes: int,
    chunk_bytes: int,
) -> list[Timed[Tensor]]:
    """Compute the labels for configurations that share one matrix of products or distances."""
    aggs: list[Any] = [c.variant.recipe.agg for c in same]
    start = time.perf_counter()
    test_x = samples.test_x
    blocks = rows.split(_block_rows(proxies.weights, aggs[0], chunk_bytes))
    if declared(aggs[0], "by_distance"):
        # Copy the AGG, since it may cache results for these proxies.
        first = copy.copy(aggs[0])
        # Select the nearest proxies for each m separately: among equally distant proxies, another
        # m may select different ones.
        of_m = {agg.m: agg for agg in aggs}
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {m: [] for m in of_m}
        for b in blocks:
            distances = first.far(norm_inf(test_x[b]), proxies.weights)
            for m, agg in of_m.items():
                parts[m].append(agg.nearest_of(distances))
        shared, results = time.perf_counter() - start, []
        for agg in aggs:
            start = time.perf_counter()
            far, places = (torch.cat(part) for part in zip(*parts[agg.m], strict=True))
            scores = agg.vote(far, proxies.classes[places], num_classes)
            labels = scores.to(test_x.dtype).argmax(1)
            results.append(Timed(labels, shared + time.perf_counter() - start))
        return results
    of_blocks = [
        aggs[0](norm_inf(test_x[b]), *proxies[:2], proxies.classes, num_classes).argmax(1)
        for b in blocks
    ]
    return [Timed(torch.cat(of_blocks), time.perf_counter() - start)] * len(same)


def _block_rows(weights: Tensor, agg: Any, chunk_bytes: int) -> int:
    proxies, dim = weights.shape
    rows = BLOCK // max(proxies, 1)
    if getattr(agg, "distance", None) in ("manhattan", "chebyshev"):
        rows //= 8
    return max(1, min(rows, chunk_bytes // (8 * (proxies + 2 * dim))))


class Alike(NamedTuple):
    """NORM_inf (`None` if it does not change labels), and what else identifies a matrix."""

    norm_inf: str | None
    scores: str


def _alike(c: Configuration, biased: bool) -> Alike:
    """Return a key; configurations with the same key share a matrix. NORM_inf is left out of it if
    it only scales samples, since this does not change the argmax of inner products."""
    parts, norm_inf = c.variant.recipe, c.variant.keys["norm_inf"]
    if declared(parts.agg, "best_product"):
        blind = not biased and declared(parts.norm_inf, "row_scale")
        return Alike(None if blind else norm_inf, "products")
    if declared(parts.agg, "by_distance"):
        return Alike(norm_inf, f"distances {parts.agg.distance}")
    return Alike(norm_inf, c.id)
