"""Sums instead of embeddings: the same head, NC1 and temperature; what must be kept, is."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import nn
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trainers import quiet_trainer

import imprint_pl.lightning.epoch
from imprint_pl import ImprintedClassifier, ImprintedHead, ImprintError, imprint
from imprint_pl.collapse import nc1
from imprint_pl.data import Digits
from imprint_pl.method.calibration import fit_temperature, folds
from imprint_pl.method.holdout import HELD, held_out_rows
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.recipes import resolve
from imprint_pl.numerics.order import in_order, keys
from imprint_pl.numerics.values import check_values
from imprint_pl.training_set.reservoir import Reservoir
from imprint_pl.training_set.store import RowStore
from imprint_pl.training_set.sums import EmbeddingSums, TrainingSums, needs_only_sums

# The recipes that need only sums, with fewer features than samples.
STREAMED = {
    "qi": {},
    "hosoda": {},
    "janson": {},
    "ls": {},
    "lda": {},
    "ridge": {},
    "ranpac": {"projection_dim": 40},
}


class Images(LightningDataModule):
    """Random grey images of 8 × 8 in 5 classes of unequal size, shuffled."""

    def __init__(self, n=301, seed=0, batch_size=32, classes=5, **attributes):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.y = torch.randint(0, 99, (n,), generator=generator).sqrt().long() % classes
        marks = torch.rand(classes, 1, 8, 8, generator=torch.Generator().manual_seed(99))
        self.x = torch.rand(n, 1, 8, 8, generator=generator) + marks[self.y]
        self.batch_size = batch_size
        for name, value in attributes.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x, self.y), batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def backbone():
    """12 numbers an image."""
    convolution = nn.Conv2d(1, 12, 3)
    generator = torch.Generator().manual_seed(1)
    nn.init.normal_(convolution.weight, generator=generator)
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def fit(tmp_path, recipe, data, model=None, overrides=None, **options):
    """The model, and what its fit logged."""
    if model is None:
        model = ImprintedClassifier(backbone(), recipe, **(overrides or STREAMED.get(recipe, {})))
    trainer = quiet_trainer(default_root_dir=tmp_path, **options)
    trainer.fit(model, data)
    return model, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.fixture
def both(tmp_path, monkeypatch):
    """Fits twice, with sums and with the embeddings kept, and sees that it was so."""

    def run(recipe, *args, **kwargs):
        kept = []
        for kind in (EmbeddingSums, RowStore):
            add = kind.add
            monkeypatch.setattr(
                kind, "add", lambda self, *a, add=add: (kept.append(self), add(self, *a))
            )
        summed = fit(tmp_path, recipe, *args, **kwargs)
        assert {type(part) for part in kept} == {EmbeddingSums}
        kept.clear()
        with monkeypatch.context() as patched:
            patched.setattr(imprint_pl.lightning.epoch, "needs_only_sums", lambda *_: False)
            stored = fit(tmp_path, recipe, *args, **kwargs)
        assert {type(part) for part in kept} == {RowStore}
        return *summed, *stored

    return run


def assert_same_heads(one, other):
    assert one.num_classes == other.num_classes
    assert one.class_names == other.class_names
    for name in ("proxies", "bias", "proxy_classes"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.norm_inf.state_dict(), other.norm_inf.state_dict())
    assert one.settings == other.settings


def test_which_recipes_need_only_sums():
    kept = {
        recipe
        for recipe in ("qi", "hosoda", "janson", "ls", "lda", "ridge", "ranpac", "robust", "knn")
        if needs_only_sums(resolve(recipe), 10_000)
    }
    assert kept == set(STREAMED)
    assert not needs_only_sums(resolve("whitened"), 100)
    assert not needs_only_sums(resolve("kernel"), 100)
    assert not needs_only_sums(resolve("ridge", lam="holdout"), 100)
    # Fewer rows than random features are smaller than the features' Gram matrix.
    assert not needs_only_sums(resolve("ranpac"), 100)
    assert needs_only_sums(resolve("ranpac"), None)
    assert needs_only_sums(resolve("ridge"), None)
    chain = ["power", "l2", "random_projection"]
    assert needs_only_sums(resolve("ridge", norm_pre=chain, norm_inf="same"), 10_000)
    assert not needs_only_sums(resolve("ridge", norm_pre=["centre", "l2"]), 100)


@pytest.mark.parametrize("recipe", STREAMED)
def test_sums_give_the_head_and_nc1_that_the_embeddings_give(both, recipe):
    data = Images(class_names=list("abcde"))
    data.class_counts = torch.bincount(data.y)
    summed, logged, stored, expected = both(recipe, data)
    assert_same_heads(summed.head, stored.head)
    assert logged["train/nc1"] == pytest.approx(expected["train/nc1"], rel=1e-6)
    # Rounding may turn over a sample or two that lie between two classes.
    assert logged["val/accuracy"] == pytest.approx(expected["val/accuracy"], abs=0.01)
    assert logged["train/images_per_second"] > 0


@pytest.mark.parametrize("recipe", STREAMED)
def test_a_shortened_epoch_gives_the_head_of_what_it_saw(both, recipe):
    data = Images(num_classes=5)
    data.class_counts = torch.bincount(data.y)
    summed, logged, stored, expected = both(recipe, data, limit_train_batches=3)
    assert_same_heads(summed.head, stored.head)
    assert logged["train/nc1"] == pytest.approx(expected["train/nc1"], rel=1e-6)


@pytest.mark.parametrize("recipe", STREAMED)
def test_classes_that_a_fast_dev_run_misses_get_no_proxy(both, recipe):
    data = Images(batch_size=40, num_classes=5)
    data.x, data.y = data.x[data.y.argsort()], data.y.sort().values
    rows = torch.cat([(data.y == c).nonzero().flatten()[:20] for c in (1, 3, 0, 2, 4)])
    data.x, data.y = data.x[rows], data.y[rows]
    with pytest.warns(UserWarning, match="3 of 5 classes had no sample"):
        summed, logged, stored, expected = both(recipe, data, fast_dev_run=True)
    assert_same_heads(summed.head, stored.head)
    assert summed.head.proxy_classes.tolist() == [1, 3]
    scores = summed(data.x)
    # Votes of nearest neighbours are counted: no proxy, no vote.
    assert scores[:, [0, 2, 4]].eq(0 if recipe == "janson" else -torch.inf).all()
    assert scores[:, [1, 3]].isfinite().all()
    assert logged["train/nc1"] == pytest.approx(expected["train/nc1"], rel=1e-6)


@pytest.mark.parametrize("recipe", ["ridge", "ranpac"])
def test_a_second_fit_forgets_the_first(tmp_path, recipe):
    first, _ = fit(tmp_path, recipe, Images())
    again, _ = fit(tmp_path, recipe, Images(n=90, seed=3), model=first)
    fresh, _ = fit(tmp_path, recipe, Images(n=90, seed=3))
    assert_same_heads(again.head, fresh.head)
    assert again.head.temperature == fresh.head.temperature


def test_chains_of_norms_stream(both):
    overrides = {"norm_pre": ["power", "l2", "random_projection"], "projection_dim": 30}
    summed, _, stored, _ = both("ridge", Images(), overrides=overrides)
    assert_same_heads(summed.head, stored.head)
    assert summed.head.feature_dim == 30


def test_projected_features_are_as_many_as_asked_for_whatever_samples_come(both):
    overrides = {"projection_dim": 60}
    summed, _, stored, _ = both("ranpac", Images(), overrides=overrides, limit_train_batches=2)
    assert_same_heads(summed.head, stored.head)
    assert summed.head.feature_dim == 60


def test_a_last_batch_left_out_is_not_counted(both):
    data = Images(n=50)
    loader = DataLoader(TensorDataset(data.x, data.y), batch_size=16, drop_last=True)
    summed, _, stored, _ = both("ranpac", loader)
    assert_same_heads(summed.head, stored.head)


def test_weibull_and_learned_norms_keep_the_embeddings(tmp_path, monkeypatch):
    monkeypatch.setattr(EmbeddingSums, "add", None)
    fit(tmp_path, "qi", Images(), overrides={"weibull": [0.1, 0.9]})
    fit(tmp_path, "ridge", Images(), overrides={"norm_pre": "centre"})


@pytest.mark.parametrize("recipe", ["ridge", "ranpac"])
def test_data_of_unknown_length_and_classes_give_the_same_head(tmp_path, recipe):
    data = Images()

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(data.x, data.y, strict=True))

    model, logged = fit(tmp_path, recipe, DataLoader(Stream(), batch_size=32))
    known, expected = fit(tmp_path, recipe, data)
    assert_same_heads(model.head, known.head)
    assert logged["train/nc1"] == pytest.approx(expected["train/nc1"], rel=1e-6)


def test_real_digits_give_the_head_of_their_embeddings(tmp_path):
    data = Digits(batch_size=128)
    data.setup()
    model = ImprintedClassifier("efficientnet_lite0", "ridge", image_size=32)
    _, logged = fit(tmp_path, "ridge", data, model=model)
    images, y = data.train_dataset.images, data.train_dataset.labels
    x = torch.cat([model.embed(part) for part in images.split(128)])
    expected = imprint(x, y, "ridge", class_names=data.class_names)
    assert_same_heads(model.head, expected)
    assert logged["train/nc1"] == pytest.approx(nc1(normalize(x), y), rel=1e-6)
    test = data.test_dataset
    right = expected(model.embed(test.images)).argmax(1) == test.labels
    assert logged["val/accuracy"] == pytest.approx(right.double().mean().item(), abs=0.01)


def test_our_data_know_their_class_counts_before_any_image_is_read():
    data = Digits(classes=[3, 1], shots=7)
    assert getattr(data, "class_counts", None) is None
    data.setup()
    assert data.class_counts.tolist() == [7, 7]


def test_nc1_of_the_acceptance_embeddings_is_the_known_one(acceptance):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"].long()
    sums = EmbeddingSums(resolve("qi"), class_counts=torch.bincount(y), samples=len(y))
    for rows, labels in zip(x.split(700), y.split(700), strict=True):
        sums.add(rows, labels)
    head = sums.gather().imprint()
    assert len(sums) == 10_000
    assert sums.nc1() == pytest.approx(1.1670, abs=1e-4)
    torch.testing.assert_close(head.proxies, imprint(x, y, "qi").proxies, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_sums_gives_the_same_logits_in_a_fresh_process(tmp_path):
    # A name, since a fresh process has to find the backbone.
    model = ImprintedClassifier("efficientnet_lite0", "ranpac", projection_dim=20, image_size=32)
    x = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8)
    x[:30] //= 4
    loader = DataLoader(TensorDataset(x, torch.arange(60) // 30), batch_size=16)
    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.fit(model, loader)
    assert model.head.temperature != 1
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    torch.save({"x": x, "logits": model(x)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch; from imprint_pl import ImprintedClassifier;"
        "file = torch.load(sys.argv[2], weights_only=True);"
        "model = ImprintedClassifier.load_from_checkpoint(sys.argv[1]);"
        "assert torch.equal(model(file['x']), file['logits'])"
    )
    arguments = [tmp_path / "it.ckpt", tmp_path / "expected.pt"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


# NC1.


def summed(x, y, recipe="qi", batch_size=50, overrides=None, **options):
    sums = EmbeddingSums(resolve(recipe, **(overrides or {})), samples=len(y), **options)
    for rows, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        sums.add(rows, labels)
    return sums.gather()


def points(n=400, classes=4, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, classes, (n,), generator=generator)
    return torch.randn(n, d, generator=generator) + 2 * torch.eye(classes, d)[y], y


def test_nc1_without_class_counts_is_exact_while_there_is_room_for_them():
    x, y = points()
    expected = nc1(normalize(x), y)
    assert summed(x, y).nc1() == pytest.approx(expected, rel=1e-10)
    assert summed(x, y, num_classes=9).nc1() == pytest.approx(expected, rel=1e-10)
    counts = torch.bincount(y)
    assert summed(x, y, class_counts=counts).nc1() == pytest.approx(expected, rel=1e-10)
    # Four classes that ask for one matrix each, or for a single one.
    assert summed(x, y).kept.unit.moments.gram.shape == (4, 6, 6)
    assert summed(x, y, class_counts=counts).kept.unit.moments.gram.shape == (6, 6)


@pytest.mark.parametrize("num_classes", [None, 4])
def test_nc1_is_nan_and_says_so_where_it_would_take_too_much(monkeypatch, num_classes):
    x, y = points()
    monkeypatch.setattr("imprint_pl.training_set.sums.LARGEST_GRAMS", 8 * 3 * 6**2)
    sums = summed(x, y, num_classes=num_classes)
    with pytest.warns(UserWarning, match=r"train/nc1 is NaN.*class_counts \(C,\)") as caught:
        value = sums.nc1()
    assert value != value
    assert len(caught) == 1
    torch.testing.assert_close(sums.imprint().proxies, imprint(x, y, "qi").proxies)


def test_class_counts_that_are_not_those_of_the_samples_are_told():
    x, y = points()
    sums = summed(x, y, class_counts=torch.bincount(y).roll(1))
    with pytest.warns(UserWarning, match="not those of the samples that came"):
        assert sums.nc1() != sums.nc1()


def test_nc1_of_one_class_is_nan():
    x, _ = points()
    value = summed(x, torch.zeros(len(x), dtype=torch.int64)).nc1()
    assert value != value


# Bad input: the messages of the store.


def test_bad_batches_are_named():
    x, y = points(n=8)
    sums = EmbeddingSums(resolve("ridge"), num_classes=4)
    sums.add(x, y)
    bad = x.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ImprintError, match="batch 1: 1 of 8 embeddings .* sample 3"):
        sums.add(bad, y)
    with pytest.raises(ImprintError, match="batch 1 has embeddings of 5 numbers, .* had 6"):
        sums.add(x[:, :5], y)
    with pytest.raises(ImprintError, match=r"label 4 of sample 7 in batch 1 .* 0..3"):
        sums.add(x, torch.tensor([0, 1, 2, 3, 0, 1, 2, 4]))
    with pytest.raises(ImprintError, match="label -1 of sample 0 in batch 1 .* out of range"):
        sums.add(x, y - 1 - y[0])


def test_a_class_without_images_is_named(tmp_path):
    with pytest.raises(ImprintError, match=r"class 5 \('hat'\) has no training sample"):
        fit(tmp_path, "ridge", Images(class_names=["a", "b", "c", "d", "e", "hat"]))


@pytest.mark.parametrize("recipe", ["ridge", "robust"])
def test_an_epoch_checks_each_value_once(tmp_path, recipe, monkeypatch):
    checked = []
    for room in ("method.inputs", "training_set.store"):
        monkeypatch.setattr(
            f"imprint_pl.{room}.check_values",
            lambda x, *_, check=check_values: (checked.append(x.numel()), check(x))[1],
        )
    data = Images(n=64)
    fit(tmp_path, recipe, data, overrides={"k": 2} if recipe == "robust" else {})
    # Sums are checked as one number for each of the five classes.
    assert sum(checked) - 64 * 12 in (0, 5)


# Labels that change, as those of `partial_fit` do.


def test_sums_under_other_labels_give_the_head_of_the_rows_under_them():
    x, y = points(n=300, classes=3)
    sums = TrainingSums(resolve("ridge"), x[:100], y[:100], num_classes=3)
    sums.add(x[:100], y[:100])
    places = torch.tensor([3, 0, 1])
    sums.relabel(places, 4)
    sums.add(x[100:], places[y[100:]])
    expected = imprint_parts(x, places[y], resolve("ridge"), num_classes=4, allow_empty=True)
    head = sums.head()
    assert_same_heads(head, expected)
    assert head.temperature == pytest.approx(expected.temperature, rel=1e-5)


# The temperature.


def test_the_temperature_is_that_of_heads_that_have_not_seen_the_held_out_samples():
    x, y = points(n=300)
    rows = in_order(x, y)
    x, y = x[rows], y[rows]
    head = summed(x, y, "ridge").imprint()
    lam = head.settings["chosen_lam"]
    scores, labels = [], []
    for held in folds(y, 0):
        scores.append(imprint(x[~held], y[~held], "ridge", lam=lam).scores(x[held]))
        labels.append(y[held])
    expected = fit_temperature(torch.cat(scores), torch.cat(labels))
    assert head.temperature == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("recipe", STREAMED)
def test_the_temperature_of_many_samples_suits_new_ones(recipe):
    x, y = points(n=9000)
    options = {"projection_dim": 100} if recipe == "ranpac" else {}
    head = summed(x, y, recipe, batch_size=900, overrides=options).imprint()
    x, y = points(n=9000, seed=1)
    assert head.temperature == pytest.approx(fit_temperature(head.scores(x), y), rel=0.1)


def held_out(x, y, batches=(slice(None),), seed=0):
    kept = Reservoir(HELD, seed)
    for rows in batches:
        kept.add(x[rows], y[rows], keys(x[rows]))
    of_sample = kept.gather(x.shape[1])[:2]
    rows = in_order(*of_sample)
    of_sample = [part[rows] for part in of_sample]
    assert len(rows) == HELD
    held = held_out_rows(*of_sample, len(y), seed)
    return [[part[rows] for part in of_sample] for rows in held]


@pytest.mark.parametrize("recipe", ["ridge", "janson"])
def test_classes_of_which_only_held_out_samples_exist_do_not_count(recipe):
    # Class 4 has one sample, and it is among those held out of 4,000.
    x, y = points(n=4000)
    (chosen, _), (others, _), (third, _), *_ = held_out(x, y)
    y[(x == chosen[0]).all(1)] = 4
    options = {"lam": 0.1} if recipe == "ridge" else {}
    head = summed(x, y, recipe, batch_size=500, overrides=options).imprint()
    assert head.proxy_classes.tolist() == [0, 1, 2, 3, 4]
    scores, labels = [], []
    for part in (chosen, others, third):
        out = (x[:, None] == part).all(2).any(1)
        parts = resolve(recipe, **options)
        trial = imprint_parts(x[~out], y[~out], parts, num_classes=5, allow_empty=True)
        known = out & (y != 4)
        scores.append(trial.scores(x[known]))
        labels.append(y[known])
    expected = fit_temperature(torch.cat(scores), torch.cat(labels))
    assert head.temperature == pytest.approx(expected, rel=1e-4)


def test_no_temperature_where_held_out_samples_cannot_be_spared():
    # Two samples a class: without one of each there is no covariance within the classes.
    x, _ = points(n=8)
    with pytest.warns(UserWarning, match="no temperature was fitted.*no within-class covariance"):
        head = summed(x, torch.arange(8) % 4, "lda").imprint()
    assert head.temperature == 1


def test_the_held_out_sample_is_bounded_and_the_same_in_any_batches_and_ranks():
    x, y = torch.arange(9000.0)[:, None], torch.arange(9000) % 3

    def drawn(parts, seed=0):
        return [rows.flatten().tolist() for rows, _ in held_out(x, y, parts, seed)]

    whole = drawn([slice(None)])
    assert [len(fold) for fold in whole] == [900, 900]
    assert drawn(torch.arange(9000).split(33)) == whole
    # As two ranks would hand them over: first one's, then the other's.
    assert drawn([slice(0, None, 2), slice(1, None, 2)]) == whole
    assert drawn([slice(None)], seed=1) != whole
    # Spread evenly over the data set: a tenth of each tenth, give or take.
    counts = torch.histc(torch.tensor(whole[0]), 10, 0, 9000)
    assert counts.min() > 60
    assert counts.max() < 120


def test_few_samples_are_held_out_in_several_folds():
    x, y = torch.arange(3000.0)[:, None], torch.arange(3000) % 3
    parts = [set(rows.flatten().tolist()) for rows, _ in held_out(x, y)]
    assert [len(part) for part in parts] == [300] * 6
    assert not parts[0] & parts[1]


def test_a_head_of_sums_is_a_head_like_any_other():
    x, y = points()
    head = summed(x, y, "ranpac").imprint()
    loaded = ImprintedHead()
    loaded.load_state_dict(head.state_dict())
    assert torch.equal(loaded(x), head(x))
    head(x).logsumexp(1).sum().backward()
    assert head.proxies.grad.abs().sum() > 0


# Memory, and several processes.

# N images that take no memory, of which a backbone makes 512 numbers each.
MEASURED = """
import sys, torch
from pathlib import Path
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from imprint_pl import ImprintedClassifier

