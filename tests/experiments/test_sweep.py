"""Sweeps: the shared work gives what each configuration gives alone, kills lose nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from places import ROOT
from safetensors.torch import save_file

from imprint_pl import imprint
from imprint_pl.cli import main
from imprint_pl.collapse import nc1, vci
from imprint_pl.data import ArrayDataset, Digits, EmbeddingDataModule, Splits
from imprint_pl.embedding import embed
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.report.read import read_results
from imprint_pl.experiments.results import COLUMNS, TIMES, Results
from imprint_pl.experiments.sweep import checked_sweep, sweep
from imprint_pl.method.recipes import RECIPES, UNNAMED
from imprint_pl.method.selection import draw_shots
from imprint_pl.parts.norm.l2 import L2

NORMS = ["none", "l2", "power"]
SLOTS = ("norm_pre", "gen", "norm_post", "norm_inf", "agg")
PARAMETERS = ("k", "m", "distance", "votes", "lam", "shrinkage", "projection_dim", "temperature")
PARAMETERS = (*PARAMETERS, "engine", "width", "prior", "intercept", "as_published")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits through the embedded backbone, as a file and as splits."""
    from imprint_pl.embedding.backbone import load_backbone

    folder = tmp_path_factory.mktemp("digits")
    embedded = embed(load_backbone("efficientnet_lite0", image_size=32), Digits(), folder)
    (x, y), (x_test, y_test) = embedded.arrays("train"), embedded.arrays("test")
    # 600 samples: every generator on them, many times over, takes seconds.
    x, y = x[:600], y[:600]
    path = folder / "digits.safetensors"
    arrays = {"train_embeddings": x, "train_labels": y}
    save_file(arrays | {"test_embeddings": x_test, "test_labels": y_test}, path)
    names = [str(c) for c in range(10)]
    return path, Splits(names, ArrayDataset(x, y), ArrayDataset(x_test, y_test))


def plan(path, grid, tasks=("all",), seeds=(0,), **more):
    data = {"name": "digits", "embeddings": str(path)}
    given = {"name": "s", "data": [data], "tasks": list(tasks), "grid": grid, "seeds": list(seeds)}
    return checked_sweep(given | more)


def keywords_of(row):
    """A row of the results as keywords of `imprint`."""
    unnamed = {name: row[name] for name in UNNAMED if not pd.isna(row.get(name))}
    if row["recipe"] == "auto":
        return {"recipe": "auto"} | unnamed
    names = [n for n in (*SLOTS, *PARAMETERS) if not pd.isna(row[n])]
    given = {n: row[n] for n in names}
    if "lam" in given and given["lam"] not in ("loo", "gcv", "holdout"):
        given["lam"] = float(given["lam"])
    for name in ("k", "m", "projection_dim"):
        if name in given:
            given[name] = int(given[name])
    if given.get("votes") != "softmax" and given["agg"] == "mnn":
        given.pop("temperature", None)
    return {"recipe": "qi"} | given | unnamed


def alone(splits, row):
    """The row's accuracy in percent by `imprint`, without any sharing; and the test samples."""
    options = {n: int(row[n]) for n in ("d", "num_labels", "task_seed") if not pd.isna(row[n])}
    classes = None if options else row["task"]
    if classes == "0+3,7":
        classes = [[0, 3], 7]
    task = EmbeddingDataModule(splits, classes=classes, **options)
    (x, y), (x_test, y_test) = task.arrays("train"), task.arrays("test")
    seed = 0 if pd.isna(row["seed"]) else int(row["seed"])
    if not pd.isna(row["shots"]):
        kept = draw_shots(y, int(row["shots"]), seed)
        x, y = x[kept], y[kept]
    head = imprint(x, y, seed=seed, calibrate=False, **keywords_of(row))
    assert len(y) == row["num_train"]
    return (head(x_test).argmax(1) == y_test).double().mean().item(), len(y_test)


