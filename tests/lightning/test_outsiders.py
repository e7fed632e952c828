"""`outsiders.py`: the threshold, "none of these", and the AUROC against outsiders."""

import json

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import (
    ImprintedClassifier,
    ImprintedHead,
    ImprintError,
    ImprintEstimator,
    imprint,
)
from imprint_pl.cli import main
from imprint_pl.data import Digits
from imprint_pl.lightning.outsiders import Outsiders, auroc
from imprint_pl.method.threshold import Limits, set_limits, set_threshold
from imprint_pl.training_set.store import RowStore


@pytest.mark.parametrize("recipe", ["qi", "robust", "knn", "kernel", "ridge", "lda"])
@pytest.mark.slow
def test_new_samples_pass_as_often_as_asked_and_outsiders_seldom(acceptance, recipe):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"]
    rows = (y < 8).nonzero().flatten()[:3000]
    head = imprint(x[rows], y[rows], recipe, calibrate=False)
    set_threshold(head, x[rows], y[rows], 0.9)
    test_x, test_y = acceptance["test_embeddings"], acceptance["test_labels"]
    labels = head.label(test_x)
    accepted = (labels[test_y < 8] >= 0).double().mean().item()
    assert accepted == pytest.approx(0.9, abs=0.03)
    assert (labels[test_y >= 8] >= 0).double().mean() < 0.9


def test_auroc_is_that_of_scikit_learn_ties_and_large_scores_included():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(50, 3, generator=generator).round() * 40 + 500
    outside = torch.randn(70, 3, generator=generator).round() * 40 + 480
    best = torch.cat([inside, outside]).amax(1)
    expected = roc_auc_score([1] * 50 + [0] * 70, best)
    assert auroc(inside, outside) == pytest.approx(expected)


def test_the_threshold_survives_a_state_dict_and_old_heads_have_none(blobs):
    head = set_threshold(imprint(*blobs, "qi"), *blobs, accept=1.0)
    assert (head.label(blobs[0]) >= 0).all()
    assert head.label(-blobs[0]).max() == -1
    assert head.name_of(-1) == "none of these"
    other = ImprintedHead()
    other.load_state_dict(head.state_dict())
    assert other.threshold == head.threshold
    head.clear()
    assert head.threshold is None


