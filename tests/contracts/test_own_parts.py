"""A part of the user's own, in a file of the user's own, works everywhere by its import path."""

import inspect
import sys
from typing import get_args, get_type_hints

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file

from imprint_pl import ImprintedClassifier, ImprintedHead, ImprintError, ImprintEstimator, imprint
from imprint_pl.cli import main
from imprint_pl.experiments.report.read import read_results
from imprint_pl.experiments.results import COLUMNS
from imprint_pl.experiments.sweep import checked_sweep, sweep
from imprint_pl.method.recipes import KEYWORDS, RECIPES, resolve
from imprint_pl.parts.agg.distances import DISTANCES
from imprint_pl.parts.by_name import SLOTS, every_parameter
from imprint_pl.parts.gen.lda import PRIORS
from imprint_pl.parts.gen.ridge import CHOICES

MODULE = '''
from imprint_pl.parts.agg.base import Aggregation
from imprint_pl.parts.gen import PerClass
from imprint_pl.parts.norm.base import Norm


class Trimmed(PerClass):
    """The mean of a class without its farthest samples."""

    def __init__(self, trim: float = 0.2):
        self.trim = trim

    def of_class(self, x, seed):
        far = (x - x.mean(0)).norm(dim=1)
        return x[far.argsort()[: max(1, round((1 - self.trim) * len(x)))]].mean(0, keepdim=True)


class Root(Norm):
    """Signed powers."""

    def __init__(self, exponent=0.5):
        super().__init__()
        self.exponent = exponent

    def forward(self, x):
        return x.sign() * x.abs() ** self.exponent


class Nearby(Aggregation):
    """A class scores by the distance to its nearest proxy, as the norm of an order."""

    def __init__(self, order: int = 1):
        super().__init__()
        self.order = order

    def forward(self, z, proxies, bias, proxy_classes, num_classes):
        scores = -(z[:, None] - proxies).norm(p=self.order, dim=2)
        lowest = scores.new_full((len(z), num_classes), -float("inf"))
        return lowest.scatter_reduce(1, proxy_classes.expand_as(scores), scores, "amax")
'''
# A slot, a part for it, its keyword and two values, and the type of the keyword's column.
PARTS = [
    ("gen", "own_parts.Trimmed", "trim", [0.0, 0.5], "Float64"),
    ("norm_pre", "own_parts.Root", "exponent", [0.5, 3.0], "Float64"),
    ("norm_inf", "own_parts.Root", "exponent", [0.5, 3.0], "Float64"),
    ("norm_post", "own_parts.Root", "exponent", [0.5, 3.0], "Float64"),
    ("agg", "own_parts.Nearby", "order", [1, 4], "Int64"),
]


@pytest.fixture(autouse=True)
def own_parts(tmp_path, monkeypatch):
    """A file that nobody has imported yet."""
    (tmp_path / "own_parts.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_parts", None)


@pytest.fixture
def points():
    """Skewed clouds `(240, 6)` of three classes, and their labels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    x = torch.randn(240, 6, generator=generator).exp() + 1.5 * torch.eye(6)[y]
    return x, y


def saved(points, folder):
    """The entry of a sweep's data for a file with the points as both splits."""
    arrays = {"train_embeddings": points[0], "train_labels": points[1]}
    arrays |= {name.replace("train", "test"): array.clone() for name, array in arrays.items()}
    save_file(arrays, folder / "points.safetensors")
    return {"name": "points", "embeddings": str(folder / "points.safetensors")}


