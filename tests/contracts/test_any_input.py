"""Whatever comes in, a right answer comes out or an ImprintError that names the cure: never a wrong
answer without a word, never another exception. Cases are drawn by hypothesis, the same ones in
every run: some 200 in `make test`, more than 10,000 in `make test-slow`.
"""

import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from imprint_pl import ImprintedHead, ImprintError, ImprintEstimator, imprint
from imprint_pl.method.recipes import RECIPES, resolve
from imprint_pl.numerics.values import LARGEST, SMALLEST
from imprint_pl.parts.by_name import SLOTS

KINDS = (
    *("clusters", "duplicates", "constant", "constant feature", "zeros", "noise"),
    *("on a line", "sparse", "mixed scales", "not finite"),
)
# GENs that one package of an extra brings.
NEEDS_EXTRA = {"kmedoids"}
# Recipes whose labels do not depend on the scale of the embeddings.
SCALE_FREE = ("qi", "robust", "janson", "hosoda", "knn", "whitened", "lda", "kernel")
# Without random draws, which go by what the rows hold: those of k-means are others after a shift.
SHIFT_FREE = (
    dict(recipe="janson"),
    dict(recipe="lda"),
    dict(recipe="whitened"),
    dict(recipe="qi", norm_pre=["centre", "l2"]),
    dict(recipe="ridge", norm_pre="whiten"),
)


def cases(strategy, fast, slow):
    """Two tests of one property: a few cases, and many."""

    def decorate(check):
        def run(number):
            chosen = settings(
                max_examples=number,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            return chosen(given(strategy)(check))

        def test(number):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run(number)()

        slow_case = pytest.param(slow, marks=pytest.mark.slow)
        return pytest.mark.parametrize("number", [fast, slow_case])(test)

    return decorate


@dataclass
class Problem:
    """Embeddings, labels, and how they were made."""

    kind: str
    scale: float
    x: torch.Tensor
    y: torch.Tensor
    classes: int
    seed: int

    def __repr__(self):
        counts = torch.bincount(self.y).tolist()
        return (
            f"Problem({self.kind}, {self.scale:.0e}, {tuple(self.x.shape)}, {counts}, {self.seed})"
        )


def made(kind, scale, sizes, dim, dtype, seed):
    """As many samples of each class as `sizes` says, in a random order."""
    draw = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(sizes)), sizes)
    n = len(y)
    means = 6 * draw.normal(size=(len(sizes), dim))
    x = means[y] + draw.normal(size=(n, dim))
    if kind == "duplicates":
        x = means[y]
    elif kind == "constant":
        x = np.full((n, dim), 3.7)
    elif kind == "constant feature":
        x[:, draw.integers(dim)] = 1.0
    elif kind == "zeros":
        x = np.zeros((n, dim))
    elif kind == "noise":
        x = draw.normal(size=(n, dim))
    elif kind == "on a line":
        x = np.outer(draw.normal(size=n) + 5 * y, draw.normal(size=dim))
    elif kind == "sparse":
        x = x * (draw.random((n, dim)) < 0.2)
    elif kind == "mixed scales":
        x = x * 10.0 ** draw.integers(-12, 12, (n, 1))
    elif kind == "not finite":
        x[draw.integers(n), draw.integers(dim)] = draw.choice([np.nan, np.inf, -np.inf])
    order = draw.permutation(n)
    x = torch.from_numpy(x[order] * scale).to(dtype)
    return Problem(kind, scale, x, torch.from_numpy(y[order]), len(sizes), seed)


SIZES = st.lists(st.sampled_from([1, 1, 2, 3, 7, 30]), min_size=1, max_size=9)
SEEDS = st.integers(0, 2**31)
PROBLEMS = st.builds(
    made,
    kind=st.sampled_from(KINDS),
    scale=st.sampled_from([0, 0, 0, 0, -30, -20, -12, -10, -5, 5, 10, 12, 20, 30]).map(
        lambda power: 10.0**power
    ),
    sizes=SIZES,
    dim=st.sampled_from([1, 2, 3, 8, 17]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.float64, torch.float16]),
    seed=SEEDS,
)