GRIDS = {
    "per class, max": dict(
        norm_pre=NORMS,
        gen=["mean", "kmeans", "kmedoids", "random", "fps", "cov_max", "all"],
        k=[1, 4],
        norm_post=["none", "l2", "quantile"],
        norm_inf=["none", "l2"],
        agg="max",
    ),
    "sums": dict(
        norm_pre=["none", "l2"],
        gen=["ls", "kls", "ridge", "kridge", "lda"],
        k=3,
        norm_post=["none", "l2"],
        norm_inf="l2",
        agg="max",
    ),
    "votes": dict(
        norm_pre="l2",
        gen=["mean", "kmeans", "fps", "ls"],
        k=3,
        norm_post=["none", "l2"],
        norm_inf="l2",
        agg=["mnn", "logsumexp"],
        m=[1, 3],
        distance=["euclidean", "cosine", "manhattan", "chebyshev", "mahalanobis"],
        votes=["uniform", "weighted_by_distance", "softmax"],
        temperature=[0.1, 0.5],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
def test_shared_work_gives_what_each_configuration_gives_alone(digits, tmp_path, grid):
    path, splits = digits
    tasks = ["odd", {"classes": [[0, 3], 7]}]
    table = sweep(plan(path, [GRIDS[grid]], tasks, [5]), tmp_path, progress=False)
    rows = table.to_dict("records")
    assert len(rows) >= 40
    # Every kind, and of the hundreds of rows as many as take seconds.
    rows = rows if len(rows) < 90 else rows[:: len(rows) // 90]
    different = []
    for row in rows:
        accuracy, samples = alone(splits, row)
        if abs(accuracy - row["accuracy"]) > 1e-9:
            different.append((round((accuracy - row["accuracy"]) * samples), keywords_of(row)))
    # Products in another order may decide a near tie of a single sample.
    assert all(abs(samples) <= 1 for samples, _ in different), different
    assert len(different) <= len(rows) // 50, different


def test_distances_that_tie_give_a_row_what_it_has_alone(tmp_path):
    # Pixels are whole numbers: most of their largest differences are those of other proxies, too.
    data = Digits()
    data.setup()
    x, x_test = (s.images.flatten(1).float() for s in (data.train_dataset, data.test_dataset))
    y, y_test = data.train_dataset.labels, data.test_dataset.labels
    path = tmp_path / "pixels.safetensors"
    arrays = {"train_embeddings": x, "train_labels": y}
    save_file(arrays | {"test_embeddings": x_test, "test_labels": y_test}, path)
    parts = dict(norm_pre="none", gen="all", norm_post="none", norm_inf="none", agg="mnn")
    votes = dict(distance=["chebyshev", "manhattan"], votes="uniform")
    table = sweep(plan(path, [parts | votes | {"m": [1, 5, 40]}]), tmp_path, progress=False)
    for row in table.to_dict("records"):
        head = imprint(x, y, calibrate=False, **keywords_of(row))
        accuracy = (head.scores(x_test).argmax(1) == y_test).double().mean().item()
        assert row["accuracy"] == accuracy, row


def test_every_recipe_and_auto_are_allowed_and_give_what_they_give_alone(digits, tmp_path):
    path, splits = digits
    small = [r for r in RECIPES if r not in ("ranpac", "kernel")]
    grid = [
        dict(recipe=["auto", *small]),
        dict(recipe=["ranpac", "kernel"], projection_dim=100),
        dict(recipe="ridge", lam="holdout"),
        dict(recipe="whitened", norm_post=["none", "quantile"]),
    ]
    table = sweep(plan(path, grid, ["short"], [1]), tmp_path, progress=False)
    assert {"auto", *RECIPES} == set(table.recipe)
    for row in table.to_dict("records"):
        assert alone(splits, row)[0] == pytest.approx(row["accuracy"], abs=1e-9), row
    auto = table[table.recipe == "auto"].iloc[0]
    assert not pd.isna(auto.gen)


@pytest.mark.slow
def test_metric_and_class_weight_are_columns_where_a_row_has_them(digits, tmp_path):
    path, splits = digits
    grid = [
        dict(recipe=["ridge", "auto"], metric=["accuracy", "macro_f1"]),
        dict(recipe=["ls", "ridge"], class_weight="balanced"),
        dict(recipe="ls"),
    ]
    table = sweep(plan(path, grid, ["odd"], [1]), tmp_path, progress=False)
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    found = {(row["recipe"], row["metric"], row["class_weight"]) for row in rows}
    assert found == {
        ("ridge", None, None),
        ("ridge", "macro_f1", None),
        ("ridge", None, "balanced"),
        ("auto", None, None),
        ("auto", "macro_f1", None),
        ("ls", None, None),
        ("ls", None, "balanced"),
    }
    for row in table.to_dict("records"):
        assert alone(splits, row)[0] == pytest.approx(row["accuracy"], abs=1e-9), row
    plain = sweep(plan(path, [dict(recipe="ridge")], ["odd"], [1]), tmp_path / "p", progress=False)
    assert list(plain.columns) == list(COLUMNS)
    assert set(plain.id) < set(table.id)


def on_a_backbone(digits, grid, folder, **more):
    """A sweep's rows on the embedded backbone, and what `imprint` gives with its classifier."""
    from imprint_pl.embedding.backbone import load_backbone

    backbone, cache = load_backbone("efficientnet_lite0", image_size=32), digits[0].parent
    given = {"name": "s", "backbones": [{"name": "efficientnet_lite0", "image_size": 32}]}
    given |= {"data": ["Digits"], "tasks": ["short"], "grid": grid, "seeds": [3]} | more
    table = sweep(checked_sweep(given), folder, cache, progress=False)
    task = EmbeddingDataModule(embed(backbone, Digits(), cache).splits, classes="short")
    (x, y), (x_test, y_test) = task.arrays("train"), task.arrays("test")
    expected = []
    for row in table.to_dict("records"):
        given = keywords_of(row)
        if given.get("shrinkage", "oas") != "oas":
            given["shrinkage"] = float(given["shrinkage"])
        if not pd.isna(row["shots"]):
            given["shots"] = int(row["shots"])
        if not pd.isna(row.get("weibull")):
            given["weibull"] = yaml.safe_load(row["weibull"])
        seed = 0 if pd.isna(row["seed"]) else int(row["seed"])
        head = imprint(x, y, seed=seed, calibrate=False, classifier=backbone.classifier, **given)
        expected.append((head.scores(x_test).argmax(1) == y_test).double().mean().item())
    return table, expected


def test_every_recipe_runs_on_a_backbone_that_has_a_classifier(digits, tmp_path):
    wide = ("ranpac", "kernel")
    grid = [dict(recipe=["auto", *(r for r in RECIPES if r not in wide)], shots=20)]
    grid += [dict(recipe=list(wide), projection_dim=30, shots=20)]
    table, expected = on_a_backbone(digits, grid, tmp_path)
    assert {"auto", *RECIPES} == set(table.recipe)
    assert table.accuracy.tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_every_part_and_keyword_runs_on_a_backbone_that_has_a_classifier(digits, tmp_path):
    per_class = ["mean", "kmeans", "kmedoids", "random", "fps", "cov_max", "all"]
    grid = [
        dict(norm_pre=[["power", "l2"], "none"], gen=per_class, k=2, norm_inf=["same", "l2"])
        | dict(norm_post=["quantile", "l2+quantile"], agg="max"),
        dict(recipe="hosoda", as_published=[False, True]),
        dict(recipe="hosoda", gen="kmeans", k=2, agg=["mnn", "logsumexp"], m=[1, 3])
        | dict(distance=["cosine", "mahalanobis"], votes=["uniform", "softmax"], temperature=0.5),
        dict(recipe="robust", gen=["kls", "kmeans"], k=2, engine=["torch", "exact"]),
        dict(recipe="ridge", gen=["ridge", "kridge"], k=2, lam=["holdout", "1e-1"]),
        dict(recipe="ridge", intercept=False),
        dict(recipe="lda", prior="uniform", shrinkage=0.1),
        dict(recipe="kernel", projection_dim=20, width=2, norm_post=["none", "quantile"]),
        dict(recipe=["auto", "robust"], weibull=[[0.1, 0.9]]),
    ]
    grid = [block | {"shots": 20} for block in grid]
    table, expected = on_a_backbone(digits, grid, tmp_path, prune=False)
    assert len(table) > 70
    off = [
        row
        for row, own in zip(table.to_dict("records"), expected, strict=True)
        if abs(row["accuracy"] - own) > 1e-9
    ]
    assert not off, [keywords_of(row) for row in off]


def test_only_the_typical_samples_are_used_where_weibull_is_given(digits, tmp_path):
    path = digits[0]
    grid = [
        dict(recipe=["qi", "auto"], weibull=[None, [0, 0.5]]),
        dict(recipe="ls", weibull=[0, 1]),
    ]
    table = sweep(plan(path, grid, ["short"]), tmp_path, progress=False)
    assert table.weibull.fillna("").tolist() == ["", "[0, 0.5]", "", "[0, 0.5]", "[0, 1]"]
    every, few = table.num_train[:2]
    assert 0.3 * every < few < 0.7 * every
    assert table.num_train.tolist() == [every, few, every, few, every]
    methods = ["qi", "qi weibull=[0, 0.5]", "auto", "auto weibull=[0, 0.5]", "ls weibull=[0, 1]"]
    assert read_results(tmp_path / "s").method.tolist() == methods


def test_a_new_part_with_its_own_keyword_runs_and_is_told_apart(digits, tmp_path, monkeypatch):
    from imprint_pl.parts.gen import GENERATORS, PerClass

    class Trimmed(PerClass):
        name = "trimmed"

        def __init__(self, trim=0.2):
            self.trim = trim

        def of_class(self, x, seed):
            far = (x - x.mean(0)).norm(dim=1)
            return x[far.argsort()[: max(1, round((1 - self.trim) * len(x)))]].mean(0, keepdim=True)

    monkeypatch.setitem(GENERATORS, "trimmed", Trimmed)
    path, splits = digits
    # The results of before, which have no such column, are resumed.
    first = sweep(plan(path, [dict(recipe="qi", shots=3)], ["odd"]), tmp_path, progress=False)
    assert "trim" not in first
    grid = [dict(recipe="qi", gen=["mean", "trimmed"], trim=[0.0, 0.9], shots=3)]
    table = sweep(plan(path, grid, ["odd"]), tmp_path, progress=False)
    assert_same(table[table.gen == "mean"].drop(columns="trim"), first)
    task = EmbeddingDataModule(splits, classes="odd", shots=None)
    (x, y), (x_test, y_test) = task.arrays("train"), task.arrays("test")
    for trim, accuracy in zip(table.trim[1:], table.accuracy[1:], strict=True):
        head = imprint(x, y, "qi", gen="trimmed", trim=float(trim), shots=3, calibrate=False)
        assert (head.scores(x_test).argmax(1) == y_test).double().mean().item() == accuracy
    methods = ["qi", "qi gen=trimmed trim=0", "qi gen=trimmed trim=0.9"]
    assert read_results(tmp_path / "s").method.tolist() == methods
    assert read_results(tmp_path / "s" / "results.csv").method.tolist() == methods


def test_a_new_norm_is_told_apart_by_its_own_keyword(digits, tmp_path, monkeypatch):
    from imprint_pl.parts.by_name import SLOTS as TABLES
    from imprint_pl.parts.norm.base import Norm
    from imprint_pl.parts.norm.table import NORMS, PROXY_NORMS

    class Root(Norm):
        name = "root"

        def __init__(self, exponent=0.5):
            super().__init__()
            self.exponent = exponent

        def forward(self, x):
            return x.sign() * x.abs() ** self.exponent

    for table in (NORMS, PROXY_NORMS, *(TABLES[slot] for slot in SLOTS if "norm" in slot)):
        monkeypatch.setitem(table, "root", Root)
    path, splits = digits
    task = EmbeddingDataModule(splits, classes="odd", shots=None)
    (x, y), (x_test, y_test) = task.arrays("train"), task.arrays("test")
    accuracies = set()
    for slot in ("norm_pre", "norm_post", "norm_inf"):
        parts = dict(recipe="hosoda", norm_post="none", shots=4) | {slot: "root"}
        grid = [parts | dict(exponent=[0.1, 0.5, 1.0])]
        table = sweep(plan(path, grid, ["odd"], prune=False), tmp_path / slot, progress=False)
        assert len(table) == 3
        for row in table.to_dict("records"):
            head = imprint(x, y, calibrate=False, exponent=float(row["exponent"]), **parts)
            expected = (head.scores(x_test).argmax(1) == y_test).double().mean().item()
            assert row["accuracy"] == pytest.approx(expected, abs=1e-9), (slot, row["exponent"])
            accuracies.add(row["accuracy"])
    assert len(accuracies) > 3


def test_a_part_that_inherits_the_name_of_ours_does_its_own_work(digits, tmp_path):
    from imprint_pl.parts.gen import KMeans

    class First(KMeans):
        def of_classes(self, xs, seed, progress):
            return [x[:1] for x in xs]

    path, splits = digits
    table = sweep(plan(path, [dict(recipe="qi", gen=First(2))], ["odd"]), tmp_path, progress=False)
    task = EmbeddingDataModule(splits, classes="odd")
    (x, y), (x_test, y_test) = task.arrays("train"), task.arrays("test")
    head = imprint(x, y, "qi", gen=First(2), calibrate=False)
    assert table.accuracy[0] == (head.scores(x_test).argmax(1) == y_test).double().mean().item()


def test_the_best_on_average_are_not_averaged_over_a_keyword(capsys):
    from imprint_pl.cli.sweep import _print_best

    rows = [
        dict(recipe="ridge", task=task, lam=lam, accuracy=accuracy, macro_f1=accuracy)
        for task, lam, accuracy in (("a", "1", 0.9), ("b", "1", 0.8), ("a", "2", 0.5))
    ]
    # What auto chose differs, and is one row of the table still.
    rows += [
        dict(recipe="auto", task=task, gen=gen, accuracy=accuracy, macro_f1=accuracy)
        for task, gen, accuracy in (("a", "ridge", 0.7), ("b", "lda", 0.6))
    ]
    _print_best(pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS))
    output = capsys.readouterr().out
    for shown in ("lam", "85.00 %", "50.00 %", "65.00 %"):
        assert shown in output


@pytest.mark.slow
def test_shots_and_d_in_1_tasks_give_what_they_give_alone(digits, tmp_path):
    path, splits = digits
    grid = [dict(recipe=["qi", "robust", "ls", "lda"], shots=[3, 10], k=[2, 5])]
    tasks = ["all", {"d": [2, 3], "num_labels": 3, "task_seed": [0, 4]}]
    table = sweep(plan(path, grid, tasks, [2, 3]), tmp_path, progress=False)
    assert (table.k.isna() | (table.k <= table.shots)).all()
    assert set(table.task) == {"all", "all 2-in-1", "all 3-in-1"}
    for row in table.to_dict("records")[::3]:
        accuracy, samples = alone(splits, row)
        assert abs(accuracy - row["accuracy"]) * samples <= 1.01, row


def test_collapse_is_that_of_the_l2_normalised_training_set(digits, tmp_path):
    path, splits = digits
    tasks = ["even", {"classes": [[0, 3], 7]}]
    table = sweep(plan(path, [dict(recipe="qi", shots=[None, 2])], tasks), tmp_path, progress=False)
    assert len(table) == 4
    for name, rows in table.groupby("task"):
        classes = [[0, 3], 7] if name != "even" else name
        x, y = EmbeddingDataModule(splits, classes=classes).arrays("train")
        assert rows.nc1.tolist() == pytest.approx([nc1(L2()(x), y)] * 2, rel=1e-6)
        assert rows.vci.tolist() == pytest.approx([vci(L2()(x), y)] * 2, rel=1e-6)


def test_the_metrics_and_counts_are_torchmetrics_and_the_task_s(digits, tmp_path):
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

    path, splits = digits
    row = sweep(plan(path, [dict(recipe="qi")], ["odd"]), tmp_path, progress=False).iloc[0]
    task = EmbeddingDataModule(splits, classes="odd")
    (x, y), (x_test, y_test) = task.arrays("train"), task.arrays("test")
    scores = imprint(x, y, "qi")(x_test)
    assert row.macro_f1 == pytest.approx(multiclass_f1_score(scores, y_test, 5).item(), abs=1e-6)
    balanced = multiclass_accuracy(scores, y_test, 5).item()
    assert row.balanced_accuracy == pytest.approx(balanced, abs=1e-6)
    assert (row.num_classes, row.num_train, row.num_test) == (5, len(y), len(y_test))
    assert pd.isna(row.seed)  # nothing is random
    assert pd.isna(row.k)


@pytest.mark.parametrize(
    ("grid", "tasks", "shots", "expected"),
    [
        # mean has no k.
        (dict(recipe="robust", gen=["mean", "kmeans"], k=[1, 2, 5]), ["all"], None, 1 + 3),
        # max has neither m nor votes; m is at most k C, here 2 · 3.
        (
            dict(recipe="robust", k=2, agg=["max", "mnn"], m=[1, 6, 7], votes=["uniform"]),
            ["short"],
            None,
            1 + 2,
        ),
        # NORM_pre l2 asks for NORM_inf l2.
        (dict(recipe="qi", norm_pre=["none", "l2"], norm_inf=["none", "l2"]), ["all"], None, 3),
        # k is at most the shots.
        (dict(recipe="robust", k=[1, 5, 10], shots=[1, 5]), ["all"], None, 1 + 2),
    ],
)
def test_what_is_the_same_is_pruned_by_the_papers_rules(grid, tasks, shots, expected):
    p = plan("x", [grid], tasks)
    names = [str(c) for c in range(10)]
    assert len(p.configurations(p.sources[0], names, 600)) == expected


def test_seeds_count_only_where_something_is_random():
    names = [str(c) for c in range(10)]
    p = plan("x", [dict(recipe=["qi", "robust"]), dict(recipe="qi", shots=5)], seeds=[1, 2, 3])
    seeds = [c.seed for c in p.configurations(p.sources[0], names, 600)]
    assert seeds == [None, 1, 2, 3, 1, 2, 3]


def test_a_configuration_named_by_its_parts_is_that_of_the_recipe():
    names = [str(c) for c in range(10)]
    parts = dict(norm_pre="l2", gen="mean", norm_post="l2", norm_inf="l2", agg="max")
    p = plan("x", [parts, dict(recipe="qi")])
    (one,) = p.configurations(p.sources[0], names, 600)
    assert one.variant.parameters["recipe"] == "qi"


def test_ids_are_stable():
    names = [str(c) for c in range(10)]
    p = plan("x", [dict(recipe="robust", k=5)], seeds=[7])
    assert p.configurations(p.sources[0], names, 600)[0].id == "3edcc01ea11c4978"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [{"recipe": "robust", "kk": 3}]}, "unknown key 'kk'"),
        ({"grid": [{"recipe": "robust", "norm_prae": "l2"}]}, "did you mean 'norm_pre'"),
        ({"grid": [{"recipe": "robst"}]}, "did you mean 'robust'"),
        ({"grid": [{"recipe": "qi", "m": [1, 3]}]}, "m is not used by any of its combinations"),
        ({"grid": [{"gen": "mean"}]}, "give recipe, or every part"),
        ({"grid": [{"recipe": "robust", "k": 0}]}, "k=0"),
        ({"tasks": ["evn"]}, "did you mean 'even'"),
        ({"tasks": [{"clases": [0]}]}, "did you mean 'classes'"),
        ({"seeds": [-1]}, "seeds holds -1"),
        ({"sedes": [1]}, "did you mean 'seeds'"),
        ({"data": ["Digits"]}, "asks for backbones"),
        ({"data": []}, "data is missing"),
        ({"grid": [{"recipe": "qi", "m": 5}]}, "m=5 is not used by norm_pre='l2', gen='mean'"),
        ({"grid": [{"recipe": "auto", "k": 5}]}, "k=5 is not used by recipe='auto', which chooses"),
        ({"grid": [{"recipe": "robust", "k": []}]}, "grid block 1: k has no value"),
        ({"grid": [{"recipe": None, "gen": "mean"}]}, "without a recipe every part needs a value"),
        ({"grid": [{"recipe": "qi", "shots": True}]}, "shots=True: give a whole number"),
        (
            {"grid": [{"recipe": "ridge", "intercept": "off"}]},
            "intercept='off': give True or False",
        ),
        ({"grid": [{"recipe": "qi", "weibull": [0.9, 0.1]}]}, "block 1: weibull bounds lower=0.9"),
        ({"grid": [{"recipe": "qi", "weibull": 0.1}]}, "weibull=0.1: give two probabilities"),
        ({"tasks": [{"shots": 0}]}, "shots=0: give a whole number of at least 1"),
        ({"tasks": [{"d": 2, "task_seed": -1}]}, "task_seed=-1: give a whole number of at least 0"),
        ({"tasks": [{"classes": []}]}, "classes has no class"),
        ({"seeds": []}, "seeds has no value"),
        ({"prune": "no"}, "prune='no': give true or false"),
    ],
)
def test_a_mistake_in_the_yaml_is_an_error_with_a_cure(tmp_path, capsys, change, message):
    data = [{"name": "x", "embeddings": "x.safetensors"}]
    given = {"name": "s", "data": data, "grid": [{"recipe": "qi"}]} | change
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(given))
    assert main(["sweep", "--config", str(tmp_path / "s.yaml")]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_counts_and_estimates_and_runs_nothing(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = [{"name": "x", "embeddings": str(digits[0])}]
    grid = [{"recipe": "robust", "gen": ["mean", "kmeans"], "k": [1, 2, 5]}]
    given = {"name": "s", "data": data, "grid": grid, "seeds": [0, 1]}
    Path("s.yaml").write_text(yaml.safe_dump(given))
    assert main(["sweep", "--config", "s.yaml", "--dry_run"]) == 0
    assert "12 combinations, 6 configurations after pruning; about" in capsys.readouterr().out
    assert not Path("results").exists()


def test_ctrl_c_is_a_line_that_says_how_to_go_on(digits, tmp_path, capsys, monkeypatch):
    from imprint_pl.experiments import sweep as experiments

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "sweep", interrupted)
    data = [{"name": "x", "embeddings": str(digits[0])}]
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "data": data, "grid": [{"recipe": "qi"}]}))
    with pytest.raises(SystemExit) as stopped:
        main(["sweep", "--config", str(path)])
    assert stopped.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_every_shipped_sweep_can_be_read():
    from imprint_pl.experiments.sweep import read_sweep

    names = [str(c) for c in range(1000)]
    for path in (ROOT / "configs" / "sweeps").glob("*.yaml"):
        p = read_sweep(path)
        assert p.name == path.stem
        assert p.configurations(p.sources[0], names, 60000)


