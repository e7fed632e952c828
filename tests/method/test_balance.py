"""Unequal classes: metrics other than accuracy, weights of classes and of samples."""

import pytest
import torch

from imprint_pl import ImprintError, imprint
from imprint_pl.method import auto
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.recipes import RECIPES, resolve
from imprint_pl.method.selection import draw_shots, weibull_typical
from imprint_pl.numerics.copies import Copies
from imprint_pl.numerics.measures import METRICS, difference, measured_by
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.gen.choice_of_lam import LeftOut, Spectrum
from imprint_pl.parts.gen.ridge import Ridge
from imprint_pl.training_set.kept import State

WEIGHED = ["ls", "ridge", "kernel", "ranpac"]


@pytest.fixture
def unequal():
    """90, 30 and 8 samples of three classes that overlap, in 6 dimensions."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 90 + [1] * 30 + [2] * 8)
    centres = 0.8 * torch.randn(3, 6, generator=generator)
    return torch.randn(128, 6, generator=generator) + centres[y], y


def recalls(head, x, y):
    right = head(x).argmax(1) == y
    return [right[y == c].float().mean().item() for c in range(int(y.max()) + 1)]


# Metrics


def test_metrics_are_those_of_scikit_learn(unequal):
    from sklearn import metrics

    _, y = unequal
    predicted = torch.randint(4, (128,), generator=torch.Generator().manual_seed(1))
    expected = [
        metrics.accuracy_score(y, predicted),
        metrics.recall_score(y, predicted, average=None, zero_division=0)[:3].mean(),
        metrics.f1_score(y, predicted, average="macro", zero_division=0),
    ]
    assert [measured_by(name, predicted, y) for name in METRICS] == pytest.approx(expected)


def test_a_difference_is_that_of_both_figures_and_its_error_by_hand():
    y = torch.tensor([0, 0, 0, 0, 1, 1])
    first = torch.tensor([0, 0, 0, 0, 0, 0])
    other = torch.tensor([0, 0, 0, 1, 1, 1])
    # Accuracy: two gained, one lost, of six.
    found = difference("accuracy", other, first, y)
    assert found.value == pytest.approx(1 / 6)
    assert found.standard_error == pytest.approx((3 + 1 - 1 / 8) ** 0.5 / 8)
    # Balanced: ¾ of a class less a whole one, and a whole one more than none of the other. A sample
    # of the first class counts 6 / (2 · 4), less the mean of its class; those of the other are
    # alike. One more counts (6 / 8)² or (6 / 4)².
    found = difference("balanced_accuracy", other, first, y)
    assert found.value == pytest.approx((0.75 + 1) / 2 - 0.5)
    squares = 0.75**2 * (3 * 0.25**2 + 0.75**2)
    assert found.standard_error == pytest.approx((squares + (0.5625 + 2.25) / 2) ** 0.5 / 8)


@pytest.mark.parametrize("metric", METRICS)
def test_the_error_of_a_difference_is_about_that_of_a_bootstrap(metric):
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 500 + [1] * 300 + [2] * 100)
    noise = torch.rand(2, 900, generator=generator) < torch.tensor([[0.3], [0.2]])
    drawn = torch.randint(3, (2, 900), generator=generator)
    first, other = (torch.where(n, d, y) for n, d in zip(noise, drawn, strict=True))
    draws = []
    for _ in range(400):
        rows = torch.randint(900, (900,), generator=generator)
        figures = [measured_by(metric, p[rows], y[rows]) for p in (other, first)]
        draws.append(figures[0] - figures[1])
    found = difference(metric, other, first, y)
    assert found.standard_error == pytest.approx(torch.tensor(draws).std().item(), rel=0.15)


def test_auto_compares_by_the_metric_and_says_what_it_measured(unequal):
    x, y = unequal
    head = imprint(x, y, metric="balanced_accuracy")
    first = head.tried[0]
    assert {"accuracy", "balanced_accuracy", "difference"} <= set(first)
    assert first["accuracy"] != first["balanced_accuracy"]
    for row in head.tried:
        expected = row["balanced_accuracy"] - first["balanced_accuracy"]
        assert row["difference"] == pytest.approx(expected)


def test_auto_takes_the_candidate_that_the_metric_prefers(monkeypatch):
    # Most of the small class is lost where classes weigh as many as they are.
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 300 + [1] * 30)
    x = torch.randn(330, 3, generator=generator) + 1.5 * y[:, None]
    candidates = (dict(recipe="ridge"), dict(recipe="lda", prior="uniform"))
    monkeypatch.setattr(auto, "ONE_LAYER", candidates)
    assert imprint(x, y).settings["recipe"] == "ridge"
    assert imprint(x, y, metric="balanced_accuracy").settings["recipe"] == "lda"


def test_accuracy_changes_nothing_and_is_not_named(unequal):
    x, y = unequal
    for recipe in ("auto", "ridge", "qi"):
        named, plain = imprint(x, y, recipe, metric="accuracy"), imprint(x, y, recipe)
        assert named.settings == plain.settings
        assert "metric" not in plain.settings
        assert torch.equal(named.proxies, plain.proxies)


@pytest.mark.slow
def test_lambda_is_the_one_whose_left_out_labels_are_best(unequal):
    x, y = unequal
    head = imprint(x, y, "ridge", metric="balanced_accuracy", calibrate=False)
    spectrum = Spectrum(Moments.of(x, y, 3))
    figures = []
    for lam in spectrum.grid.tolist():
        labels = []
        for i in range(len(y)):
            others = torch.arange(len(y)) != i
            left = imprint(x[others], y[others], "ridge", lam=lam, calibrate=False)
            labels.append(left(x[i : i + 1]).argmax(1))
        figures.append(measured_by("balanced_accuracy", torch.cat(labels), y))
    chosen = figures[spectrum.grid.tolist().index(head.settings["chosen_lam"])]
    assert chosen == max(figures)
    assert min(figures) < max(figures)
    assert head.settings["metric"] == "balanced_accuracy"


@pytest.mark.parametrize("metric", METRICS)
def test_lambda_by_held_out_samples_is_chosen_by_the_metric(unequal, metric):
    x, y = unequal
    held, classes = torch.arange(len(y)) % 3 == 0, torch.arange(3)
    spectrum = Spectrum(Moments.of(x[~held], y[~held], 3))
    chosen = spectrum.best_by_holdout(x[held], y[held], classes, metric)
    figures = {}
    for lam in spectrum.grid.tolist():
        head = imprint(x[~held], y[~held], "ridge", lam=lam, calibrate=False)
        figures[lam] = measured_by(metric, head(x[held]).argmax(1), y[held])
    assert figures[chosen] == max(figures.values())
    assert min(figures.values()) < max(figures.values())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(recipe="ridge", lam="gcv"), "lam='gcv' knows no labels of held-out samples"),
        (dict(recipe="ridge", lam=0.1), "lam=0.1 leaves no choice"),
        (dict(recipe="qi"), r"metric='macro_f1' is not used.*recipe: auto, ridge, kernel\)"),
    ],
)
def test_a_metric_that_has_nothing_to_choose_is_refused(keywords, message):
    with pytest.raises(ImprintError, match=message):
        resolve(**keywords, metric="macro_f1")


@pytest.mark.parametrize("recipe", ["auto", "ridge"])
def test_an_unknown_metric_or_class_weight_is_refused(recipe):
    with pytest.raises(ImprintError, match="did you mean 'balanced_accuracy'"):
        resolve(recipe, metric="balanced_acuracy")
    with pytest.raises(ImprintError, match="class_weight='blanced': give 'balanced'"):
        resolve(recipe, class_weight="blanced")


# Weights


@pytest.mark.parametrize("norm_pre", ["none", "l2"])
@pytest.mark.parametrize("recipe", ["ls", "ridge"])
@pytest.mark.parametrize("dim", [6, 300])
def test_whole_weights_are_repeated_samples(unequal, recipe, norm_pre, dim):
    # With 300 dimensions sums are those of coordinates in the space of the samples.
    generator = torch.Generator().manual_seed(2)
    x, y = unequal
    x = torch.cat([x, torch.randn(len(x), dim - 6, generator=generator)], 1)
    weights = torch.randint(4, (len(y),), generator=generator)
    weights[[0, 90, 120]] = 1
    keywords = dict(recipe=recipe, norm_pre=norm_pre, lam=0.3, calibrate=False)
    weighted = imprint(x, y, sample_weight=weights, **keywords)
    repeated = imprint(x.repeat_interleave(weights, 0), y.repeat_interleave(weights), **keywords)
    torch.testing.assert_close(weighted.proxies, repeated.proxies, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weighted.bias, repeated.bias, atol=1e-6, rtol=1e-5)


def test_the_scale_of_weights_does_not_matter(unequal):
    x, y = unequal
    weights = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) + 0.1
    one, other = (imprint(x, y, "ridge", sample_weight=f * weights) for f in (1, 1000.0))
    torch.testing.assert_close(one.proxies, other.proxies)
    assert one.temperature == pytest.approx(other.temperature)


@pytest.mark.parametrize("recipe", WEIGHED)
def test_balanced_classes_have_equal_sums_of_weights(unequal, recipe):
    x, y = unequal
    balanced = imprint(x, y, recipe, class_weight="balanced")
    by_hand = imprint(x, y, recipe, sample_weight=1 / torch.bincount(y)[y])
    torch.testing.assert_close(balanced.proxies, by_hand.proxies)
    assert balanced.settings["class_weight"] == "balanced"
    # Also where samples have weights of their own.
    weights = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) + 0.1
    sums = torch.zeros(3).index_add_(0, y, weights)
    both = imprint(x, y, recipe, class_weight="balanced", sample_weight=weights)
    by_hand = imprint(x, y, recipe, sample_weight=weights / sums[y])
    torch.testing.assert_close(both.proxies, by_hand.proxies, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["auto", "ls", "ridge", "kernel"])
def test_balanced_finds_more_of_the_small_class(unequal, recipe):
    x, y = unequal
    plain, balanced = (imprint(x, y, recipe, class_weight=w) for w in (None, "balanced"))
    assert recalls(balanced, x, y)[2] >= recalls(plain, x, y)[2]
    assert sum(recalls(balanced, x, y)) > sum(recalls(plain, x, y))


@pytest.mark.parametrize("lam", ["loo", "holdout", "gcv"])
def test_equal_weights_and_equal_classes_change_nothing(lam):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 4, generator=generator) + y[:, None]
    plain = imprint(x, y, "ridge", lam=lam)
    for keywords in (dict(class_weight="balanced"), dict(sample_weight=torch.full((60,), 7.0))):
        other = imprint(x, y, "ridge", lam=lam, **keywords)
        torch.testing.assert_close(other.proxies, plain.proxies)
        assert other.settings["chosen_lam"] == plain.settings["chosen_lam"]
        assert other.temperature == pytest.approx(plain.temperature, rel=1e-4)


def test_left_out_samples_with_weights_are_those_of_a_fit_without_them():
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(12) % 2
    x = torch.randn(12, 3, generator=generator, dtype=torch.float64) + y[:, None]
    weights = torch.rand(12, generator=generator, dtype=torch.float64) + 0.2
    weights *= 12 / weights.sum()
    # Row 1 goes with row 3.
    copies = Copies(torch.tensor([1, 3]), torch.tensor([3, 1]), 12)
    spectrum = Spectrum(Moments.of(x, y, 2, weights))
    found = spectrum.leave_out(LeftOut(x, y, 2, copies, weights))
    z = torch.cat([x, torch.ones(12, 1)], 1)
    for lam, squares in list(zip(spectrum.grid.tolist(), found.tolist(), strict=True))[6:]:
        expected = 0.0
        for row, out in ((0, [0]), (1, [1, 3])):
            kept = torch.ones(12, dtype=torch.bool)
            kept[out] = False
            w, target = weights[kept, None], torch.eye(2, dtype=torch.float64)[y]
            gram = z[kept].T @ (w * z[kept]) + 12 * lam * torch.eye(4)
            fitted = torch.linalg.solve(gram, z[kept].T @ (w * target[kept]))
            expected += weights[row] * (target[row] - z[row] @ fitted).square().sum().item()
        assert squares == pytest.approx(expected.item(), rel=1e-6)


def test_a_weight_of_zero_leaves_the_sample_out(unequal):
    x, y = unequal
    weights = (torch.arange(len(y)) % 5 > 0).float()
    kept = weights > 0
    weighted, without = (
        imprint(x, y, "ridge", sample_weight=weights),
        imprint(x[kept], y[kept], "ridge"),
    )
    torch.testing.assert_close(weighted.proxies, without.proxies)
    with pytest.raises(ImprintError, match="class 2 has no training sample"):
        imprint(x, y, "ridge", sample_weight=(y < 2).float())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], r"sample_weight of shape \(2,\) for 3 embeddings"),
        ([1.0, -2.0, 1.0], r"sample_weight -2\.0 of sample 1"),
        ([1.0, 1.0, float("nan")], "sample_weight nan of sample 2"),
        ([0.0, 0.0, 0.0], "sample_weight is 0 for every sample"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights, message):
    with pytest.raises(ImprintError, match=message):
        imprint(torch.eye(3), torch.arange(3), "ridge", sample_weight=torch.tensor(weights))


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(WEIGHED)))
def test_recipes_that_cannot_weigh_name_those_that_can(recipe, unequal):
    x, y = unequal
    match = r"class_weight='balanced' is not used.*recipe: auto, ls, ridge, ranpac, kernel"
    with pytest.raises(ImprintError, match=match) as refused:
        imprint(x, y, recipe, class_weight="balanced")
    assert ("prior='uniform'" in str(refused.value)) == (recipe == "lda")
    with pytest.raises(ImprintError, match="sample_weight is not used.*ls, ridge, kernel"):
        imprint(x, y, recipe, sample_weight=torch.arange(len(y)) + 1)


def test_auto_with_weights_compares_recipes_that_take_them(unequal):
    x, y = unequal
    for keywords in (dict(class_weight="balanced"), dict(sample_weight=1.0 + torch.arange(128))):
        head = imprint(x, y, **keywords)
        assert {row["recipe"] for row in head.tried} == {"kernel", "ridge"}


def test_shots_and_typical_samples_keep_their_weights(unequal):
    x, y = unequal
    weights = torch.rand(len(y), generator=torch.Generator().manual_seed(0)) + 0.1
    keywords = dict(recipe="ridge", lam=0.1, shots=8, seed=4, calibrate=False)
    head = imprint(x, y, sample_weight=weights, **keywords)
    rows = draw_shots(y, 8, 4)
    del keywords["shots"]
    drawn = imprint(x[rows], y[rows], sample_weight=weights[rows], **keywords)
    torch.testing.assert_close(head.proxies, drawn.proxies)
    keywords["weibull"] = (0.1, 0.9)
    head = imprint(x, y, sample_weight=weights, **keywords)
    rows = weibull_typical(x, y, 0.1, 0.9)
    del keywords["weibull"]
    drawn = imprint(x[rows], y[rows], sample_weight=weights[rows], **keywords)
    torch.testing.assert_close(head.proxies, drawn.proxies)


# Files and states


def test_a_weighed_head_is_the_same_from_its_file(unequal, tmp_path):
    x, y = unequal
    head = imprint(x, y, metric="macro_f1", class_weight="balanced")
    torch.save(head.state_dict(), tmp_path / "head.pt")
    loaded = ImprintedHead()
    loaded.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    torch.testing.assert_close(loaded(x), head(x))
    assert loaded.settings == head.settings
    assert loaded.settings["class_weight"] == "balanced"
    assert loaded.tried == head.tried


def test_kept_embeddings_make_the_weighed_head_anew_and_sums_refuse_it(unequal):
    x, y = unequal
    head = imprint(x, y, "ridge", class_weight="balanced", metric="balanced_accuracy")
    state = State.of(x, y, head, "embeddings")
    torch.testing.assert_close(state.head().proxies, head.proxies)
    grown = state.add_class("new", x[:9] + 3)
    parts = resolve("ridge", class_weight="balanced", metric="balanced_accuracy")
    whole = imprint_parts(torch.cat([x, x[:9] + 3]), torch.cat([y, torch.full((9,), 3)]), parts)
    torch.testing.assert_close(grown.head().proxies, whole.proxies, atol=1e-5, rtol=1e-4)
    with pytest.raises(ImprintError, match="class_weight changes what every sample weighs"):
        State.of(x, y, head, "moments")


def test_kept_sums_keep_the_lambda_that_a_metric_chose(unequal):
    x, y = unequal
    head = imprint(x, y, "ridge", metric="balanced_accuracy")
    state = State.of(x, y, head, "moments")
    torch.testing.assert_close(state.head().proxies, head.proxies, atol=1e-5, rtol=1e-4)


def test_ridge_takes_its_keywords_by_name():
    gen = Ridge(metric="macro_f1", class_weight="balanced")
    assert (gen.metric, gen.class_weight, gen.takes_weights) == ("macro_f1", "balanced", True)