@pytest.mark.parametrize(("slot", "part", "keyword", "values", "dtype"), PARTS)
def test_it_runs_in_python_estimator_sweep_and_report(
    points, tmp_path, slot, part, keyword, values, dtype
):
    (x, y), own = points, {slot: part}
    heads = [imprint(x, y, "qi", calibrate=False, **own | {keyword: v}) for v in values]
    labels = [head(x).argmax(1) for head in heads]
    assert not torch.equal(*labels)
    for value, head, expected in zip(values, heads, labels, strict=True):
        given = own | {keyword: value}
        module = ImprintedClassifier(torch.nn.Identity(), "qi", **given)
        assert module.parts.parameters == {n: v for n, v in head.settings.items() if n != "seed"}
        model = ImprintEstimator("qi", **given).fit(x.numpy(), y.numpy())
        assert model.predict(x.numpy()).tolist() == expected.tolist()
        assert model.get_params()[keyword] == value
        batches = ImprintEstimator("qi", **given).partial_fit(x.numpy(), y.numpy())
        assert batches.predict(x.numpy()).tolist() == expected.tolist()
    data = [saved(points, tmp_path)]
    given = {"name": "own", "data": data, "prune": False}
    given["grid"] = [{"recipe": "qi"}, {"recipe": ["qi", "ls"], slot: part, keyword: values}]
    table = sweep(checked_sweep(given), tmp_path, progress=False)
    rows = table[table[slot] == part]
    assert rows[keyword].dtype == dtype
    assert list(table.columns) == [*COLUMNS, keyword]
    of_qi = rows[rows["recipe"] == "qi"]
    assert of_qi[keyword].tolist() == values
    found = [(own_labels == y).double().mean().item() for own_labels in labels]
    assert of_qi["accuracy"].tolist() == pytest.approx(found, abs=1e-9)
    # Neither the report nor a sweep that goes on has to have the part.
    del sys.modules["own_parts"]
    for file in ("results.parquet", "results.csv"):
        methods = read_results(tmp_path / "own" / file)["method"]
        assert f"qi {slot}={part} {keyword}={values[1]:g}" in set(methods)
        assert len(set(methods)) == len(table)
    pd.testing.assert_frame_equal(sweep(checked_sweep(given), tmp_path, progress=False), table)


@pytest.mark.slow
def test_two_processes_of_a_sweep_import_it_whatever_an_earlier_sweep_has_started(
    points, tmp_path, monkeypatch
):
    data = [saved(points, tmp_path)]
    with monkeypatch.context() as before:
        before.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
        plan = checked_sweep({"name": "before", "data": data, "grid": [{"recipe": "qi"}]})
        sweep(plan, tmp_path, n_jobs=2, progress=False)
    grid = [{"recipe": "qi", "gen": ["mean", "own_parts.Trimmed"], "trim": [0.1, 0.5]}]
    plan = checked_sweep({"name": "own", "data": data, "grid": grid})
    assert len(sweep(plan, tmp_path, n_jobs=2, progress=False)) == 3


def test_a_configuration_fits_it_and_its_checkpoint_asks_for_it(tmp_path, capsys):
    given = {
        "model": {"recipe": "qi", "image_size": 32, "norm_pre": ["own_parts.Root", "l2"]}
        | {
            "norm_inf": "same",
            "exponent": 2,
            "gen": "own_parts.Trimmed",
            "agg": "own_parts.Nearby",
        },
        "data": {"class_path": "Digits"},
        "trainer": {"limit_train_batches": 2, "limit_val_batches": 1},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(given))
    run = ["fit", "--config", str(tmp_path / "own.yaml"), "--model.trim", "0.1"]
    root = ["--trainer.default_root_dir", str(tmp_path / "runs")]
    assert main([*run, "--model.trmi", "1"]) == 2
    assert "did you mean 'model.trim'" in capsys.readouterr().err
    assert main([*run, *root]) == 0
    [checkpoint] = (tmp_path / "runs").rglob("*.ckpt")
    [config] = (tmp_path / "runs").rglob("config.yaml")
    assert yaml.safe_load(config.read_text())["model"]["trim"] == 0.1
    parts = ["--model.gen", "own_parts.Trimmed", "--model.agg", "own_parts.Nearby"]
    parts += ["--model.norm_pre", "[own_parts.Root, l2]"]
    test = ["test", "--data", "Digits", "--ckpt_path", str(checkpoint), *root]
    test += ["--trainer.limit_test_batches", "1"]
    del sys.modules["own_parts"]
    assert main(test) == 2
    assert "is not a part of this package, and a file never imports" in capsys.readouterr().err
    assert "own_parts" not in sys.modules
    assert main([*test, *parts]) == 0
    del sys.modules["own_parts"]
    with pytest.raises(ImprintError, match="import own_parts first, if you trust it"):
        ImprintedClassifier.load_from_checkpoint(checkpoint)
    assert "own_parts" not in sys.modules
    with pytest.raises(ImprintError, match="has no argument 'trmi'; did you mean 'trim'"):
        ImprintedClassifier.load_from_checkpoint(checkpoint, gen="own_parts.Trimmed", trmi=1)
    model = ImprintedClassifier.load_from_checkpoint(checkpoint)
    assert (model.parts.gen.trim, model.parts.norm_pre.steps[0].exponent) == (0.1, 2)


