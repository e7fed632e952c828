"""`sets.py`: prediction sets by hand, their coverage, files, growing, the estimator."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine

from imprint_pl import ImprintedHead, ImprintError, ImprintEstimator, imprint
from imprint_pl.method.recipes import resolve
from imprint_pl.method.sets import PredictionSets
from imprint_pl.method.threshold import Limits, set_coverage, set_limits
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.kept_file import read_state, write_state
from imprint_pl.training_set.sums import TrainingSums


def fitted(probabilities, classes, num_classes=2):
    """Sets from the probability that each held-out sample's class had."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    y = torch.tensor(classes)
    rest = ((1 - p) / (num_classes - 1)).log()
    logits = rest[:, None].repeat(1, num_classes)
    logits[torch.arange(len(y)), y] = p.log()
    sets = PredictionSets()
    sets.fit(logits, y)
    return sets


def clusters(n, classes=3, spread=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.eye(8)[y] + 1 + spread * torch.randn(n, 8, generator=generator)
    return x, y


def test_the_bound_is_the_order_statistic_of_split_conformal_prediction():
    # Nine samples: with a coverage of 0.8 the bound is the floor(10 · 0.2) = second smallest.
    sets = fitted([0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.95], [0, 1] * 4 + [0])
    assert sets.bounds(0.8, 2).exp().tolist() == pytest.approx([0.3, 0.3])
    assert sets.bounds(0.9, 2).exp().tolist() == pytest.approx([0.2, 0.2])
    # One sample in ten may miss; of nine samples none can stand for one in twenty.
    assert sets.bounds(0.95, 2).tolist() == [-math.inf, -math.inf]
    assert sets.bounds(1.0, 2).tolist() == [-math.inf, -math.inf]


def test_a_large_class_has_a_bound_of_its_own_and_small_ones_share_theirs():
    large = [0.5 + 0.004 * i for i in range(100)]
    small = [0.1 + 0.004 * i for i in range(40)]
    sets = fitted(large + small, [0] * 100 + [1] * 20 + [2] * 20, 3)
    expected = [large[math.floor(101 * 0.05) - 1], *[small[math.floor(41 * 0.05) - 1]] * 2]
    assert sets.bounds(0.95, 3).exp().tolist() == pytest.approx(expected)
    # A class that no held-out sample had shares the bound, too.
    assert sets.bounds(0.95, 4)[3] == sets.bounds(0.95, 4)[2]


def test_small_classes_that_are_too_few_take_the_bound_of_all():
    large = [0.5 + 0.004 * i for i in range(100)]
    sets = fitted([*large, 0.2], [0] * 100 + [1])
    every = sorted([*large, 0.2])
    assert sets.bounds(0.95, 2)[1].exp().item() == pytest.approx(every[math.floor(102 * 0.05) - 1])


def test_sets_are_the_classes_whose_probability_reaches_their_bound():
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.34, 0.33, 0.33]]).log()
    bounds = torch.tensor([0.5, 0.3, 0.1]).log()
    sets = ImprintedHead.sets_of(logits, bounds)
    assert sets.tolist() == [[True, False, True], [False, True, True], [False, True, True]]
    dead = torch.tensor([[0.0, -math.inf, math.nan]])
    assert not ImprintedHead.sets_of(dead, torch.full((3,), -math.inf)).any()
    assert ImprintedHead.sets_of(dead[:, :2], torch.full((2,), -math.inf)).tolist() == [
        [True, False]
    ]


def test_another_coverage_needs_no_new_fit_and_sets_grow_with_it():
    x, y = clusters(600)
    head = set_coverage(imprint(x, y, "ridge"), x, y, 0.9)
    assert torch.equal(head.prediction_sets(x), head.prediction_sets(x, 0.9))
    sizes = [head.prediction_sets(x, c).sum(1) for c in (0.5, 0.8, 0.9, 0.99, 1.0)]
    assert all((small <= large).all() for small, large in pairwise(sizes))
    assert (sizes[-1] == 3).all()


def test_what_the_threshold_keeps_out_has_an_empty_set():
    x, y = clusters(600, spread=0.2)
    head = set_limits(imprint(x, y, "ridge"), x, y, Limits(0.9, 0.95))
    strange = torch.cat([x, -x])
    out = head.label(strange) == -1
    sets = head.prediction_sets(strange)
    assert 600 <= out.sum() < 700
    assert not sets[out].any()
    assert sets[~out].any(1).double().mean() > 0.9
    # All classes belong to what is accepted, none to what is not, whatever the coverage.
    assert torch.equal(head.prediction_sets(strange, 1.0).sum(1), torch.where(out, 0, 3))


def test_sets_and_threshold_in_one_pass_are_those_of_two():
    x, y = clusters(300)
    both = set_limits(imprint(x, y, "qi"), x, y, Limits(0.9, 0.9))
    alone = set_coverage(imprint(x, y, "qi"), x, y, 0.9)
    assert torch.equal(both.bounds(), alone.bounds())
    assert alone.threshold is None
    assert alone.familiar.is_empty


