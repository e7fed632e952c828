"""Ridge, LDA and their recipes: against direct formulas, and what they reach on real embeddings."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint_pl import ImprintError, imprint
from imprint_pl.method.recipes import resolve
from imprint_pl.method.selection import draw_shots
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.gen import LDA, KRidge, Ridge
from imprint_pl.parts.gen.choice_of_lam import Spectrum, held_out

CLOSED = ["whitened", "ridge", "lda", "ranpac", "kernel"]


def with_one(x):
    return torch.cat([x.double(), torch.ones(len(x), 1).double()], 1)


@pytest.mark.parametrize("lam", [0.0, 1e-3, 2.0])
def test_ridge_is_its_formula(lam, blobs):
    x, y = blobs
    z, targets = with_one(x), F.one_hot(y).double()
    gram, cross = z.T @ z / 40, z.T @ targets / 40
    expected = torch.linalg.solve(gram + lam * torch.eye(6).double(), cross)
    proxies = Ridge(lam=lam)(Moments.of(x, y, 3))
    torch.testing.assert_close(proxies.weights, expected[:5].T.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(proxies.bias, expected[5].float(), atol=1e-6, rtol=1e-5)
    assert proxies.classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(
        imprint(x, y, "ridge", lam=lam).scores(x), (z @ expected).float(), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_is_scikit_learns(intercept, blobs):
    from sklearn.linear_model import Ridge as Reference

    x, y = blobs
    # scikit-learn leaves its intercept free; ours is the weight of a feature that is always 1.
    features = with_one(x).numpy() if intercept else x.double().numpy()
    reference = Reference(alpha=40 * 0.3, fit_intercept=False)
    reference.fit(features, F.one_hot(y).double().numpy())
    head = imprint(x, y, "ridge", lam=0.3, intercept=intercept)
    np.testing.assert_allclose(
        head.scores(x).detach().numpy(), reference.predict(features), atol=1e-5
    )


def test_ridge_without_penalty_interpolates_hand_made_points():
    x = torch.tensor([[0.0], [1.0]])
    proxies = Ridge(lam=0.0)(Moments.of(x, torch.tensor([0, 1]), 2))
    torch.testing.assert_close(proxies.weights, torch.tensor([[-1.0], [1.0]]))
    torch.testing.assert_close(proxies.bias, torch.tensor([1.0, 0.0]))


@pytest.mark.parametrize(("n", "d"), [(40, 5), (12, 5), (9, 20)])
@pytest.mark.parametrize("intercept", [True, False])
def test_gcv_from_sums_is_gcv_from_the_hat_matrix(n, d, intercept):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(n))
    y = torch.arange(n) % 3
    spectrum = Spectrum(Moments.of(x, y, 3), intercept)
    z = with_one(x) if intercept else x.double()
    targets = F.one_hot(y).double()
    scores = []
    for lam in spectrum.grid[spectrum.grid > 1e-4 * spectrum.trace].tolist():
        inverse = torch.linalg.inv(z.T @ z / n + lam * torch.eye(z.shape[1]).double())
        hat = z @ inverse @ z.T / n
        residual = (targets - hat @ targets).square().sum().item() / n
        scores.append(residual / (1 - hat.trace().item() / n) ** 2)
        assert spectrum.gcv(lam) == pytest.approx(scores[-1], rel=1e-6)
        torch.testing.assert_close(spectrum.weights(lam), inverse @ z.T @ targets / n)
    assert min(spectrum.grid.tolist(), key=spectrum.gcv) == spectrum.best_by_gcv()


def test_gcv_prefers_a_lot_of_penalty_on_noise_and_little_on_signal():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    noise = torch.randn(60, 30, generator=generator)
    signal = noise * 0.01 + F.one_hot(y, 30)
    chosen = {}
    for name, x in dict(noise=noise, signal=signal).items():
        lam = Ridge(lam="gcv")(Moments.of(x, y, 2)).chosen["lam"]
        chosen[name] = lam / x.square().sum(1).mean().item()
    assert chosen["noise"] > 100 * chosen["signal"]


def test_the_grid_follows_the_scale_of_the_features(blobs):
    x, y = blobs
    gen = Ridge(intercept=False)
    small, large = gen(Moments.of(x, y, 3)), gen(Moments.of(100 * x, y, 3))
    torch.testing.assert_close(large.weights * 100, small.weights, rtol=1e-4, atol=1e-6)
    assert large.chosen["lam"] == pytest.approx(1e4 * small.chosen["lam"])


def test_a_held_out_tenth_is_stratified_and_follows_the_seed():
    y = torch.tensor([0] * 100 + [1] * 30 + [2] * 4 + [3] * 2 + [4])
    y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    held = held_out(y, seed=1)
    assert torch.bincount(y[held], minlength=5).tolist() == [10, 3, 1, 1, 0]
    assert torch.equal(held, held_out(y, seed=1))
    assert not torch.equal(held, held_out(y, seed=2))


def test_holdout_is_the_best_lambda_on_the_held_out_tenth_refitted_on_all(blobs):
    x, y = blobs
    x = x + 4 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    found = Ridge(lam="holdout")(x, y, 3, seed=5)
    lam = found.chosen["lam"]
    held = held_out(y, 5)
    part = Moments.of(x[~held], y[~held], 3)
    targets = F.one_hot(y[held], 3)

    def loss(lam):
        proxies = Ridge(lam=lam)(part)
        scores = x[held] @ proxies.weights.T + proxies.bias
        wrong = (scores.argmax(1) != y[held]).sum().item()
        return wrong, round((scores - targets).square().sum().item(), 4)

    assert loss(lam) == min(map(loss, Spectrum(part).grid[6:].tolist()))
    torch.testing.assert_close(found.weights, Ridge(lam=lam)(Moments.of(x, y, 3)).weights)


def test_holdout_of_one_shot_a_class_says_what_else_to_do():
    with pytest.raises(ImprintError, match="lam='holdout'.*no class has two samples"):
        imprint(torch.eye(3), torch.arange(3), "ridge", lam="holdout")


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf"), "gvc", [1.0]])
def test_a_wrong_lambda_is_named(lam):
    with pytest.raises(ImprintError, match="lam=.*'gcv', or 'holdout'"):
        resolve("ridge", lam=lam)


def test_a_lambda_that_yaml_read_as_text_is_a_number():
    assert resolve("ridge", lam="1e-2").parameters["lam"] == 0.01


def test_ridge_of_too_few_samples_names_lambda_and_any_penalty_cures_it():
    x = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    y = torch.arange(6) % 2
    with pytest.raises(ImprintError, match="singular.*lam=0.0: give a larger lam"):
        imprint(x, y, "ridge", lam=0.0)
    for lam in (1e-4, "gcv", "holdout"):
        assert imprint(x, y, "ridge", lam=lam)(x).isfinite().all()


def test_constant_and_duplicate_features_and_one_class_are_no_trouble(blobs):
    x, y = blobs
    x = torch.cat([x, x[:, :1], torch.full((40, 1), 7.0), torch.zeros(40, 1)], 1)
    for recipe in CLOSED:
        scores = imprint(x, y, recipe)(x)
        assert (scores.argmax(1) == y).all(), recipe
        assert imprint(x, 0 * y, recipe)(x).isfinite().all(), recipe
    for recipe in ("ridge", "kernel"):
        assert imprint(0 * x, y, recipe)(x).isfinite().all(), recipe


@pytest.mark.parametrize("shrinkage", [0.0, 0.2])
def test_lda_is_scikit_learns(shrinkage):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    generator = torch.Generator().manual_seed(3)
    y = torch.tensor([0] * 30 + [1] * 12 + [2] * 9)
    x = torch.randn(51, 4, generator=generator) + F.one_hot(y, 4)
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage or None)
    if shrinkage:
        # scikit-learn scales the features before it shrinks: give it some that it need not scale.
        reference.set_params(covariance_estimator=Shrunk(shrinkage), shrinkage=None)
    reference.fit(x.double().numpy(), y.numpy())
    proxies = LDA(shrinkage=shrinkage)(Moments.of(x, y, 3))
    np.testing.assert_allclose(proxies.weights.numpy(), reference.coef_, atol=1e-4)
    np.testing.assert_allclose(proxies.bias.numpy(), reference.intercept_, atol=1e-4)


class Shrunk:
    """scikit-learn's estimator of one class's covariance, shrunk without scaling the features."""

    def __init__(self, shrinkage):
        self.shrinkage = shrinkage

    def fit(self, x):
        covariance = np.cov(x.T, bias=True)
        scale = np.trace(covariance) / len(covariance)
        s = self.shrinkage
        self.covariance_ = (1 - s) * covariance + s * scale * np.eye(len(covariance))
        return self


@pytest.mark.parametrize("offset", [1, 30, 1000, 30_000])
def test_lda_keeps_its_labels_however_far_from_the_origin_the_embeddings_lie(offset):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(2000) % 10
    x = 0.3 * torch.randn(10, 64, generator=generator)[y] + torch.randn(
        2000, 64, generator=generator
    )
    labels = imprint(x, y, "lda")(x).argmax(1)
    far = imprint(x + offset, y, "lda")(x + offset).argmax(1)
    assert (labels == y).float().mean() > 0.6
    # At 30,000 float32 holds the embeddings themselves to 1/512.
    assert (far == labels).float().mean() > (0.999 if offset < 10_000 else 0.98)


def test_the_priors_of_lda_move_the_bias_alone():
    y = torch.tensor([0] * 30 + [1] * 10)
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(3))
    moments = Moments.of(x, y, 2)
    empirical, uniform = LDA()(moments), LDA(prior="uniform")(moments)
    torch.testing.assert_close(empirical.weights, uniform.weights)
    moved = empirical.bias - uniform.bias
    torch.testing.assert_close(moved, torch.tensor([0.75, 0.25]).log() - torch.tensor(0.5).log())
    with pytest.raises(ImprintError, match="unknown prior='flat'"):
        LDA(prior="flat")


def test_lda_by_euclidean_distance_after_whitening(blobs):
    x, y = blobs
    head = imprint(x, y, "lda", prior="uniform", shrinkage=0.1)
    nearest = imprint(x, y, "janson", norm_pre="whiten", shrinkage=0.1)
    new = 4 * torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    assert (head(new).argmax(1) == nearest(new).argmax(1)).all()


def test_kridge_with_one_cluster_is_ridge_and_with_more_beats_it_on_two_modes(blobs):
    x, y = blobs
    one, ridge = KRidge(k=1, lam=0.1)(x, y, 3), Ridge(lam=0.1)(Moments.of(x, y, 3))
    torch.testing.assert_close(one.weights, ridge.weights)
    torch.testing.assert_close(one.bias, ridge.bias)
    # Four corners; those that face each other are one class.
    corners = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [3.0, -3.0], [-3.0, 3.0]])
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    x = 0.1 * x + corners.repeat_interleave(10, 0)
    y = torch.tensor([0] * 20 + [1] * 20)
    for lam in (1e-3, "gcv", "holdout"):
        head = imprint(x, y, "ridge", gen="kridge", k=2, lam=lam)
        assert head.proxy_classes.tolist() == [0, 0, 1, 1]
        assert (head(x).argmax(1) == y).float().mean() > 0.9, lam
    assert (imprint(x, y, "ridge")(x).argmax(1) == y).float().mean() < 0.9


@pytest.mark.parametrize("recipe", CLOSED)
def test_the_order_of_classes_and_samples_does_not_matter(recipe, blobs):
    x, y = blobs
    # Random choices are of samples: with all of them as landmarks their order is the draw's alone.
    arguments = dict(norm_pre="l2", intercept=False) if recipe == "ranpac" else {}
    scores = imprint(x, y, recipe, **arguments).scores(x)
    turned = imprint(x.flip(0), 2 - y.flip(0), recipe, **arguments).scores(x)
    torch.testing.assert_close(turned.flip(1), scores, atol=1e-3, rtol=1e-3)


# Not of ranpac and kernel, whose draws depend on the number of samples.
@pytest.mark.parametrize("recipe", sorted(set(CLOSED) - {"ranpac", "kernel"}))
def test_two_copies_of_every_sample_change_nothing_but_draws(recipe, blobs):
    x, y = blobs
    # λ and shrinkage that choose themselves look at the number of samples.
    given = {"lam": 0.1} if recipe == "ridge" else {"shrinkage": 0.01}
    once = imprint(x, y, recipe, **given).scores(x)
    twice = imprint(x.repeat(2, 1), y.repeat(2), recipe, **given).scores(x)
    torch.testing.assert_close(once, twice, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", CLOSED)
def test_classes_without_samples_of_a_shortened_epoch_are_never_predicted(recipe, blobs):
    from imprint_pl.method.imprinting import imprint_parts

    x, y = blobs
    head = imprint_parts(x, 2 * y, resolve(recipe), num_classes=6, allow_empty=True)
    assert (head(x).argmax(1) == 2 * y).all()
    assert (head(x)[:, [1, 3, 5]] == -torch.inf).all()


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 20), min_size=1, max_size=5),
    d=st.integers(1, 12),
    # ranpac has a fixed lam, which is all that counts beside smaller embeddings.
    scale=st.sampled_from([0.1, 1.0, 1e3]),
    recipe=st.sampled_from(CLOSED),
    seed=st.integers(0, 99),
)
def test_any_sizes_give_finite_scores(sizes, d, scale, recipe, seed):
    y = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x = scale * torch.randn(len(y), d, generator=torch.Generator().manual_seed(seed))
    head = imprint(x, y, recipe, seed=seed)
    assert head(x).shape == (len(y), len(sizes))
    assert head(x).isfinite().all()
    assert head.embedding_dim == d


# Real embeddings.


def accuracy(data, recipe, **arguments):
    head = imprint(data["train_embeddings"], data["train_labels"], recipe, **arguments)
    with torch.no_grad():
        correct = head(data["test_embeddings"]).argmax(1) == data["test_labels"]
    return 100 * correct.double().mean().item()


@pytest.mark.slow
def test_whitened_and_lda_on_real_embeddings(acceptance):
    assert accuracy(acceptance, "whitened") == pytest.approx(87.28, abs=0.1)
    assert accuracy(acceptance, "lda") >= 86.8


@pytest.mark.parametrize(("lam", "expected"), [(1e-4, 87.10), (1e-3, 87.18), (1e-2, 87.24)])
def test_ridge_on_real_embeddings(acceptance, lam, expected):
    assert accuracy(acceptance, "ridge", lam=lam) == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
def test_ridge_chooses_a_lambda_near_the_best_on_real_embeddings(acceptance):
    chosen = accuracy(acceptance, "ridge")
    best = max(accuracy(acceptance, "ridge", lam=lam) for lam in (1e-4, 1e-3, 1e-2, 1e-1))
    assert chosen >= best - 0.3
    assert accuracy(acceptance, "ridge", lam="gcv") >= max(86.9, best - 0.3)


def test_kernel_with_few_landmarks_on_real_embeddings(acceptance):
    assert accuracy(acceptance, "kernel", projection_dim=500) >= 86.5


@pytest.mark.slow
def test_kernel_on_real_embeddings(acceptance):
    assert np.mean([accuracy(acceptance, "kernel", seed=seed) for seed in range(5)]) >= 88.7


@pytest.mark.slow
def test_ranpac_on_real_embeddings(acceptance):
    assert np.mean([accuracy(acceptance, "ranpac", seed=seed) for seed in range(5)]) >= 87.8


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["lda", "whitened"])
def test_the_shrinkage_that_chooses_itself_is_good_with_few_samples_and_with_many(
    acceptance, recipe
):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"]
    few = draw_shots(y, 20, 0)

    def accuracy(rows, **keywords):
        head = imprint(x[rows], y[rows], recipe, calibrate=False, **keywords)
        right = head(acceptance["test_embeddings"]).argmax(1) == acceptance["test_labels"]
        return right.double().mean().item()

    assert accuracy(few) > accuracy(few, shrinkage=0.01)
    assert accuracy(slice(None)) > accuracy(slice(None), shrinkage=0.5) + 0.01


@pytest.mark.parametrize("shrinkage", [-0.1, 1.1, "osa", float("nan")])
def test_a_wrong_shrinkage_is_named_with_a_cure(shrinkage):
    with pytest.raises(ImprintError, match="shrinkage=.*give a number from 0 to 1.*'oas'"):
        imprint(torch.eye(3), torch.arange(3), "lda", shrinkage=shrinkage)
