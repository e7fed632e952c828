"""Several layers side by side: sums, epochs and states give the head that all rows give."""

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import LightningDataModule
from sklearn.base import clone
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintError, ImprintEstimator, imprint
from imprint_pl.collapse import nc1
from imprint_pl.files import read_tensors, save_tensors
from imprint_pl.method.recipes import resolve
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.kept_file import FORMAT, read_state, write_state
from imprint_pl.training_set.sums import needs_only_sums

WIDTHS = [4, 3, 5]
STREAMED = ["ridge", "lda", "ls", "hosoda", "janson"]
GENERATOR = torch.Generator().manual_seed(0)
Y = torch.randint(0, 99, (301,), generator=GENERATOR) % 4
X = torch.randn(301, 12, generator=GENERATOR) + torch.randn(4, 12, generator=GENERATOR)[Y]
X = X * torch.tensor([50.0] * 4 + [1.0] * 3 + [0.02] * 5) + 3
X[:, 2] = 7.0


class Points(LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(X, Y), batch_size=37)


def expect_same(head, expected):
    assert head.layer_widths == WIDTHS
    assert head.settings == expected.settings
    torch.testing.assert_close(head.scores(X), expected.scores(X), atol=1e-4, rtol=1e-4)
    assert head.temperature == pytest.approx(expected.temperature, rel=1e-3)


def test_join_alone_streams_and_what_comes_behind_it_needs_rows():
    for recipe in STREAMED:
        assert needs_only_sums(resolve(recipe, layer_widths=WIDTHS), 301)
    assert not needs_only_sums(resolve("ridge", layer_widths=WIDTHS), 11)
    for recipe in ("qi", "kernel", "ranpac", "whitened", "knn", "auto"):
        assert not needs_only_sums(resolve(recipe, layer_widths=WIDTHS), 301)


@pytest.mark.parametrize("recipe", [*STREAMED, "qi"])
def test_an_epoch_gives_the_head_of_the_rows_and_nc1_of_the_last_layer(tmp_path, recipe):
    model = ImprintedClassifier(nn.Identity(), recipe, layer_widths=WIDTHS)
    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.fit(model, Points())
    expect_same(model.head, imprint(X, Y, recipe, layer_widths=WIDTHS))
    expected = nc1(normalize(X[:, 7:]), Y)
    assert float(trainer.callback_metrics["train/nc1"]) == pytest.approx(expected, rel=1e-5)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = ImprintedClassifier.load_from_checkpoint(tmp_path / "a.ckpt", backbone=nn.Identity())
    assert loaded.head.layer_widths == WIDTHS
    assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("recipe", STREAMED)
def test_batches_of_partial_fit_give_what_fit_gives(recipe):
    model = ImprintEstimator(recipe, layer_widths=WIDTHS)
    for x, y in zip(X.split(50), Y.split(50), strict=True):
        model.partial_fit(x.numpy(), y.numpy())
        # A head in between changes nothing.
        assert model.head_.layer_widths == WIDTHS
    whole = clone(model)
    assert whole.get_params()["layer_widths"] == WIDTHS
    expect_same(model.head_, whole.fit(X.numpy(), Y.numpy()).head_)


@pytest.mark.parametrize("keep", ["moments", "embeddings"])
@pytest.mark.parametrize("recipe", STREAMED)
def test_classes_come_and_go_as_if_all_samples_were_imprinted_at_once(tmp_path, recipe, keep):
    first = Y < 2
    head = imprint(X[first], Y[first], recipe, layer_widths=WIDTHS, class_names=["0", "1"])
    state = State.of(X[first], Y[first], head, keep)
    with pytest.warns(UserWarning, match="not calibrated") if keep == "moments" else nullcontext():
        state = state.add_class("2", X[Y == 2]).add_class("3", X[Y == 3])
        state = state.remove_class("1", X[Y == 1])
    found = read_state(write_state(state, tmp_path / "a.state.safetensors")).head()
    rest = Y != 1
    expected = imprint(X[rest], (Y[rest] - 1).clamp_min(0), recipe, layer_widths=WIDTHS)
    torch.testing.assert_close(found.scores(X), expected.scores(X), atol=1e-4, rtol=1e-4)


def test_sums_that_do_not_suffice_say_so():
    with pytest.raises(ImprintError, match=r"norm_pre='join\+l2' learns .* hosoda, janson, ls"):
        State.of(X, Y, imprint(X, Y, "qi", layer_widths=WIDTHS), "moments")
    state = State.of(X, Y, imprint(X, Y, "janson", layer_widths=WIDTHS), "moments")
    with pytest.raises(ImprintError, match="'1' from sums: norm_pre='join' needs the squares"):
        state.remove_class("1")


def test_a_state_without_the_squares_that_join_needs_is_damaged(tmp_path):
    state = State.of(X, Y, imprint(X, Y, "janson", layer_widths=WIDTHS), "moments")
    path = write_state(state, tmp_path / "a.state.safetensors")
    tensors, metadata = read_tensors(path)
    assert tensors.pop("gram").shape == (12,)
    save_tensors(path, tensors, {"format": FORMAT, "state": metadata["state"]})
    with pytest.raises(ImprintError, match="damaged"):
        read_state(path)


@pytest.mark.parametrize("recipe", ["ridge", "kernel"])
def test_widths_of_other_embeddings_are_refused_at_the_first_batch(recipe):
    with pytest.raises(ImprintError, match="add up to 11, and the embeddings have 12 numbers"):
        ImprintEstimator(recipe, layer_widths=[6, 5]).partial_fit(X.numpy(), Y.numpy())
