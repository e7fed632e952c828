"""Which training samples GEN sees: shots, and distances that are typical of a class."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import weibull_min

from imprint_pl.errors import ImprintError
from imprint_pl.method.selection import draw_shots, weibull_typical
from imprint_pl.numerics.draws import sample

labels = st.lists(st.integers(0, 4), min_size=1, max_size=40).map(torch.tensor)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(n=st.integers(0, 30), count=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_a_sample_is_of_different_positions_and_a_prefix_of_a_larger_one(n, count, seed):
    drawn = sample(n, count, seed).tolist()
    assert len(set(drawn)) == len(drawn) == min(n, count)
    assert set(drawn) <= set(range(n))
    assert drawn == sample(n, count + 3, seed).tolist()[: len(drawn)]


@given(y=labels, shots=st.integers(1, 12), seed=st.integers(0, 1000))
def test_each_class_keeps_so_many_shots_or_all_it_has(y, shots, seed):
    kept = draw_shots(y, shots, seed)
    assert kept.dtype == torch.int64
    assert kept.tolist() == sorted(set(kept.tolist()))
    expected = torch.bincount(y).clamp(max=shots)
    assert torch.bincount(y[kept], minlength=len(expected)).tolist() == expected.tolist()
    assert torch.equal(kept, draw_shots(y, shots, seed))


@given(y=labels, shots=st.integers(1, 6), seed=st.integers(0, 1000))
def test_shots_of_a_class_do_not_depend_on_the_other_classes(y, shots, seed):
    kept = draw_shots(y, shots, seed)
    for c in y.unique().tolist():
        rows = (y == c).nonzero().flatten()
        alone = rows[draw_shots(torch.zeros_like(rows), shots, seed)]
        assert torch.equal(alone, kept[y[kept] == c])


@given(y=labels, shots=st.integers(1, 6), seed=st.integers(0, 1000))
def test_fewer_shots_are_a_subset_of_more(y, shots, seed):
    few, more = draw_shots(y, shots, seed), draw_shots(y, shots + 2, seed)
    assert set(few.tolist()) <= set(more.tolist())


def test_other_seeds_draw_other_shots():
    y = torch.arange(200) % 2
    assert len({tuple(draw_shots(y, 5, seed).tolist()) for seed in range(20)}) == 20


@pytest.mark.parametrize("shots", [0, -3, 1.5])
def test_shots_below_one_or_not_whole_are_an_error(shots):
    with pytest.raises(ImprintError, match=f"shots={shots}: "):
        draw_shots(torch.tensor([0, 1]), shots, 0)


def distances(x, y, c):
    of_class = x[y == c].double()
    return (of_class - of_class.mean(0)).norm(dim=1).numpy()


def test_typical_samples_lie_between_the_quantiles_of_scipys_fit(acceptance):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"]
    kept = weibull_typical(x, y, 0.1, 0.9)
    is_kept = torch.zeros(len(x), dtype=torch.bool)
    is_kept[kept] = True
    for c in range(10):
        far = distances(x, y, c)
        low, high = weibull_min.ppf([0.1, 0.9], *weibull_min.fit(far))
        assert is_kept[y == c].tolist() == ((far >= low) & (far <= high)).tolist()
        assert 0.76 < is_kept[y == c].double().mean() < 0.88
    assert torch.equal(kept, kept.sort().values)


def test_bounds_of_0_and_1_keep_every_sample(acceptance):
    # L2-normalised class 9: scipy's location ends above the nearest sample.
    x = torch.nn.functional.normalize(acceptance["train_embeddings"])
    y = acceptance["train_labels"]
    assert len(weibull_typical(x, y, 0.0, 1.0)) == len(x)


def test_samples_of_weibull_distances_are_kept_in_proportion():
    far = weibull_min.rvs(2.0, loc=3.0, scale=2.0, size=4000, random_state=1)
    x = torch.nn.functional.normalize(normal(4000, 20)) * torch.from_numpy(far)[:, None].float()
    y = torch.zeros(4000, dtype=torch.long)
    for lower, upper in [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0), (0.05, 0.95)]:
        part = len(weibull_typical(x, y, lower, upper)) / 4000
        assert part == pytest.approx(upper - lower, abs=0.02)


def test_typical_samples_of_a_class_do_not_depend_on_the_others(blobs):
    x, y = blobs
    kept = weibull_typical(x, y, 0.2, 0.8)
    for c in range(3):
        rows = (y == c).nonzero().flatten()
        alone = rows[weibull_typical(x[rows], torch.zeros_like(rows), 0.2, 0.8)]
        assert torch.equal(alone, kept[y[kept] == c])


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_the_scale_of_embeddings_does_not_matter(blobs, scale):
    x, y = blobs
    kept = weibull_typical(x, y, 0.2, 0.8)
    assert torch.equal(weibull_typical(scale * x, y, 0.2, 0.8), kept)


@pytest.mark.parametrize(
    "of_class",
    [
        torch.ones(1, 3),
        torch.tensor([[1.0, 2.0, 3.0], [0.1, 0.2, 0.4]]),  # two are equally far from their mean
        torch.full((8, 3), 0.7),
        torch.cat([torch.eye(3), -torch.eye(3)]) + 5,
    ],
    ids=["one", "two", "constant", "equally far"],
)
def test_classes_with_nothing_to_fit_keep_all_their_samples_without_a_warning(of_class, blobs):
    x = torch.cat([torch.nn.functional.pad(of_class, (0, 2)), blobs[0]])
    y = torch.cat([torch.zeros(len(of_class), dtype=torch.long), blobs[1] + 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = weibull_typical(x, y, 0.4, 0.6)
    assert kept[: len(of_class)].tolist() == list(range(len(of_class)))
    assert len(kept) < len(x)


@settings(max_examples=60, deadline=None)
@given(
    y=labels,
    seed=st.integers(0, 1000),
    duplicates=st.booleans(),
    bounds=st.sampled_from([(0.0, 0.01), (0.5, 0.5001), (0.1, 0.9), (0.99, 1.0)]),
)
def test_no_class_ever_ends_empty_nor_warns(y, seed, duplicates, bounds):
    x = normal(len(y), 3, seed=seed)
    x = x.round() if duplicates else x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = weibull_typical(x, y, *bounds)
    assert y[kept].unique().tolist() == y.unique().tolist()
    assert kept.tolist() == sorted(set(kept.tolist()))


def test_without_a_sample_between_the_bounds_the_nearest_stays():
    # On a circle but for rounding, and one sample far out.
    x = torch.cat([torch.tensor([[-1.0], [1.0], [-1.1], [1.1], [-8.0], [8.0]])])
    y = torch.zeros(6, dtype=torch.long)
    far = distances(x, y, 0)
    low, high = weibull_min.ppf([0.8, 0.81], *weibull_min.fit(far))
    assert not ((far >= low) & (far <= high)).any()
    outside = np.maximum(low - far, far - high)
    kept = weibull_typical(x, y, 0.8, 0.81)
    assert kept.tolist() == np.flatnonzero(outside == outside.min()).tolist()


@pytest.mark.parametrize(
    "bounds", [(-0.1, 0.9), (0.1, 1.1), (0.9, 0.1), (0.5, 0.5), (float("nan"), 0.9)]
)
def test_bounds_that_are_no_rising_probabilities_are_an_error(bounds, blobs):
    with pytest.raises(ImprintError, match="lower=.*upper="):
        weibull_typical(*blobs, *bounds)


def test_the_global_generators_are_left_alone(blobs):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    draw_shots(blobs[1], 3, 0)
    weibull_typical(*blobs, 0.1, 0.9)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
