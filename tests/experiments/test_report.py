"""The report: statistics with exact answers, what is written, and the page in a real browser."""

import csv
import html
import itertools
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from pictures import NAMES, drawn
from places import ROOT
from scipy.stats import friedmanchisquare, wilcoxon

from imprint_pl.cli import main
from imprint_pl.drawing import style
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.report import write_report
from imprint_pl.experiments.report.figures import (
    accuracy_against_shots,
    gain_against_nc1,
    gen_seconds,
)
from imprint_pl.experiments.report.page import advice
from imprint_pl.experiments.report.read import method_of, read_results
from imprint_pl.experiments.report.statistics import accuracy_by_group, compare, significance
from imprint_pl.experiments.report.tables import TABLES, published, safe_for_csv, shown
from imprint_pl.experiments.results import Results
from imprint_pl.experiments.sweep import read_sweep
from imprint_pl.method.recipes import resolve
from imprint_pl.parts.by_name import SLOTS, parameters_of

EVIL = '<img src=x onerror="alert(1)">$x_{'
METHODS = [
    ("kernel", {}, 0.05),
    ("ridge", {}, 0.03),
    ("robust", {}, 0.0),
    ("robust", {"k": 1}, -0.08),
    ("robust", {"k": 5}, -0.03),
    ("robust", {"gen": "fps", "k": 1}, -0.2),
    ("robust", {"gen": "fps", "k": 5}, -0.1),
    ("qi", {}, -0.08),
]


def row_of(recipe, keywords, backbone="b", data="mnist", task="all", **values):
    parameters = resolve(recipe, **keywords).parameters
    row = {"backbone": backbone, "data": data, "task": task, "nc1": 1.0, "gen_seconds": 0.5}
    return row | {"macro_f1": 0.5, "inference_seconds": 0.1} | parameters | values


def sweep():
    """Two backbones, two data sets, two tasks; then shots, and d-in-1 on one of them."""
    generator = np.random.default_rng(0)
    rows = []
    for backbone in ("torchvision/resnet18", "b2"):
        for data in ("mnist", "digits"):
            for task in ("all", "short"):
                base = 0.8 + 0.1 * generator.random()
                for recipe, keywords, better in METHODS:
                    accuracy = base + better + 0.002 * generator.random()
                    place = {"backbone": backbone, "data": data, "task": task, "nc1": base}
                    rows.append(row_of(recipe, keywords, accuracy=accuracy, **place))
    for n in (1, 5, 20):
        rows += [row_of(r, {}, shots=n, accuracy=0.5 + n / 100) for r in ("qi", "ridge")]
    for d in (1, 2):
        for k in (1, 5):
            place = {"task": f"{d}-in-1", "d": d, "task_seed": 0, "nc1": d / 2}
            rows.append(row_of("robust", {"k": k}, accuracy=0.6 + k / 100, **place))
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("section")
    sweep().to_parquet(folder / "results.parquet")
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return write_report(folder)


def test_average_rank_accuracy_and_wins_of_a_hand_made_table():
    table = pd.DataFrame({"a": [0.9, 0.8], "b": [0.9, 0.6], "c": [0.1, 0.7]}, index=["g", "h"])
    compared = compare(table)
    assert list(compared.index) == ["a", "b", "c"]
    assert compared["rank"].tolist() == [1.25, 2.25, 2.5]
    assert compared["wins"].tolist() == [2, 1, 0]
    assert compared.loc["a", "accuracy"] == pytest.approx(0.85)


def test_a_method_without_all_groups_is_not_averaged_over_other_groups():
    rows = pd.DataFrame(
        {
            "group": ["g", "h", "g", "h", "g"],
            "method": ["a", "a", "b", "b", "c"],
            "accuracy": [0.1, 0.2, 0.3, 0.4, 1.0],
        }
    )
    assert list(accuracy_by_group(rows).columns) == ["a", "b"]


def test_the_tests_are_friedmans_and_wilcoxons_with_holms_correction():
    generator = np.random.default_rng(1)
    table = pd.DataFrame(generator.random((12, 3)), columns=["x", "y", "z"])
    table["z"] += 0.5
    found = significance(table)
    assert found.friedman == pytest.approx(friedmanchisquare(*table.T.to_numpy()).pvalue)
    pairs = [("x", "y"), ("x", "z"), ("y", "z")]
    raw = {pair: wilcoxon(table[pair[0]], table[pair[1]]).pvalue for pair in pairs}
    largest = 0.0
    for i, pair in enumerate(sorted(raw, key=raw.get)):
        largest = max(largest, min(1.0, raw[pair] * (3 - i)))
        assert found.pairs.loc[pair] == pytest.approx(largest)
        assert found.pairs.loc[pair[::-1]] == pytest.approx(largest)


