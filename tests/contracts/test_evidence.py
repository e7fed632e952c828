"""The paper's recipes on real embeddings that lie in the repository: the package against NumPy.

`tests/data/reference.py` computes the accuracies without the package. On the full embeddings, where
they are on the machine, it gives what the paper's own code gave: 162 of 166 rows to the last digit,
the others to one test sample. So the part in the repository proves the same everywhere.
"""

import ast
import csv
import importlib.util
import sys

import numpy as np
import pytest
import torch
from places import ACCEPTANCE, ROOT
from safetensors.torch import save_file

from imprint_pl import imprint
from imprint_pl.experiments.sweep import checked_sweep, sweep

SCRIPT = ROOT / "tests" / "data" / "reference.py"
SPEC = importlib.util.spec_from_file_location("reference", SCRIPT)
reference = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(reference)

SLOTS = ("norm_pre", "gen", "norm_post", "norm_inf", "agg")
# A test sample that lies between two classes within rounding may fall to either.
SAMPLES_APART = 1


@pytest.fixture(scope="module")
def part():
    return dict(np.load(reference.PART))


@pytest.fixture(scope="module")
def rows():
    with open(reference.PART_ROWS) as file:
        return list(csv.DictReader(file))


def keywords(row):
    """A row of the CSV as keywords of a recipe."""
    given = {slot: row[slot] for slot in SLOTS}
    if row["gen"] in ("cov_max", "kmedoids"):
        given["k"] = int(row["k"])
    if row["gen"] == "ls":
        given["lam"] = float(row["lambda"])
    if row["agg"] == "mnn":
        given |= {"m": int(row["m"]), "distance": row["distance"], "votes": row["weighting"]}
    if row["agg"] == "mnn" or row["norm_post"] == "quantile":
        given["as_published"] = True
    return given


def of_task(part, task, split):
    labels = torch.from_numpy(part[f"{split}_labels"])
    classes = torch.tensor(reference.TASKS[task])
    kept = torch.isin(labels, classes)
    x = torch.from_numpy(part[f"{split}_embeddings"]).float()
    return x[kept], torch.searchsorted(classes, labels[kept])


def wrong(row, percent, count):
    """By how many of `count` test samples an accuracy and that of a row differ."""
    return round(abs(percent - float(row["accuracy"])) / 100 * count)


def assert_near(apart):
    """Most rows agree to the sample, the rest to one sample."""
    print(f"\n{len(apart)} rows, {sum(map(bool, apart))} differ, at most by {max(apart)} samples")
    assert max(apart) <= SAMPLES_APART
    assert sum(map(bool, apart)) <= len(apart) // 20


def test_the_part_is_small_and_balanced(part):
    assert 2e6 < reference.PART.stat().st_size < 3e6
    for split, count in (("train", reference.TRAIN), ("test", reference.TEST)):
        assert part[f"{split}_embeddings"].shape == (10 * count, 1280)
        assert part[f"{split}_embeddings"].dtype == np.float16
        assert np.bincount(part[f"{split}_labels"]).tolist() == [count] * 10


def test_the_script_imports_nothing_of_the_package_nor_torch():
    imported = set()
    for node in ast.walk(ast.parse(SCRIPT.read_text())):
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    # safetensors reads the full set's file, and is not needed for the part.
    others = imported - set(sys.stdlib_module_names)
    assert others == {"numpy", "safetensors"}


def test_the_csv_beside_the_part_is_what_the_script_computes(part, rows):
    """Every 20th row: the others run the same code."""
    expected = reference.rows_of_part()
    assert len(rows) == len(expected)
    for row, given in zip(rows, expected, strict=True):
        assert row == given | {"accuracy": row["accuracy"]}
    for row in rows[::20]:
        assert f"{reference.accuracy(row, part):.4f}" == row["accuracy"]


def test_imprint_scores_what_the_script_computed(part, rows):
    """Every eleventh row, since each is imprinted by itself; the sweep's test has them all."""
    apart, rows = [], rows[::11]
    for row in rows:
        x, y = of_task(part, row["task"], "train")
        x_test, y_test = of_task(part, row["task"], "test")
        head = imprint(x, y, "qi", **keywords(row))
        found = 100 * (head(x_test).argmax(1) == y_test).double().mean().item()
        apart.append(wrong(row, found, len(y_test)))
    assert {row["gen"] for row in rows} == {"mean", "all", "ls", "cov_max", "kmedoids"}
    assert len({row["distance"] for row in rows if row["agg"] == "mnn"}) == 5
    assert_near(apart)


@pytest.mark.slow
def test_a_sweep_scores_what_the_script_computed(part, rows, tmp_path):
    path = tmp_path / "part.safetensors"
    save_file({name: torch.from_numpy(array) for name, array in part.items()}, path)
    apart, seen = [], 0
    for task in reference.TASKS:
        of = [row for row in rows if row["task"] == task]
        grid = [keywords(row) for row in of]
        data = [{"name": "x", "embeddings": str(path)}]
        given = {"name": task, "data": data, "tasks": [task], "grid": grid, "seeds": [0]}
        table = sweep(checked_sweep(given | {"prune": False}), tmp_path, progress=False)
        seen += len(table)
        for row, block in zip(of, grid, strict=True):
            kept = table
            for name in (*SLOTS, "k", "m", "distance", "votes"):
                column = kept[name]
                kept = kept[column == block[name] if name in block else column.isna()]
            assert len(kept) == 1
            found = 100 * kept["accuracy"].item()
            apart.append(wrong(row, found, int(kept["num_test"].item())))
    assert seen == len(rows)
    assert_near(apart)


@pytest.mark.slow  # 166 rows on 15,000 embeddings
def test_the_script_gives_what_the_papers_code_gave_on_the_full_set_but_for_four_samples():
    if not ACCEPTANCE.is_file():
        pytest.skip("the acceptance embeddings (../shared/acceptance) are not on this machine")
    found = reference.deviations(ACCEPTANCE.parent)
    assert len(found) == 126 + 40
    apart = [(row, deviation) for row, deviation in found if deviation]
    # One test sample of 2,500 (even) or of 1,500 (short). The likely cause: the paper's code
    # inverts the matrix of `ls` in float32, and an error of 1e-4 in the weights moves that sample.
    assert all(row["gen"] == "ls" and row["norm_post"] == "quantile" for row, _ in apart)
    assert [abs(round(deviation, 4)) for _, deviation in apart] == [0.04, 0.04, 0.0666, 0.0666]
