"""Files of an earlier version (`old_files/write.py`) are read as that version read them."""

import importlib.util
import shutil

import pandas as pd
import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

from imprint_pl import ImprintedClassifier, ImprintedHead
from imprint_pl.cli import main
from imprint_pl.embedding import embed

OLD = ROOT / "tests" / "old_files"
spec = importlib.util.spec_from_file_location("write", OLD / "write.py")
writer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(writer)


@pytest.fixture
def logits():
    return load_file(OLD / "logits.safetensors")


def read(name):
    model = ImprintedClassifier.load_from_checkpoint(
        OLD / f"{name}.ckpt", backbone=writer.Doubled()
    )
    return model.eval()


@pytest.mark.parametrize("name", writer.FITS)
def test_an_old_checkpoint_gives_the_logits_it_gave(name, logits):
    x, _ = writer.points()
    with torch.no_grad():
        torch.testing.assert_close(read(name)(x), logits[name], atol=1e-4, rtol=1e-4)


def test_an_old_head_gives_the_logits_it_gave(logits):
    x, _ = writer.points()
    head = ImprintedHead.from_pretrained(OLD / "head")
    assert head.class_names == ["a", "b", "c"]
    with torch.no_grad():
        torch.testing.assert_close(head(x), logits["head"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in writer.FITS if "keep" in writer.FITS[name]])
def test_an_old_state_grows_and_shrinks_back_to_its_head(name):
    x, _ = writer.points()
    model = read(name)
    model.load_state(OLD / f"{name}.ckpt")
    assert model.state.counts.tolist() == [20, 20, 20]
    before, proxies = model(x).argmax(1), model.head.proxies.detach().clone()
    outside = torch.full((20, 6), 9.0)
    model.add_class("far", outside)
    assert model.head.num_classes == 4
    assert (model(outside).argmax(1) == 3).all()
    if name == "qi":  # sums: they ask for the samples, as the backbone gave them
        model.remove_class("far", outside)
    else:
        model.remove_class("far")
    assert model.head.proxies.shape == proxies.shape
    if name != "kernel":  # whose landmarks are drawn anew
        # The rows were rounded to half precision, and a sum to single.
        torch.testing.assert_close(model.head.proxies, proxies, atol=5e-3, rtol=5e-3)
    least = 50 if name == "kernel" else 58
    assert (model(x).argmax(1) == before).sum() >= least


def test_an_old_cache_is_read_not_filled_again(tmp_path):
    shutil.copytree(OLD / "cache", tmp_path / "cache")
    embedded = embed(
        writer.backbone(), writer.Squares(), tmp_path / "cache", name="doubled", device="cpu"
    )
    assert (embedded.use.embedded, embedded.use.read) == (0, 12)


def test_old_results_of_a_sweep_are_gone_on_with(tmp_path):
    shutil.copytree(OLD / "results", tmp_path / "results")
    text = writer.SWEEP.format(embeddings=OLD / "points.safetensors")
    # What was the default of ridge when they were written; a default of today is another row.
    text = text.replace("[qi, ridge, knn]", "[qi, knn]") + "  - {recipe: ridge, lam: gcv}\n"
    config = tmp_path / "sweep.yaml"
    config.write_text(text + "  - {recipe: lda}\n")
    before = pd.read_csv(OLD / "results" / "old" / "results.csv")
    assert main(["sweep", "--config", str(config), "--results_dir", str(tmp_path / "results")]) == 0
    after = pd.read_csv(tmp_path / "results" / "old" / "results.csv")
    assert len(after) == len(before) + 1
    # A row that is computed again has other seconds.
    assert set(before.id) <= set(after.id)
    assert set(before.gen_seconds) <= set(after.gen_seconds)
    assert main(["report", str(tmp_path / "results" / "old")]) == 0