def test_two_equal_methods_cannot_be_told_apart_and_do_not_spoil_the_others():
    generator = np.random.default_rng(1)
    x = generator.random(10)
    found = significance(pd.DataFrame({"a": x, "b": x, "c": x + 0.1 + 0.01 * generator.random(10)}))
    assert found.pairs.loc["a", "b"] == 1
    assert found.pairs.loc["a", "c"] < 0.05


def test_too_few_groups_are_not_tested():
    assert significance(pd.DataFrame({"a": [0.1] * 5, "b": [0.2] * 5})) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"recipe": "robust", "k": 20.0, "gen": "kmeans"}, "robust"),
        ({"recipe": "robust", "k": 5, "engine": "faiss"}, "robust k=5"),
        ({"recipe": "ls", "lam": "0.0001"}, "ls"),
        ({"recipe": "ls", "lam": "0.01"}, "ls lam=0.01"),
        ({"recipe": "kernel", "width": 1.0, "intercept": True}, "kernel"),
        (
            {"recipe": "kernel", "width": 0.2, "intercept": False},
            "kernel width=0.2 intercept=False",
        ),
        ({"recipe": "lda", "prior": "uniform"}, "lda prior=uniform"),
        ({"recipe": "janson", "as_published": True}, "janson as_published=True"),
        ({"recipe": "hosoda", "agg": "mnn", "as_published": False}, "hosoda agg=mnn"),
        ({"recipe": "auto", "gen": "ridge"}, "auto"),
        ({"recipe": "somebody's", "gen": "mine", "k": None}, "somebody's gen=mine"),
        (
            {"recipe": "", "norm_pre": "l2", "gen": "kmeans", "k": 3.0, "norm_post": "none"}
            | {"norm_inf": "l2", "agg": "mnn", "m": 5, "lam": None},
            "l2/kmeans/none/l2/mnn k=3 m=5",
        ),
    ],
)
def test_a_method_is_named_by_what_one_would_type(row, expected):
    assert method_of(row) == expected


def test_settings_that_differ_in_any_keyword_are_different_methods():
    keywords = {n for t in SLOTS.values() for part in t.values() for n in parameters_of(part)}
    for name in keywords - {"engine"}:
        row = {"recipe": "robust"}
        assert method_of(row | {name: 7}) != method_of(row | {name: 8}), name


def test_a_sweep_of_parts_alone_and_of_one_number_of_shots_has_its_tables(tmp_path):
    # As `sweep` writes a grid without recipes: an empty recipe, in a column of its own type.
    rows = sweep()
    rows = rows[rows["recipe"].isin(["robust", "qi"]) & rows["shots"].isna() & rows["d"].isna()]
    parts = {"norm_pre": "l2", "norm_post": "l2", "norm_inf": "l2", "agg": "max"}
    rows = rows.assign(gen=rows["recipe"].map({"robust": "kmeans", "qi": "mean"}), **parts)
    rows = rows.assign(shots=100, recipe=None).astype({"recipe": "string", "shots": "Int64"})
    rows.to_parquet(tmp_path / "results.parquet")
    read = read_results(tmp_path)
    assert "l2/mean/l2/l2/max" in set(read["method"])
    assert not read["method"].str.contains("nan|None|shots").any()
    assert len(accuracy_by_group(read)) > 0
    assert main(["report", str(tmp_path)]) == 0
    assert "l2/mean/l2/l2/max" in (tmp_path / "report.html").read_text()


def test_every_table_and_figure_is_written(page):
    names = {path.name for path in (page.parent / "report").iterdir()}
    figures = ("critical_difference", "critical_difference_settings", "accuracy_against_k")
    figures += ("accuracy_against_shots", "nc1_against_d", "gain_against_nc1", "gen_seconds")
    assert {f"{name}.csv" for name in [*TABLES, "pairs"]} <= names
    assert {f"{name}.{kind}" for name in figures for kind in ("png", "svg")} <= names


