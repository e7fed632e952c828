import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from imprint_pl import ImprintError, imprint
from imprint_pl.export import head_config
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.recipes import resolve
from imprint_pl.parts.agg.max import Max
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.norm.l2 import L2
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.kept_file import read_state, write_state


def test_max_gives_each_class_its_best_proxy_plus_bias():
    proxies = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    bias, classes = torch.tensor([0.0, 0.5, -2.0]), torch.tensor([1, 1, 0])
    scores = Max()(torch.tensor([[2.0, 3.0], [4.0, 0.0]]), proxies, bias, classes, 2)
    assert scores.tolist() == [[3.0, 3.5], [2.0, 4.0]]


def test_an_empty_head_says_so():
    with pytest.raises(ImprintError, match="no proxies yet"):
        ImprintedHead(L2(), Max())(torch.zeros(1, 3))


def test_embeddings_of_another_size_are_refused(blobs):
    with pytest.raises(ImprintError, match="embeddings of 7 numbers for a head made for 5"):
        imprint(*blobs)(torch.zeros(2, 7))


def test_a_saved_head_resizes_an_empty_one_and_scores_the_same(blobs, tmp_path):
    x, y = blobs
    head = imprint(x, y, "robust", k=4, class_names=["a", "b", "c"])
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = resolve("robust").empty_head()
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(other(x), head(x))
    assert other.class_names == ["a", "b", "c"]
    assert isinstance(other.proxies, nn.Parameter)


def test_a_saved_head_scores_the_same_in_a_fresh_process(blobs, tmp_path):
    x, y = blobs
    head = imprint(x, y, "robust", k=4)
    torch.save(
        {"head": head.state_dict(), "x": x, "scores": head(x).detach()}, tmp_path / "file.pt"
    )
    code = (
        "import sys, torch; from imprint_pl.method.recipes import resolve;"
        "file = torch.load(sys.argv[1], weights_only=True); head = resolve('robust').empty_head();"
        "head.load_state_dict(file['head']); assert torch.equal(head(file['x']), file['scores'])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "file.pt"], check=True)


def test_a_head_filled_under_inference_mode_can_still_be_trained():
    with torch.inference_mode():
        head = imprint(torch.eye(3), torch.arange(3), "qi")
    head(torch.randn(4, 3)).sum().backward()
    assert head.proxies.grad is not None


@pytest.mark.parametrize("recipe", ["qi", "lda", "kernel", "knn"])
@pytest.mark.parametrize("made_in_inference_mode", [False, True])
def test_a_head_takes_over_another_and_stays_the_same_object(blobs, recipe, made_in_inference_mode):
    x, y = blobs
    with torch.inference_mode(made_in_inference_mode):
        other = imprint(x, y, recipe)
        head = ImprintedHead()
        head.take(other)
    expected = other(x)
    assert torch.equal(head(x), expected)
    assert (head.settings, head.tried) == (other.settings, other.tried)
    assert head.takes_parts_of_file
    # Copies: what becomes of the one does not reach the other.
    other.clear()
    other.settings["seed"] = 7
    head.to(torch.float64).to(torch.float32)
    assert torch.equal(head(x), expected)
    assert head.settings["seed"] == 0
    tensors = [*head.parameters(), *head.norm_inf.state_dict().values()]
    assert not any(tensor.is_inference() for tensor in tensors)
    head(x).sum().backward()
    assert head.log_scale.grad is not None


def test_a_smaller_head_replaces_a_larger_one(blobs):
    x, y = blobs
    small, large = imprint(x, y, "qi"), imprint(x, y, "robust", k=9)
    large.load_state_dict(small.state_dict())
    torch.testing.assert_close(large(x), small(x))


def test_a_head_is_moved_and_cast_with_its_module(blobs):
    head = imprint(*blobs).double()
    assert head(blobs[0].double()).dtype == torch.float64


def test_filling_copies(blobs):
    weights = torch.eye(3)
    head = ImprintedHead(L2(), Max()).fill(Proxies(weights, torch.zeros(3), torch.arange(3)), 3)
    weights.zero_()
    assert head.proxies.sum() == 3


def test_a_head_exports_with_torch_export(blobs):
    x, y = blobs
    head = imprint(x, y, "robust", k=3).eval()
    batch = torch.export.Dim("batch")
    program = torch.export.export(head, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:7]), head(x[:7]))


def test_an_exported_mahalanobis_head_votes_by_its_own_proxies_not_by_held_out_ones(blobs):
    x, _ = blobs
    head = imprint(*blobs, "janson", distance="mahalanobis").eval()
    with pytest.raises(ImprintError, match="call the head once"):
        torch.export.export(head, (x,))
    expected = head(x)
    torch.testing.assert_close(torch.export.export(head, (x,)).module()(x), expected)


