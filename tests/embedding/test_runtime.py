"""Runtimes of a backbone: equal to torch, chosen by rule, and torch wherever another one fails."""

import copy
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import nn
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier
from imprint_pl.cli import main
from imprint_pl.data import Digits
from imprint_pl.embedding import embed, graphs, runtime
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.embedding.graphs import KeptGraphs
from imprint_pl.errors import ImprintError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

# It has depthwise convolutions and batch norms, and is tiny.
NAME = "timm/test_efficientnet"
OPTIONS = {"pretrained": False, "image_size": 32}
IMAGES = torch.randint(
    0, 256, (7, 3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class Small(nn.Module):
    """A convolution and its norm, with statistics that are not 0 and 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, images):
        return self.norm(self.conv(images)).relu().mean((2, 3))


class PythonLoop(nn.Module):
    """The exporter cannot follow it: a branch on values."""

    def forward(self, images):
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


SETTINGS = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}


def small(asked="onnxruntime"):
    return load_backbone(Small(), preprocess=SETTINGS, runtime=asked)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of kept graphs of this test's own."""
    monkeypatch.setenv(graphs.VARIABLE, str(tmp_path / "graphs"))
    return tmp_path / "graphs"


@pytest.fixture
def exports(monkeypatch):
    """Grows by one with each export."""
    done = []

    def export(*arguments):
        done.append(1)
        return graphs.export_graph(*arguments)

    monkeypatch.setattr(runtime, "export_graph", export)
    return done


@pytest.fixture
def few_are_enough(monkeypatch):
    monkeypatch.setattr(runtime, "ENOUGH_PIXELS", 100 * 32 * 32)


def agree(found, expected):
    return (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def needs_openvino(asked):
    if asked == "openvino":
        pytest.importorskip("openvino")


# Equality.


@pytest.mark.parametrize("asked", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("layers", "views"), [("last", "none"), ("all", "flip")])
def test_each_runtime_gives_the_embeddings_of_torch(asked, layers, views):
    needs_openvino(asked)
    wide = {"layers": layers, "views": views}
    expected = load_backbone(NAME, runtime="torch", **OPTIONS, **wide)
    backbone = load_backbone(NAME, runtime=asked, **OPTIONS, **wide)
    found = backbone(IMAGES)
    assert backbone.runtime.running == asked
    assert found.dtype == torch.float32
    assert agree(found, expected(IMAGES))
    assert backbone.layer_widths == expected.layer_widths
    assert backbone.source() == expected.source()
    assert list(backbone.state_dict()) == list(expected.state_dict())
    assert backbone.embedding_dim == found.shape[1] == expected.embedding_dim


def test_batches_of_any_length_run_in_one_graph(exports):
    backbone = small()
    expected = small("torch")(IMAGES)
    for rows in (3, 7, 1):
        assert agree(backbone(IMAGES[:rows]), expected[:rows])
    first_of_one = small()
    assert agree(first_of_one(IMAGES[:1]), expected[:1])
    assert agree(first_of_one(IMAGES), expected)
    assert len(exports) == 2
    assert len(small()([*IMAGES[:2], IMAGES[2, :, :30]])) == 3


def test_weights_that_change_in_place_are_noticed():
    backbone, other = small(), Small()
    backbone(IMAGES)
    with torch.no_grad():
        other.conv.weight.mul_(3)
    backbone.model.load_state_dict(other.state_dict())
    assert agree(backbone(IMAGES), load_backbone(other, preprocess=SETTINGS)(IMAGES))
    assert backbone.runtime.running == "onnxruntime"


def test_copies_and_pickles_start_their_own(exports):
    backbone = small()
    found = backbone(IMAGES)
    for copied in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert copied.runtime.running == "torch"
        assert torch.equal(copied(IMAGES), found)
        assert copied.runtime.running == "onnxruntime"
    assert len(exports) == 3


def test_the_threads_are_those_of_torch_and_do_not_spin(monkeypatch):
    import onnxruntime

    seen = []
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda graph, options, **_: seen.append(options) or 1 / 0,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with pytest.warns(UserWarning, match="runs in torch"):
            small()(IMAGES)
    finally:
        torch.set_num_threads(threads)
    assert seen[0].intra_op_num_threads == 3
    assert seen[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"


# The rule.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/tf_efficientnet_lite0", True),
        ("torchvision/mobilenet_v3_small", True),
        ("torchvision/shufflenet_v2_x0_5", True),
        ("torchvision/resnet18", False),
        ("torchvision/regnet_y_400mf", False),
        ("timm/test_convnext", False),
        ("timm/test_vit", False),
    ],
)
def test_families_that_gain_have_depthwise_convolutions_with_batch_norms(name, expected):
    assert runtime.gains(load_backbone(name, pretrained=False, runtime="torch").model) is expected


def test_auto_looks_at_family_images_size_and_device(monkeypatch):
    def chosen(images, device="cpu", name=NAME, **options):
        backbone = load_backbone(name, **{"pretrained": False, "image_size": 224} | options)
        backbone.expect(images)
        return backbone.runtime_on(torch.device(device))

    assert chosen(1000) == "onnxruntime"
    for images in (None, 0, 999):
        assert chosen(images) == "torch"
    assert chosen(10_000, image_size=32) == "torch"
    assert chosen(50_000, image_size=32) == "onnxruntime"
    assert chosen(1000, device="cuda") == "torch"
    assert chosen(1000, precision="bf16") == "torch"
    assert chosen(1000, compile=True) == "torch"
    assert chosen(1000, runtime="torch") == "torch"
    assert chosen(1000, name="torchvision/resnet18") == "torch"
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(1000) == "torch"
    own = load_backbone(Small(), preprocess=SETTINGS | {"size": 224})
    own.expect(10**6)
    assert own.runtime_on(torch.device("cpu")) == "torch"


def test_without_the_extra_auto_is_torch_and_says_once_what_it_would_bring(monkeypatch, caplog):
    monkeypatch.setattr(runtime, "_is_installed", lambda name: False)
    backbone = load_backbone(NAME, pretrained=False, image_size=224)
    assert backbone.runtime.expect(backbone.model, 999) is None
    line = backbone.runtime.expect(backbone.model, 1000)
    assert line.endswith("ONNX Runtime: pip install 'imprint-pl[onnx]'")
    assert backbone.runtime.expect(backbone.model, 1000) is None
    assert backbone.runtime_on(torch.device("cpu")) == "torch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onxruntime"}, "did you mean 'onnxruntime'"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "precision='bf16'"),
        ({"runtime": "onnxruntime", "compile": True}, "compile=True"),
    ],
)
def test_an_unknown_runtime_and_a_clash_are_errors(options, message):
    with pytest.raises(ImprintError, match=message):
        load_backbone(NAME, **OPTIONS, **options)


