"""The NORMs for several layers side by side: `join`, `last`, and `layer_widths` of a recipe."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint_pl import ImprintedHead, ImprintError, imprint
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.pipeline import keywords_of
from imprint_pl.method.recipes import RECIPES, drop_unused, resolve
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.by_name import build, describe
from imprint_pl.parts.norm.base import Chain
from imprint_pl.parts.norm.l2 import L2
from imprint_pl.parts.norm.layers import JoinLayers, LastLayer, last_columns

WIDTHS = [4, 3, 5]
OPTIONS = {"whitened": {"shrinkage": 0.2}, "ranpac": {"projection_dim": 30}}


@pytest.fixture
def layers():
    """60 points in 3 classes, layers of 4, 3 and 5 features in other units: `(60, 12)`, labels."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 12, generator=generator) + torch.randn(3, 12, generator=generator)[y]
    return x * torch.tensor([50.0] * 4 + [1.0] * 3 + [0.02] * 5) + 3, y


def rows(seed, n=23):
    generator = torch.Generator().manual_seed(seed)
    scales = 10 ** torch.empty(12).uniform_(-3, 3, generator=generator)
    offsets = torch.empty(12).uniform_(-10, 10, generator=generator)
    y = torch.arange(n) % 3
    return (torch.randn(n, 12, generator=generator) + offsets) * scales, y


def test_join_is_its_formula_on_hand_made_numbers():
    # Deviations 1, 20 and 0; layers of one and of two features.
    x = torch.tensor([[1.0, 10.0, 5.0], [3.0, 50.0, 5.0]])
    join = JoinLayers([1, 2]).fit(x, torch.tensor([0, 1]), 2)
    assert join.mean.tolist() == [2, 30, 5]
    assert join.scale.tolist() == pytest.approx([1, 1 / (20 * 2**0.5), 0])
    expected = torch.tensor([[-1, -(0.5**0.5), 0], [1, 0.5**0.5, 0]])
    torch.testing.assert_close(join(x), expected)
    torch.testing.assert_close(join(torch.tensor([4.0, 70.0, 9.0])), torch.tensor([2, 2**0.5, 0]))


def test_every_layer_has_a_mean_squared_length_of_one(layers):
    z = JoinLayers(WIDTHS).fit(*layers, 3)(layers[0])
    for part in z.split(WIDTHS, 1):
        assert part.square().sum(1).mean().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("feature", "varies"),
    [
        ([7.0, 7.0, 7.0, 7.0], False),
        ([0.0, 0.0, 0.0, 0.0], False),
        # Neighbours in float32: nothing but rounding.
        ([1.0, 1 + 2**-23, 1.0, 1 + 2**-23], False),
        ([1e8, 1e8 + 8, 1e8, 1e8 + 8], False),
        ([1e-20, 3e-20, 1e-20, 3e-20], True),
        ([1e-35, 3e-35, 1e-35, 3e-35], False),
        ([1.0, 1.001, 1.0, 1.001], True),
        ([1e4, 1e4 + 1, 1e4, 1e4 + 1], True),
        ([-1e12, 1e12, -1e12, 1e12], True),
    ],
)
def test_a_feature_that_is_constant_but_for_rounding_becomes_zero(feature, varies):
    x = torch.stack([torch.tensor(feature), torch.tensor([1.0, 2.0, 4.0, 8.0])], 1)
    join = JoinLayers([1, 1]).fit(x, torch.tensor([0, 0, 1, 1]), 2)
    assert (join.scale[0] != 0).item() == varies
    z = join(x)
    assert z.isfinite().all()
    if varies:
        torch.testing.assert_close(z[:, 0], torch.tensor([-1.0, 1, -1, 1]), atol=1e-2, rtol=0)
    else:
        # New samples may be anything: still 0.
        assert join(torch.tensor([5.0, 1.0]))[0] == 0