def without_times(table):
    return table.drop(columns=list(TIMES)).sort_values("id").reset_index(drop=True)


def assert_same(one, other):
    pd.testing.assert_frame_equal(without_times(one), without_times(other), check_exact=True)


def test_a_second_run_computes_nothing_and_a_larger_grid_only_what_is_new(
    digits, tmp_path, monkeypatch
):
    from imprint_pl.experiments.sweep import work

    first = sweep(plan(digits[0], [dict(recipe=["qi", "ls"])]), tmp_path, progress=False)
    ran, run = [], work.Work.run
    monkeypatch.setattr(
        work.Work, "run", lambda self, u, todo: ran.extend(todo) or run(self, u, todo)
    )
    assert_same(sweep(plan(digits[0], [dict(recipe=["qi", "ls"])]), tmp_path), first)
    assert ran == []
    more = sweep(plan(digits[0], [dict(recipe=["qi", "lda", "ls"])]), tmp_path, progress=False)
    assert len(ran) == 1
    assert more.recipe.tolist() == ["qi", "lda", "ls"]


def test_rows_of_other_data_under_the_same_name_are_an_error(digits, tmp_path):
    import safetensors.torch

    grid, path = [dict(recipe="qi")], tmp_path / "e.safetensors"
    arrays = safetensors.torch.load_file(digits[0])
    save_file(arrays, path)
    first = sweep(plan(path, grid), tmp_path, progress=False)
    save_file(arrays, tmp_path / "moved.safetensors")
    assert_same(sweep(plan(tmp_path / "moved.safetensors", grid), tmp_path), first)
    save_file(arrays | {"train_labels": arrays["train_labels"].flip(0)}, path)
    with pytest.raises(ImprintError, match="give the sweep another name"):
        sweep(plan(path, grid), tmp_path, progress=False)
    others = sweep(plan(path, grid, name="others"), tmp_path, progress=False)
    assert others.accuracy.tolist() != first.accuracy.tolist()