def test_the_papers_numbers_stand_beside_ours(page):
    with open(page.parent / "report" / "k.csv") as file:
        rows = list(csv.DictReader(file))
    resnet = [r for r in rows if r["backbone"] == "torchvision/resnet18"]
    (row,) = [r for r in resnet if r["k"] == "5.0" and (r["data"], r["task"]) == ("mnist", "all")]
    assert row["paper %"] == "88.95"
    difference = float(row["accuracy %"]) - 88.95
    assert float(row["ours − paper"]) == pytest.approx(difference)
    assert all(r["paper %"] == "" for r in rows if r["backbone"] == "b2")


@pytest.mark.slow
def test_every_number_of_the_paper_stands_beside_a_row_of_the_shipped_sweeps(tmp_path):
    found = {}
    for name in ("section_5_1", "figure_6", "d_in_1"):
        plan = read_sweep(ROOT / "configs" / "sweeps" / f"{name}.yaml")
        results = Results(tmp_path / name)
        for source in plan.sources:
            classes = [str(c) for c in range(1000 if source[1]["name"] == "ImageNet" else 10)]
            made = plan.configurations(source, classes, 60000)
            made = [c for c in made if name != "section_5_1" or c.task.name == "all"]
            results.append([c.columns() | {"accuracy": 0.5, "nc1": 1.0} for c in made])
        results.save()
        rows = read_results(tmp_path / name)
        for table in ("methods", "k", "d_in_1", "nc1"):
            values = TABLES[table][1](rows).filter(like="paper ").to_numpy().ravel()
            found.setdefault(table, set()).update(values)
    for table, values in found.items():
        assert set(published(table)["value"]) <= values, table


def test_tasks_of_other_numbers_of_labels_are_not_averaged(tmp_path):
    place = {"task": "all 2-in-1", "d": 2, "task_seed": 0}
    rows = [
        row_of("robust", {"k": k}, num_labels=n, accuracy=n / 10 + k / 100, **place)
        for n in (2, 5)
        for k in (1, 5)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "results.parquet")
    read = read_results(tmp_path)
    for table in ("d_in_1", "runs"):
        accuracies = TABLES[table][1](read)["accuracy %"]
        assert accuracies.tolist() == pytest.approx([21, 25, 51, 55])
    assert sorted(TABLES["gain"][1](read)["k=1 %"]) == pytest.approx([21, 51])


def test_the_advice_names_the_best_recipe_and_the_faster_near_it():
    rows = sweep()
    rows["method"] = [method_of(row) for row in rows.to_dict("records")]
    rows["group"] = rows["backbone"] + rows["data"] + rows["task"]
    rows.loc[rows["method"] == "kernel", "gen_seconds"] = 9.0
    whole = rows[rows["shots"].isna() & rows["d"].isna()]
    rows.loc[rows["method"] == "ridge", "accuracy"] += 0.015
    table = accuracy_by_group(whole[whole["method"].isin(["kernel", "ridge", "robust", "qi"])])
    table["ridge"] += 0.015
    sentences = " ".join(advice(rows, compare(table), significance(table)))
    assert sentences.startswith("Use kernel on ")
    assert "it has the best average rank, 1.00 of 4 recipes" in sentences
    assert "In a hurry, ridge" in sentences
    assert "over 8 groups" in sentences


def small(recipes, backbones=("resnet18",), data="leaves"):
    """Two tasks of each backbone; `recipes` and `backbones` may say by how much they differ."""
    rows = [
        dict(
            backbone=backbone,
            data=data,
            task=f"task{task}",
            recipe=recipe,
            accuracy=0.9 + 0.01 * task + recipes[recipe] + 0.001 * i,
            gen_seconds=1.0,
            num_classes=4,
        )
        for i, backbone in enumerate(backbones)
        for task in range(2)
        for recipe in recipes
    ]
    return pd.DataFrame(rows)


def advice_of(rows, path):
    rows.to_csv(path / "results.csv", index=False)
    rows = read_results(path)
    table = accuracy_by_group(rows)
    return " ".join(advice(rows, compare(table), significance(table)))


def test_the_advice_names_the_backbone_as_well(tmp_path):
    one = advice_of(small({"kernel": 0.02, "qi": 0}), tmp_path)
    assert one.startswith("Use kernel on resnet18: it has the best average rank")
    two = advice_of(small({"kernel": 0.02, "qi": 0}, ("resnet18", "swin_b")), tmp_path)
    assert two.startswith("Use kernel on swin_b: it has the best average rank")
    assert "With kernel, swin_b has 92.60 %, resnet18 92.50 %." in two


def test_the_advice_calls_a_tie_a_tie(tmp_path):
    text = advice_of(small({"kernel": 0.02, "ridge": 0.02, "qi": 0}), tmp_path)
    assert text.startswith("It is a tie on resnet18: kernel and ridge have the same average rank")
    assert "Use kernel" not in text