def separated(scale, sizes, extra, turned, spread, seed):
    """Classes that lie along directions at right angles, far apart for their spread."""
    draw = np.random.default_rng(seed)
    dim = len(sizes) + extra
    y = np.repeat(np.arange(len(sizes)), sizes)
    directions = np.linalg.qr(draw.normal(size=(dim, dim)))[0] if turned else np.eye(dim)
    x = 6 * directions[y] + spread * draw.normal(size=(len(y), dim))
    order = draw.permutation(len(y))
    x = torch.from_numpy(x[order] * scale).float()
    return Problem("separated", scale, x, torch.from_numpy(y[order]), len(sizes), seed)


def separated_problems(scales=(1e-10, 1e-5, 1.0, 1.0, 1e5, 1e10), spreads=(0.0, 0.05, 0.05)):
    return st.builds(
        separated,
        scale=st.sampled_from(scales),
        sizes=SIZES,
        extra=st.sampled_from([1, 2, 8]),
        turned=st.booleans(),
        spread=st.sampled_from(spreads),
        seed=SEEDS,
    )


@st.composite
def keywords(draw):
    """A recipe, with any of its parts exchanged."""
    recipe = draw(st.sampled_from(["auto", *RECIPES]))
    if recipe == "auto":
        return dict(recipe=recipe)
    given = dict(recipe=recipe)
    for slot, parts in SLOTS.items():
        if draw(st.integers(0, 3)) == 0:
            given[slot] = draw(st.sampled_from([n for n in parts if n not in NEEDS_EXTRA]))
    if draw(st.integers(0, 9)) == 0:
        given["norm_pre"] = ["centre", "l2"]
    if given.get("agg") == "mnn":
        given["m"] = draw(st.sampled_from([1, 3, 50]))
        given["distance"] = draw(
            st.sampled_from(["euclidean", "cosine", "manhattan", "chebyshev", "mahalanobis"])
        )
        given["votes"] = draw(st.sampled_from(["uniform", "weighted_by_distance", "softmax"]))
    if given.get("gen") in ("kmeans", "kls", "kridge", "fps", "random", "cov_max"):
        given["k"] = draw(st.sampled_from([1, 2, 5, 1000]))
    return given


NO_SPREAD = ("do not differ", "singular")


def imprinted(problem, allowed=("",), **given_keywords):
    """The head, or `None` where there was an error, which has to be long enough to say what, where
    and what to do, with one of the words that are `allowed`."""
    try:
        return imprint(problem.x, problem.y, **given_keywords)
    except ImprintError as error:
        message = str(error)
    assert len(message) > 40, message
    assert ":" in message, message
    assert any(words in message for words in allowed), message
    return None


@cases(st.tuples(PROBLEMS, keywords()), fast=60, slow=5000)
def test_any_embeddings_and_recipe_give_finite_scores_or_an_error_with_a_cure(case):
    problem, given_keywords = case
    head = imprinted(problem, **given_keywords)
    if head is None:
        return
    assert problem.kind != "not finite"
    assert SMALLEST <= problem.x.abs().max() <= LARGEST or not problem.x.any()
    x = problem.x.float()
    scores, logits = head.scores(x), head(x)
    assert scores.shape == logits.shape == (len(x), problem.classes)
    assert scores.isfinite().all()
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.softmax(1).sum(1), torch.ones(len(x)))
    assert 0 < head.temperature < math.inf
    assert sorted(set(head.proxy_classes.tolist())) == list(range(problem.classes))


SURE = [
    *(dict(recipe=recipe) for recipe in ["auto", *RECIPES] if recipe not in ("hosoda", "ranpac")),
    *(
        dict(recipe="robust", gen=gen, **({} if gen in ("mean", "all") else {"k": k}))
        for gen in ("mean", "kmeans", "random", "fps", "cov_max", "all")
        for k in (1, 3, 1000)
    ),
    # With more clusters, and few dimensions, a linear fit may mask one by its neighbours.
    *(dict(recipe="ridge", gen=gen, k=1) for gen in ("kls", "kridge")),
    *(dict(recipe="qi", norm_pre=norm, norm_inf="same") for norm in ("power", "whiten")),
    *(
        dict(recipe="janson", gen="all", distance=distance, votes=votes)
        for distance in ("euclidean", "cosine", "manhattan", "chebyshev", "mahalanobis")
        for votes in ("uniform", "weighted_by_distance", "softmax")
    ),
]