def test_of_one_sample_every_feature_is_constant():
    x = torch.tensor([[1.0, -2.0, 3.0]])
    assert JoinLayers([1, 2]).fit(x, torch.tensor([0]), 1)(x).tolist() == [[0, 0, 0]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_join_can_be_undone(seed):
    x, y = rows(seed)
    join = JoinLayers(WIDTHS).fit(x, y, 3)
    back = join(x) / join.scale + join.mean
    torch.testing.assert_close(back / x.std(0), x / x.std(0), atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_join_does_not_mind_the_order_of_the_samples(seed):
    x, y = rows(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    first, second = (JoinLayers(WIDTHS).fit(*of, 3) for of in ((x, y), (x[order], y[order])))
    torch.testing.assert_close(first(x), second(x))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    gram=st.sampled_from(["diagonal", "pooled"]),
    cut=st.integers(0, 23),
)
def test_join_learns_the_same_from_sums_and_turns_sums_into_those_of_its_output(seed, gram, cut):
    x, y = rows(seed)
    parts = [Moments.of(x[part], y[part], 3, gram=gram) for part in (slice(cut), slice(cut, None))]
    moments = parts[0] + parts[1]
    join = JoinLayers(WIDTHS).fit(x, y, 3)
    torch.testing.assert_close(JoinLayers(WIDTHS).fit_moments(moments)(x), join(x))
    found = join.of_moments(moments)
    expected = Moments.of((x.double() - join.mean) * join.scale, y, 3, gram=gram)
    torch.testing.assert_close(found.sums, expected.sums, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(found.gram, expected.gram, atol=1e-8, rtol=1e-8)
    assert torch.equal(found.counts, expected.counts)


def test_a_diagonal_gram_holds_the_squares_of_each_feature():
    moments = Moments.of(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1]), 2)
    diagonal = Moments.of(
        torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([0, 1]), 2, gram="diagonal"
    )
    assert diagonal.squares.tolist() == moments.squares.tolist() == [10, 4]
    assert (diagonal - diagonal).squares.tolist() == [0, 0]
    for ask in (lambda: diagonal.pooled_gram, lambda: diagonal.within("micro")):
        with pytest.raises(ValueError, match=r"[Gg]ram"):
            ask()


@settings(max_examples=10, deadline=None)
@given(
    recipe=st.sampled_from(["qi", "ridge", "lda", "kernel", "ranpac", "hosoda", "knn"]),
    layer=st.integers(0, 2),
    seed=st.integers(0, 50),
)
def test_a_layer_in_other_units_changes_no_label(recipe, layer, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(45) % 3
    x = torch.randn(45, 12, generator=generator) + 4 * torch.randn(3, 12, generator=generator)[y]
    other = x.clone()
    other.split(WIDTHS, 1)[layer].mul_(7)
    options = OPTIONS.get(recipe, {})
    heads = [imprint(of, y, recipe, layer_widths=WIDTHS, **options) for of in (x, other)]
    assert torch.equal(heads[0](x).argmax(1), heads[1](other).argmax(1))


def test_last_takes_the_columns_of_the_last_layer_as_they_are(layers):
    x, _ = layers
    last = LastLayer(WIDTHS)
    assert torch.equal(last(x), x[:, 7:])
    assert last.input_dim == 12
    assert last.features(12, 60) == 5
    assert last_columns(x, None) is x
    with pytest.raises(ImprintError, match=r"add up to 12, and the embeddings have 11 numbers"):
        last(x[:, 1:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_last_alone_gives_the_head_of_the_last_layer(layers, recipe):
    x, y = layers
    options = OPTIONS.get(recipe, {})
    steps = resolve(recipe).parameters["norm_pre"]
    wide = imprint(x, y, recipe, norm_pre=f"last+{steps}", layer_widths=WIDTHS, **options)
    head = imprint(x[:, 7:], y, recipe, **options)
    assert wide.layer_widths == WIDTHS
    assert wide.embedding_dim == 12
    torch.testing.assert_close(wide.scores(x), head.scores(x[:, 7:]))


@pytest.mark.parametrize("recipe", [*RECIPES, "auto"])
def test_join_comes_before_both_norms_of_any_recipe(layers, recipe):
    x, y = layers
    head = imprint(x, y, recipe, layer_widths=WIDTHS, **OPTIONS.get(recipe, {}))
    assert head.settings["norm_pre"].split("+")[0] == "join"
    assert head.settings["norm_inf"] == "same"
    assert head.settings["layer_widths"] == head.layer_widths == WIDTHS
    if recipe != "auto":
        own = resolve(recipe).parameters["norm_pre"]
        assert head.settings["norm_pre"] == ("join" if own == "none" else f"join+{own}")
        # Proxies and embeddings are in one space: joined by hand, the head is the same.
        z = JoinLayers(WIDTHS).fit(x, y, 3)(x)
        options = OPTIONS.get(recipe, {})
        torch.testing.assert_close(
            head.scores(x), imprint(z, y, recipe, **options).scores(z), atol=1e-3, rtol=1e-3
        )


def test_norms_that_differ_stay_different_behind_one_join():
    parts = resolve("qi", norm_pre="none", layer_widths=WIDTHS)
    assert parts.parameters["norm_pre"] == "join"
    assert parts.parameters["norm_inf"] == "join+l2"
    assert parts.norm_inf.steps[0] is parts.norm_pre
    parts = resolve("qi", norm_inf="none", layer_widths=WIDTHS)
    assert parts.norm_inf is parts.norm_pre.steps[0]
    parts = resolve("qi", norm_pre=[Chain([L2(), L2()]), "power"], layer_widths=WIDTHS)
    assert parts.parameters["norm_pre"] == "join+l2+l2+power"


@pytest.mark.parametrize("norm_pre", ["join+l2", ["l2", "join"], "last", ["power", "last"]])
def test_a_norm_for_layers_that_is_named_stays_where_it_is(norm_pre):
    named = norm_pre if isinstance(norm_pre, str) else "+".join(norm_pre)
    parts = resolve("qi", norm_pre=norm_pre, layer_widths=WIDTHS)
    assert parts.parameters["norm_pre"] == named
    assert parts.norm_inf is parts.norm_pre
    instance = resolve("qi", norm_pre=[JoinLayers(WIDTHS), L2()], layer_widths=WIDTHS)
    assert instance.parameters["norm_pre"] == "join+l2"
    assert instance.layer_widths == WIDTHS


@pytest.mark.parametrize("widths", [None, [12]])
@pytest.mark.parametrize("recipe", ["qi", "kernel", "auto"])
def test_one_layer_is_the_recipe_of_before(layers, recipe, widths):
    x, y = layers
    parts, before = resolve(recipe, layer_widths=widths), resolve(recipe)
    assert parts.parameters == before.parameters
    head, old = imprint_parts(x, y, parts), imprint_parts(x, y, before)
    assert head.settings == old.settings
    assert head.layer_widths is None
    assert "layer_widths" not in head.settings
    assert torch.equal(head(x), old(x))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(layer_widths=[4, 3]), r"layer_widths=\[4, 3\] add up to 7, and .* have 12 numbers"),
        (dict(layer_widths=[13]), r"layer_widths=\[13\] add up to 13, and .* have 12 numbers"),
        (dict(layer_widths=[4, 0, 8]), r"layer_widths=\[4, 0, 8\]: give the number of features"),
        (dict(layer_widths=[4.0, 8.0]), "give the number of features of each layer"),
        (dict(layer_widths=[True, 11]), "give the number of features of each layer"),
        (dict(layer_widths="48"), "layer_widths='48': give the number of features"),
        (dict(layer_widths=12), "layer_widths=12: give the number of features"),
        (dict(layer_widths=[]), r"layer_widths=\[\]: give the number of features"),
        (dict(layer_widths=[2**20, 1]), "add up to 1,048,577 features: at most 1,048,576"),
    ],
)
@pytest.mark.parametrize("recipe", ["qi", "auto"])
def test_widths_that_cannot_be_are_named(layers, recipe, keywords, message):
    with pytest.raises(ImprintError, match=message):
        imprint(*layers, recipe, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (dict(norm_pre="join"), "layer_widths=None: give the number of features"),
        (dict(norm_pre="last"), "layer_widths=None: give the number of features"),
        (dict(norm_pre="join", norm_inf="l2", layer_widths=WIDTHS), "in another space than"),
        (dict(norm_pre="last", norm_inf="l2", layer_widths=WIDTHS), "in another space than"),
        (
            dict(norm_pre=JoinLayers([6, 6]), layer_widths=WIDTHS),
            r"layer_widths=\[4, 3, 5\] is not used by norm_pre='join'",
        ),
    ],
)
def test_layers_that_do_not_fit_the_norms_are_named(layers, keywords, message):
    with pytest.raises(ImprintError, match=message):
        imprint(*layers, "qi", **keywords)