def test_the_papers_numbers_stand_beside_its_own_data_sets_only(tmp_path):
    own, papers = (small({"robust": 0.02, "qi": 0}, data=d) for d in ("leaves", "FashionMNIST"))
    for rows, there in ((own, False), (papers, True)):
        rows.to_csv(tmp_path / "results.csv", index=False)
        table = TABLES["methods"][1](read_results(tmp_path))
        assert ("paper %" in table) == there
        assert ("paper %" in write_report(tmp_path).read_text()) == there


def test_no_axis_of_accuracies_goes_beyond_100_percent():
    rows = pd.DataFrame(
        [
            dict(group=g, method=m, shots=float(s), accuracy=min(1.0, 0.99 + 0.005 * s))
            for g in "ab"
            for m in ("kernel", "qi")
            for s in (1, 2, 5)
        ]
    )
    with style():
        (axes,) = accuracy_against_shots(rows).axes
    assert axes.get_ylim()[1] == 100


def test_a_point_of_a_line_is_an_average_over_the_groups_of_the_others(tmp_path):
    rows = [
        row_of("qi", {}, task=task, shots=shots, accuracy=base + shots / 100)
        for task, base in (("all", 0.5), ("short", 0.8))
        for shots in (1, 5)
        if (task, shots) != ("all", 5)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "results.parquet")
    (axes,) = accuracy_against_shots(read_results(tmp_path)).axes
    assert axes.lines[0].get_ydata() == pytest.approx([81, 85])
    assert axes.get_title() == "average over 1 group"


def test_a_number_without_bound_is_shown_as_such():
    assert shown(float("inf"), "NC1") == "inf"
    assert shown(3.0, "k") == "3"


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", text)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text).replace("http-equiv", "")


def test_names_from_strangers_are_text_in_the_page_and_no_formula_in_the_csv(tmp_path):
    rows = sweep()
    rows["data"] = rows["data"].replace({"mnist": EVIL, "digits": "=HYPERLINK(1)"})
    rows.to_csv(tmp_path / "results.csv", index=False)
    page = write_report(tmp_path)
    assert "<img src=x" not in page.read_text()
    assert html.escape(EVIL, quote=False).split('"')[0] in page.read_text()
    for path in (tmp_path / "report").glob("*.csv"):
        with open(path) as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell[:1] in "=@" and cell], path.name
    assert safe_for_csv(pd.DataFrame({"+x": ["-1", 2]})).to_dict("list") == {"'+x": ["'-1", 2]}


@pytest.mark.parametrize(
    "kept",
    [
        slice(0, 1),
        slice(0, 3),
        sweep()["shots"].notna(),
        sweep()["d"].notna(),
        sweep()["recipe"] == "qi",
    ],
    ids=["one run", "one group", "shots", "d-in-1", "one recipe"],
)
def test_a_part_of_the_results_still_makes_a_page(kept, tmp_path):
    sweep()[kept][["backbone", "data", "task", "d", "shots", "recipe", "k", "accuracy"]].to_csv(
        tmp_path / "results.csv", index=False
    )
    text = write_report(tmp_path).read_text()
    assert "All results" in text
    assert "nan" not in re.sub(r"base64,[\w+/=]+", "", text).lower()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("backbone,data,task,recipe,accurcy\n", "no column 'accuracy'; did you mean 'accurcy'"),
        ("backbone,data,task,recipe,accuracy\n", "no row with an accuracy"),
        ("backbone,data,task,recipe,accuracy\nb,d,t,qi,93.1\n", "accuracy 93.1 is not in"),
        ("backbone,data,task,recipe,accuracy,k\nb,d,t,qi,0.9,two\n", "k='two', which is no number"),
        ('"', "cannot be read"),
    ],
)
def test_bad_results_are_named(content, message, tmp_path):
    (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ImprintError, match=re.escape(message)):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere: there is no such file or folder"),
        (["."], "has neither results.parquet nor results.csv"),
        ([], "the following arguments are required: results"),
        (["results.csv", "--table", "recipe"], "did you mean 'recipes'"),
    ],
)
def test_a_wrong_command_ends_in_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("table", TABLES)
def test_one_command_prints_a_table(table, folder, capsys):
    assert main(["report", str(folder), "--table", table]) == 0
    assert TABLES[table][0] in capsys.readouterr().out