@cases(st.tuples(separated_problems(), st.sampled_from(SURE)), fast=40, slow=2000)
def test_samples_of_classes_far_apart_get_their_own_class(case):
    problem, given_keywords = case
    # No spread within classes, or none left to rounding.
    head = imprinted(problem, NO_SPREAD, **given_keywords)
    if head is None:
        return
    assert head(problem.x).argmax(1).tolist() == problem.y.tolist()


def gap(head, x):
    """Between the best score of each sample and the next, over the largest of all."""
    scores = head.scores(x).double()
    if scores.shape[1] == 1:
        return torch.full((len(x),), torch.inf)
    best = scores.topk(2, dim=1).values
    return (best[:, 0] - best[:, 1]) / scores.abs().max().clamp(min=1e-300)


def same_labels(first, second, x, moved, tolerance=1e-3):
    """Where the first head is not undecided."""
    sure = gap(first, x) > tolerance
    labels, others = first(x).argmax(1), second(moved).argmax(1)
    assert torch.equal(labels[sure], others[sure])


@cases(
    st.tuples(
        separated_problems(scales=(1.0,), spreads=(0.5, 3.0)),
        st.sampled_from(SCALE_FREE),
        st.integers(-25, 25),
    ),
    fast=20,
    slow=1000,
)
def test_the_scale_of_the_embeddings_changes_no_label(case):
    problem, recipe, power = case
    # A power of two is exact in every step but those that mix scales on purpose.
    scaled = problem.x * 2.0**power
    scaled_problem = replace(problem, x=scaled)
    heads = [imprinted(p, NO_SPREAD, recipe=recipe) for p in (problem, scaled_problem)]
    if None in heads:
        assert heads == [None, None]
        return
    same_labels(*heads, problem.x, scaled)


@cases(
    st.tuples(
        separated_problems(scales=(1.0,), spreads=(0.5, 3.0)),
        st.sampled_from(SHIFT_FREE),
        st.floats(-100, 100),
    ),
    fast=20,
    slow=1000,
)
def test_a_constant_added_to_all_embeddings_changes_no_label(case):
    problem, given_keywords, shift = case
    shifted = problem.x + shift
    shifted_problem = replace(problem, x=shifted)
    heads = [imprinted(p, NO_SPREAD, **given_keywords) for p in (problem, shifted_problem)]
    if None in heads:
        return
    same_labels(*heads, problem.x, shifted)


@cases(
    st.tuples(
        separated_problems(scales=(1.0,), spreads=(0.5, 3.0)),
        st.sampled_from(["qi", "janson", "hosoda", "ls", "ridge", "lda", "whitened", "knn"]),
        SEEDS,
    ),
    fast=20,
    slow=1000,
)
def test_the_order_of_samples_and_of_classes_changes_nothing(case):
    problem, recipe, seed = case
    x, y, draw = problem.x, problem.y, torch.Generator().manual_seed(seed)
    samples = torch.randperm(len(x), generator=draw)
    classes = torch.randperm(problem.classes, generator=draw)
    try:
        head = imprint(x, y, recipe, calibrate=False)
    except ImprintError as error:
        with pytest.raises(ImprintError, match=str(error)[:20]):
            imprint(x[samples], classes[y][samples], recipe, calibrate=False)
        return
    other = imprint(x[samples], classes[y][samples], recipe, calibrate=False)
    scores, others = head.scores(x), other.scores(x)[:, classes]
    size = scores.abs().max().item()
    torch.testing.assert_close(others, scores, rtol=1e-3, atol=1e-4 * size)


ODD_ROWS = (math.nan, math.inf, -math.inf, 1e30)


@cases(
    st.tuples(separated_problems(scales=(1.0,)), keywords(), st.sampled_from(ODD_ROWS)),
    fast=20,
    slow=1000,
)
def test_an_odd_embedding_gets_nan_and_leaves_the_others_alone(case):
    problem, given_keywords, value = case
    head = imprinted(problem, **given_keywords)
    if head is None:
        return
    rows = problem.x[[0, 0, 0]].clone()
    rows[1, 0] = value
    logits = head(rows)
    assert logits[1].isnan().all()
    torch.testing.assert_close(logits[[0, 2]], head(rows[[0, 0, 2]])[[0, 2]])
    for wrong in (rows[0], rows[None], rows[:, 1:], torch.cat([rows, rows], 1)):
        with pytest.raises(ImprintError, match="embeddings of "):
            head(wrong)
    assert head(rows[:0]).shape == (0, problem.classes)
    for dtype in (torch.float16, torch.float64):
        assert head(problem.x[:2].to(dtype)).isfinite().all()


