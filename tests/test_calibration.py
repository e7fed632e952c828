"""Temperatures and folds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_calibration_error

from imprint_pl.calibration import fit_temperature, folds
from imprint_pl.imprinting import imprint


def smoothed_loss(scores, y, temperature):
    smoothing = 1 / (len(y) + 2)
    return torch.nn.functional.cross_entropy(
        scores / temperature, y, label_smoothing=smoothing
    ).item()


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([1e-3, 1.0, 50.0]))
@settings(deadline=None, max_examples=30)
def test_no_other_temperature_is_likelier(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (40,), generator=generator)
    noise = torch.randn(40, 3, generator=generator)
    scores = scale * (noise + 2 * torch.eye(3)[y]).double()
    best = fit_temperature(scores, y)
    for factor in (0.5, 0.9, 1.1, 2.0):
        assert smoothed_loss(scores, y, best) <= smoothed_loss(scores, y, factor * best) + 1e-9


def test_the_temperature_scales_with_the_scores():
    scores, y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
    scores[torch.arange(50), y] += 2
    assert fit_temperature(7 * scores, y) == pytest.approx(7 * fit_temperature(scores, y), rel=1e-6)


def test_a_few_samples_that_are_all_right_do_not_make_it_certain():
    probability = (torch.eye(2) / fit_temperature(torch.eye(2), torch.arange(2))).softmax(1)
    assert probability[0, 0].item() == pytest.approx(1 - 1 / 8, abs=1e-6)


def test_scores_without_information_give_even_probabilities_and_no_error():
    y = torch.tensor([0, 1, 0, 1])
    assert fit_temperature(torch.zeros(4, 2), y) == 1.0
    assert fit_temperature(torch.zeros(0, 2), y[:0]) == 1.0
    wrong = torch.eye(2)[1 - y]
    assert (wrong / fit_temperature(wrong, y)).softmax(1).sub(0.5).abs().max() < 1e-4


def test_classes_without_proxies_do_not_count():
    scores = torch.tensor([[2.0, 0.0, -math.inf], [0.0, 2.0, -math.inf], [0.0, 1.0, -math.inf]])
    y = torch.tensor([0, 1, 2])
    assert fit_temperature(scores, y) == pytest.approx(fit_temperature(scores[:2, :2], y[:2]))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    seed=st.integers(0, 100),
    enough=st.sampled_from([1, 10, 500]),
)
@settings(deadline=None, max_examples=60)
def test_folds_share_no_sample_and_leave_one_of_each_class(sizes, seed, enough):
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])
    masks = folds(y, seed, enough)
    assert len(masks) <= 10
    assert bool(masks) == (max(sizes) > 1)
    if masks:
        assert torch.stack(masks).sum(0).max() == 1
    for mask in masks:
        assert (torch.bincount(y[~mask], minlength=len(sizes)) >= 1).all()


def test_many_samples_need_one_stratified_tenth():
    y = torch.arange(6000) % 3
    (mask,) = folds(y, seed=0)
    assert torch.bincount(y[mask]).tolist() == [200, 200, 200]
    assert not torch.equal(mask, folds(y, seed=1)[0])
    assert torch.equal(mask, folds(y, seed=0)[0])


@pytest.mark.parametrize("recipe", ["qi", "robust", "knn", "whitened", "lda", "ridge"])
def test_probabilities_on_real_embeddings_are_calibrated(acceptance, recipe):
    rows = slice(0, 3000)
    x, y = acceptance["train_embeddings"][rows], acceptance["train_labels"][rows]
    head = imprint(x, y, recipe)
    plain = imprint(x, y, recipe, calibrate=False)
    assert plain.temperature == 1
    test, labels = acceptance["test_embeddings"], acceptance["test_labels"]

    def error(logits):
        return multiclass_calibration_error(logits.softmax(1), labels, 10, n_bins=15).item()

    assert error(head(test)) < 0.08
    assert error(head(test)) < error(plain(test)) / 2
    torch.testing.assert_close(head.scores(test), plain.scores(test))


def test_calibrating_never_stops_a_recipe_that_has_just_enough_samples():
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    head = imprint(x, torch.tensor([0, 0, 1, 1, 2, 2]), "whitened")
    assert head.temperature == 1