def test_the_page_sorts_and_filters_in_a_browser(page, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    script = """<script>
      const cells = i => [...document.querySelectorAll("#methods tbody tr")]
        .filter(row => !row.hidden).map(row => row.cells[i].textContent).join("|");
      const click = i => document.querySelectorAll("#methods thead button")[i].click();
      const out = [];
      click(1); out.push(cells(1)); click(1); out.push(cells(1)); click(0); out.push(cells(0));
      const input = document.querySelector("input[data-table=methods]");
      input.value = "FPS robust"; input.dispatchEvent(new Event("input")); out.push(cells(0));
      out.push(document.documentElement.scrollWidth <= window.innerWidth);
      document.body.innerHTML = "<pre>" + out.join("\\n") + "</pre>";
    </script></body>"""
    probe = tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", script))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", probe.as_uri()]
    done = subprocess.run([browser, *options], capture_output=True, text=True, timeout=60)
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr
    down, up, names, kept, fits = found[1].split("\n")
    numbers = [float(value) for value in down.split("|")]
    assert len(numbers) == len(METHODS)
    assert numbers == sorted(numbers, reverse=True)
    assert [float(value) for value in up.split("|")] == sorted(numbers)
    assert names.split("|") == sorted(names.split("|"))
    assert sorted(kept.split("|")) == ["robust gen=fps k=1", "robust gen=fps k=5"]
    assert fits == "true"


def frame_of(methods, backbones=("b",), tasks=("all",), **more):
    """Results with a row a method, backbone and task; the later methods are better."""
    rows = [
        dict(backbone=b, data="x", task=t, accuracy=0.5 + 0.01 * i + 0.001 * j, nc1=1.0 + j)
        | dict(recipe="robust", gen_seconds=0.002 + 0.0001 * (i + j))
        | dict(resolve("robust").parameters)
        | method
        | more
        for j, (b, t) in enumerate(itertools.product(backbones, tasks))
        for i, method in enumerate(methods)
    ]
    return pd.DataFrame(rows)


LONG_METHODS = [
    dict(norm_pre="power+l2", norm_post="l2+quantile", norm_inf="power+l2", agg="mnn", m=m, k=k)
    | dict(distance="mahalanobis", votes="weighted_by_distance")
    for m in (1, 3, 5)
    for k in (2, 5, 7)
]
REPORTS = {
    "one": frame_of([{}]),
    "two": frame_of([{}, {"k": 5}, {"k": 1}], tasks=["all", "even"]),
    "forty": frame_of(
        [{"k": k, "shots": s} for k in (1, 5) for s in (5, 10)], [f"fm {i}" for i in range(40)]
    ),
    "names": frame_of([{"k": 1}, {"k": 5}], NAMES.values(), [*NAMES.values()][:2]),
    "methods": frame_of([{}, *LONG_METHODS], tasks="abcdefg"),
    "many k": frame_of([{"k": k} for k in (*range(1, 16), 100)]),
    "many d": pd.concat([frame_of([{}], NAMES.values(), d=d, num_labels=2) for d in (1, 2, 3)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPORTS)
def test_no_text_of_a_figure_is_cut_or_overlaps(tmp_path, monkeypatch, name):
    figures = drawn(monkeypatch)
    REPORTS[name].to_csv(tmp_path / "results.csv", index=False)
    write_report(tmp_path)
    assert figures
    assert not [wrong for _, wrong in figures if wrong]
    for figure, _ in figures:
        for legend in figure.legends:
            shown = [text.get_text() for text in legend.get_texts()]
            assert len(set(shown)) == len(shown)
            # The axes keep most of the figure that they have without a legend.
            assert figure.axes[0].bbox.height > 0.5 * 4.2 * figure.dpi


def test_more_sources_than_colours_have_markers_of_their_own(tmp_path):
    REPORTS["forty"].to_csv(tmp_path / "results.csv", index=False)
    with style():
        figure = gain_against_nc1(read_results(tmp_path))
    looks = {
        (tuple(dots.get_facecolor()[0]), dots.get_paths()[0].vertices.tobytes())
        for dots in figure.axes[0].collections
    }
    assert len(looks) == 40


def test_of_long_methods_a_figure_shows_what_tells_them_apart(tmp_path):
    REPORTS["methods"].to_csv(tmp_path / "results.csv", index=False)
    with style():
        figure = gen_seconds(read_results(tmp_path))
    shown = {text.get_text() for text in figure.axes[0].get_yticklabels()}
    assert {"robust", "robust … k=2 m=3 …", "robust … k=7 m=1 …"} <= shown