def test_a_runtime_that_was_asked_for_needs_its_extra_and_a_cpu_in_float32(monkeypatch):
    backbone = small()
    with pytest.raises(ImprintError, match="a backbone on meta"):
        backbone.runtime_on(torch.device("meta"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ImprintError, match="autocast"):
        backbone(IMAGES)
    with pytest.raises(ImprintError, match="weights in float64"):
        small().double()(IMAGES)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImprintError, match=r"pip install 'imprint-pl\[openvino\]'"):
        load_backbone(NAME, runtime="openvino", **OPTIONS)


# Where it fails.


def test_a_model_that_cannot_be_exported_runs_in_torch_and_one_line_says_so():
    backbone = load_backbone(PythonLoop(), preprocess=SETTINGS, runtime="onnxruntime")
    with pytest.warns(UserWarning, match="'PythonLoop' runs in torch, not in onnxruntime") as seen:
        found = backbone(IMAGES)
    assert torch.equal(found, load_backbone(PythonLoop(), preprocess=SETTINGS)(IMAGES))
    assert backbone.runtime.running == "torch"
    assert torch.equal(backbone(IMAGES), found)
    assert len(seen) == 1
    assert "\n" not in str(seen[0].message)


@pytest.mark.parametrize("fault", [1.001, float("nan")])
def test_a_graph_that_computes_something_else_is_not_used(monkeypatch, fault):
    real = runtime.OPENERS["onnxruntime"]

    def wrong(*arguments):
        run = real(*arguments)
        return lambda batch: run(batch) * fault

    monkeypatch.setitem(runtime.OPENERS, "onnxruntime", wrong)
    with pytest.warns(UserWarning, match="embeddings differ by"):
        found = small()(IMAGES)
    assert torch.equal(found, small("torch")(IMAGES))


def test_a_layer_of_small_numbers_is_compared_by_its_own():
    expected = torch.tensor([[1e-3, 100.0]])
    assert runtime.difference(expected + torch.tensor([[1e-5, 0]]), expected, None) is None
    assert "1.0e-05" in runtime.difference(
        expected + torch.tensor([[1e-5, 0]]), expected, widths=[1, 1]
    )


# Kept graphs.


