"""Classes and examples that come and go: `kept.py`, `growing.py`, the estimator, the commands."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from imprint_pl import ImprintedClassifier, ImprintError, ImprintEstimator, imprint
from imprint_pl.files import read_tensors, save_tensors
from imprint_pl.numerics.order import in_order
from imprint_pl.training_set.kept import KeptRows, KeptSums, State
from imprint_pl.training_set.kept_file import FORMAT, read_state, write_state

RECIPES = {
    "qi": {},
    "hosoda": {},
    "janson": {},
    "ls": {},
    "ridge": {"lam": "gcv"},
    "lda": {},
    "ranpac": {"projection_dim": 6},
    "robust": {"k": 3},
    "knn": {"m": 3},
    "whitened": {"shrinkage": 0.1},
    "kernel": {"projection_dim": 8},
}
SUMS = ("qi", "hosoda", "janson", "ls", "ridge", "lda", "ranpac")
POOL = {
    name: (torch.randn(24, 6, generator=torch.Generator().manual_seed(i)) + 4 * torch.eye(6)[i])
    .half()
    .float()
    for i, name in enumerate("abcdef")
}


def start(recipe, keep, names="abc"):
    x = torch.cat([POOL[name][:8] for name in names])
    y = torch.arange(len(names)).repeat_interleave(8)
    head = imprint(x, y, recipe, class_names=list(names), calibrate=False, **RECIPES[recipe])
    return State.of(x, y, head, keep), dict.fromkeys(names, 8)


def walk(state, held, generator, removal):
    """A random sequence of steps; returns the state and how many rows of the pool each has."""
    for _ in range(6):
        step = generator.integers(3 if removal else 2)
        if step == 0 and len(held) < 6:
            name = str(generator.choice([n for n in POOL if n not in held]))
            held[name] = 8
            state = state.add_class(name, POOL[name][:8])
        elif step == 1:
            name = str(generator.choice(list(held)))
            more = min(4, 24 - held[name])
            if more:
                state = state.add_examples(name, POOL[name][held[name] : held[name] + more])
                held[name] += more
        elif step == 2 and len(held) > 2:
            name = str(generator.choice(list(held)))
            own = POOL[name][: held.pop(name)]
            state = state.remove_class(name, own if state.keep == "moments" else None)
    return state


def at_once(state, held, recipe):
    names = state.class_names
    x = torch.cat([POOL[name][: held[name]] for name in names])
    y = torch.cat([torch.full((held[name],), i) for i, name in enumerate(names)])
    return imprint(x, y, recipe, calibrate=False, **RECIPES[recipe])


PROBE = torch.randn(30, 6, generator=torch.Generator().manual_seed(9)) * 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_fifty_random_sequences_equal_imprinting_the_final_set_from_embeddings(recipe):
    first, sizes = start(recipe, "embeddings")
    for seed in range(50):
        held = dict(sizes)
        state = walk(first, held, np.random.default_rng(seed), removal=True)
        assert state.counts.tolist() == [held[name] for name in state.class_names]
        expected = at_once(state, held, recipe).scores(PROBE)
        assert torch.allclose(state.head().scores(PROBE), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", SUMS)
def test_fifty_random_sequences_equal_imprinting_the_final_set_from_sums(recipe):
    first, sizes = start(recipe, "moments")
    for seed in range(50):
        held = dict(sizes)
        state = walk(first, held, np.random.default_rng(seed), removal=True)
        expected = at_once(state, held, recipe).scores(PROBE)
        assert torch.allclose(state.head().scores(PROBE), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_order_in_which_classes_come_does_not_matter(recipe):
    first, _ = start(recipe, "embeddings", "ab")
    one = first.add_class("c", POOL["c"]).add_class("d", POOL["d"]).head()
    other = first.add_class("d", POOL["d"]).add_class("c", POOL["c"]).head()
    assert other.class_names == ["a", "b", "d", "c"]
    assert torch.allclose(one.scores(PROBE), other.scores(PROBE)[:, [0, 1, 3, 2]], atol=1e-5)


def test_a_class_that_came_and_went_leaves_the_very_same_head():
    first, _ = start("kernel", "embeddings")
    back = first.add_class("d", POOL["d"]).remove_class("d")
    assert torch.equal(first.head().proxies, back.head().proxies)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [("robust", "gen='kmeans' has to see"), ("kernel", "norm_pre='nystrom' learns")],
)
def test_sums_that_do_not_suffice_are_an_error_that_says_what_would(recipe, reason):
    with pytest.raises(ImprintError, match=reason) as raised:
        start(recipe, "moments")
    assert 'keep="embeddings"' in str(raised.value)


def test_removal_from_a_gram_matrix_asks_for_the_images_and_refuses_others():
    state, _ = start("ridge", "moments")
    with pytest.raises(ImprintError, match='all 8.*keep="embeddings"'):
        state.remove_class("a")
    with pytest.raises(ImprintError, match="are not the 8"):
        state.remove_class("a", POOL["b"][:8])


def earlier(state, path):
    """The state as an earlier version would have written it: float16, the fields of both kinds, and
    none of those that came later."""
    write_state(state, path)
    tensors, metadata = read_tensors(path)
    plain = json.loads(metadata["state"])
    if "x" in tensors:
        tensors["x"] = tensors["x"].half()
    plain = {"sources": [], "temperature": 1.0, "threshold": None} | plain
    plain = {"accept": None, "weibull": None} | plain
    for later in ("capped", "calibrated"):
        plain.pop(later, None)
    save_tensors(path, tensors, {"format": FORMAT, "state": json.dumps(plain)})
    return read_state(path)


def test_a_state_of_an_earlier_version_goes_on_with_its_own_number_of_random_features(tmp_path):
    x, y = torch.cat([POOL["a"][:4], POOL["b"][:4]]), torch.arange(2).repeat_interleave(4)
    head = imprint(x, y, "ranpac", projection_dim=20)
    state = State.of(x, y, head, "embeddings")
    assert state.add_class("c", POOL["c"]).head().feature_dim == 20
    old = earlier(state, tmp_path / "old.state.safetensors")
    assert old.x.dtype == torch.float16
    assert [old.head().feature_dim, old.add_class("c", POOL["c"]).head().feature_dim] == [4, 16]
    again = read_state(write_state(old.add_class("c", POOL["c"]), tmp_path / "it.safetensors"))
    assert (again.head().feature_dim, again.x.dtype) == (16, torch.float32)
    sums = State.of(x, y, imprint(x, y, "ranpac", projection_dim=4), "moments")
    sums = replace(sums, settings=old.settings)
    sums = earlier(sums, tmp_path / "sums.state.safetensors")
    with pytest.raises(ImprintError, match="8 samples had 4 random features, 12 would have 6"):
        sums.add_examples("0", POOL["a"][4:8])
    assert sums.counts.tolist() == [4, 4]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda s: s.add_class("a", POOL["a"]), "is there already"),
        (lambda s: s.add_examples("x", POOL["a"]), "there is no class 'x'"),
        (lambda s: s.add_class("d", POOL["d"][:, :5]), r"shape \(24, 5\)"),
        (lambda s: s.add_class("d", POOL["d"][:0]), "no sample was given"),
        (lambda s: s.add_class("d", POOL["d"] / 0), "not finite"),
        (lambda s: s.remove_class("a").remove_class("b").remove_class("c"), "last one"),
    ],
)
def test_a_step_that_makes_no_sense_names_it(step, message):
    with pytest.raises(ImprintError, match=message):
        step(start("qi", "embeddings")[0])


@pytest.mark.parametrize(
    ("keep", "kind", "foreign"),
    [("embeddings", KeptRows, "moments"), ("moments", KeptSums, "x")],
)
def test_a_state_is_of_the_kind_that_was_asked_for_and_stays_of_it(tmp_path, keep, kind, foreign):
    state, _ = start("qi", keep)
    read = read_state(write_state(state, tmp_path / "it.state.safetensors"))
    steps = (state, read, state.add_class("d", POOL["d"]), state.remove_class("a"))
    for one in steps:
        assert type(one) is kind
        assert one.keep == keep
        assert not hasattr(one, foreign)


@pytest.mark.parametrize("keep", ["moments", "embeddings"])
def test_a_file_with_a_field_that_nobody_knows_is_refused(tmp_path, keep):
    path = tmp_path / "it.state.safetensors"
    write_state(start("qi", keep)[0], path)
    tensors, metadata = read_tensors(path)
    plain = json.loads(metadata["state"]) | {"later": 1}
    save_tensors(path, tensors, {"format": FORMAT, "state": json.dumps(plain)})
    with pytest.raises(ImprintError, match="not a state file"):
        read_state(path)


@pytest.mark.parametrize("keep", ["moments", "embeddings"])
def test_a_state_is_read_in_a_fresh_process(tmp_path, keep):
    state, _ = start("ridge", keep)
    write_state(state, tmp_path / "it.state.safetensors")
    torch.save(PROBE, tmp_path / "probe.pt")
    code = (
        "import torch; from imprint_pl.training_set.kept_file import read_state\n"
        "state = read_state('it.state.safetensors')\n"
        "torch.save(state.head().scores(torch.load('probe.pt')).detach(), 'scores.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "scores.pt"), state.head().scores(PROBE))
    (tmp_path / "it.state.safetensors").write_bytes(b"nothing")
    with pytest.raises(ImprintError, match="damaged, or not a state file"):
        read_state(tmp_path / "it.state.safetensors")


@pytest.mark.parametrize("scale", [1.0, 1e5, 1e-6, 1e-9])
def test_embeddings_are_kept_as_they_are(blobs, scale):
    x, y = blobs[0] * scale, blobs[1]
    state = State.of(x, y, imprint(x, y, "robust", k=2), "embeddings")
    assert state.x.dtype == torch.float32
    rows = in_order(x, y)
    assert torch.equal(state.x, x[rows])
    assert torch.equal(state.y, y[rows])
    assert (state.head()(x).argmax(1) == y).all()


def test_the_estimator_grows_and_forgets_with_labels_of_its_own():
    x = torch.cat([POOL["a"], POOL["c"]]).numpy()
    model = ImprintEstimator("ridge", keep="embeddings").fit(x, np.repeat([10, 30], 24))
    model.add_class(20, POOL["b"].numpy())
    assert model.classes_.tolist() == [10, 20, 30]
    assert model.predict(POOL["b"].numpy()).tolist() == [20] * 24
    model.add_examples(20, POOL["b"].numpy() + 0.1).remove_class(10)
    assert model.classes_.tolist() == [20, 30]
    assert set(model.predict(POOL["c"].numpy())) == {30}
    with pytest.raises(ImprintError, match="nothing was kept"):
        ImprintEstimator("ridge").fit(x, np.repeat([1, 2], 24)).add_class(3, x)


@pytest.mark.parametrize(
    ("known", "label"),
    [([2, 10], "fox"), ([1, 2], "fox"), ([2, 10], 1.5), ([False, True], 2)],
)
def test_the_estimator_refuses_a_new_label_that_would_turn_the_others_into_another_type(
    known, label
):
    X, y = np.eye(4)[[0, 0, 1, 1]], np.repeat(known, 2)
    model = ImprintEstimator("qi", keep="embeddings").fit(X, y)
    with pytest.raises(ImprintError, match=f"label {label!r} is of another type than those"):
        model.add_class(label, np.eye(4)[[2, 2]])
    assert model.predict(X).tolist() == y.tolist()


def test_a_classifier_grows_on_embeddings_and_a_failed_step_leaves_it_as_it_was(tmp_path):
    state, _ = start("kernel", "embeddings")
    model = ImprintedClassifier(torch.nn.Identity(), recipe="kernel", projection_dim=8)
    model.head.load_state_dict(state.head().state_dict())
    with pytest.raises(ImprintError, match='fit with keep="embeddings"'):
        model.add_class("d", POOL["d"])
    model.state = state
    model.save_state(tmp_path / "it.ckpt")
    model.add_class("d", POOL["d"])
    assert model.class_names == ["a", "b", "c", "d"]
    assert (model(POOL["d"]).argmax(1) == 3).double().mean() > 0.9
    with pytest.raises(ImprintError):
        model.add_class("e", POOL["e"][:0])
    assert model.class_names == ["a", "b", "c", "d"]
    model.load_state(tmp_path / "it.ckpt")
    assert model.state.class_names == ["a", "b", "c"]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_kept(blobs, tmp_path, dtype):
    x, y = blobs[0], blobs[1].to(dtype)
    state = State.of(x, y, imprint(x, y, "qi"), "embeddings")
    state = read_state(write_state(state, tmp_path / "state.safetensors"))
    assert state.add_class("new", x[:2]).counts.tolist() == [*torch.bincount(y).tolist(), 2]


def test_sums_keep_the_lambda_that_rows_chose():
    x = torch.cat([POOL[name][:8] for name in "abc"])
    y = torch.arange(3).repeat_interleave(8)
    head = imprint(x, y, "ridge", class_names=list("abc"), calibrate=False)
    state = State.of(x, y, head, "moments")
    assert head.settings["lam"] == "loo"
    assert torch.allclose(state.head().proxies, head.proxies, atol=1e-5)
    grown = state.add_class("d", POOL["d"][:8]).head()
    assert grown.settings["lam"] == head.settings["chosen_lam"]
