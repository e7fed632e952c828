"""The order of rows by what they hold, and heads that do not depend on the order in which rows
came: `order.py`, `holdout.py`."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintEstimator, imprint
from imprint_pl.method.holdout import held_out_rows
from imprint_pl.numerics.order import in_order, keys

RECIPES = ["auto", "qi", "robust", "knn", "ridge", "lda", "whitened", "kernel", "ls"]


@pytest.fixture(scope="module")
def points():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 4
    x = torch.randn(240, 6, generator=generator) + 2 * torch.eye(4, 6)[y]
    return x, y, torch.randperm(240, generator=generator)


def same(one, other):
    return torch.equal(one.proxies, other.proxies) and one.temperature == other.temperature


def test_a_row_has_its_key_wherever_it_stands():
    x = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0))
    rows = torch.randperm(1000)
    assert len(keys(x).unique()) == 1000
    assert torch.equal(keys(x[rows]), keys(x)[rows])
    assert torch.equal(torch.cat([keys(part) for part in x.split(13)]), keys(x))
    assert torch.equal(keys(-torch.zeros(1, 3)), keys(torch.zeros(1, 3)))


def test_equal_rows_follow_each_other_by_label():
    x, y = torch.ones(4, 2), torch.tensor([3, 1, 2, 0])
    assert in_order(x, y).tolist() == [3, 1, 2, 0]


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e3])
def test_embeddings_in_another_unit_are_in_the_same_order(scale):
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, 2 * x[:50], 4 * x[:50]])
    y = torch.zeros(len(x), dtype=torch.int64)
    order = in_order(x, y)
    assert torch.equal(in_order(scale * x, y), order)
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert torch.equal(x[shuffled][in_order(x[shuffled], y)], x[order])


def test_rows_of_a_single_feature_have_an_order_of_their_own():
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    assert len(keys(x).unique()) == 100
    y = torch.zeros(100, dtype=torch.int64)
    assert torch.equal(x.flip(0)[in_order(x.flip(0), y)], x[in_order(x, y)])


def test_rows_that_differ_by_rounding_keep_their_order_but_for_neighbours():
    x = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(2000)
    places, others = in_order(x, y).argsort(), in_order(x * (1 + 1e-7), y).argsort()
    assert (places - others).abs().max() <= 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_head_depends_on_the_set_of_rows_alone_and_not_on_what_is_kept(points, recipe):
    x, y, rows = points
    head = imprint(x, y, recipe)
    assert head.temperature != 1
    assert same(imprint(x[rows], y[rows], recipe), head)
    model = ImprintEstimator(recipe, keep="embeddings").fit(x.numpy(), y.numpy())
    assert same(model.head_, head)
    model.add_class(9, x[:20].numpy() + 5).remove_class(9)
    assert same(model.head_, head)


@pytest.mark.parametrize("recipe", ["robust", "ridge"])
def test_a_fit_has_the_same_temperature_and_threshold_with_and_without_keep(
    points, recipe, tmp_path
):
    x, y, _ = points

    def fitted(**keywords):
        model = ImprintedClassifier(nn.Identity(), recipe, **keywords)
        trainer = quiet_trainer(default_root_dir=tmp_path)
        trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=32))
        return model

    plain, keeps = fitted(), fitted(keep="embeddings")
    torch.testing.assert_close(keeps.head.proxies, plain.head.proxies, rtol=1e-5, atol=1e-6)
    assert keeps.head.temperature == pytest.approx(plain.head.temperature, rel=1e-5)
    assert same(keeps.state.head(), keeps.head)
    plain, keeps = fitted(accept=0.9), fitted(accept=0.9, keep="embeddings")
    assert keeps.head.threshold == plain.head.threshold
    assert keeps.state.head().threshold == plain.head.threshold


def test_of_many_samples_a_bounded_sample_gives_the_folds_of_all():
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    y = torch.arange(5000) % 3
    rows = in_order(x, y)
    x, y = x[rows], y[rows]
    whole = held_out_rows(x, y, 5000, seed=1)
    kept = torch.cat(whole).sort().values
    assert len(kept) == 2000
    assert [len(fold) for fold in whole] == [500] * 4
    of_sample = held_out_rows(x[kept], y[kept], 5000, seed=1)
    for fold, own in zip(whole, of_sample, strict=True):
        assert torch.equal(x[fold], x[kept][own])


@pytest.mark.parametrize("recipe", ["qi", "ridge", "kernel"])
def test_batches_give_the_temperature_of_fit_in_any_order(points, recipe):
    x, y, rows = (t.numpy() for t in points)
    whole = ImprintEstimator(recipe).fit(x, y).head_
    model = ImprintEstimator(recipe)
    # What learns is fitted on the first batch.
    for part in [rows] if recipe == "kernel" else np.array_split(rows, 5):
        model.partial_fit(x[part], y[part])
    assert model.head_.temperature == pytest.approx(whole.temperature, rel=1e-3)