def test_quantiles_of_a_classifier_of_the_last_layer_are_refused_for_joined_layers(layers):
    x, y = layers
    classifier = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    with pytest.raises(ImprintError, match=r"from a classifier of 5 numbers, .* the 12 of 3 lay"):
        imprint(x, y, "hosoda", classifier=classifier, layer_widths=WIDTHS)
    last = dict(norm_pre="last", layer_widths=WIDTHS)
    wide = imprint(x, y, "hosoda", classifier=classifier, **last)
    head = imprint(x[:, 7:], y, "hosoda", classifier=classifier)
    assert torch.equal(wide.proxies, head.proxies)
    assert imprint(x, y, "hosoda", layer_widths=WIDTHS).feature_dim == 12


def test_the_settings_of_a_joined_head_are_its_recipe(layers):
    x, y = layers
    head = imprint(x, y, "kernel", layer_widths=tuple(WIDTHS))
    again = imprint(x, y, **json.loads(json.dumps(keywords_of(head))))
    assert torch.equal(head.proxies, again.proxies)
    assert again.settings == head.settings


def test_widths_stay_where_a_part_is_exchanged():
    remembered = dict(layer_widths=WIDTHS, k=3, gen="mean")
    assert drop_unused("robust", remembered, kept={"gen"}) == dict(layer_widths=WIDTHS, gen="mean")


