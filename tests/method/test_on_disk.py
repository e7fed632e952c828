"""What does not fit into the budget of memory is imprinted from files, to the same head."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintError, ImprintEstimator, imprint
from imprint_pl.data.arrays import ArrayDataset
from imprint_pl.data.embeddings import EmbeddingDataModule
from imprint_pl.data.splits import Splits
from imprint_pl.embedding.row_cache import RowCache
from imprint_pl.numerics import large, passes
from imprint_pl.numerics.copies import CopyFinder, projected_bytes
from imprint_pl.training_set.store import RowStore

# Bytes of rows that fit: 26,843 / 5.5; the rows of two classes.
BUDGET = 2.5e-5
ON_DISK = dict(memory_budget=BUDGET)


def points(n=4000, d=6):
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 20, (n,), generator=generator)
    return (torch.randn(n, d, generator=generator) + 2 * torch.randn(20, d)[y]).relu(), y


@pytest.fixture
def files(monkeypatch):
    """The sizes of the files that were made."""
    made, new = [], large._new_file

    def counted(size, expected=0):
        made.append(size)
        return new(size, expected)

    monkeypatch.setattr(large, "_new_file", counted)
    return made


def the_same(head, expected, x):
    assert head.settings == expected.settings
    torch.testing.assert_close(head.scores(x), expected.scores(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(head(x), expected(x), rtol=1e-4, atol=1e-4)


RECIPES = {
    "auto": dict(recipe="auto"),
    "kernel": dict(recipe="kernel", projection_dim=60),
    "kernel, not chained": dict(recipe="kernel", norm_pre="nystrom", projection_dim=60),
    "kernel of layers": dict(
        recipe="kernel", norm_pre="join+power+l2+nystrom", projection_dim=60, layer_widths=[2, 4]
    ),
    "kernel behind whiten": dict(recipe="kernel", norm_pre="whiten+nystrom", projection_dim=60),
    "whitened": dict(recipe="whitened"),
    "lda": dict(recipe="lda"),
    "ridge": dict(recipe="ridge"),
    "ridge, holdout": dict(recipe="ridge", lam="holdout"),
    "ridge, balanced": dict(recipe="ridge", class_weight="balanced"),
    "ls": dict(recipe="ls"),
    "robust": dict(recipe="robust", k=3),
    "k-means behind whiten": dict(recipe="robust", norm_pre="whiten+l2", k=3),
    "k-means behind nystrom": dict(recipe="robust", norm_pre="nystrom", projection_dim=60, k=2),
    "kls": dict(recipe="ls", gen="kls", k=2),
    "kridge": dict(recipe="ridge", gen="kridge", k=2),
    "cov_max": dict(recipe="robust", gen="cov_max", k=2),
    "fps": dict(recipe="robust", gen="fps", k=2),
    "knn": dict(recipe="knn"),
    "weibull": dict(recipe="qi", weibull=(0.1, 0.9)),
    "shots": dict(recipe="qi", shots=150),
}


def slowly(name):
    """`auto` tries kernels of a thousand landmarks."""
    return pytest.param(name, marks=pytest.mark.slow if name == "auto" else [])


@pytest.mark.parametrize("name", map(slowly, RECIPES))
def test_every_recipe_gives_the_head_that_it_gives_in_memory(files, name):
    x, y = points()
    if name == "kernel, not chained":
        y = y % 2  # classes of 2,000: the rows of one do not fit
    expected = imprint(x, y, **RECIPES[name])
    assert files == []
    head = imprint(x, y, **RECIPES[name], **ON_DISK)
    assert max(files) >= 0.7 * x.nbytes
    the_same(head, expected, x[:500])


def test_projections_for_near_copies_lie_in_a_file_where_the_rows_do(files):
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    y = torch.arange(300) % 3
    expected = CopyFinder(x, y).find()
    assert files == []
    with large.within_budget(large.COPIES * x.nbytes / 2 / 2**30):
        found = CopyFinder(x, y).find()
    assert files == [projected_bytes(300, 200)]
    assert torch.equal(found.first, expected.first)


def test_with_weights_those_of_zero_are_left_out(files):
    x, y = points()
    weights = torch.arange(4000.0) % 3
    expected = imprint(x, y, "ridge", sample_weight=weights)
    the_same(imprint(x, y, "ridge", sample_weight=weights, **ON_DISK), expected, x[:500])
    assert files


@pytest.mark.parametrize("recipe", ["kernel", "robust", "lda"])
def test_threshold_and_prediction_sets_are_the_same(files, recipe):
    x, y = (part.numpy() for part in points())
    few = {"robust": {"k": 2}, "kernel": {"projection_dim": 60}}
    options = dict(accept=0.9, coverage=0.9) | few.get(recipe, {})
    one = ImprintEstimator(recipe, **options).fit(x, y)
    other = ImprintEstimator(recipe, **options, **ON_DISK).fit(x, y)
    assert files
    assert other.head_.threshold == pytest.approx(one.head_.threshold, abs=1e-4)
    np.testing.assert_allclose(other.familiarity(x[:300]), one.familiarity(x[:300]), atol=1e-4)
    assert (other.predict_set(x[:300]) == one.predict_set(x[:300])).mean() > 0.999


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_a_mapped_array_gives_the_head_of_its_rows(tmp_path, files, dtype, mode):
    x, y = points()
    np.save(tmp_path / "x.npy", x.numpy().astype(dtype))
    mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
    before = (tmp_path / "x.npy").read_bytes()
    expected = imprint(x.numpy().astype(dtype), y, "ridge")
    the_same(imprint(mapped, y, "ridge", **ON_DISK), expected, x[:500])
    estimator = ImprintEstimator("ridge", **ON_DISK).fit(mapped, y.numpy())
    torch.testing.assert_close(estimator.head_.scores(x), expected.scores(x), rtol=1e-4, atol=1e-4)
    assert (tmp_path / "x.npy").read_bytes() == before
    assert files


def test_a_mapped_array_with_a_value_that_is_not_finite_is_refused(tmp_path):
    x, y = points()
    x[1234, 2] = torch.nan
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(ImprintError, match="not finite.*sample 1234"):
        ImprintEstimator("ridge", **ON_DISK).fit(np.load(tmp_path / "x.npy", mmap_mode="r"), y)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_estimator_predicts_mapped_rows_block_by_block(tmp_path, monkeypatch, dtype):
    x, y = points(n=9000)
    np.save(tmp_path / "x.npy", x.numpy().astype(dtype))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    estimator = ImprintEstimator("qi", accept=0.9, coverage=0.9).fit(x[:2000].numpy(), y[:2000])
    outputs = ["predict", "predict_proba", "decision_function", "familiarity", "accepts"]
    outputs += ["predict_set"]
    expected = [getattr(estimator, name)(np.array(mapped)) for name in outputs]
    head, seen = estimator.head_, []
    scores = head.scores
    monkeypatch.setattr(head, "scores", lambda x: seen.append(len(x)) or scores(x))
    for name, values in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(getattr(estimator, name)(mapped), values)
    assert sum(seen) == 6 * 9000 + 1
    assert max(seen) == passes.CHUNK


@pytest.mark.parametrize("progress", [False, True])
def test_an_estimator_shows_bars_where_they_are_asked_for(monkeypatch, capsys, progress):
    monkeypatch.setattr(
        passes, "tqdm", lambda *items, **how: tqdm(*items, **how | {"delay": 0, "mininterval": 0})
    )
    x, y = points(n=9000)
    ImprintEstimator("qi", accept=0.9, progress=progress).fit(x.numpy(), y)
    assert ("putting rows in order: " in capsys.readouterr().err) == progress


def test_an_estimator_names_the_mapped_row_that_is_not_finite(tmp_path):
    x, y = points(n=9000)
    estimator = ImprintEstimator("qi").fit(x.numpy(), y)
    x[8765, 2] = torch.nan
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(ImprintError, match="not finite.*sample 8765"):
        estimator.predict(np.load(tmp_path / "x.npy", mmap_mode="r"))


def test_auto_leaves_knn_out_above_a_budget_that_was_asked_for(files):
    x, y = points(n=200)
    on_disk = dict(memory_budget=1e-6)
    assert "knn" in {row["recipe"] for row in imprint(x, y).tried}
    assert "knn" not in {row["recipe"] for row in imprint(x, y, **on_disk).tried}
    assert files


def test_a_head_of_all_samples_that_memory_does_not_hold_is_refused(monkeypatch):
    x, y = points()
    monkeypatch.setattr(large, "available_bytes", lambda: 500_000)
    with pytest.raises(ImprintError, match="gen='all' makes each of them a proxy.*3,787 in all"):
        imprint(x, y, "knn", **ON_DISK)


# In a fit.


def fit(data, **options):
    model = ImprintedClassifier(torch.nn.Identity(), **options)
    trainer = quiet_trainer()
    trainer.fit(model, data)
    return model, float(trainer.callback_metrics["train/nc1"])


FITS = {
    "kernel": dict(recipe="kernel", projection_dim=60),
    "robust": dict(recipe="robust", k=2),
    "auto": dict(recipe="auto"),
}


@pytest.mark.parametrize("name", map(slowly, FITS))
def test_a_fit_in_files_gives_the_head_of_a_fit_in_memory(files, name):
    x, y = points()
    options = FITS[name]
    loader = DataLoader(TensorDataset(x, y), 256)
    expected, nc1 = fit(loader, accept=0.9, **options)
    assert files == []
    model, found = fit(loader, accept=0.9, **options, **ON_DISK)
    assert 0 in files  # what the epoch appends to
    the_same(model.head, expected.head, x[:500])
    assert model.head.threshold == pytest.approx(expected.head.threshold, abs=1e-4)
    assert found == pytest.approx(nc1)


def test_what_the_epoch_keeps_moves_to_a_file_once_it_does_not_fit(files):
    x, y = points()
    store = RowStore()
    with large.within_budget(BUDGET):
        store.add(x[:100], y[:100])
        assert files == []
        for start in range(100, 4000, 300):
            store.add(x[start : start + 300], y[start : start + 300])
        assert files == [0]
        assert store._embeddings == []
        kept = store.gather()
    assert torch.equal(kept[0], x)
    assert torch.equal(kept[1], y)


def test_a_checkpoint_does_not_keep_the_budget(tmp_path):
    x, y = points(200)
    model = ImprintedClassifier(torch.nn.Identity(), "qi", **ON_DISK)
    trainer = quiet_trainer()
    trainer.fit(model, DataLoader(TensorDataset(x, y), 64))
    assert "memory_budget" not in model.hparams


@pytest.mark.parametrize("classes", ["all", [3, 1, 7]])
def test_a_data_module_reads_mapped_arrays(tmp_path, files, classes):
    x, y = points()
    for name, part in dict(x=x, y=y).items():
        np.save(tmp_path / f"{name}.npy", part.numpy())
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "xy"]
    names = [str(i) for i in range(20)]

    def module(*arrays):
        train = ArrayDataset(*arrays)
        return EmbeddingDataModule(
            Splits(names, train, ArrayDataset(x[:900], y[:900])), classes=classes
        )

    expected, _ = fit(module(x, y), recipe="ridge")
    model, _ = fit(module(*mapped), recipe="ridge")
    the_same(model.head, expected.head, x[:100])
    assert files == []


def test_the_embedding_cache_reads_into_a_file_what_does_not_fit(tmp_path, files):
    x, _ = points()
    cache = RowCache(tmp_path, {"backbone": "none"})
    with cache.lock(print):
        cache.write(torch.arange(4000), x)
    with large.within_budget(BUDGET):
        found = cache.read(torch.arange(1, 4000))
    assert torch.equal(found.rows, x[1:])
    assert files == [found.rows.nbytes]
