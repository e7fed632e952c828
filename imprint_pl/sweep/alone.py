"""What shares nothing in a sweep: NORM_pre that learns, λ by held-out samples, auto."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imprint_pl.gen import Proxies
from imprint_pl.imprinting import imprint_parts
from imprint_pl.norm import NORMS
from imprint_pl.pipeline import make_head
from imprint_pl.recipes import Auto
from imprint_pl.sweep.grid import Configuration
from imprint_pl.sweep.plan import grouped
from imprint_pl.sweep.samples import Group, Samples

# Columns that `auto` fills with what it has chosen.
CHOSEN = ("norm_pre", "gen", "k", "norm_post", "norm_inf", "agg", "lam", "shrinkage", "engine")
CHOSEN = (*CHOSEN, "projection_dim", "width", "prior", "intercept")


def alone(
    samples: Samples,
    groups: list[Group],
    same: list[Configuration],
    rows: Tensor,
    chunk_bytes: int,
) -> list[tuple[Configuration, Tensor, float, float, dict[str, Any]]]:
    """Configurations of one task and one GEN, as `imprint` does them.

    Returns:
        For each the labels of the test rows, seconds of inference and of GEN, and the parameters
        that `auto` has chosen.
    """
    places = [samples.rows(g, same[0].shots, same[0].seed) for g in groups]
    places = [torch.arange(p.start, p.stop) if isinstance(p, slice) else p for p in places]
    y = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(p) for p in places]))
    places = torch.cat(places)
    order = samples.rank[places].argsort()
    x, y = samples.x[places[order]], y[order]
    seed, results = same[0].seed or 0, []
    classifier = samples.classifier
    for of_inf in grouped(same, lambda c: c.variant.parameters.get("norm_inf")).values():
        parts = of_inf[0].variant.parts
        start = time.perf_counter()
        if isinstance(parts, Auto):
            head = imprint_parts(
                x, y, parts, len(groups), seed=seed, classifier=classifier, calibrate=False
            )
            gen = time.perf_counter() - start
            start = time.perf_counter()
            labels = [
                head.scores(z).argmax(1) for z in _blocks(samples.test_x, rows, head, chunk_bytes)
            ]
            chosen = {n: v for n, v in head.settings.items() if n in CHOSEN}
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
                    head.norm_inf(z),
                    weights,
                    proxies.bias,
                    proxies.classes,
                    len(groups),
                ).argmax(1)
                for z in _blocks(samples.test_x, rows, head, chunk_bytes)
            ]
            results.append((c, torch.cat(labels), time.perf_counter() - start, gen, {}))
    return results


def _blocks(test_x: Tensor, rows: Tensor, head, chunk_bytes: int) -> Iterator[Tensor]:
    width = test_x.shape[1] + 2 * head.feature_dim
    return (test_x[block] for block in rows.split(max(1, chunk_bytes // (4 * width))))