def test_a_saved_head_asks_for_it(points, tmp_path):
    x, y = points
    parts = dict(norm_inf="own_parts.Root", exponent=0.7, agg="own_parts.Nearby", order=2)
    head = imprint(x, y, "qi", norm_pre="none", **parts)
    head.save_pretrained(tmp_path / "head")
    del sys.modules["own_parts"]
    with pytest.raises(ImprintError, match="import own_parts first, if you trust it"):
        ImprintedHead.from_pretrained(tmp_path / "head")
    assert "own_parts" not in sys.modules
    import own_parts

    read = ImprintedHead.from_pretrained(tmp_path / "head")
    assert isinstance(read.agg, own_parts.Nearby)
    assert torch.equal(read(x), head(x))


@pytest.mark.parametrize(
    ("gen", "message"),
    [
        ("no_such_module.Trimmed", "no_such_module cannot be imported"),
        ("own_parts.Trimed", "own_parts has no class 'Trimed' that inherits from"),
        ("own_parts.Root", "inherits from imprint_pl.parts.gen.base.Generator"),
        ("os.path", "os has no class 'path'"),
        ("subprocess.Popen", "subprocess has no class 'Popen' that inherits"),
    ],
)
def test_what_is_no_part_is_refused(points, gen, message):
    with pytest.raises(ImprintError, match=message):
        imprint(*points, "qi", gen=gen)


# The declaration of our own keywords.


def test_the_estimator_spells_out_the_keywords_of_resolve():
    of_resolve = inspect.signature(resolve).parameters
    of_estimator = inspect.signature(ImprintEstimator.__init__).parameters
    for name in ("recipe", *KEYWORDS, "own"):
        assert of_estimator[name].annotation == of_resolve[name].annotation, name
        assert of_estimator[name].kind == of_resolve[name].kind or name == "recipe", name
        assert of_estimator[name].default == of_resolve[name].default, name


def test_the_keywords_are_the_slots_and_their_parts_parameters():
    assert set(KEYWORDS) == set(SLOTS) | every_parameter()


@pytest.mark.parametrize(
    ("keyword", "names"),
    [
        ("recipe", ["auto", *RECIPES]),
        ("norm_pre", SLOTS["norm_pre"]),
        ("gen", SLOTS["gen"]),
        ("norm_post", SLOTS["norm_post"]),
        ("norm_inf", ["same", *SLOTS["norm_inf"]]),
        ("agg", SLOTS["agg"]),
        ("distance", DISTANCES),
        ("lam", CHOICES),
        ("prior", PRIORS),
    ],
)
def test_the_declared_names_are_those_that_there_are(keyword, names):
    kind = get_type_hints(resolve)[keyword]
    literals = [part for part in get_args(kind) if "Literal" in str(part)]
    assert sorted(name for part in literals for name in get_args(part)) == sorted(names)


def test_it_is_found_in_the_current_folder_by_the_installed_command(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "parts_of_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path / "here")
    # As it is in a console script.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and p != str(tmp_path / "here")])
    try:
        resolved = imprint(torch.eye(4), torch.arange(4) % 2, "qi", gen="parts_of_here.Trimmed")
    finally:
        sys.modules.pop("parts_of_here", None)
    assert resolved.settings["gen"] == "parts_of_here.Trimmed"