def test_a_head_made_without_parts_takes_those_of_the_file(blobs, tmp_path):
    x, y = blobs
    head = imprint(x, y, "robust", norm_pre="power+whiten+l2", k=3, agg="mnn", m=2)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    other = ImprintedHead()
    other.load_state_dict(torch.load(tmp_path / "head.pt", weights_only=True))
    assert torch.equal(other(x), head(x))
    assert other.norm_inf.name == "power+whiten+l2"
    assert other.agg.m == 2


def test_a_file_with_a_part_of_the_users_own_asks_for_it(blobs):
    class Half(L2):
        name = "half"

    head = imprint(*blobs, "qi", norm_pre="l2", gen="mean", norm_inf=Half())
    with pytest.raises(ImprintError, match=r"norm_inf='test_head\..*Half' is not a part of this"):
        ImprintedHead().load_state_dict(head.state_dict())
    own = ImprintedHead(Half(), Max())
    own.load_state_dict(head.state_dict())
    assert torch.equal(own(blobs[0]), head(blobs[0]))


def test_the_logits_are_the_scores_over_the_temperature(blobs):
    head = imprint(*blobs, "qi")
    head.temperature = 0.25
    torch.testing.assert_close(head(blobs[0]), 4 * head.scores(blobs[0]))
    assert head.log_scale.requires_grad


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_an_embedding_that_is_not_finite_gets_no_label(blobs, threshold):
    x, y = blobs
    head = imprint(x, y, "robust", k=2)
    head.threshold = threshold
    rows = x[:3].clone()
    rows[1, 2] = torch.nan
    assert head.decide(head.scores(rows)).tolist() == [y[0], -1, y[2]]


def test_a_head_and_a_state_made_with_numbers_of_numpy_can_be_read_again(blobs, tmp_path):
    x, y = blobs
    numbers = dict(k=np.int64(2), m=np.int64(3), as_published=np.bool_(False))
    head = imprint(x, y, "robust", agg="mnn", num_classes=y.numpy().max() + 1, **numbers)
    for threshold in (np.float32(0.5), torch.tensor(0.5)):
        head.threshold = threshold
        head.save_pretrained(tmp_path)
        read = ImprintedHead.from_pretrained(tmp_path)
        assert torch.equal(read(x), head(x))
        assert (read.num_classes, read.threshold, read.settings["k"]) == (3, 0.5, 2)
        assert read.agg.as_published is False
        state = State.of(x, y, head, "embeddings")
        state = read_state(write_state(state, tmp_path / "state.safetensors"))
        assert state.head().settings["m"] == 3
        sums = imprint(x, y, "qi", num_classes=np.int64(3))
        sums.threshold = threshold
        state = State.of(x, y, sums, "moments")
        state = read_state(write_state(state, tmp_path / "state.safetensors"))
        assert state.head().threshold == 0.5
        assert head_config(head)["threshold"] == 0.5


def test_a_head_takes_numpy_arrays_like_tensors():
    x = torch.eye(4).repeat(3, 1)
    head = imprint(x, torch.arange(4).repeat(3), "qi")
    assert torch.equal(head(x.numpy()), head(x))
    assert torch.equal(head(x.double().numpy()), head(x))
    with pytest.raises(ImprintError, match="expected"):
        head(np.zeros(4, np.float32))


def test_print_names_recipe_classes_and_proxies():
    head = imprint(torch.eye(3), torch.arange(3), "qi", class_names=["a", "b", "c"])
    text = repr(head)
    assert "recipe=qi, 3 classes (a, b, c), 3 proxies of 3 numbers" in text
    many = imprint(torch.eye(9), torch.arange(9), "qi", class_names=[*"abcdefghi"])
    assert "9 classes (a, b, c, d, e, f, … i)" in repr(many)
    many.clear()
    assert "empty" in repr(many)


def test_what_auto_tried_is_a_table_best_first():
    pytest.importorskip("pandas")
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    head = imprint(x + 3 * torch.eye(5)[torch.arange(60) % 3], torch.arange(60) % 3)
    table = head.tried_table()
    assert list(table.index.sort_values()) == list(range(len(head.tried)))
    assert (table["accuracy"].dropna().diff().dropna() <= 0).all()
    assert int(table["chosen"].sum()) == 1
    assert not len(imprint(torch.eye(3), torch.arange(3), "qi").tried_table())


def test_the_table_of_what_auto_tried_is_sorted_by_the_metric_it_compared_by():
    pytest.importorskip("pandas")
    head = imprint(torch.eye(3), torch.arange(3), "qi")
    head.tried = [
        dict(recipe="kernel", accuracy=0.9, balanced_accuracy=0.5, chosen=False),
        dict(recipe="ridge", accuracy=0.8, balanced_accuracy=0.7, chosen=True),
    ]
    assert head.tried_table()["recipe"].tolist() == ["ridge", "kernel"]
