"""`familiarity.py`: distances by hand, what it is for on real embeddings, files and growing."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintedHead, ImprintError, ImprintEstimator, imprint
from imprint_pl.lightning.outsiders import auroc, false_positive_rate
from imprint_pl.method import familiarity as module
from imprint_pl.method import threshold
from imprint_pl.method.familiarity import Familiarity, UnitLayers, unit_sums
from imprint_pl.method.holdout import copies_of
from imprint_pl.method.recipes import resolve
from imprint_pl.method.threshold import Limits, set_threshold
from imprint_pl.numerics.factorisations import oas
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.sums import TrainingSums


def directions(n, d, classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=generator)
    y = torch.arange(n) % classes
    return centres[y] + 0.5 * torch.randn(n, d, generator=generator), y


def by_definition(x, y, queries, least=0.0):
    """The two distances with whole covariances."""
    z, q = normalize(x).double(), normalize(queries).double()
    classes = int(y.max()) + 1
    means = torch.stack([z[y == c].mean(0) for c in range(classes)])
    mean = z.mean(0)
    between = (means - mean).T @ torch.diag(torch.bincount(y) / len(y)).double() @ (means - mean)
    total = (z - mean).T @ (z - mean) / len(z)
    within = total - between
    s, d = oas(within, len(z) - classes), len(within)
    within = (1 - s) * within + (
        s * within.trace() / d + module.LEAST * total.trace() / d
    ) * torch.eye(d, dtype=torch.float64)

    def distance(centre, covariance):
        return torch.einsum("nd,de,ne->n", q - centre, torch.linalg.inv(covariance), q - centre)

    nearest = torch.stack([distance(m, within) for m in means]).amin(0)
    return distance(mean, within + between) - nearest, -nearest


@pytest.mark.parametrize("width", [3, 60, 200])
def test_distances_are_those_of_the_definition(width):
    # With 200 features the directions that are left out are alike: one number describes them.
    x, y = directions(3000, width, 4)
    if width == 200:
        x[:, 100:] = 0.1 * torch.randn(3000, 100, generator=torch.Generator().manual_seed(1))
    queries = torch.cat(
        [x[:20], torch.randn(20, width, generator=torch.Generator().manual_seed(2))]
    )
    got = Familiarity().fit(unit_sums(x, y, 4, None)).distances(queries)
    relative, absolute = by_definition(x, y, queries)
    tolerance = dict(rtol=1e-3, atol=1e-3) if width < 200 else dict(rtol=0.1, atol=1.0)
    torch.testing.assert_close(got.relative, relative, **tolerance)
    torch.testing.assert_close(got.absolute, absolute, **tolerance)


@pytest.mark.parametrize("classes", [3, 100])
@pytest.mark.parametrize("widths", [None, [100, 80, 120]])
@pytest.mark.parametrize("most_bytes", [1, 15_000, 60_000, 10**7])
def test_it_takes_at_most_the_bytes_that_it_may(classes, widths, most_bytes):
    x, y = directions(600, 300, classes)
    found = Familiarity().fit(unit_sums(x, y, classes, widths), 0, most_bytes, widths)
    kept = found.basis.shape[1]
    if most_bytes == 10**7:
        assert kept == classes - 1 + 128
        return
    tensors = [getattr(found, name) for name in found.constants]
    size = sum(tensor.nbytes for tensor in [*tensors, found.unit.layers])
    # One direction is the least there is; one more would be too much.
    assert size <= most_bytes or kept == 1
    assert size + 4 * (300 + classes + 1 + 2 * kept + 1) > most_bytes
    # Insiders are told from noise by any number of directions but one.
    noise = torch.randn(600, 300, generator=torch.Generator().manual_seed(1))
    inside, outside = found.distances(x).absolute, found.distances(noise).absolute
    assert kept == 1 or auroc(inside[:, None], outside[:, None]) > 0.7


def test_a_classifier_gives_it_a_quarter_of_the_bytes_of_its_backbone():
    backbone = torch.nn.Linear(300, 300)
    model = ImprintedClassifier(backbone, "qi", accept=0.9, keep="embeddings")
    assert model.options.limits.most_bytes == 4 * 300 * 301 // 4
    assert ImprintedClassifier(torch.nn.Identity(), "qi").options.limits == Limits()
    x, y = directions(120, 300, 3)
    quiet_trainer().fit(model, DataLoader(TensorDataset(x, y), 40))
    for _ in range(2):
        familiar = model.head.familiar
        size = sum(getattr(familiar, name).nbytes for name in familiar.constants)
        assert 0.95 * 90_300 < size <= 90_300
        model.add_examples("0", x[y == 0])


def test_distances_of_several_layers_are_those_of_their_unit_vectors():
    x, y = directions(60, 6, 3)
    wide = torch.cat([9 * torch.randn(60, 4, generator=torch.Generator().manual_seed(1)), x], 1)
    both = torch.cat([normalize(wide[:, :4]), normalize(x)], 1)
    # Both layers together have the length √2, so that `normalize` changes nothing but the scale.
    one = Familiarity().fit(unit_sums(both, y, 3, None)).distances(both)
    found = Familiarity().fit(unit_sums(wide, y, 3, [4, 6]), layer_widths=[4, 6]).distances(wide)
    torch.testing.assert_close(found, one, atol=1e-3, rtol=1e-4)


def test_a_layer_that_is_zero_or_very_large_has_finite_distances():
    x, y = directions(60, 6, 3)
    wide = torch.cat([torch.zeros(60, 4), 1e12 * x], 1)
    found = Familiarity().fit(unit_sums(wide, y, 3, [4, 6]), layer_widths=[4, 6])
    for queries in (wide, 0 * wide, 1e-9 * wide):
        distances = found.distances(queries)
        assert distances.relative.isfinite().all()
        assert distances.absolute.isfinite().all()
    torch.testing.assert_close(
        found.distances(1e-9 * wide), found.distances(wide), atol=1e-4, rtol=1e-4
    )


def test_the_rounding_of_a_layer_that_is_constant_does_not_count():
    units = UnitLayers().fit([3, 3])
    x = torch.tensor([[3.0, 4.0, 0.0, 1e-7, -1e-7, 0.0], [3.0, 4.0, 0.0, 0.06, 0.0, 0.08]])
    expected = torch.tensor([[0.6, 0.8, 0.0, 0.0, 0.0, 0.0], [0.6, 0.8, 0.0, 0.6, 0.0, 0.8]])
    torch.testing.assert_close(units(x), expected, atol=1e-5, rtol=0)
    assert torch.equal(units(0 * x), 0 * x)


def test_a_head_of_several_layers_keeps_its_familiarity_in_files_and_loses_it_with_another(
    tmp_path,
):
    x, y = directions(90, 10, 3)
    widths = [4, 6]
    head = set_threshold(imprint(x, y, "ridge", layer_widths=widths), x, y, 0.9)
    assert head.familiar.unit.layers.sum(1).tolist() == widths
    head.save_pretrained(tmp_path / "head")
    read = ImprintedHead.from_pretrained(tmp_path / "head")
    assert torch.equal(read.familiarity(x), head.familiarity(x))
    one = set_threshold(imprint(x[:, 4:], y, "ridge"), x[:, 4:], y, 0.9)
    read.take(one)
    assert torch.equal(read.familiarity(x[:, 4:]), one.familiarity(x[:, 4:]))
    # Heads of earlier versions have the distances of the last layer alone.
    state = head.state_dict() | {n: v for n, v in one.state_dict().items() if "familiar" in n}
    del state["familiar.unit.layers"]
    earlier = ImprintedHead()
    earlier.load_state_dict(state)
    assert torch.equal(
        earlier.check().familiar.distances(x)[0], one.familiar.distances(x[:, 4:])[0]
    )


@pytest.mark.parametrize("forge", [lambda v: v[:, 1:], lambda v: v / 2, lambda v: v[0]])
def test_forged_layers_are_refused(forge):
    x, y = directions(90, 10, 3)
    head = set_threshold(imprint(x, y, "ridge", layer_widths=[4, 6]), x, y, 0.9)
    state = head.state_dict()
    state["familiar.unit.layers"] = forge(state["familiar.unit.layers"]).clone()
    read = ImprintedHead()
    read.load_state_dict(state)
    with pytest.raises(ImprintError, match="damaged or forged"):
        read.check()


def test_the_class_score_weighs_as_much_as_both_distances_and_is_never_more_than_sure():
    familiar = Familiarity().fit(unit_sums(*directions(60, 6, 3), 3, None))
    familiar.standardise(torch.tensor([[0.0, -10.0, 5.0], [2.0, -30.0, 7.0]]))
    scores = torch.tensor([[1.0, -20, 6], [2, -20, 6], [0, -20, 6], [9, -20, 6], [1, -10, 7]])
    # Standard deviations: 1, 10 and 1. The class score makes up a half, each distance a quarter.
    assert familiar.of_scores(scores).tolist() == pytest.approx([0, 0.5, -0.5, 0.5, 0.5])
    # Where the class score is the same everywhere, the distances alone count.
    familiar.standardise(torch.tensor([[1.0, -10.0, 5.0], [1.0, -30.0, 7.0]]))
    assert familiar.of_scores(scores).tolist() == pytest.approx([0, 0, 0, 0, 1])


def test_a_usual_held_out_sample_has_familiarity_0_and_the_accepted_share_passes():
    x, y = directions(1500, 12, 5)
    head = set_threshold(imprint(x, y, "ridge"), x, y, 0.9)
    more, _ = directions(1500, 12, 5)
    familiar = head.familiarity(more)
    assert familiar.mean().abs() < 0.3
    assert (head.label(more) >= 0).double().mean() == pytest.approx(0.9, abs=0.05)
    assert head.familiarity(-more).mean() < -2


@pytest.mark.parametrize("x", [torch.ones(6, 3), torch.zeros(6, 3), torch.eye(3).repeat(2, 1)])
def test_samples_that_are_all_alike_have_a_finite_familiarity(x):
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    head = set_threshold(imprint(x, y, "qi", calibrate=False), x, y, 1.0)
    assert head.familiarity(x).isfinite().all()
    assert (head.label(x) >= 0).all()


def test_one_class_alone_has_a_familiarity():
    x, _ = directions(200, 5, 1)
    head = set_threshold(
        imprint(x, torch.zeros(200).long(), "qi"), x, torch.zeros(200).long(), 0.95
    )
    assert head.familiarity(-x).mean() < head.familiarity(x).mean() - 2


def test_near_copies_of_a_sample_do_not_vouch_for_it(monkeypatch):
    x, y = directions(120, 100, 4)
    noise = 1e-3 * torch.randn(120, 100, generator=torch.Generator().manual_seed(3))
    twice, labels = torch.cat([x, x + noise]), torch.cat([y, y])
    absolute = []
    for copies in (copies_of, lambda x, y, held: [held[0][:0] for _ in held]):
        monkeypatch.setattr(threshold, "copies_of", copies)
        head = set_threshold(imprint(twice, labels, "qi"), twice, labels, 0.9)
        absolute.append(head.familiar.scale[0, 2].item())
    hidden, seen = absolute
    assert hidden < 1.2 * seen < 0


def test_a_head_keeps_its_familiarity_in_files_and_heads_without_one_have_the_keys_they_had(
    blobs, tmp_path
):
    plain = imprint(*blobs, "qi")
    assert not [name for name in plain.state_dict() if "familiar" in name]
    head = set_threshold(imprint(*blobs, "qi"), *blobs, 0.9)
    head.save_pretrained(tmp_path / "head")
    read = ImprintedHead.from_pretrained(tmp_path / "head")
    assert torch.equal(read.familiarity(blobs[0]), head.familiarity(blobs[0]))
    assert torch.equal(read.label(blobs[0]), head.label(blobs[0]))
    other = ImprintedHead()
    other.take(head)
    assert torch.equal(other.familiarity(blobs[0]), head.familiarity(blobs[0]))
    other.load_state_dict(plain.state_dict())
    assert other.familiar.is_empty
    assert other.threshold is None


def test_old_heads_go_on_by_their_best_score(blobs):
    head = imprint(*blobs, "qi")
    best = head.scores(blobs[0]).amax(1)
    head.threshold = best.median().item()
    expected = torch.where(best >= head.threshold, head.scores(blobs[0]).argmax(1), -1)
    assert torch.equal(head.decide(head.scores(blobs[0])), expected)
    assert torch.equal(head.label(blobs[0]), expected)
    with pytest.raises(ImprintError, match="no score of familiarity"):
        head.familiarity(blobs[0])


def test_deciding_without_the_familiarity_that_the_threshold_is_of_is_an_error(blobs):
    head = set_threshold(imprint(*blobs, "qi"), *blobs, 0.9)
    with pytest.raises(ImprintError, match=r"head.label\(embeddings\)"):
        head.decide(head.scores(blobs[0]))
    scores = head.scores(blobs[0])
    assert torch.equal(
        head.decide(scores, head.familiarity(blobs[0], scores)), head.label(blobs[0])
    )


@pytest.mark.parametrize(
    ("name", "forge"),
    [
        ("basis", lambda v: v[:, :-1]),
        ("mean", lambda v: v[:-1]),
        ("mean", lambda v: v.repeat(9)),
        ("turn", lambda v: v * torch.nan),
        ("noise", lambda v: -v),
        ("scale", lambda v: -v - 1),
        ("scale", lambda v: v[:, :2]),
        ("centres", lambda v: v[:0]),
        ("shares", lambda v: v[None]),
    ],
)
def test_a_forged_familiarity_is_refused(blobs, name, forge):
    head = set_threshold(imprint(*blobs, "qi"), *blobs, 0.9)
    state = head.state_dict()
    state[f"familiar.{name}"] = forge(state[f"familiar.{name}"]).clone()
    read = ImprintedHead()
    read.load_state_dict(state)
    with pytest.raises(ImprintError, match="damaged or forged"):
        read.check()


def test_a_familiarity_of_which_a_part_is_missing_is_refused(blobs):
    state = set_threshold(imprint(*blobs, "qi"), *blobs, 0.9).state_dict()
    del state["familiar.turn"]
    with pytest.raises(RuntimeError, match=r"familiar\.turn"):
        ImprintedHead().load_state_dict(state)


def test_an_embedding_that_is_not_finite_is_not_accepted(blobs):
    head = set_threshold(imprint(*blobs, "qi"), *blobs, 1.0)
    x = blobs[0][:2].clone()
    x[0, 0] = torch.nan
    assert head.label(x).tolist()[0] == -1


@pytest.mark.parametrize(
    ("recipe", "widths"), [("qi", None), ("ridge", None), ("lda", None), ("ridge", [4, 6])]
)
@pytest.mark.parametrize("samples", [300, 2600])
def test_streamed_sums_give_the_familiarity_of_all_rows(recipe, widths, samples):
    x, y = directions(samples, 10, 3)
    whole = set_threshold(imprint(x, y, recipe, layer_widths=widths), x, y, 0.9)
    sums = TrainingSums(resolve(recipe, layer_widths=widths), x[:50], y[:50], 1, limits=Limits(0.9))
    for rows, labels in zip(x.split(64), y.split(64), strict=True):
        sums.add(rows, labels)
    streamed = sums.head()
    torch.testing.assert_close(streamed.familiarity(x), whole.familiarity(x), atol=2e-3, rtol=2e-3)
    assert streamed.threshold == pytest.approx(whole.threshold, abs=5e-3)


def test_kept_embeddings_fit_it_anew_when_classes_come_and_go():
    x, y = directions(90, 6, 3)
    head = set_threshold(imprint(x, y, "kernel", projection_dim=20), x, y, 0.9)
    state = State.of(x, y, head, "embeddings", limits=Limits(0.9))
    assert torch.equal(state.head().familiarity(x), head.familiarity(x))
    without = state.remove_class("2").head()
    fresh = x[y < 2], y[y < 2]
    expected = set_threshold(imprint(*fresh, "kernel", projection_dim=20), *fresh, 0.9)
    torch.testing.assert_close(without.familiarity(x), expected.familiarity(x))
    assert without.familiarity(x[y == 2]).mean() < head.familiarity(x[y == 2]).mean()
    back = state.remove_class("2").add_class("2", x[y == 2]).head()
    torch.testing.assert_close(back.familiarity(x), head.familiarity(x))


def test_kept_sums_refuse_it_with_the_cure():
    x, y = directions(90, 6, 3)
    head = set_threshold(imprint(x, y, "qi"), x, y, 0.9)
    with pytest.raises(ImprintError, match='Give keep="embeddings"'):
        State.of(x, y, head, "moments")


@pytest.mark.parametrize("recipe", ["kernel", "ridge"])
def test_the_estimator_tells_how_familiar_rows_are(recipe):
    x, y = (part.numpy() for part in directions(200, 6, 2))
    model = ImprintEstimator(recipe, accept=0.9, keep="embeddings").fit(x, y)
    assert model.familiarity(x).shape == (200,)
    assert model.accepts(x).mean() == pytest.approx(0.9, abs=0.07)
    assert model.accepts(-x).mean() < 0.1
    assert model.get_params()["accept"] == 0.9
    batches = ImprintEstimator(recipe, accept=0.9)
    for part in np.array_split(np.arange(200), 2):
        batches.partial_fit(x[part], y[part], classes=[0, 1])
    assert batches.accepts(x).mean() == pytest.approx(0.9, abs=0.07)
    with pytest.raises(ImprintError, match="accept"):
        ImprintEstimator(recipe).fit(x, y).familiarity(x)
    with pytest.raises(ImprintError, match="accept=2"):
        ImprintEstimator(recipe, accept=2).fit(x, y)


def test_the_false_positive_rate_counts_outsiders_that_pass():
    inside, outside = torch.arange(100.0), torch.tensor([0.0, 4.0, 5.0, 50.0])
    assert false_positive_rate(inside, outside) == 0.5
    assert false_positive_rate(inside, outside, 1.0) == 1.0


@pytest.mark.slow
def test_on_real_embeddings_it_tells_outsiders_better_than_the_best_score(acceptance):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"]
    test_x, test_y = acceptance["test_embeddings"], acceptance["test_labels"]
    rows = (y < 8).nonzero().flatten()[:2000]
    head = set_threshold(
        imprint(x[rows], y[rows], "kernel", calibrate=False), x[rows], y[rows], 0.95
    )
    inner, outer = test_x[test_y < 8], test_x[test_y >= 8]
    before = auroc(head.scores(inner), head.scores(outer))
    after = auroc(head.familiarity(inner)[:, None], head.familiarity(outer)[:, None])
    assert before < 0.86
    assert after > 0.885
    size = sum(getattr(head.familiar, n).numel() for n in head.familiar.constants) * 4
    assert size < 18.6e6 / 4