def test_a_graph_is_exported_once_and_kept(folder, exports):
    first = load_backbone(NAME, runtime="onnxruntime", **OPTIONS)(IMAGES)
    second = load_backbone(NAME, runtime="onnxruntime", **OPTIONS)(IMAGES)
    assert torch.equal(first, second)
    assert len(exports) == 1
    # Weights, size and layers have graphs of their own.
    other = load_backbone(NAME, runtime="onnxruntime", **OPTIONS | {"image_size": 64})
    assert agree(
        other(IMAGES), load_backbone(NAME, runtime="torch", **OPTIONS | {"image_size": 64})(IMAGES)
    )
    assert len(exports) == len(list(folder.glob("*.graph"))) == 2
    # Nobody sees the code of a module of one's own.
    small()(IMAGES)
    assert len(list(folder.glob("*.graph"))) == 2


@pytest.mark.parametrize("how", ["cut short", "changed", "of another key", "wrong but whole"])
@pytest.mark.slow
def test_a_damaged_or_forged_graph_is_exported_again(folder, exports, how):
    backbone = load_backbone(NAME, runtime="onnxruntime", **OPTIONS)
    expected = backbone(IMAGES)
    (path,) = folder.glob("*.graph")
    content = path.read_bytes()
    if how == "cut short":
        path.write_bytes(content[:-100])
    elif how == "changed":
        path.write_bytes(content[:-100] + b"x" + content[-99:])
    elif how == "of another key":
        kept = KeptGraphs(folder)
        kept.get({"another": 1}, lambda: content[graphs.HASH_LENGTH :])
        os.replace(next(p for p in folder.glob("*.graph") if p != path), path)
    else:
        key = backbone.runtime._key(backbone.model, backbone.reader, torch.empty(1, 3, 32, 32))
        forged = load_backbone(NAME, runtime="torch", **OPTIONS)
        with torch.no_grad():
            next(forged.model.parameters()).mul_(2)
        graph = graphs.export_graph(
            runtime.Forward(forged.model, forged.reader), torch.rand(2, 3, 32, 32)
        )
        path.unlink()
        KeptGraphs(folder).get(key, lambda: graph)
    again = load_backbone(NAME, runtime="onnxruntime", **OPTIONS)
    assert torch.equal(again(IMAGES), expected)
    assert again.runtime.running == "onnxruntime"
    assert len(exports) == 2


def test_the_folder_keeps_what_was_used_last(tmp_path):
    kept = KeptGraphs(tmp_path / "graphs", most_bytes=400)
    for age, name in enumerate("abc"):
        kept.get({"name": name}, lambda: 50 * b"x")
        os.utime(kept._path({"name": name}), (age, age))
    kept.get({"name": "a"}, lambda: pytest.fail("it is there"))
    (tmp_path / "graphs" / "killed.graph.unfinished").write_bytes(b"half")
    kept.get({"name": "d"}, lambda: 50 * b"x")
    # 114 bytes each; b was used the longest time ago.
    assert [name for name in "abcd" if kept.has({"name": name})] == ["a", "c", "d"]
    assert not list(tmp_path.glob("graphs/*.unfinished"))
    large = kept.get({"name": "large"}, lambda: 900 * b"x")
    assert kept.get({"name": "large"}, lambda: pytest.fail("it is there")) == large


def test_two_who_want_the_same_graph_export_it_once(tmp_path):
    done = []

    def get(_):
        return KeptGraphs(tmp_path).get({"name": "a"}, lambda: done.append(1) or b"graph")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, range(4))) == 4 * [b"graph"]
    assert len(done) == 1


def test_a_folder_that_cannot_be_written_to_costs_a_line_only(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="cannot be kept in .*let IMPRINT_PL_GRAPHS name"):
        assert KeptGraphs(tmp_path / "file").get({}, lambda: b"graph") == b"graph"