def test_rows_of_other_classes_under_the_same_task_are_an_error(digits, tmp_path):
    for classes in ([0, 1], [0, 1], [2, 3]):
        task = {"name": "mine", "classes": classes}
        p = plan(digits[0], [dict(recipe="qi")], tasks=[task])
        if classes == [2, 3]:
            with pytest.raises(ImprintError, match="rows of task mine from before"):
                sweep(p, tmp_path, progress=False)
        else:
            assert len(sweep(p, tmp_path, progress=False)) == 1


def test_embeddings_whose_squares_float32_cannot_hold_are_an_error(digits, tmp_path):
    import safetensors.torch

    arrays = safetensors.torch.load_file(digits[0])
    for factor, message in ((1e25, "digits', training: .* values above 1e"), (1e-20, "smaller")):
        scaled = {n: a * factor if n.endswith("embeddings") else a for n, a in arrays.items()}
        save_file(scaled, tmp_path / "scaled.safetensors")
        with pytest.raises(ImprintError, match=message):
            sweep(plan(tmp_path / "scaled.safetensors", [dict(recipe="qi")]), tmp_path)


def test_a_file_that_imprint_would_refuse_is_refused_before_anything_runs(tmp_path, capsys):
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    nothing, whole = torch.empty(0, 4), dict(train=(x, y), test=(x.clone(), y.clone()))
    for change, message in (
        ({"test": (nothing, y[:0])}, "'x', test: embeddings of shape (0, 4)"),
        ({"test": (x[:, :3], y)}, "train_embeddings have 4 numbers a sample, test_embeddings 3"),
        ({"test": (x * torch.nan, y)}, "test: 12 of 12 embeddings are not finite"),
        ({"train": (x, y + 0.5)}, "training: labels of shape (12,) and type torch.float32"),
        ({"train": (x, y - 1)}, "training: label -1 of sample 0 is out of range"),
        ({"train": (x[:, :, None], y)}, "training: embeddings of shape (12, 4, 1)"),
    ):
        arrays = {
            f"{split}_{kind}": array.contiguous().clone()
            for split, pair in (whole | change).items()
            for kind, array in zip(("embeddings", "labels"), pair, strict=True)
        }
        save_file(arrays, tmp_path / "x.safetensors")
        data = [{"name": "x", "embeddings": str(tmp_path / "x.safetensors")}]
        given = {"name": "s", "data": data, "grid": [{"recipe": "qi"}]}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(given))
        assert main(["sweep", "--config", str(tmp_path / "s.yaml")]) == 2
        assert message in capsys.readouterr().err


