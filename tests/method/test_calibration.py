"""Temperatures and folds."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchmetrics.functional.classification import multiclass_calibration_error

from imprint_pl import ImprintError, ImprintEstimator
from imprint_pl.method.calibration import Fold, fit_temperature, folds, score_folds
from imprint_pl.method.imprinting import imprint
from imprint_pl.parts.gen import Proxies
from imprint_pl.training_set.kept import State


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
    with pytest.warns(UserWarning, match="not calibrated.*without the held-out samples"):
        head = imprint(x, torch.tensor([0, 0, 1, 1, 2, 2]), "whitened")
    assert head.temperature == 1
    assert head.settings["calibrated"] is False


@pytest.mark.parametrize("recipe", ["auto", "qi", "robust", "knn", "ridge", "kernel", "ranpac"])
def test_one_sample_a_class_is_not_calibrated_and_says_so(recipe):
    options = {"projection_dim": 50} if recipe == "ranpac" else {}
    with pytest.warns(UserWarning, match="not calibrated.*no class has two samples"):
        head = imprint(torch.eye(4), torch.arange(4), recipe, **options)
    assert head.settings["calibrated"] is False


def test_a_single_class_needs_no_temperature_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = imprint(torch.eye(3), torch.zeros(3, dtype=torch.long), "qi")
    assert "calibrated" not in head.settings


def test_standardised_pixels_are_calibrated_on_every_split():
    # λ is tiny there: the others of held-out rows need the very features that the sums are of.
    X, y = load_digits(return_X_y=True)
    for seed in (0, 4):
        x, x_test, y_train, y_test = train_test_split(X, y, random_state=seed)
        model = make_pipeline(StandardScaler(), ImprintEstimator("kernel")).fit(x, y_train)
        probabilities = model.predict_proba(x_test)
        assert log_loss(y_test, probabilities) < 0.1
        assert probabilities.max(1).mean() > 0.95


class Fails:
    """A GEN that needs a λ of at least `least`."""

    name, from_moments, needs_gram = "fails", True, False

    def __init__(self, lam, least):
        self.lam, self.least = lam, least

    def __call__(self, moments):
        if self.lam < self.least and moments.counts.sum() < 40:
            raise ImprintError(f"lam={self.lam} is too small")
        weights = moments.means.float()
        return Proxies(weights, weights.new_zeros(len(weights)), torch.arange(len(weights)))


def test_a_held_out_head_that_fails_is_tried_with_a_larger_lam(blobs):
    head = imprint(*blobs, "qi", gen=Fails(1e-3, 0.5))
    assert head.temperature == pytest.approx(imprint(*blobs, "qi").temperature, rel=1e-6)
    assert "calibrated" not in head.settings
    with pytest.warns(UserWarning, match="not calibrated.*lam=0.001 is too small"):
        head = imprint(*blobs, "qi", gen=Fails(1e-3, 1e3))
    assert head.temperature == 1
    assert head.settings["calibrated"] is False


def test_a_fold_that_fails_gives_way_to_another():
    # Without the one pair that differs there is no covariance within the classes.
    x = torch.tensor([[0.0, 0], [1, 0], [0, 5], [0, 5], [5, 0], [5, 0], [5, 5], [5, 5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = torch.cat([x, x[:2] + 0.1])
        y = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 0, 0])
        assert imprint(x, y, "lda").temperature != 1


def test_sums_that_grow_say_that_the_temperature_is_of_the_head_before(blobs):
    x, y = blobs
    state = State.of(x, y, imprint(x, y, "qi"), "moments")
    with pytest.warns(UserWarning, match='not calibrated.*keep="moments" has no samples'):
        grown = state.add_class("new", x[:5] - 9)
    assert grown.head().settings["calibrated"] is False
    assert "calibrated" not in state.head().settings
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        grown.add_examples("new", x[:5] - 9)
        kept = State.of(x, y, imprint(x, y, "qi"), "embeddings").add_class("new", x[:5] - 9)
    assert "calibrated" not in kept.head().settings


def test_classes_without_proxies_do_not_count_where_a_vote_gives_them_zero(blobs):
    # A class whose only sample is held out gets the score 0 from `mnn`, not −∞.
    scores, y = torch.tensor([[2.0, 0.0, 0.0], [1.0, 2.0, 0.0]]), torch.tensor([0, 2])
    held_out = score_folds(
        [0], lambda fold: Fold(scores, y, torch.tensor([0, 1]), torch.tensor([5, 6]))
    )
    assert held_out.y.tolist() == [0]
    assert held_out.rows.tolist() == [5]
