"""Every kind of row of the reference implementation beyond GEN with the maximum, through
`imprint` as a user calls it. The worst deviation of each group is printed (`pytest -s`).
"""

import csv
from collections import defaultdict

import pytest
import torch
from places import ACCEPTANCE
from safetensors.torch import load_file

from imprint_pl import imprint
from imprint_pl.method.head import ImprintedHead
from imprint_pl.parts.agg.nearest import NearestProxies
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.norm.l2 import L2

TASKS = {"all": range(10), "even": range(0, 10, 2), "odd": range(1, 10, 2), "short": range(3)}


def rows():
    if not ACCEPTANCE.is_file():
        return []
    with open(ACCEPTANCE.with_name("reference_accuracy.csv")) as file:
        return list(csv.DictReader(file))


def task(acceptance, name):
    """The task's embeddings and labels 0..C−1: train x, y, test x, y."""
    result = []
    for split in ("train", "test"):
        x, y = acceptance[f"{split}_embeddings"], acceptance[f"{split}_labels"]
        kept = torch.isin(y, torch.tensor(TASKS[name]))
        result += [x[kept], torch.searchsorted(torch.tensor(TASKS[name]), y[kept])]
    return result


def percent(head, x, y):
    return 100 * (head(x).argmax(1) == y).double().mean().item()


def parameters(row):
    """A row of the reference as keywords of `imprint`."""
    names = ["norm_pre", "gen", "norm_post", "norm_inf", "agg"]
    given = {name: row[name] for name in names}
    if row["agg"] == "mnn":
        given |= {"m": int(row["m"]), "distance": row["distance"], "votes": row["weighting"]}
    if row["agg"] == "mnn" or row["norm_post"] == "quantile":
        given["as_published"] = True
    if row["gen"] in ("ls", "kls"):
        given["lam"] = float(row["lambda"])
    return given


def report(deviations):
    for group, values in sorted(deviations.items()):
        print(f"\n{group}: {len(values)} rows, worst {max(values, key=abs):+.4f} points", end="")


@pytest.mark.slow
def test_quantile_rows_are_matched(acceptance):
    deviations = defaultdict(list)
    for row in rows():
        if row["norm_post"] == "quantile":
            x, y, x_test, y_test = task(acceptance, row["task"])
            head = imprint(x, y, "qi", **parameters(row))
            deviations[f"{row['gen']} quantile"].append(
                percent(head, x_test, y_test) - float(row["accuracy"])
            )
    report(deviations)
    assert sum(map(len, deviations.values())) == 24
    assert max(abs(v) for values in deviations.values() for v in values) <= 0.1


def test_nearest_proxy_rows_on_the_references_own_proxies_are_matched(acceptance):
    file = load_file(ACCEPTANCE.with_name("reference_proxies_short_kmeans20.safetensors"))
    proxies = Proxies(file["proxies"], torch.zeros(60), file["proxy_labels"].long())
    _, _, x_test, y_test = task(acceptance, "short")
    deviations = defaultdict(list)
    for row in rows():
        if row["agg"] == "mnn" and row["gen"] == "kmeans":
            agg = NearestProxies(
                int(row["m"]), row["distance"], row["weighting"], as_published=True
            )
            head = ImprintedHead(L2(), agg).fill(proxies, 3)
            deviations[f"{row['distance']} {row['weighting']}"].append(
                percent(head, x_test, y_test) - float(row["accuracy"])
            )
    report(deviations)
    assert sum(map(len, deviations.values())) == 40
    assert max(abs(v) for values in deviations.values() for v in values) <= 0.001


@pytest.mark.slow
def test_nearest_neighbour_rows_over_all_samples_and_over_means_are_matched(acceptance):
    deviations = defaultdict(list)
    for row in rows():
        if row["agg"] == "mnn" and row["gen"] in ("all", "mean"):
            x, y, x_test, y_test = task(acceptance, row["task"])
            head = imprint(x, y, "qi", **parameters(row))
            deviations[f"{row['gen']} {row['m']}-nn"].append(
                percent(head, x_test, y_test) - float(row["accuracy"])
            )
    report(deviations)
    assert sum(map(len, deviations.values())) == 8
    assert max(abs(v) for values in deviations.values() for v in values) <= 0.1


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("qi", {}, 78.28),
        ("hosoda", {"as_published": True}, 78.48),
        ("hosoda", {}, 78.18),
        ("janson", {}, 77.24),
        ("ls", {}, 87.14),
        ("knn", {}, 85.56),
    ],
)
def test_recipes_score_what_is_known_of_them(acceptance, recipe, overrides, expected):
    x, y, x_test, y_test = task(acceptance, "all")
    head = imprint(x, y, recipe, **overrides)
    assert percent(head, x_test, y_test) == pytest.approx(expected, abs=0.1)


@pytest.mark.slow
def test_ties_by_the_nearer_proxy_are_no_worse_than_by_the_lowest_label(acceptance):
    x, y, x_test, y_test = task(acceptance, "all")
    keywords = dict(m=5, distance="euclidean", votes="uniform")
    ours = percent(imprint(x, y, "knn", **keywords), x_test, y_test)
    published = percent(imprint(x, y, "knn", **keywords, as_published=True), x_test, y_test)
    print(f"\nties: nearer proxy {ours:.2f}, lowest label {published:.2f}", end="")
    assert ours >= published