def test_a_grid_that_the_rules_leave_nothing_of_is_an_error(digits, tmp_path):
    grid = [dict(recipe="qi", norm_inf="none")]
    with pytest.raises(ImprintError, match=r"leave out every combination.*prune: false"):
        sweep(plan(digits[0], grid), tmp_path, progress=False)
    assert len(sweep(plan(digits[0], grid, prune=False), tmp_path, progress=False)) == 1


def test_files_have_one_schema_and_say_the_same(digits, tmp_path):
    grid = [dict(recipe=["qi", "ls", "ridge", "kernel"], shots=[5])]
    table = sweep(plan(digits[0], grid), tmp_path, progress=False)
    parquet = pd.read_parquet(tmp_path / "s" / "results.parquet")
    assert list(parquet.columns) == list(COLUMNS)
    pd.testing.assert_frame_equal(parquet.astype(COLUMNS), table)
    rows = pd.read_csv(tmp_path / "s" / "results.csv")
    assert rows.accuracy.tolist() == table.accuracy.tolist()
    assert rows.id.tolist() == table.id.tolist()
    assert set(rows.lam.dropna()) == {"0.0001", "loo"}


def test_a_line_that_a_kill_cut_short_does_not_count(tmp_path):
    results = Results(tmp_path)
    rows = [dict.fromkeys(COLUMNS) | {"id": i, "accuracy": 1 / 3} for i in ("a", "b")]
    results.append(rows)
    with open(results.journal, "ab") as file:
        file.write(b'{"id": "c", "accur')
    again = Results(tmp_path)
    assert again.ids == {"a", "b"}
    again.append([dict.fromkeys(COLUMNS) | {"id": "d"}])
    assert Results(tmp_path).ids == {"a", "b", "d"}
    assert Results(tmp_path).table().accuracy.tolist()[0] == 1 / 3


