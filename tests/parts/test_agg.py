import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from imprint_pl import ImprintError
from imprint_pl.parts.agg import nearest as agg
from imprint_pl.parts.agg.distances import DISTANCES
from imprint_pl.parts.agg.logsumexp import LogSumExp
from imprint_pl.parts.agg.max import Max
from imprint_pl.parts.agg.nearest import NearestProxies

# On a line: class 0 at 0 and 10, class 1 at 3 and 4, class 2 at 20.
PROXIES = torch.tensor([[0.0], [10.0], [3.0], [4.0], [20.0]])
CLASSES = torch.tensor([0, 0, 1, 1, 2])
BIAS = torch.zeros(5)


def scores(part, z, proxies=PROXIES, classes=CLASSES, num_classes=3):
    return part(torch.as_tensor(z), proxies, torch.zeros(len(proxies)), classes, num_classes)


def random_case(seed, n=9, p=12, d=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    z, proxies = torch.randn(n, d, generator=generator), torch.randn(p, d, generator=generator)
    return z, proxies, torch.arange(p) % classes


def test_max_gives_each_class_its_best_proxy_plus_bias():
    bias = torch.tensor([0.0, 0.0, 0.5, 0.0, -100.0])
    result = Max()(torch.tensor([[1.0], [-1.0]]), PROXIES, bias, CLASSES, 3)
    assert result.tolist() == [[10.0, 4.0, -80.0], [0.0, -2.5, -120.0]]


def test_uniform_votes_are_shares_and_a_tie_goes_to_the_nearer_proxy():
    result = scores(NearestProxies(2, votes="uniform"), [[1.4], [1.6], [3.4]])
    # 1.4: class 0 at 1.4, class 1 at 1.6. 1.6: the other way round. 3.4: both of class 1.
    assert result.argmax(1).tolist() == [0, 1, 1]
    assert result[2].tolist() == [0.0, 1.25, 0.0]
    assert result[:2].sum(1).tolist() == pytest.approx([1.375, 1.375])


def test_as_published_a_tie_goes_to_the_lowest_label():
    part = NearestProxies(2, votes="uniform", as_published=True)
    result = scores(part, [[1.4], [1.6]])
    assert result.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]]
    assert result.argmax(1).tolist() == [0, 0]


def test_weighted_votes_are_one_over_the_distance():
    result = scores(NearestProxies(3), [[2.0]])
    assert result[0].tolist() == pytest.approx([1 / 2, 1 + 1 / 2, 0])


def test_softmax_votes_sum_to_one():
    result = scores(NearestProxies(3, votes="softmax", temperature=1.0), [[2.0]])
    weights = [math.exp(-1), math.exp(-2), math.exp(-2)]
    expected = [weights[2] / sum(weights), (weights[0] + weights[1]) / sum(weights), 0]
    assert result[0].tolist() == pytest.approx(expected)


def test_more_votes_than_proxies_is_all_proxies():
    assert torch.equal(scores(NearestProxies(99), [[2.0]]), scores(NearestProxies(5), [[2.0]]))