@pytest.mark.parametrize("recipe", ["qi", "ridge"])
def test_a_recipe_that_streams_goes_on_streaming_and_gets_the_same_limits(recipe, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    x = torch.eye(4)[y] + 0.3 * torch.randn(400, 4, generator=generator)
    model = ImprintedClassifier(nn.Identity(), recipe, accept=0.9, coverage=0.9)
    monkeypatch.setattr(RowStore, "add", None)
    quiet_trainer().fit(model, DataLoader(TensorDataset(x, y), 32))
    whole = set_limits(imprint(x, y, recipe), x, y, Limits(0.9, 0.9))
    assert model.head.coverage == 0.9
    assert model.head.threshold == pytest.approx(whole.threshold, abs=1e-3)
    torch.testing.assert_close(
        model.head.familiarity(x), whole.familiarity(x), atol=1e-3, rtol=1e-3
    )
    torch.testing.assert_close(model.head.bounds(), whole.bounds(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("limits", [{"accept": 0.9}, {"coverage": 0.9}])
def test_sums_that_are_kept_refuse_both_before_the_fit(limits, blobs):
    with pytest.raises(ImprintError, match='Give keep="embeddings"'):
        ImprintedClassifier(nn.Identity(), "qi", keep="moments", **limits)
    x, y = (part.numpy() for part in blobs)
    model = ImprintEstimator("qi", keep="moments", **limits)
    with pytest.raises(ImprintError, match='Give keep="embeddings"'):
        model.fit(x, y)
    assert not hasattr(model, "classes_")


def test_a_classifier_that_kept_nothing_refuses_to_grow_and_keeps_its_limits(blobs):
    x, y = blobs
    model = ImprintedClassifier(nn.Identity(), "qi", accept=0.9, coverage=0.9)
    quiet_trainer().fit(model, DataLoader(TensorDataset(x, y), 32))
    before = model.head.familiarity(x), model.head.threshold, model.head.bounds()
    with pytest.raises(ImprintError, match="nothing was kept"):
        model.add_class("more", x)
    with pytest.raises(ImprintError, match="nothing was kept"):
        model.remove_class("0")
    assert torch.equal(model.head.familiarity(x), before[0])
    assert model.head.threshold == before[1]
    assert torch.equal(model.head.bounds(), before[2])


def assert_limits_of_a_fit(head, x, y):
    """The head's limits are those of a fit on these samples."""
    whole = set_limits(imprint(x, y, "qi"), x, y, Limits(0.9, 0.9))
    assert head.threshold == pytest.approx(whole.threshold, abs=1e-5)
    torch.testing.assert_close(head.familiarity(x), whole.familiarity(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head.bounds(), whole.bounds())


def test_kept_embeddings_fit_both_anew_with_added_examples_and_without_a_class(blobs):
    x, y = blobs
    first = torch.arange(len(y)) % 2 == 0
    options = dict(keep="embeddings", accept=0.9, coverage=0.9)
    model = ImprintedClassifier(nn.Identity(), "qi", **options)
    quiet_trainer().fit(model, DataLoader(TensorDataset(x[first], y[first]), 32))
    for label in range(3):
        model.add_examples(str(label), x[~first & (y == label)])
    assert_limits_of_a_fit(model.head, x, y)
    model.remove_class("0")
    assert_limits_of_a_fit(model.head, x[y > 0], y[y > 0] - 1)


@pytest.mark.parametrize("accept", [0, 1.5, -1])
def test_a_share_that_is_none_is_refused(blobs, accept):
    with pytest.raises(ImprintError, match="accept="):
        set_threshold(imprint(*blobs, "qi"), *blobs, accept)


@pytest.mark.slow
def test_a_test_run_logs_how_outsiders_are_told_from_insiders():
    model = ImprintedClassifier(recipe="kernel", image_size=32, accept=0.95, keep="embeddings")
    inside, outside = Digits(classes=list(range(6))), Digits(classes=[6, 7, 8, 9])
    trainer = quiet_trainer(callbacks=[Outsiders(outside)])
    trainer.fit(model, inside)
    found = trainer.test(model, inside, verbose=False)[0]
    assert 0.5 < found["test/outsiders_auroc"] < 1
    assert found["test/accepted"] > 0.85
    assert found["test/rejected"] > 0.05
    assert 0 < found["test/outsiders_fpr95"] < 1
    assert not model.head._forward_hooks
    before = model.head.threshold
    model.remove_class("0")
    assert model.head.threshold not in (None, before)


def test_the_test_command_shows_the_figures_against_outsiders(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inside = ["--data", "Digits", "--data.classes", "[0,1,2,3,4,5]"]
    options = ["--model.image_size", "32", "--model.recipe", "qi", "--model.accept", "0.9"]
    assert main(["fit", *inside, *options, "--data.shots", "20"]) == 0
    checkpoint = next(tmp_path.rglob("imprinted.ckpt"))
    outside = ["--trainer.callbacks+=Outsiders", "--trainer.callbacks.data=Digits"]
    outside += ["--trainer.callbacks.data.classes=[6,7,8,9]"]
    capfd.readouterr()
    assert main(["test", *inside, "--ckpt_path", str(checkpoint), *outside]) == 0
    shown = capfd.readouterr().out
    summary = json.loads((tmp_path / "runs/Digits/version_1/summary.json").read_text())
    assert f"outsiders: AUROC {summary['outsiders_auroc']:.3f}, " in shown
    assert f"{100 * summary['rejected']:.1f} % rejected" in shown
    assert 0.5 < summary["outsiders_auroc"] < 1
    assert 0.7 < summary["accepted"] <= 1
    assert 0 < summary["rejected"] < 1


@pytest.mark.parametrize("recipe", ["ridge", "robust"])
def test_the_threshold_takes_embeddings_and_labels_of_the_types_that_imprint_takes(blobs, recipe):
    x, y = blobs[0].half(), blobs[1]
    expected = set_threshold(imprint(x, y, recipe), x.float(), y, 0.9).threshold
    for rows, labels in (
        (x, y.byte()),
        (x.double(), y.int()),
        (x.float().requires_grad_(), y),
        (x.numpy(), y.numpy()),
    ):
        head = imprint(rows, labels, recipe)
        assert set_threshold(head, rows, labels, 0.9).threshold == expected