recipe, n, devices, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

class Generated(Dataset):
    def __len__(self):
        return n
    def __getitems__(self, indices):
        index = torch.tensor(indices)
        pixels = torch.sin(index[:, None] * torch.arange(1.0, 13.0)) + index[:, None] % 10 / 5
        return pixels.reshape(-1, 3, 2, 2), index % 10

class Data(LightningDataModule):
    def train_dataloader(self):
        sampler = None
        if devices > 1:
            rank = self.trainer.global_rank
            sampler = DistributedSampler(Generated(), devices, rank, shuffle=False)
        return DataLoader(Generated(), 256, sampler=sampler, collate_fn=lambda batch: batch)

class Waves(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("matrix", torch.randn(12, 512, generator=generator))
    def forward(self, x):
        return torch.sin(x.flatten(1) @ self.matrix)

overrides = {
    "ranpac": {"projection_dim": 1000}, "robust": {"k": 2},
    "bounded": {"recipe": "robust", "k": 2, "max_per_class": 500},
}.get(recipe, {})
recipe = overrides.pop("recipe", recipe)
trainer = Trainer(
    max_epochs=1, accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False,
    strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False,
    enable_model_summary=False, default_root_dir=folder,
)
trainer.fit(ImprintedClassifier(Waves(), recipe, **overrides), Data())
if trainer.is_global_zero:
    # Of this program alone; ru_maxrss counts what the one that started it had.
    status = Path("/proc/self/status").read_text()
    print("KiB", status.split("VmHWM:")[1].split()[0])
if devices > 1:
    torch.distributed.destroy_process_group()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "devices", "grows"),
    [
        ("ridge", 1, False),
        ("ridge", 2, False),
        ("ranpac", 1, False),
        ("bounded", 1, False),
        ("robust", 1, True),
    ],
)
def test_memory_grows_with_the_images_only_where_their_embeddings_are_kept(
    tmp_path, recipe, devices, grows
):
    n = 20_000
    # A script, since the other processes start it again.
    script = tmp_path / "script.py"
    script.write_text(MEASURED)
    peaks = []
    for number in (n, 8 * n):
        command = [sys.executable, script, recipe, number, devices, tmp_path]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, check=True, timeout=300
        )
        peaks.append(int(done.stdout.split("KiB ")[1].split()[0]) / 1024)
    more = 7 * n * 512 * 4 / 2**20 / devices
    print(f"{recipe}, {devices} processes: {peaks} MiB; {more:.0f} MiB of embeddings more")
    growth = peaks[1] - peaks[0]
    # The same program's peak differs by some 25 MiB from run to run.
    assert growth > 0.8 * more if grows else growth < 0.5 * more