@pytest.mark.slow
def test_a_new_process_reads_the_kept_graph(folder):
    load_backbone(NAME, runtime="onnxruntime", **OPTIONS)(IMAGES)
    script = f"""
import torch
from imprint_pl.embedding import runtime
from imprint_pl.embedding.backbone import load_backbone
runtime.export_graph = None
backbone = load_backbone({NAME!r}, runtime="onnxruntime", **{OPTIONS!r})
backbone(torch.zeros(2, 3, 9, 9, dtype=torch.uint8))
print(backbone.runtime.running)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "onnxruntime\n", done.stderr[-2000:]


# Fit, predict, and the cache of embeddings.


def test_fit_and_predict_agree_and_a_checkpoint_does_not_keep_the_runtime(tmp_path, few_are_enough):
    data = Digits(shots=20, batch_size=64)
    fitted = {}
    for asked in ("auto", "torch"):
        model = ImprintedClassifier(NAME, "qi", runtime=asked, **OPTIONS)
        trainer = quiet_trainer()
        trainer.fit(model, data)
        fitted[asked] = model
        assert model.backbone.runtime.running == ("onnxruntime" if asked == "auto" else "torch")
    proxies = [fitted[asked].head.proxies for asked in fitted]
    assert agree(*proxies)
    file = tmp_path / "it.ckpt"
    trainer = quiet_trainer()
    trainer.fit(fitted["auto"], data)
    trainer.save_checkpoint(file)
    assert "runtime" not in torch.load(file, weights_only=True)["hyper_parameters"]
    loaded = ImprintedClassifier.load_from_checkpoint(file, runtime="torch")
    data.setup()
    images = data.test_dataset.images[:50]
    assert torch.equal(loaded(images).argmax(1), fitted["auto"](images).argmax(1))


@pytest.mark.slow
def test_two_processes_in_onnx_runtime_make_the_head_of_one_in_torch(tmp_path):
    def fitted(asked, processes):
        command = [sys.executable, "-m", "imprint_pl", "fit", "--data", "Digits"]
        command += ["--data.shots", "20", "--model.recipe", "qi", "--model.backbone", NAME]
        command += ["--model.pretrained", "false", "--model.image_size", "32", "--model.runtime"]
        command += [asked, "--trainer.accelerator", "cpu", "--trainer.devices", str(processes)]
        folder = tmp_path / f"{asked}-{processes}"
        folder.mkdir()
        done = subprocess.run(
            command, cwd=folder, timeout=240, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (summary,) = (json.loads(f.read_text()) for f in folder.glob("runs/**/summary.json"))
        head = ImprintedClassifier.load_from_checkpoint(folder / summary["checkpoint"]).head
        return summary.get("runtime", "torch"), head.proxies

    (alone, expected), (together, found) = fitted("torch", 1), fitted("onnxruntime", 2)
    assert (alone, together) == ("torch", "onnxruntime")
    assert agree(found, expected)


def test_fit_says_which_runtime_was_used_where_it_was_not_torch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = (
        f"fit --data Digits --data.shots 3 --model.recipe qi --model.backbone {NAME} "
        "--model.pretrained false --model.image_size 32 --trainer.accelerator cpu --model.runtime"
    )
    assert main([*line.split(), "onnxruntime"]) == 0
    assert "the backbone ran in onnxruntime" in capsys.readouterr().out
    (file,) = tmp_path.glob("runs/**/summary.json")
    assert json.loads(file.read_text())["runtime"] == "onnxruntime"
    assert main([*line.split(), "onnx"]) == 2
    assert "runtime 'onnx'; did you mean 'onnxruntime'" in capsys.readouterr().err


def keys_in(folder):
    return [json.loads(path.read_text()) for path in Path(folder).glob("*/key.json")]


def test_cached_rows_name_their_runtime_unless_it_is_torch(tmp_path, few_are_enough):
    data = {"shots": 2, "batch_size": 64}
    by_torch = embed(load_backbone(NAME, runtime="torch", **OPTIONS), Digits(**data), tmp_path)
    assert all("runtime" not in key for key in keys_in(tmp_path))
    by_rule = embed(load_backbone(NAME, **OPTIONS), Digits(**data), tmp_path)
    # The whole set counts, not the 20 images of this task; nothing of torch is read.
    assert by_rule.use.read == 0
    assert {key.get("runtime") for key in keys_in(tmp_path)} == {None, "onnxruntime"}
    assert agree(by_rule.arrays()[0], by_torch.arrays()[0])
    again = embed(load_backbone(NAME, **OPTIONS), Digits(**data), tmp_path)
    assert again.use.embedded == 0
    assert torch.equal(again.arrays()[0], by_rule.arrays()[0])


def test_where_the_runtime_fails_the_cache_holds_the_rows_of_torch(
    tmp_path, few_are_enough, monkeypatch
):
    monkeypatch.setitem(runtime.OPENERS, "onnxruntime", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="runs in torch, not in onnxruntime: ZeroDivisionError"):
        found = embed(load_backbone(NAME, **OPTIONS), Digits(shots=2), tmp_path)
    assert all("runtime" not in key for key in keys_in(tmp_path))
    again = embed(load_backbone(NAME, runtime="torch", **OPTIONS), Digits(shots=2), tmp_path)
    assert again.use.embedded == 0
    assert torch.equal(again.arrays()[0], found.arrays()[0])