def test_a_head_keeps_its_sets_in_files_and_heads_without_have_the_keys_they_had(blobs, tmp_path):
    plain = imprint(*blobs, "qi")
    assert not [name for name in plain.state_dict() if "sets" in name]
    head = set_coverage(imprint(*blobs, "qi"), *blobs, 0.8)
    head.save_pretrained(tmp_path / "head")
    read = ImprintedHead.from_pretrained(tmp_path / "head")
    assert read.coverage == 0.8
    assert torch.equal(read.prediction_sets(blobs[0]), head.prediction_sets(blobs[0]))
    read.load_state_dict(plain.state_dict())
    assert read.coverage is None
    with pytest.raises(ImprintError, match="no prediction sets: fit with coverage"):
        read.prediction_sets(blobs[0])


@pytest.mark.parametrize("coverage", [0, 1.5, -1, math.nan])
def test_a_coverage_that_is_none_is_refused(blobs, coverage):
    with pytest.raises(ImprintError, match="coverage="):
        set_coverage(imprint(*blobs, "qi"), *blobs, coverage)
    head = set_coverage(imprint(*blobs, "qi"), *blobs, 0.8)
    with pytest.raises(ImprintError, match="coverage="):
        head.prediction_sets(blobs[0], coverage)


def test_one_sample_a_class_has_no_sets_and_says_what_to_do():
    x, y = torch.eye(3), torch.arange(3)
    with pytest.raises(ImprintError, match="coverage: no class has two samples"):
        set_coverage(imprint(x, y, "qi"), x, y, 0.9)


@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("log_probabilities", lambda v: v[:-1]),
        ("log_probabilities", lambda v: -v + 1),
        ("log_probabilities", lambda v: v * math.nan),
        ("classes", lambda v: v + 9),
        ("classes", lambda v: v[None]),
    ],
)
def test_forged_sets_are_refused(blobs, name, forge):
    head = set_coverage(imprint(*blobs, "qi"), *blobs, 0.8)
    state = head.state_dict()
    state[f"sets.{name}"] = forge(state[f"sets.{name}"]).clone()
    read = ImprintedHead()
    read.load_state_dict(state)
    with pytest.raises(ImprintError, match="damaged or forged"):
        read.check()


@pytest.mark.parametrize("samples", [300, 2600])
def test_streamed_sums_give_the_sets_of_all_rows(samples):
    x, y = clusters(samples)
    whole = set_coverage(imprint(x, y, "ridge"), x, y, 0.9)
    sums = TrainingSums(resolve("ridge"), x[:50], y[:50], 1, limits=Limits(coverage=0.9))
    for rows, labels in zip(x.split(64), y.split(64), strict=True):
        sums.add(rows, labels)
    torch.testing.assert_close(sums.head().bounds(), whole.bounds(), atol=5e-3, rtol=5e-3)


def test_kept_embeddings_fit_the_sets_anew_and_sums_refuse(tmp_path):
    x, y = clusters(240)
    head = set_coverage(imprint(x, y, "qi"), x, y, 0.9)
    state = State.of(x, y, head, "embeddings", limits=Limits(coverage=0.9))
    write_state(state, tmp_path / "it.safetensors")
    state = read_state(tmp_path / "it.safetensors")
    assert torch.equal(state.head().bounds(), head.bounds())
    left = state.remove_class("2").head()
    assert left.prediction_sets(x).shape == (240, 2)
    assert torch.equal(
        state.remove_class("2").add_class("2", x[y == 2]).head().bounds(), head.bounds()
    )
    with pytest.raises(ImprintError, match='Give keep="embeddings"'):
        State.of(x, y, head, "moments")


def test_the_estimator_predicts_sets_of_its_own_labels():
    x, y = (part.numpy() for part in clusters(300))
    labels = np.array(["ant", "bee", "cat"])[y]
    model = ImprintEstimator("ridge", coverage=0.9).fit(x, labels)
    sets = model.predict_set(x)
    assert (sets.shape, sets.dtype) == ((300, 3), bool)
    assert sets[np.arange(300), y].mean() == pytest.approx(0.9, abs=0.06)
    assert model.predict_set(x, 1.0).all()
    batches = ImprintEstimator("robust", k=2, coverage=0.9)
    batches.partial_fit(x[:150], labels[:150]).partial_fit(x[150:], labels[150:])
    assert batches.predict_set(x)[np.arange(300), y].mean() == pytest.approx(0.9, abs=0.06)
    with pytest.raises(ImprintError, match="coverage"):
        ImprintEstimator("ridge").fit(x, labels).predict_set(x)


SETS = {"digits": load_digits, "breast_cancer": load_breast_cancer, "wine": load_wine}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SETS, "fashion"])
@pytest.mark.parametrize("coverage", [0.9, 0.95])
def test_the_mean_coverage_of_20_splits_is_what_was_asked_for(name, coverage, request):
    if name == "fashion":
        acceptance = request.getfixturevalue("acceptance")
        x, y = acceptance["train_embeddings"][:6000].float(), acceptance["train_labels"][:6000]
    else:
        data = SETS[name](return_X_y=True)
        x, y = torch.from_numpy(data[0]).float(), torch.from_numpy(data[1])
        x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)
    size = min(len(y) // 2, 1000)
    covered = []
    for seed in range(20):
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        rows, others = order[:size], order[size:]
        head = imprint(x[rows], y[rows], "ridge", num_classes=int(y.max()) + 1, seed=seed)
        set_coverage(head, x[rows], y[rows], coverage)
        sets = head.prediction_sets(x[others])
        covered.append(sets[torch.arange(len(others)), y[others]].double().mean().item())
    assert np.mean(covered) == pytest.approx(coverage, abs=0.015)