LABELS = (
    lambda y: y,
    lambda y: y * 7 - 3,
    lambda y: y.astype(np.uint8),
    lambda y: y.astype(np.int64) * 2**40,
    lambda y: y % 2 == 0,
    lambda y: np.array([f"class {label}" for label in y]),
    lambda y: np.array([f"class {label}" for label in y], dtype=object),
    lambda y: y.astype(np.float64),
    lambda y: y + 0.5,
    lambda y: y.tolist(),
    lambda y: y[:, None],
    lambda y: y[:-1],
    lambda y: np.stack([y, y], 1),
)


@cases(
    st.tuples(PROBLEMS, st.sampled_from(["auto", *RECIPES]), st.sampled_from(LABELS)),
    fast=20,
    slow=1000,
)
def test_an_estimator_predicts_its_own_labels_or_says_why_not(case):
    problem, recipe, relabel = case
    x, y = problem.x.numpy(), relabel(problem.y.numpy())
    try:
        model = ImprintEstimator(recipe).fit(x, y)
    except ValueError:  # scikit-learn's own checks, too
        return
    assert set(model.classes_) == set(np.ravel(y).tolist())
    with np.errstate(all="ignore"):
        predicted, probabilities = model.predict(x), model.predict_proba(x)
    assert set(predicted.tolist()) <= set(model.classes_.tolist())
    assert probabilities.shape == (len(x), len(model.classes_))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    decision = model.decision_function(x)
    assert np.isfinite(decision).all()


X = torch.tensor([[3.0, 0.0], [4.0, 1.0], [0.0, 5.0], [1.0, 4.0]])
Y = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.tensor([0, 0, 1, 2**40]), "num_classes=1,099,511,627,777"),
        (torch.tensor([0, 0, 1, 2**62]), "num_classes=4,611,686,018,427,387,905"),
        (torch.tensor([0, 0, 1, 1_000_000]), "class 2, 3, 4, 5, 6 and 999,?993 more has no"),
        (np.array([0, 0, 1, 2**63], dtype=np.uint64), "label -9223372036854775808 of sample 3"),
        (torch.tensor([0, 0, 1, -1]), "label -1 of sample 3"),
        ([0, 0, 1, 3], "class 2 has no training sample"),
        (["a", "a", "b", "b"], "ImprintEstimator takes labels of any kind"),
        (np.array(["a", "a", "b", "b"]), "ImprintEstimator takes labels of any kind"),
        (None, "labels of type NoneType"),
        (object(), "labels of type object"),
        (torch.tensor(0), r"labels of shape \(\)"),
        (torch.tensor([0.0, 0.0, 1.0, math.nan]), "expected integers"),
        (torch.tensor([0, 0, 1, 1]) * 1j, "expected integers"),
    ],
)
@pytest.mark.parametrize("recipe", ["auto", "qi", "robust"])
def test_wrong_labels_are_named_before_room_is_made_for_them(recipe, y, message):
    with pytest.raises(ImprintError, match=message):
        imprint(X, y, recipe)


@pytest.mark.parametrize(
    "y", [Y.bool(), Y.to(torch.uint8), Y.numpy(), Y.numpy().astype(np.uint16), Y.tolist()]
)
@pytest.mark.parametrize("x", [X, X.double(), X.half(), X.bfloat16(), X.numpy(), X.tolist()])
def test_embeddings_and_labels_of_any_integer_and_float_type_are_read_alike(x, y):
    assert imprint(x, y, "qi")(X).argmax(1).tolist() == Y.tolist()


@pytest.mark.parametrize("x", [None, "text", object(), [[1.0], [1.0, 2.0]], X * 1j, X.bool()])
def test_what_is_no_embedding_is_named(x):
    with pytest.raises(ImprintError, match="embeddings of (type|shape)"):
        imprint(x, Y)