@pytest.mark.parametrize("norm_pre", ["join+l2", "last+l2"])
def test_a_head_of_layers_is_saved_and_loaded(layers, tmp_path, norm_pre):
    x, y = layers
    head = imprint(x, y, "qi", norm_pre=norm_pre, layer_widths=WIDTHS)
    head.save_pretrained(tmp_path)
    loaded = ImprintedHead.from_pretrained(tmp_path)
    assert loaded.layer_widths == WIDTHS
    assert torch.equal(loaded(x), head(x))
    other = ImprintedHead()
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.check()(x), head(x))
    taken = ImprintedHead()
    taken.take(head)
    assert taken.layer_widths == WIDTHS


@pytest.mark.parametrize(
    "description",
    [
        [{"name": "join"}],
        [{"name": "join", "layer_widths": "x"}],
        [{"name": "join", "layer_widths": [4, -1]}],
        [{"name": "last", "layer_widths": [2**40]}],
        [{"name": "last", "layer_widths": {"4": 5}}],
        [{"name": "last", "layer_widths": [1], "other": 2}],
    ],
)
def test_a_forged_description_is_an_error(description):
    with pytest.raises(ImprintError):
        build("norm_inf", description)


def test_a_head_whose_widths_are_not_those_of_its_constants_is_forged(layers):
    head = imprint(*layers, "qi", layer_widths=WIDTHS)
    assert describe(head.norm_inf)[0] == {"name": "join", "layer_widths": WIDTHS}
    head.norm_inf.norms[0].layer_widths = [4, 3, 6]
    with pytest.raises(ImprintError, match="damaged or forged"):
        head.check()
