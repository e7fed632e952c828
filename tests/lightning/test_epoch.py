"""An imprint epoch that does not end as hoped, and the checkpoints of every moment."""

import warnings

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from test_classifier import Points, classifier, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from imprint_pl import ImprintedClassifier, ImprintError, imprint

GENERATOR = torch.Generator().manual_seed(0)
Y = torch.arange(4).repeat(10)
X = 4 * torch.eye(4)[Y] + 0.1 * torch.randn(40, 4, generator=GENERATOR)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=4)


class Stream(IterableDataset):
    """Has fewer samples than it says, or deals all of them to its workers."""

    def __init__(self, samples=40):
        self.samples = samples

    def __len__(self):
        return 40

    def __iter__(self):
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return iter([(X[i], Y[i]) for i in range(first, self.samples, step)])


class At(Callback):
    """Does something in one hook, at one batch where the hook has a batch."""

    def __init__(self, hook, does, batch=3):
        def act(trainer, module, *rest):
            if not hook.startswith("on_train_batch") or rest[-1] == batch:
                does(trainer)

        setattr(self, hook, act)


def stop(trainer):
    trainer.should_stop = True


def fit(tmp_path, loader=LOADER, **options):
    model, run = classifier(), trainer(tmp_path, **options)
    run.fit(model, loader, LOADER)
    return model, run


def expect_head(model, rows):
    expected = imprint(X[:rows], Y[:rows], "qi", num_classes=4)
    torch.testing.assert_close(model.head.proxies, expected.proxies)