def test_embeddings_out_of_range_are_named_with_the_factor_to_scale_them_by():
    with pytest.raises(ImprintError, match=r"1 of 4 embeddings have values above 1e\+12.*sample 2"):
        imprint(X * torch.tensor([[1.0], [1.0], [1e15], [1.0]]), Y)
    with pytest.raises(ImprintError, match=r"above 5.0e-15.*one factor such as 2e\+14"):
        imprint(X * 1e-15, Y)


WRONG = (
    *(0, -1, 2.5, "3", "x", math.nan, math.inf, [1], {}, 10**30, (1, 2), 1e-300, b"1"),
    *(np.float64(2.0), np.int64(3), object(), True),
)
KEYWORDS = (
    *(("robust", {"gen": gen}, "k") for gen in ("kmeans", "random", "fps", "cov_max", "kls")),
    *(("knn", {}, name) for name in ("m", "temperature", "distance", "votes")),
    *(("ridge", {}, name) for name in ("lam", "intercept")),
    *(("lda", {}, name) for name in ("shrinkage", "prior")),
    *(("kernel", {}, name) for name in ("width", "projection_dim")),
    *(("qi", {}, name) for name in ("norm_pre", "gen", "norm_post", "norm_inf", "agg")),
    *(("qi", {}, name) for name in ("seed", "shots", "weibull", "num_classes", "class_names")),
    *(("ls", {}, "lam"), ("ranpac", {}, "projection_dim"), ("hosoda", {}, "classifier")),
    *(("robust", {}, "engine"), ("robust", {}, "nonsense"), ("qi", {}, "recipe")),
)


@pytest.mark.parametrize(
    ("recipe", "parts", "name"), KEYWORDS, ids=[f"{r}-{'-'.join(p)}{n}" for r, p, n in KEYWORDS]
)
def test_a_keyword_of_a_wrong_type_or_size_is_named_or_works(recipe, parts, name, blobs):
    x, y = blobs
    for value in WRONG:
        message = name
        try:
            head = imprint(x, y, **dict(recipe=recipe) | parts | {name: value})
            assert head(x).isfinite().all(), value
        except ImprintError as error:
            message = str(error)
        assert name in message


def test_a_norm_that_maps_to_another_space_is_not_left_out_at_inference():
    for norm in ("random_projection", "nystrom"):
        with pytest.raises(ImprintError, match=f"norm_inf='l2' leaves .* norm_pre='{norm}' maps"):
            resolve("qi", norm_pre=norm, norm_inf="l2")


def test_a_head_whose_parts_do_not_fit_each_other_says_so():
    head = imprint(X, Y, "qi")
    head.norm_inf = imprint(X, Y, "kernel").norm_inf
    with pytest.raises(ImprintError, match="NORM_inf makes 4 numbers of an embedding.* have 2"):
        head(X)


def test_a_lambda_that_leaves_nothing_of_the_samples_is_an_error():
    with pytest.raises(ImprintError, match="lam=0.01 is all that counts beside samples"):
        imprint(X * 1e-6, Y, "ridge", lam=1e-2)


@pytest.mark.parametrize("scale", [1e-10, 1e-5, 1e5, 1e10])
def test_ridge_learns_alike_from_tiny_and_huge_embeddings_with_an_intercept(scale):
    # On a line, and one side of 0: without the intercept the classes cannot be told apart.
    x = torch.tensor([[5.0], [5.1], [5.2], [9.0], [9.1], [9.2]]) * scale
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    assert imprint(x, y, "ridge")(x).argmax(1).tolist() == y.tolist()
    assert imprint(x, y, "ridge", lam="holdout")(x).argmax(1).tolist() == y.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["auto", "robust", "janson", "ridge", "lda"])
def test_ten_thousand_classes(recipe):
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(10_000).repeat(2)
    x = torch.randn(10_000, 24, generator=draw)[y] + 0.01 * torch.randn(20_000, 24, generator=draw)
    head = imprint(x, y, recipe)
    rows = torch.arange(0, 20_000, 97)
    scores = head(x[rows])
    assert isinstance(head, ImprintedHead)
    assert scores.shape == (len(rows), 10_000)
    assert not scores.isnan().any()
    if recipe != "ridge":
        assert (scores.argmax(1) == y[rows]).float().mean() > 0.95
