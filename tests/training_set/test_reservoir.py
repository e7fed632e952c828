"""Bounded memory: the reservoir of embeddings, `max_per_class`, and the estimate before a run."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintError, imprint
from imprint_pl.numerics import large
from imprint_pl.training_set import memory, reservoir
from imprint_pl.training_set.reservoir import EmbeddingReservoir, Reservoir
from imprint_pl.training_set.store import RowStore


def numbered(y):
    """Embeddings that say which sample they are."""
    return torch.arange(float(len(y)))[:, None].repeat(1, 2)


def kept(y, size, seed, parts, block):
    held = Reservoir(size, seed, per_class=True)
    before, reservoir.BLOCK = reservoir.BLOCK, block
    try:
        for rows in parts:
            held.add(numbered(y)[rows], y[rows], torch.arange(len(y))[rows])
    finally:
        reservoir.BLOCK = before
    return held.gather(2)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_kept_is_the_same_in_any_batches_and_at_most_so_many_of_each_class(data):
    n = data.draw(st.integers(1, 60))
    y = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)))
    size, seed = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3))
    x, labels, positions = kept(y, size, seed, [slice(None)], 1)
    assert torch.equal(labels.bincount(), y.bincount().clamp(max=size))
    assert torch.equal(labels, y[positions])
    assert torch.equal(x, numbered(y)[positions])
    assert positions.tolist() == sorted(positions.tolist())
    batch, block = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 30))
    order = torch.arange(n)
    if data.draw(st.booleans()):  # the samples of one rank after those of the other
        order = torch.cat([order[::2], order[1::2]])
    again = kept(y, size, seed, order.split(batch), block)
    assert torch.equal(again[2], positions)


def test_every_sample_is_drawn_equally_often():
    drawn = torch.zeros(40)
    for seed in range(500):
        drawn[kept(torch.zeros(40, dtype=torch.int64), 10, seed, [slice(None)], 8)[2]] += 1
    # 125 each, standard deviation 9.7.
    assert drawn.sum() == 5000
    assert drawn.min() > 125 - 4.5 * 9.7
    assert drawn.max() < 125 + 4.5 * 9.7


def test_with_room_for_all_it_is_the_store_of_all():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(500, 3, generator=generator), torch.arange(500) % 4
    bounded, whole = EmbeddingReservoir(125, 0), RowStore()
    for rows in torch.arange(500).split(30):
        bounded.add(x[rows], y[rows])
        whole.add(x[rows], y[rows])
    for got, expected in zip(bounded.gather(), whole.gather(), strict=True):
        assert torch.equal(got, expected)


def test_what_a_sampler_repeats_is_not_kept():
    held = EmbeddingReservoir(5, 0, dealt=3)
    y = torch.tensor([0, 0, 0, 0])
    held.add(numbered(y), y)
    assert held.gather()[0][:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("labels", [[0, -1], [0, 3], [-1], [-1, -1]])
def test_a_label_out_of_range_is_named(labels):
    held = EmbeddingReservoir(5, 0, num_classes=3)
    place = labels.index(next(label for label in labels if label))
    message = f"label {labels[place]} of sample {place} in batch 0"
    with pytest.raises(ImprintError, match=message):
        held.add(torch.ones(len(labels), 2), torch.tensor(labels))


def test_a_class_that_only_another_rank_has_seen_is_bounded_too(monkeypatch):
    # The other rank has four samples of class 3.
    others = iter([torch.ones(4, 2), torch.full((4,), 3), torch.arange(1, 5)])
    held = Reservoir(2, 0, per_class=True)
    held.add(torch.ones(1, 2), torch.tensor([0]), torch.tensor([0]))
    monkeypatch.setattr(reservoir, "gather_rows", lambda rows: torch.cat([rows, next(others)]))
    assert held.gather(2).y.tolist() == [0, 3, 3]


def test_an_empty_batch_adds_nothing():
    held = EmbeddingReservoir(5, 0)
    held.add(torch.ones(0, 2), torch.zeros(0, dtype=torch.int64))
    held.add(torch.ones(1, 2), torch.tensor([1]))
    assert held.gather()[1].tolist() == [1]


# In a fit.


class Usage(NamedTuple):
    free: int


def points():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(900) % 3
    return torch.randn(900, 5, generator=generator) + 3 * torch.eye(3, 5)[y], y


def fit(loader, recipe="robust", **options):
    model = ImprintedClassifier(torch.nn.Identity(), recipe, **options)
    trainer = quiet_trainer()
    trainer.fit(model, loader)
    return model


def test_a_fit_imprints_the_kept_samples():
    x, y = points()
    model = fit(DataLoader(TensorDataset(x, y), 64), k=2, max_per_class=40, seed=3)
    rows = kept(y, 40, 3, [slice(None)], 2048)[2]
    expected = imprint(x[rows], y[rows], "robust", k=2, seed=3)
    assert len(rows) == 120
    torch.testing.assert_close(model.head.proxies, expected.proxies)
    assert model.head.temperature == pytest.approx(expected.temperature)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(recipe="ridge", max_per_class=4), "max_per_class=4.*keeps sums.*leave it out"),
        (dict(max_per_class=0), "max_per_class=0: give a number from 1"),
        (dict(max_per_class=4, keep="embeddings"), "drops samples that keep='embeddings'"),
    ],
)
def test_what_it_cannot_bound_is_an_error(options, message):
    with pytest.raises(ImprintError, match=message):
        fit(DataLoader(TensorDataset(*points()), 64), **options)


def test_a_fit_that_there_is_no_memory_for_is_refused_before_the_second_batch(monkeypatch):
    # 900 × 5 floats are 18 kB, 81 kB with what GEN does.
    seen = []
    monkeypatch.setattr(RowStore, "add", lambda self, x, y: seen.append(len(x)))
    monkeypatch.setattr(large, "available_bytes", lambda: 80_000)
    budget = dict(memory_budget=1e-9)
    for options in (dict(recipe="knn"), dict(k=2, keep="embeddings")):
        with pytest.raises(ImprintError, match="900 images.*max_per_class.*room is for 727 in all"):
            fit(DataLoader(TensorDataset(*points()), 64), **options, **budget)
    # In files: up to four times 18 kB.
    monkeypatch.setattr(large.psutil, "disk_usage", lambda folder: Usage(free=71_000))
    with pytest.raises(ImprintError, match="do not fit into memory.*of disk.*TMPDIR"):
        fit(DataLoader(TensorDataset(*points()), 64), **budget)
    assert seen == []


def test_where_nobody_knows_how_many_will_come_it_is_refused_on_the_way(monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from zip(*points(), strict=True)

    monkeypatch.setattr(large, "available_bytes", lambda: 50_000)
    monkeypatch.setattr(large, "SMALL", 0)
    with pytest.raises(ImprintError, match="512 images"):
        fit(DataLoader(Stream(), 64), "knn")
    monkeypatch.setattr(large.psutil, "disk_usage", lambda folder: Usage(free=40_000))
    with pytest.raises(ImprintError, match="do not fit into memory"):
        fit(DataLoader(Stream(), 64), k=2)
    # Sums fit, and so do the embeddings of a bounded number.
    fit(DataLoader(Stream(), 64), "ridge")
    fit(DataLoader(Stream(), 64), max_per_class=100, k=2)


def test_an_estimate_above_a_gibibyte_is_told(monkeypatch):
    monkeypatch.setattr(large, "available_bytes", lambda: 2**40)
    assert memory.check_room(1000, 10) is None
    told = memory.check_room(1_281_167, 1280)
    assert "1,281,167 images take 6.1 GiB, imprinting them some 33.6 GiB, and 1024.0 GiB" in told
    monkeypatch.setattr(large.psutil, "disk_usage", lambda folder: Usage(free=2**40))
    with large.within_budget(4):
        told = memory.check_room(1_281_167, 1280)
    assert "more than memory_budget, 4.0 GiB: they go to files in" in told
    assert "of up to 24.7 GiB, which vanish with the run" in told
    monkeypatch.setattr(large, "is_ram_disk", lambda folder: folder != "/var/tmp")
    with large.within_budget(4):
        told = memory.check_room(1_281_167, 1280)
    assert "they go to files in /var/tmp (/" in told
    assert " is a RAM disk) of up to 24.7 GiB" in told


class OwnBar(TQDMProgressBar):
    def print(self, text):  # fewer arguments than Lightning's
        raise AssertionError(text)


@pytest.mark.parametrize("kind", [RichProgressBar, TQDMProgressBar, OwnBar])
def test_the_estimate_is_told_beside_a_progress_bar(monkeypatch, capsys, kind):
    monkeypatch.setattr(memory, "WORTH_SAYING", 0)
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, torch.arange(60) % 3), 20)
    trainer = quiet_trainer(enable_progress_bar=True, callbacks=[kind()])
    trainer.fit(ImprintedClassifier(torch.nn.Identity(), "robust", k=2), loader)
    assert "the embeddings of 60 images take" in capsys.readouterr().err


def test_the_memory_of_this_machine_is_positive_and_below_that_of_all_machines():
    assert 2**20 < large.available_bytes() < 2**50