def test_a_stream_that_is_shorter_than_its_len_is_imprinted_and_measured(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max")
    with pytest.warns(UserWarning, match="imprinted from 6 of 10 training batches: no other came"):
        model, run = fit(tmp_path, DataLoader(Stream(24), batch_size=4), callbacks=[save])
    expect_head(model, 24)
    assert run.callback_metrics["val/accuracy"] == 1
    assert run.callback_metrics["train/nc1"] > 0
    assert save.best_model_score == 1
    loaded = ImprintedClassifier.load_from_checkpoint(save.best_model_path, backbone=nn.Identity())
    assert torch.equal(loaded(X), model(X))


def test_workers_that_drop_their_last_batches_end_the_epoch_early(tmp_path):
    # Each worker has 20 samples, one batch of 11; len() counts 3 in 40.
    stream = DataLoader(Stream(), batch_size=11, num_workers=2, drop_last=True)
    assert len(stream) == 3
    with pytest.warns(UserWarning, match="imprinted from 2 of 3 training batches"):
        model, run = fit(tmp_path, stream)
    assert model.head.num_classes == 4
    assert run.callback_metrics["val/accuracy"] == 1


@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_a_fit_that_is_stopped_imprints_what_it_saw(tmp_path, hook, batch):
    said = f"imprinted from {batch + 1} of 10 training batches: the Trainer was told to stop"
    with pytest.warns(UserWarning, match=said):
        model, run = fit(tmp_path, callbacks=[At(hook, stop, batch)])
    expect_head(model, 4 * (batch + 1))
    assert run.callback_metrics["val/accuracy"] == 1
    assert ModelCheckpoint in map(type, run.checkpoint_callbacks)
    assert run.checkpoint_callback.best_model_path


def test_a_stop_may_leave_out_classes_that_the_data_name(tmp_path):
    model, run = classifier(), trainer(tmp_path, callbacks=[At("on_train_batch_end", stop, 1)])
    with pytest.warns(UserWarning, match="imprinted from 2 of 3 training batches"):
        run.fit(model, Points(batch_size=2, class_names=["a", "b", "c"]))
    assert model.head.proxy_classes.tolist() == [0, 1]
    assert model.head.num_classes == 3


def test_a_stop_during_an_early_validation_is_one_too(tmp_path):
    options = dict(val_check_interval=3, num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="imprinted from 3 of 10 training batches"):
        model, run = fit(tmp_path, callbacks=[At("on_validation_end", stop)], **options)
    expect_head(model, 12)
    assert run.callback_metrics["val/accuracy"] == 1


def test_a_stop_that_min_epochs_forbids_stops_nothing(tmp_path):
    callbacks = [At("on_train_batch_end", stop)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the head is imprinted from")
        model, _ = fit(tmp_path, callbacks=callbacks, min_epochs=2, max_epochs=3)
    expect_head(model, 40)


def test_an_epoch_that_the_module_skips_the_rest_of_is_imprinted(tmp_path):
    class Skipping(ImprintedClassifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 2 else None

    model, run = Skipping(nn.Identity(), "qi"), trainer(tmp_path)
    with pytest.warns(UserWarning, match="imprinted from 2 of 10 training batches"):
        run.fit(model, LOADER, LOADER)
    expect_head(model, 8)
    assert run.callback_metrics["val/accuracy"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(limit_train_batches=0), "limit_train_batches=0 leaves none"),
        (dict(limit_train_batches=0.0), "limit_train_batches=0 leaves none"),
        (dict(max_epochs=0), "max_epochs=0 leaves none, give max_epochs=1"),
        (dict(max_steps=0), "max_steps=0 leaves none, give max_epochs=1"),
        (dict(max_time={"seconds": 0}), "before the first the Trainer was told to stop"),
        (dict(callbacks=[At("on_train_start", stop)]), "before the first the Trainer was told to"),
        (dict(loader=DataLoader(Stream(0), batch_size=4)), "the training loader gave none"),
        (dict(loader=DataLoader([], batch_size=4)), "the training loader gave none"),
    ],
)
def test_a_fit_without_a_training_batch_fails_and_says_why(tmp_path, options, reason):
    with pytest.raises(ImprintError, match=f"no training batch to imprint a head from: {reason}"):
        fit(tmp_path, **options)


def test_a_limit_of_no_batch_leaves_the_head_that_is_there(tmp_path):
    model, _ = fit(tmp_path)
    with pytest.raises(ImprintError, match="limit_train_batches=0"):
        trainer(tmp_path, limit_train_batches=0).fit(model, LOADER)
    expect_head(model, 40)


def test_a_trainer_that_has_taken_its_steps_says_so(tmp_path):
    model, run = fit(tmp_path, max_steps=1, max_epochs=-1)
    expect_head(model, 40)
    with pytest.raises(ImprintError, match="has taken its max_steps=1 already, give a new one"):
        run.fit(model, LOADER)


@pytest.mark.parametrize(
    "options",
    [
        dict(val_check_interval=0.3),
        dict(val_check_interval=7, check_val_every_n_epoch=None),
        dict(val_check_interval="00:01:00:00", check_val_every_n_epoch=None),
        dict(check_val_every_n_epoch=2),
        dict(check_val_every_n_epoch=5, max_epochs=10),
    ],
)
@pytest.mark.filterwarnings("ignore:validation before the end")
def test_the_head_is_validated_whenever_the_trainer_meant_to(tmp_path, options):
    save = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max")
    model, run = fit(tmp_path, callbacks=[save], **options)
    expect_head(model, 40)
    assert run.callback_metrics["val/accuracy"] == 1
    assert save.best_model_score == 1


def test_a_fit_without_validation_is_not_validated(tmp_path):
    model, run = fit(tmp_path, limit_val_batches=0)
    expect_head(model, 40)
    assert "val/accuracy" not in run.callback_metrics


def test_the_sums_of_a_fit_in_mixed_precision_are_not_rounded(tmp_path):
    # More rows than are added to the sums at once; the embeddings are exact, so that the head is.
    x, y = X.repeat(60, 1), Y.repeat(60)
    model = ImprintedClassifier(nn.Identity(), "ranpac", projection_dim=8)
    loader = DataLoader(TensorDataset(x, y), batch_size=400)
    trainer(tmp_path, precision="bf16-mixed").fit(model, loader)
    expected = imprint(x, y, "ranpac", projection_dim=8)
    torch.testing.assert_close(model.head.proxies, expected.proxies, rtol=1e-4, atol=1e-5)


def proxies_of(path):
    return torch.load(path, weights_only=True)["state_dict"]["head.proxies"]


@pytest.mark.parametrize(
    "save",
    [
        dict(every_n_train_steps=1),
        dict(every_n_train_steps=1, save_top_k=-1, save_last=True),
        dict(save_last=True),
        dict(save_on_train_epoch_end=True),
        dict(save_on_train_epoch_end=False),
    ],
)
def test_every_checkpoint_that_is_written_by_itself_has_the_head(tmp_path, save):
    model, _ = fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path / "them", **save)])
    paths = list((tmp_path / "them").iterdir())
    assert paths
    for path in paths:
        assert torch.equal(proxies_of(path), model.head.proxies)


def test_the_last_batchs_hooks_see_the_head(tmp_path):
    path = tmp_path / "it.ckpt"
    save = At("on_train_batch_end", lambda trainer: trainer.save_checkpoint(path), 9)
    model, _ = fit(tmp_path, callbacks=[save])
    assert torch.equal(proxies_of(path), model.head.proxies)