def test_a_foreign_results_file_is_an_error_that_leaves_it_alone(tmp_path):
    path = tmp_path / "results.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(ImprintError, match="move it away"):
        Results(tmp_path)
    assert path.read_bytes() == b"not parquet"


def test_two_sweeps_on_the_same_results_are_an_error(digits, tmp_path):
    from filelock import FileLock

    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s" / "lock"), pytest.raises(ImprintError, match="another sweep"):
        sweep(plan(digits[0], [dict(recipe="qi")]), tmp_path, progress=False)


@pytest.mark.slow
def test_a_small_chunk_and_two_processes_give_the_same(digits, tmp_path):
    grid = [dict(recipe=["qi", "ls", "knn", "lda"]), dict(recipe="robust", k=[2, 5])]
    p = plan(digits[0], grid, ["all", "odd"])
    one = sweep(p, tmp_path / "one", progress=False)
    small = sweep(p, tmp_path / "small", chunk_bytes=1 << 20, progress=False)
    two = sweep(p, tmp_path / "two", n_jobs=2, progress=False)
    for other in (small, two):
        joined = one.merge(other, on="id")
        assert len(joined) == len(one)
        off = (joined.accuracy_x - joined.accuracy_y).abs() * joined.num_test_x
        assert off.max() <= 1.01


