"""Norms that learn: against their formulas, in chains, and on their way through a head."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from imprint_pl import ImprintError, imprint
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.recipes import resolve
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.passes import CHUNK
from imprint_pl.parts.norm.base import Chain, transform
from imprint_pl.parts.norm.centre import Centre
from imprint_pl.parts.norm.l2 import L2
from imprint_pl.parts.norm.nystrom import Nystrom
from imprint_pl.parts.norm.power import Power
from imprint_pl.parts.norm.random_projection import RandomProjection
from imprint_pl.parts.norm.whiten import Whiten


def test_centre_takes_the_mean_of_all_samples_away(blobs):
    x, y = blobs
    centre = Centre().fit(x, y, 3)
    torch.testing.assert_close(centre(x), x - x.mean(0))
    torch.testing.assert_close(centre(x[0]), x[0] - x.mean(0))


def test_power_is_the_signed_square_root():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Power()(x).square() * x.sign(), x)


def test_whitened_samples_have_the_identity_as_within_class_covariance(blobs):
    x, y = blobs
    z = Whiten(shrinkage=0.0).fit(x, y, 3)(x)
    torch.testing.assert_close(
        Moments.of(z, y, 3).within("micro").float(), torch.eye(5), atol=1e-5, rtol=0
    )
    means = torch.stack([z[y == c].mean(0) for c in range(3)])
    torch.testing.assert_close(means.mean(0), torch.zeros(5), atol=1e-5, rtol=0)


def test_whiten_is_its_formula_with_shrinkage():
    generator = torch.Generator().manual_seed(5)
    y = torch.tensor([0] * 9 + [1] * 21)
    x = torch.randn(30, 4, generator=generator) * torch.tensor([1.0, 2.0, 3.0, 9.0]) + y[:, None]
    rows = x.double().numpy()
    centred = np.concatenate([rows[:9] - rows[:9].mean(0), rows[9:] - rows[9:].mean(0)])
    within = centred.T @ centred / 30
    shrunk = 0.7 * within + 0.3 * np.trace(within) / 4 * np.eye(4)
    centre = (rows[:9].mean(0) + rows[9:].mean(0)) / 2
    expected = np.linalg.solve(np.linalg.cholesky(shrunk), (rows - centre).T).T
    found = Whiten(shrinkage=0.3).fit(x, y, 2)(x)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_whitening_does_not_mind_where_the_embeddings_lie_nor_their_scale(blobs):
    x, y = blobs
    z = Whiten().fit(x, y, 3)(x)
    torch.testing.assert_close(
        Whiten().fit(100 * x + 500, y, 3)(100 * x + 500), z, atol=1e-3, rtol=0
    )


def test_whiten_with_fewer_samples_than_dimensions_asks_for_shrinkage():
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(2))
    y = torch.arange(8) % 2
    assert Whiten().fit(x, y, 2)(x).isfinite().all()
    with pytest.raises(ImprintError, match=r"singular.*shrinkage=0\.0: give a larger one"):
        Whiten(shrinkage=0.0).fit(x, y, 2)


def test_whiten_takes_constant_and_duplicate_features(blobs):
    x, y = blobs
    x = torch.cat([x, x[:, :1], torch.full((40, 1), 7.0)], 1)
    assert Whiten().fit(x, y, 3)(x).isfinite().all()
    with pytest.raises(ImprintError, match="singular"):
        Whiten(shrinkage=0.0).fit(x, y, 3)


def test_one_shot_a_class_cannot_be_whitened():
    with pytest.raises(ImprintError, match="one sample a class"):
        imprint(
            torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
            torch.arange(3),
            "whitened",
        )


def test_random_projection_is_relu_of_draws_with_variance_one_over_d():
    x = torch.randn(600, 50, generator=torch.Generator().manual_seed(4))
    norm = RandomProjection(projection_dim=200).fit(x, torch.zeros(600).long(), 1, seed=3)
    assert norm.projection.shape == (50, 200)
    assert norm.projection.std().item() == pytest.approx(50**-0.5, rel=0.03)
    torch.testing.assert_close(norm(x), (x @ norm.projection).clamp_min(0))
    again = RandomProjection(projection_dim=200).draw(x[0], samples=600, seed=3)
    assert torch.equal(again.projection, norm.projection)
    other = RandomProjection(projection_dim=200).fit(x, torch.zeros(600).long(), 1, seed=4)
    assert not torch.equal(other.projection, norm.projection)


def test_random_projection_has_the_features_that_are_asked_for_whatever_the_samples(blobs):
    x, y = blobs
    head = imprint(x, y, "ranpac")
    assert (head.embedding_dim, head.feature_dim) == (5, 5000)
    assert imprint(x, y, "ranpac", projection_dim=6).feature_dim == 6


def test_nystrom_features_have_the_kernel_as_inner_product_and_are_centred(blobs):
    x, y = blobs
    norm = Nystrom(width=0.8).fit(x, y, 3)
    z = norm(x)
    far = torch.cdist(x, x).double()
    sigma = 0.8 * far[~torch.eye(40, dtype=torch.bool)].median()
    kernel = torch.exp(-far.square() / (2 * sigma**2))
    centring = torch.eye(40).double() - 1 / 40
    torch.testing.assert_close((z @ z.T).double(), centring @ kernel @ centring, atol=2e-4, rtol=0)
    torch.testing.assert_close(z.mean(0), torch.zeros(40), atol=1e-4, rtol=0)


def test_nystrom_with_all_samples_as_landmarks_is_kernel_ridge(blobs):
    from sklearn.kernel_ridge import KernelRidge

    x, y = blobs
    onehot = F.one_hot(y).double()
    far = torch.cdist(x, x).double()
    gamma = 0.5 / far[~torch.eye(40, dtype=torch.bool)].median().square().item()
    # On centred features and targets ridge without intercept is ridge with a free one.
    kernel = torch.exp(-gamma * far.square())
    centring = torch.eye(40).double() - 1 / 40
    model = KernelRidge(alpha=40 * 1e-2, kernel="precomputed")
    model.fit((centring @ kernel @ centring).numpy(), onehot.numpy())
    new = x[:11] + 0.1
    to_new = torch.exp(-gamma * torch.cdist(new, x).double().square())
    to_new = (to_new - kernel.mean(0)) @ centring
    expected = model.predict(to_new.numpy())
    head = imprint(x, y, "kernel", norm_pre="nystrom", lam=1e-2, intercept=False, projection_dim=40)
    scores = head.scores(new) - head.scores(x).mean(0)
    # Without intercept one-hot targets that are not centred fit the same on centred features.
    np.testing.assert_allclose(scores.detach().numpy(), expected, atol=2e-3)


def test_nystrom_takes_duplicates_and_embeddings_that_are_all_the_same():
    x = torch.ones(12, 3)
    y = torch.arange(12) % 2
    assert Nystrom().fit(x, y, 2)(x).isfinite().all()
    x = torch.cat([torch.eye(3)] * 4)
    z = Nystrom().fit(x, y, 2)(x)
    assert z.isfinite().all()
    torch.testing.assert_close(torch.cdist(z[:3], z[:3]).unique().numel(), 2, atol=2, rtol=0)


def test_nystrom_of_embeddings_far_from_the_origin_keeps_its_digits(blobs):
    x, y = blobs
    near, far = Nystrom().fit(x, y, 3)(x), Nystrom().fit(x + 1000, y, 3)(x + 1000)
    torch.testing.assert_close(near @ near.T, far @ far.T, atol=1e-3, rtol=0)


def test_a_chain_is_its_steps_by_hand(blobs):
    x, y = blobs
    power, whiten, l2 = Power(), Whiten(), L2()
    z = power(x)
    z = whiten.fit(z, y, 3)(z)
    z = l2(z)
    nystrom = Nystrom(projection_dim=15).fit(z, y, 3, seed=2)
    chain = Chain([Power(), Whiten(), L2(), Nystrom(projection_dim=15)]).fit(x, y, 3, seed=2)
    torch.testing.assert_close(chain(x), nystrom(z))
    assert (chain.name, chain.learns, chain.input_dim) == ("power+whiten+l2+nystrom", True, 5)


def test_a_chain_asks_a_kernel_of_ones_own_for_its_sums(blobs):
    class Twice(Nystrom):
        def fit_sums(self, x, y, num_classes, seed=0, gram="pooled", weights=None):
            return (
                super()
                .fit_sums(x, y, num_classes, seed, gram, weights)
                .scaled(torch.full((20,), 2))
            )

    x, y = blobs
    expected = Chain([L2(), Nystrom(20)]).fit_sums(x, y, 3)
    found = Chain([L2(), Twice(20)]).fit_sums(x, y, 3)
    torch.testing.assert_close(found.sums, 2 * expected.sums)


def test_transforming_in_chunks_is_transforming():
    x = torch.randn(2 * CHUNK + 3, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(transform(L2(), x), L2()(x))


def test_whitened_is_its_parts_by_hand(blobs):
    x, y = blobs
    head = imprint(x, y, "whitened")
    whiten = Whiten().fit(x, y, 3)
    means = torch.stack([F.normalize(whiten(x))[y == c].mean(0) for c in range(3)])
    torch.testing.assert_close(head.proxies.data, F.normalize(means))
    torch.testing.assert_close(head.scores(x), F.normalize(whiten(x)) @ F.normalize(means).T)


def test_whitened_centres_between_two_classes_however_unequal_they_are():
    # 98 samples of one class and 2 of the other: the mean of all lies in the first.
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 98 + [1] * 2)
    x = torch.randn(100, 2, generator=generator)
    x[:98] -= x[:98].mean(0)
    x[98:] -= x[98:].mean(0) - torch.tensor([8.0, 0.0])
    head = imprint(x, y, "whitened")
    torch.testing.assert_close(head.norm_inf.steps[0].mean, torch.tensor([4.0, 0.0]))
    torch.testing.assert_close(head.proxies[0], -head.proxies[1], atol=0.1, rtol=0)
    assert (head(x).argmax(1) == y).all()


def test_an_unfitted_norm_says_so():
    with pytest.raises(ImprintError, match="whiten has not been fitted"):
        Whiten()(torch.zeros(1, 3))


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        (Whiten, dict(shrinkage=-0.1)),
        (Whiten, dict(shrinkage=1.1)),
        (RandomProjection, dict(projection_dim=0)),
        (Nystrom, dict(projection_dim=0)),
        (Nystrom, dict(width=0.0)),
    ],
)
def test_a_wrong_value_is_named(part, arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ImprintError, match=f"{name}={value}"):
        part(**arguments)


# Through resolve, the head and its files.


def test_norms_are_given_as_a_list_or_joined_and_named_by_a_word():
    for norms in (["power", "l2", "nystrom"], "power+l2+nystrom", [Power(), "l2", Nystrom()]):
        parts = resolve("qi", norm_pre=norms)
        assert parts.parameters["norm_pre"] == "power+l2+nystrom"
        assert parts.parameters["norm_inf"] == "same"
        assert parts.parameters["projection_dim"] == 2000
        assert parts.norm_inf is parts.norm_pre
    again = resolve(**{n: v for n, v in parts.parameters.items() if n != "as_published"})
    assert again.parameters == parts.parameters
    assert isinstance(resolve("qi", norm_pre=["whiten"]).norm_pre, Whiten)


def test_a_step_of_norm_inf_that_learns_is_the_one_of_norm_pre(blobs):
    parts = resolve("qi", norm_pre=["power", "whiten"], norm_inf=["whiten", "l2"], shrinkage=0.2)
    assert parts.norm_inf.steps[0] is parts.norm_pre.steps[1]
    assert parts.parameters["shrinkage"] == 0.2
    norm_pre, head = parts.fresh()
    assert head.norm_inf.steps[0] is norm_pre.steps[1]
    x, y = blobs
    assert imprint_parts(x, y, parts)(x).shape == (40, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(norm_inf="whiten"), "norm_inf='whiten' learns .* NORM_pre has no such step"),
        (dict(norm_pre="centre", norm_inf=["centre", "whiten"]), "norm_inf='whiten' learns"),
        (dict(norm_pre="whiten", norm_inf=Whiten()), "norm_inf='whiten' learns"),
        (dict(norm_pre="same"), "unknown norm_pre='same'"),
        (dict(norm_pre=["l2", "whitn"]), "unknown norm_pre='whitn'; did you mean 'whiten'"),
        (dict(norm_pre=[]), "give one part"),
        (dict(gen="mean+kmeans"), "gen='mean.kmeans': give one part"),
        (dict(norm_post="whiten"), "unknown norm_post='whiten'"),
        (dict(shrinkage=0.1), "shrinkage=0.1 is not used by .*shrinkage: whiten, lda"),
        (dict(norm_pre="whiten", width=2.0), "width=2.0 is not used .*width: nystrom"),
    ],
)
def test_what_does_not_fit_together_is_named(arguments, message):
    with pytest.raises(ImprintError, match=message):
        resolve("qi", **arguments)


def test_two_parts_share_a_keyword():
    parts = resolve("whitened", gen="lda", shrinkage=0.3)
    assert parts.norm_pre.steps[0].shrinkage == parts.gen.shrinkage == 0.3
    assert parts.parameters["shrinkage"] == 0.3


CHAINS = ["centre", "power+whiten+l2", "random_projection", "power+l2+nystrom", "nystrom+whiten"]


@pytest.mark.parametrize("norm_pre", CHAINS)
def test_fitting_twice_gives_two_heads_that_do_not_share(norm_pre, blobs):
    x, y = blobs
    parts = resolve("qi", norm_pre=norm_pre)
    first = imprint_parts(x, y, parts)
    before = {name: t.clone() for name, t in first.state_dict().items()}
    imprint_parts(3 * x + 1, y, parts, seed=1)
    assert all(torch.equal(t, before[name]) for name, t in first.state_dict().items())
    assert parts.empty_head().norm_inf.input_dim is None


@pytest.mark.parametrize("norm_pre", CHAINS)
def test_same_seed_same_head_and_the_global_generators_are_left_alone(norm_pre, blobs):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, two = (imprint(*blobs, "qi", norm_pre=norm_pre, seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_a_saved_head_with_learned_norms_scores_the_same_in_a_fresh_process(blobs, tmp_path):
    x, y = blobs
    file = {"x": x}
    for norm_pre in CHAINS:
        head = imprint(x, y, "qi", norm_pre=norm_pre)
        file[norm_pre] = {"head": head.state_dict(), "scores": head(x).detach()}
    torch.save(file, tmp_path / "file.pt")
    code = (
        "import sys, torch; from imprint_pl.method.recipes import resolve\n"
        "file = torch.load(sys.argv[1], weights_only=True); x = file.pop('x')\n"
        "for name, saved in file.items():\n"
        "    head = resolve('qi', norm_pre=name).empty_head()\n"
        "    head.load_state_dict(saved['head'])\n"
        "    assert torch.equal(head(x), saved['scores']), name\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "file.pt"], check=True)


def test_a_learned_norm_travels_once(blobs):
    x, y = blobs
    state = imprint(x, y, "whitened").state_dict()
    learned = sorted(name for name in state if name.startswith("norm"))
    assert learned == ["norm_inf.steps.0.matrix", "norm_inf.steps.0.mean"]
    assert len(state) == 2 + len(["proxies", "log_scale", "bias", "proxy_classes", "_extra_state"])


def test_clearing_a_head_forgets_what_was_learned(blobs):
    x, y = blobs
    head = imprint(x, y, "kernel")
    assert head.embedding_dim == 5
    head.clear()
    assert head.temperature == 1
    kept = ("_extra_state", "log_scale")
    assert all(t.numel() == 0 for n, t in head.state_dict().items() if n not in kept)


def test_embeddings_of_another_size_are_refused(blobs):
    with pytest.raises(ImprintError, match="embeddings of 7 numbers for a head made for 5"):
        imprint(*blobs, "kernel")(torch.zeros(2, 7))


@pytest.mark.parametrize("norm_pre", CHAINS)
def test_a_head_with_learned_norms_exports_casts_and_can_be_trained(norm_pre, blobs):
    x, y = blobs
    with torch.inference_mode():
        head = imprint(x, y, "qi", norm_pre=norm_pre)
    head(x).sum().backward()
    assert head.proxies.grad is not None
    program = torch.export.export(head, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x[:7]), head(x[:7]))
    assert head.double()(x.double()).dtype == torch.float64


def test_an_image_gets_the_probabilities_of_float64_from_a_kernel_head(acceptance):
    x, y = acceptance["train_embeddings"][:1000], acceptance["train_labels"][:1000]
    head = imprint(x, y, "kernel")
    exact = copy.deepcopy(head)
    exact.norm_inf.double()
    test = acceptance["test_embeddings"][:500]
    with torch.no_grad():
        scores = exact.norm_inf(test.double()) @ head.proxies.T.double() + head.bias
        expected = torch.softmax(scores / head.temperature, 1)
        found = torch.softmax(head(test), 1)
    assert (found - expected).abs().max() < 5e-6