@pytest.mark.parametrize("options", [dict(every_n_train_steps=50), dict(every_n_epochs=3)])
def test_a_checkpoint_whose_moment_never_comes_is_missed_aloud(tmp_path, options):
    with pytest.warns(UserWarning, match="a ModelCheckpoint has saved nothing: imprinting is one"):
        fit(tmp_path, callbacks=[ModelCheckpoint(tmp_path, **options)], max_epochs=5)


MOMENTS = [
    ("on_fit_start", 0),
    ("on_train_epoch_start", 0),
    ("on_train_batch_end", 3),
    ("on_train_batch_end", 9),
    ("on_validation_epoch_end", 0),
    ("on_train_epoch_end", 0),
    ("on_train_end", 0),
]


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize(("hook", "batch"), MOMENTS)
def test_a_fit_resumes_from_the_checkpoint_of_any_moment(tmp_path, hook, batch, epochs):
    path = tmp_path / "it.ckpt"
    save = At(hook, lambda trainer: trainer.save_checkpoint(path), batch)
    fit(tmp_path, callbacks=[save], num_sanity_val_steps=0)
    model, run = classifier(), trainer(tmp_path, max_epochs=epochs)
    run.fit(model, LOADER, LOADER, ckpt_path=path)
    expect_head(model, 40)
    assert run.validate(model, LOADER, verbose=False)[0]["val/accuracy"] == 1


def test_a_checkpoint_from_before_the_head_says_so_wherever_it_is_used(tmp_path):
    path = tmp_path / "it.ckpt"
    fit(tmp_path, callbacks=[At("on_train_batch_end", lambda t: t.save_checkpoint(path))])
    for command in ("validate", "test", "predict"):
        with pytest.raises(ImprintError, match=r"it.ckpt was written before its fit had imprinted"):
            getattr(trainer(tmp_path), command)(classifier(), LOADER, ckpt_path=path)
    with pytest.warns(UserWarning, match="was written before its fit had imprinted the head"):
        model = ImprintedClassifier.load_from_checkpoint(path, backbone=nn.Identity())
    assert model.head.is_empty


def test_a_fit_that_was_stopped_resumes_with_the_whole_training_set(tmp_path):
    with pytest.warns(UserWarning, match="imprinted from 4 of 10"):
        model, run = fit(tmp_path, callbacks=[At("on_train_batch_end", stop)])
    path = run.checkpoint_callback.best_model_path
    tested, resumed = classifier(), classifier()
    trainer(tmp_path).test(tested, LOADER, ckpt_path=path, verbose=False)
    assert torch.equal(tested.head.proxies, model.head.proxies)
    trainer(tmp_path).fit(resumed, LOADER, LOADER, ckpt_path=path)
    expect_head(resumed, 40)


def test_resuming_a_finished_fit_says_that_nothing_is_left(tmp_path, caplog):
    model, run = fit(tmp_path)
    resumed = classifier()
    with caplog.at_level("INFO"):
        trainer(tmp_path).fit(resumed, LOADER, ckpt_path=run.checkpoint_callback.best_model_path)
    assert torch.equal(resumed.head.proxies, model.head.proxies)
    assert "was finished: nothing was left to imprint" in caplog.text


def test_a_fit_that_raised_goes_on_from_its_exceptions_checkpoint(tmp_path):
    def fail(trainer):
        raise ValueError("mine")

    model = classifier()
    run = trainer(
        tmp_path, callbacks=[At("on_train_batch_end", fail), OnExceptionCheckpoint(tmp_path)]
    )
    with pytest.raises(ValueError, match="mine"):
        run.fit(model, LOADER, LOADER)
    assert model.head.is_empty
    again = classifier()
    trainer(tmp_path).fit(again, LOADER, LOADER, ckpt_path=tmp_path / "on_exception.ckpt")
    expect_head(again, 40)


def test_an_interrupted_fit_ends_with_status_1_and_can_be_fitted_again(tmp_path):
    def interrupt(trainer):
        raise KeyboardInterrupt

    model = classifier()
    with pytest.raises(SystemExit) as ended:
        trainer(tmp_path, callbacks=[At("on_train_batch_end", interrupt)]).fit(model, LOADER)
    assert ended.value.code == 1
    trainer(tmp_path).fit(model, LOADER)
    expect_head(model, 40)


@pytest.mark.slow
def test_a_module_that_is_compiled_whole_fits(tmp_path):
    model = ImprintedClassifier(nn.Linear(4, 4), "qi")
    run = trainer(tmp_path)
    run.fit(torch.compile(model, backend="eager"), LOADER, LOADER)
    assert run.callback_metrics["val/accuracy"] == 1
