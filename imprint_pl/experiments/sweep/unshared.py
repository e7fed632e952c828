"""What shares nothing in a sweep: NORM_pre that learns, λ by held-out samples, auto, a choice of
typical samples, parts of one's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imprint_pl.experiments.sweep.grid import Configuration
from imprint_pl.experiments.sweep.plan import grouped
from imprint_pl.experiments.sweep.samples import Group, Samples
from imprint_pl.method.auto import choose
from imprint_pl.method.pipeline import Request, make_head
from imprint_pl.method.recipes import AUTO, Auto
from imprint_pl.method.selection import weibull_typical
from imprint_pl.parts.by_name import describe
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.norm.table import NORMS

# What a head's settings have besides the parameters that `auto` has chosen.
NOT_CHOSEN = ("recipe", "seed", "chosen_by", "chosen_lam")


def alone(
    samples: Samples,
    groups: list[Group],
    same: list[Configuration],
    rows: Tensor,
    chunk_bytes: int,
) -> list[tuple[Configuration, Tensor, float, float, dict[str, Any]]]:
    """Configurations of one task and one GEN, as `imprint` does them.

    Returns:
        For each the labels of the test rows, seconds of inference and of GEN, and further columns:
        the parameters that `auto` has chosen, the number of samples.
    """
    places = [samples.rows(g, same[0].shots, same[0].seed) for g in groups]
    places = [torch.arange(p.start, p.stop) if isinstance(p, slice) else p for p in places]
    y = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(p) for p in places]))
    places = torch.cat(places)
    order = samples.rank[places].argsort()
    x, y = samples.x[places[order]], y[order]
    if same[0].variant.weibull is not None:
        typical = weibull_typical(x, y, *same[0].variant.weibull)
        x, y = x[typical], y[typical]
    size = {"num_train": len(y)}
    seed, results = same[0].seed or 0, []
    request = Request(len(groups), seed=seed, classifier=samples.classifier)
    for of_inf in grouped(same, _norm_inf).values():
        parts = of_inf[0].variant.parts
        start = time.perf_counter()
        if isinstance(parts, Auto):
            # Not by `imprint`, which takes a classifier and not its quantiles.
            head = make_head(x, y, choose(x, y, request).parts, request).head
            gen = time.perf_counter() - start
            start = time.perf_counter()
            labels = [
                head.scores(z).argmax(1) for z in _blocks(samples.test_x, rows, head, chunk_bytes)
            ]
            chosen = {n: v for n, v in head.settings.items() if n not in NOT_CHOSEN}
            if "lam" in chosen:
                chosen["lam"] = str(chosen["lam"])
            seconds = time.perf_counter() - start
            results.append((of_inf[0], torch.cat(labels), seconds, gen, chosen | size))
            continue
        raw = replace(parts, norm_post=NORMS["none"]())
        head = make_head(x, y, raw, request).head
        gen = time.perf_counter() - start
        proxies = Proxies(head.proxies.data, head.bias, head.proxy_classes)
        for c in of_inf:
            start = time.perf_counter()
            post = c.variant.parts.norm_post
            weights = post.of_proxies(proxies.weights, proxies.classes, samples.classifier)
            labels = [
                c.variant.parts.agg(
                    head.norm_inf(z),
                    weights,
                    proxies.bias,
                    proxies.classes,
                    len(groups),
                ).argmax(1)
                for z in _blocks(samples.test_x, rows, head, chunk_bytes)
            ]
            results.append((c, torch.cat(labels), time.perf_counter() - start, gen, size))
    return results


def _norm_inf(c: Configuration) -> str:
    """What tells NORM_inf of one configuration from that of another."""
    if isinstance(c.variant.parts, Auto):
        return AUTO
    return f"{c.variant.parameters['norm_inf']} {describe(c.variant.parts.norm_inf)}"


def _blocks(test_x: Tensor, rows: Tensor, head, chunk_bytes: int) -> Iterator[Tensor]:
    width = test_x.shape[1] + 2 * head.feature_dim
    return (test_x[block] for block in rows.split(max(1, chunk_bytes // (4 * width))))
