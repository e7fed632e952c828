import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint_pl import ImprintError, imprint
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.recipes import RECIPES, resolve
from imprint_pl.parts.gen import KMeans, Mean

X = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, 4.0], [-4.0, 3.0], [0.0, -2.0]])
Y = torch.tensor([0, 0, 1, 1, 2])


def test_qi_of_hand_placed_points_has_the_exact_proxies():
    head = imprint(X, Y, "qi")
    expected = torch.tensor([[0.5**0.5, 0.5**0.5], [-(0.5**0.5), 0.5**0.5], [0.0, -1.0]])
    torch.testing.assert_close(head.proxies.data, expected)
    assert head.proxy_classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(head.scores(torch.tensor([[0.0, -7.0]]))[0, 2], torch.tensor(1.0))


def test_mean_without_any_norm_is_the_class_mean():
    head = imprint(X, Y, "qi", norm_pre="none", norm_post="none", norm_inf="none")
    torch.testing.assert_close(head.proxies.data, torch.tensor([[3.5, 3.5], [-3.5, 3.5], [0, -2]]))


def test_kmeans_finds_both_modes_of_a_class():
    x = torch.tensor([[9.0, 1.0], [9.0, -1.0], [-9.0, 1.0], [-9.0, -1.0], [0.0, 50.0], [0.0, 51.0]])
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    head = imprint(x, y, "robust", k=2, norm_pre="none", norm_post="none", norm_inf="none")
    found = sorted(head.proxies.data[head.proxy_classes == 0].tolist())
    assert found == [[-9.0, 0.0], [9.0, 0.0]]


def test_kmeans_with_one_proxy_equals_the_mean(acceptance):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"]
    one, mean = imprint(x, y, "robust", k=1), imprint(x, y, "qi")
    torch.testing.assert_close(one.proxies.data, mean.proxies.data, rtol=1e-5, atol=1e-6)


def test_accuracy_on_real_embeddings_is_the_reference_codes(acceptance):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"]

    def accuracy(head):
        correct = head(acceptance["test_embeddings"]).argmax(1) == acceptance["test_labels"]
        return 100 * correct.double().mean().item()

    assert accuracy(imprint(x, y, "qi")) == pytest.approx(78.28, abs=0.1)
    seeds = [accuracy(imprint(x, y, "robust", seed=seed)) for seed in range(5)]
    assert np.mean(seeds) == pytest.approx(82.62, abs=0.7)


def test_same_seed_same_head_and_another_seed_another(acceptance):
    x, y = acceptance["train_embeddings"][:2000], acceptance["train_labels"][:2000]
    first, again, other = (imprint(x, y, "robust", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.proxies, again.proxies)
    assert not torch.equal(first.proxies, other.proxies)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_global_generators_are_left_alone(recipe, blobs):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    imprint(*blobs, recipe)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


# Not of hosoda, whose reference distribution is pooled over classes, nor of least squares.
@pytest.mark.parametrize("recipe", ["qi", "robust", "janson", "knn"])
def test_proxies_of_a_class_do_not_depend_on_its_label_or_the_other_classes(recipe, blobs):
    x, y = blobs
    whole = imprint(x, y, recipe)
    part = imprint(x[y != 0], 2 - y[y != 0], recipe)
    torch.testing.assert_close(
        whole.proxies[whole.proxy_classes == 1], part.proxies[part.proxy_classes == 1]
    )


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    d=st.integers(1, 8),
    k=st.integers(1, 25),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_any_sizes_give_min_n_k_finite_proxies_a_class(sizes, d, k, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = scale * torch.randn(len(y), d, generator=generator)
    head = imprint(x, y, "robust", k=k, seed=seed)
    assert torch.bincount(head.proxy_classes).tolist() == [min(n, k) for n in sizes]
    assert head.proxies.isfinite().all()
    assert head(x).shape == (len(y), len(sizes))


def test_order_of_the_samples_does_not_change_the_mean(blobs):
    x, y = blobs
    torch.testing.assert_close(
        imprint(x, y, "qi").proxies, imprint(x.flip(0), y.flip(0), "qi").proxies
    )


def test_an_explicit_keyword_beats_the_recipe_and_an_instance_is_as_good_as_a_name():
    assert resolve("robust", gen="mean").parameters == {
        "recipe": "robust",
        "norm_pre": "l2",
        "gen": "mean",
        "norm_post": "l2",
        "norm_inf": "l2",
        "agg": "max",
    }
    assert resolve("qi", gen=KMeans(k=3)).parameters["k"] == 3
    assert isinstance(resolve("robust", gen=Mean()).gen, Mean)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(recipe="robst"), "unknown recipe 'robst'; did you mean 'robust'"),
        (dict(gen="kmean"), "unknown gen='kmean'; did you mean 'kmeans'"),
        (dict(norm_pre="l3"), "unknown norm_pre='l3'"),
        (dict(agg="maximum"), "unknown agg='maximum'"),
        (dict(kk=3), "unknown keyword 'kk'"),
        (dict(recipe="qi", k=3), "k=3 is not used by .*gen='mean'.*k: kmeans"),
        (dict(k=0), "k=0: a class needs at least one proxy"),
    ],
)
def test_a_wrong_parameter_is_named_with_a_cure(arguments, message):
    with pytest.raises(ImprintError, match=message):
        imprint(X, Y, **{"recipe": "robust"} | arguments)