@pytest.mark.slow  # two workers import everything
def test_a_local_dask_cluster_gives_the_same(digits, tmp_path):
    pytest.importorskip("distributed", reason="dask is not installed (imprint-pl[dask])")
    p = plan(digits[0], [dict(recipe=["qi", "ls"])], ["all", "odd"])
    one = sweep(p, tmp_path / "one", progress=False)
    dask = sweep(p, tmp_path / "dask", dask="local", progress=False)
    joined = one.merge(dask, on="id")
    assert len(joined) == len(one) == 4
    assert (joined.accuracy_x - joined.accuracy_y).abs().max() * 360 <= 1.01


@pytest.mark.slow
def test_kills_lose_and_spoil_nothing(digits, tmp_path):
    script = Path(__file__).with_name("killed_sweeps.py")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), str(digits[0]), str(tmp_path), "3"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = yaml.safe_load(done.stdout)
    assert counts == sorted(counts)
    assert counts[-1] > 0
    killed = pd.read_parquet(tmp_path / "killed" / "s" / "results.parquet").astype(COLUMNS)
    undisturbed = pd.read_parquet(tmp_path / "whole" / "s" / "results.parquet").astype(COLUMNS)
    # Most kills came while rows were being made.
    assert sum(count < len(undisturbed) for count in counts) >= 5, counts
    assert len(set(counts)) >= 3, counts
    assert_same(killed, undisturbed)
    assert not list((tmp_path / "killed").glob("**/unfinished*"))


@pytest.mark.slow
def test_a_report_reads_what_a_sweep_wrote(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = [{"recipe": ["qi", "ridge", "auto", "knn"]}, {"recipe": "robust", "k": [1, 5]}]
    data = [{"name": "x", "embeddings": str(digits[0])}]
    Path("s.yaml").write_text(
        yaml.safe_dump({"name": "s", "data": data, "tasks": ["all", "even"], "grid": grid})
    )
    assert main(["sweep", "--config", "s.yaml"]) == 0
    for file in ("results/s", "results/s/results.csv"):
        assert main(["report", file]) == 0
    assert Path("results/s/report.html").is_file()
    methods = {row["method"] for row in read_results("results/s").to_dict("records")}
    assert methods == {"qi", "ridge", "auto", "knn", "robust k=1", "robust k=5"}
