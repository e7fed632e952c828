"""Runs the configurations of a sweep that share no work: a NORM_pre that learns, λ by held-out
samples, auto, a selection of typical samples, and users' own parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imprint_pl.experiments.sweep.grid import Configuration, cells
from imprint_pl.experiments.sweep.plan import grouped
from imprint_pl.experiments.sweep.samples import Group, Samples
from imprint_pl.method.auto import choose
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.pipeline import Request, make_head
from imprint_pl.method.recipes import AUTO, Auto
from imprint_pl.method.selection import weibull_typical
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.norm.base import NoNorm

# Entries of a head's settings that are not parameters chosen by `auto`.
NOT_CHOSEN = ("recipe", "seed", "chosen_by", "chosen_lam", "layer_widths")


class Result(NamedTuple):
    """The labels of a configuration's test rows, and further columns of its row."""

    configuration: Configuration
    labels: Tensor
    seconds: float
    gen_seconds: float
    columns: dict[str, Any]


def alone(
    samples: Samples,
    groups: list[Group],
    same: list[Configuration],
    rows: Tensor,
    chunk_bytes: int,
) -> list[Result]:
    """Runs configurations of one task and one GEN in the same way as `imprint`.

    The further columns are the parameters that `auto` chose, and the number of samples.
    """
    drawn = [samples.rows(g, same[0].shots, same[0].seed) for g in groups]
    of_group = [torch.arange(p.start, p.stop) if isinstance(p, slice) else p for p in drawn]
    y = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(p) for p in of_group]))
    places = torch.cat(of_group)
    order = samples.rank[places].argsort()
    x, y = samples.x[places[order]], y[order]
    if same[0].variant.weibull is not None:
        typical = weibull_typical(x, y, *same[0].variant.weibull)
        x, y = x[typical], y[typical]
    size = {"num_train": len(y)}
    seed = same[0].seed or 0
    results: list[Result] = []
    request = Request(len(groups), seed=seed, classifier=samples.classifier)
    for of_inf in grouped(same, _norm_inf).values():
        parts = of_inf[0].variant.parts
        start = time.perf_counter()
        if isinstance(parts, Auto):
            # Not by `imprint`: it needs the classifier, and only its quantiles are known here.
            found = choose(x, y, request, parts.layer_widths, parts.metric, parts.class_weight)
            head = make_head(x, y, found.parts, request).head
            gen = time.perf_counter() - start
            start = time.perf_counter()
            labels = [
                head.scores(z).argmax(1) for z in _blocks(samples.test_x, rows, head, chunk_bytes)
            ]
            chosen = cells({n: v for n, v in head.settings.items() if n not in NOT_CHOSEN})
            seconds = time.perf_counter() - start
            results.append(Result(of_inf[0], torch.cat(labels), seconds, gen, chosen | size))
            continue
        raw = replace(parts, norm_post=NoNorm())
        head = make_head(x, y, raw, request).head
        gen = time.perf_counter() - start
        proxies = Proxies(head.proxies.data, head.bias, head.proxy_classes)
        for c in of_inf:
            start = time.perf_counter()
            of_c = c.variant.recipe
            weights = of_c.norm_post.of_proxies(
                proxies.weights, proxies.classes, samples.classifier
            )
            labels = [
                of_c.agg(
                    head.norm_inf(z),
                    weights,
                    proxies.bias,
                    proxies.classes,
                    len(groups),
                ).argmax(1)
                for z in _blocks(samples.test_x, rows, head, chunk_bytes)
            ]
            seconds = time.perf_counter() - start
            results.append(Result(c, torch.cat(labels), seconds, gen, size))
    return results


def _norm_inf(c: Configuration) -> str:
    """Return a text that identifies the NORM_inf of a configuration."""
    if isinstance(c.variant.parts, Auto):
        return AUTO
    return f"{c.variant.parameters['norm_inf']} {c.variant.keys['norm_inf']}"


def _blocks(
    test_x: Tensor, rows: Tensor, head: ImprintedHead, chunk_bytes: int
) -> Iterator[Tensor]:
    width = test_x.shape[1] + 2 * head.feature_dim
    return (test_x[block] for block in rows.split(max(1, chunk_bytes // (4 * width))))