@pytest.mark.parametrize(
    ("x", "y", "arguments", "message"),
    [
        (X[:, 0], Y, {}, r"shape \(5,\).*expected floats \(N, d\)"),
        (X.long(), Y, {}, "int64"),
        (X[:0], Y[:0], {}, r"shape \(0, 2\)"),
        (X, Y[:3], {}, r"labels of shape \(3,\).*for 5 embeddings"),
        (X, Y.float(), {}, "expected integers"),
        (X, Y - 1, {}, "label -1 of sample 0 is out of range: labels are 0..1"),
        (X, Y, dict(num_classes=2), "label 2 of sample 4 is out of range: labels are 0..1"),
        (X, 2 * Y, {}, "class 1, 3 has no training sample"),
        (X, Y, dict(class_names=["a", "b", "c", "d"]), r"class 3 \('d'\) has no training sample"),
        (X, Y, dict(class_names=["a"], num_classes=3), "1 class_names for num_classes=3"),
        (X.where(X != 4, torch.nan), Y, {}, "3 of 5 embeddings are not finite.*sample 0"),
    ],
)
def test_bad_input_is_named_with_place_and_cure(x, y, arguments, message):
    with pytest.raises(ImprintError, match=message):
        imprint(x, y, "qi", **arguments)


def test_an_empty_class_of_a_shortened_epoch_is_never_predicted():
    parts = resolve("robust", k=2)
    head = imprint_parts(X[Y != 1], Y[Y != 1], parts, num_classes=3, allow_empty=True)
    scores = head(X)
    assert scores.shape == (5, 3)
    assert (scores[:, 1] == -torch.inf).all()
    assert scores.argmax(1)[Y != 1].tolist() == [0, 0, 2]


def test_float16_embeddings_are_read_as_float32(blobs):
    x, y = blobs
    torch.testing.assert_close(
        imprint(x.half(), y, "robust").proxies, imprint(x.half().float(), y, "robust").proxies
    )


def test_a_row_of_zeros_does_not_become_nan():
    head = imprint(torch.cat([X, torch.zeros(1, 2)]), torch.cat([Y, Y[:1]]), "qi")
    assert head.proxies.isfinite().all()
    assert F.normalize(torch.zeros(1, 2)).isfinite().all()


def test_shots_and_weibull_choose_the_samples_before_gen(blobs):
    x, y = blobs
    head = imprint(x, y, "knn", shots=4, seed=3)
    assert torch.bincount(head.proxy_classes).tolist() == [4, 4, 4]
    again, other = imprint(x, y, "knn", shots=4, seed=3), imprint(x, y, "knn", shots=4, seed=4)
    assert torch.equal(head.proxies, again.proxies)
    assert not torch.equal(head.proxies, other.proxies)
    typical = imprint(x, y, "knn", weibull=(0.2, 0.8))
    assert 6 < len(typical.proxies) < 40


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_separates_what_is_far_apart_and_survives_saving(recipe, blobs):
    x, y = blobs
    head = imprint(x, y, recipe)
    assert (head(x).argmax(1) == y).all()
    other = resolve(recipe).empty_head()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other(x), head(x))


def test_the_parameters_of_a_resolved_recipe_resolve_to_the_same(blobs):
    for recipe in RECIPES:
        parameters = resolve(recipe).parameters
        assert resolve(**parameters).parameters == parameters


@pytest.mark.parametrize("keywords", [{}, {"recipe": "robust", "gen": "kmedoids", "k": 2}])
def test_embeddings_that_carry_a_gradient_give_the_head_of_their_values(blobs, keywords):
    x, y = blobs
    head, expected = (imprint(z, y, **keywords) for z in (x.clone().requires_grad_(), x))
    assert torch.equal(head(x), expected(x))


def test_frames_and_arrays_that_run_backwards_are_taken(blobs):
    x, y = blobs
    expected = imprint(x, y, "qi")
    columns, labels = pd.DataFrame(x.numpy()).sample(frac=1, random_state=0), pd.Series(y.numpy())
    for rows, own in (
        (columns, labels[columns.index]),
        (x.numpy()[::-1], y.numpy()[::-1]),
    ):
        torch.testing.assert_close(imprint(rows, own, "qi").scores(x), expected.scores(x))