def test_one_nearest_euclidean_proxy_of_unit_length_decides_as_max_does():
    z, proxies, classes = random_case(0, n=50)
    z, proxies = torch.nn.functional.normalize(z), torch.nn.functional.normalize(proxies)
    nearest = scores(NearestProxies(1, votes="uniform"), z, proxies, classes, 4)
    best = scores(Max(), z, proxies, classes, 4)
    assert torch.equal(nearest.argmax(1), best.argmax(1))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    m=st.integers(1, 14),
    distance=st.sampled_from(DISTANCES),
    votes=st.sampled_from(["uniform", "weighted_by_distance"]),
    # Not in two dimensions: there proxies come so near that 1 / distance shows float32's digits.
    shape=st.sampled_from([(3, 8), (12, 5), (30, 6)]),
)
def test_votes_equal_a_plain_loop_over_samples(seed, m, distance, votes, shape):
    p, d = shape
    z, proxies, classes = random_case(seed, p=p, d=d)
    settings = {}
    if distance == "mahalanobis":
        covariance = np.cov(proxies.double().numpy().T) + 1e-6 * np.eye(d)
        settings["VI"] = np.linalg.inv(covariance)
    metric = {"manhattan": "cityblock"}.get(distance, distance)
    far = cdist(z.double().numpy(), proxies.double().numpy(), metric, **settings)
    expected = np.zeros((len(z), 4))
    for i, row in enumerate(far):
        nearest = row.argsort()[:m]
        for j in nearest:
            vote = 1 / len(nearest) if votes == "uniform" else 1 / (row[j] + 1e-10)
            expected[i, classes[j]] += vote
    part = NearestProxies(m, distance, votes, as_published=True)
    result = scores(part, z, proxies, classes, 4)
    np.testing.assert_allclose(result.numpy(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("distance", DISTANCES)
def test_blocks_of_bounded_memory_give_the_same_scores(distance, monkeypatch):
    z, proxies, classes = random_case(1, n=40)
    part = NearestProxies(3, distance)
    whole = scores(part, z, proxies, classes, 4)
    monkeypatch.setattr(agg, "BLOCK", 100)
    torch.testing.assert_close(scores(part, z, proxies, classes, 4), whole)


def test_mahalanobis_tells_new_proxies_from_those_that_lay_at_their_address():
    shared = NearestProxies(m=3, distance="mahalanobis", votes="uniform")
    addresses = set()
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        proxies = torch.randn(30, 4, generator=generator)
        addresses.add(proxies.data_ptr())
        z = torch.randn(50, 4, generator=generator)
        arguments = (z, proxies, torch.zeros(30), torch.arange(30) % 3, 3)
        alone = NearestProxies(m=3, distance="mahalanobis", votes="uniform")
        assert torch.equal(shared(*arguments), alone(*arguments))
        del alone, arguments, proxies
    assert len(addresses) < 100


def test_a_copy_of_mnn_can_be_made_after_use():
    z, proxies, classes = random_case(2)
    part = NearestProxies(3, "mahalanobis")
    expected = scores(part, z, proxies, classes, 4)
    for copied in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert torch.equal(scores(copied, z, proxies, classes, 4), expected)


def test_mahalanobis_takes_proxies_made_in_inference_mode_and_follows_their_changes():
    z, proxies, classes = random_case(2)
    part = NearestProxies(3, "mahalanobis")
    expected = [scores(part, z, p, classes, 4) for p in (proxies, 2 * proxies)]
    with torch.inference_mode():
        changing = proxies.clone()
        assert torch.equal(scores(part, z, changing, classes, 4), expected[0])
        assert torch.equal(scores(part, z, changing.mul_(2), classes, 4), expected[1])


def test_mahalanobis_follows_proxies_that_change():
    z, proxies, classes = random_case(2)
    part = NearestProxies(3, "mahalanobis")
    first = scores(part, z, proxies, classes, 4)
    proxies.mul_(torch.linspace(1, 3, 5))
    changed = scores(part, z, proxies, classes, 4)
    fresh = scores(NearestProxies(3, "mahalanobis"), z, proxies, classes, 4)
    assert not torch.allclose(first, changed)
    assert torch.equal(changed, fresh)


def test_the_nearest_mahalanobis_proxy_wins_though_float32_cannot_tell_the_votes_apart():
    z, proxies, classes = random_case(3, n=50, p=4, d=30)
    part = NearestProxies(4, "mahalanobis")
    _, nearest = part.nearest(100 * z, proxies)
    result = scores(part, 100 * z, proxies, classes, 4)
    assert torch.equal(result.argmax(1), classes[nearest[:, 0]])


def test_logsumexp_equals_its_formula_and_max_for_a_small_temperature():
    result = scores(LogSumExp(2.0), [[0.3]])
    expected = [2 * math.log(1 + math.exp(1.5)), 2 * math.log(math.exp(0.45) + math.exp(0.6)), 6.0]
    assert result[0].tolist() == pytest.approx(expected)
    z, proxies, classes = random_case(3)
    cold, best = (
        scores(LogSumExp(1e-4), z, proxies, classes, 5),
        scores(Max(), z, proxies, classes, 5),
    )
    torch.testing.assert_close(cold, best, rtol=1e-3, atol=1e-3)
    assert (cold[:, 4] == -torch.inf).all()


def test_logsumexp_has_a_gradient_for_every_proxy():
    z, proxies, classes = random_case(4)
    proxies.requires_grad_()
    scores(LogSumExp(1.0), z, proxies, classes, 4).sum().backward()
    assert proxies.grad.isfinite().all()
    assert (proxies.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(m=0), "m=0: at least one proxy"),
        (dict(distance="euclidian"), "unknown distance='euclidian'; did you mean 'euclidean'"),
        (dict(votes="weighted"), "unknown votes='weighted'; did you mean 'weighted_by_distance'"),
        (dict(temperature=0.1), "temperature=0.1 is not used by votes='weighted_by_distance'"),
        (dict(votes="softmax", temperature=0.0), "temperature=0.0: give a number above 0"),
    ],
)
def test_a_wrong_parameter_is_named(arguments, message):
    with pytest.raises(ImprintError, match=message):
        NearestProxies(**arguments)
