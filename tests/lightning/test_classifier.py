"""The contract of the imprint epoch, with a plain Trainer and data modules of a user's own."""

import contextlib
import copy
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintError, imprint
from imprint_pl.collapse import nc1
from imprint_pl.lightning.intended_warnings import IntendedWarnings

POINTS = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, 4.0], [-4.0, 3.0], [0.0, -2.0], [0.1, -2.0]])
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


class Points(LightningDataModule):
    """A user's own: default collation, embeddings as 2-D floats."""

    def __init__(self, x=POINTS, y=LABELS, batch_size=4, **names):
        super().__init__()
        self.data = TensorDataset(x, y)
        self.batch_size = batch_size
        for name, value in names.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def trainer(tmp_path, **kwargs):
    options = dict(
        enable_checkpointing=True,
        default_root_dir=tmp_path,
    )
    return quiet_trainer(**(options | kwargs))


def classifier(**kwargs):
    return ImprintedClassifier(nn.Identity(), "qi", **kwargs)


def images(seed=0, n=60, classes=3):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    x = torch.rand(n, 3, 16, 16, generator=generator) + 4 * torch.eye(3)[y % 3][:, :, None, None]
    return x, y


def small_backbone():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers)


def test_one_epoch_gives_the_head_that_imprint_gives(tmp_path):
    model = classifier()
    trainer(tmp_path).fit(model, Points())
    expected = imprint(POINTS, LABELS, "qi")
    torch.testing.assert_close(model.head.proxies, expected.proxies)
    assert model.head.proxy_classes.tolist() == [0, 1, 2]
    torch.testing.assert_close(model.head.scores(POINTS), expected.scores(POINTS))


def test_accuracy_f1_nc1_and_times_are_logged(tmp_path):
    run = trainer(tmp_path)
    run.fit(classifier(), Points())
    metrics = run.callback_metrics
    assert metrics["val/accuracy"] == 1
    assert metrics["val/macro_f1"] == 1
    assert metrics["val/accuracy/2"] == 1
    expected = nc1(nn.functional.normalize(POINTS), LABELS)
    assert metrics["train/nc1"].item() == pytest.approx(expected, rel=1e-6)
    for name in ("embed_seconds", "gen_seconds", "images_per_second"):
        assert metrics[f"train/{name}"] > 0


def test_metrics_are_exact_on_a_head_that_errs(tmp_path):
    # One class-1 point lies in class 0: 5 of 6 right, class 1 half right.
    x = POINTS.clone()
    model = classifier()
    trainer(tmp_path).fit(model, Points())
    x[2] = x[0]
    run = trainer(tmp_path)
    run.test(model, Points(x), verbose=False)
    assert run.callback_metrics["test/accuracy"].item() == pytest.approx(5 / 6)
    assert run.callback_metrics["test/macro_f1"].item() == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    assert run.callback_metrics["test/accuracy/1"] == 0.5
    assert model.class_accuracy.tolist() == [1, 0.5, 1]


def test_the_head_is_full_before_its_epochs_validation_and_its_checkpoint(tmp_path):
    class Watch(Callback):
        seen = ()

        def on_validation_start(self, trainer, pl_module):
            self.seen += (pl_module.head.is_empty, trainer.global_step)

        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            self.seen += ("saved", checkpoint["state_dict"]["head.proxies"].shape)

    watch, save = Watch(), ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max")
    trainer(tmp_path, callbacks=[watch, save], num_sanity_val_steps=0).fit(classifier(), Points())
    assert watch.seen == (False, 1, "saved", (3, 2))
    assert save.best_model_score == 1


def test_of_many_tokens_only_the_first_stays_in_memory():
    tokens = torch.randn(4, 197, 8)

    class FirstToken(nn.Module):
        def forward(self, x):
            return tokens[:, 0]

    embeddings = ImprintedClassifier(FirstToken(), "qi").embed(torch.zeros(4, 3, 2, 2))
    assert torch.equal(embeddings, tokens[:, 0])
    assert embeddings.untyped_storage().nbytes() == 4 * 8 * 4


def test_the_backbone_and_its_statistics_stay_bitwise_the_same(tmp_path):
    backbone = small_backbone().train()
    before = copy.deepcopy(backbone.state_dict())
    model = ImprintedClassifier(backbone, "robust", k=2)
    trainer(tmp_path).fit(model, Points(*images()))
    assert not any(module.training for module in backbone.modules())
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_checkpoint_has_the_head_and_not_the_backbone(tmp_path):
    run = trainer(tmp_path)
    run.fit(ImprintedClassifier(small_backbone(), "qi"), Points(*images()))
    run.save_checkpoint(tmp_path / "it.ckpt")
    state = torch.load(tmp_path / "it.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("head.") for name in state)
    loaded = ImprintedClassifier.load_from_checkpoint(
        tmp_path / "it.ckpt", backbone=small_backbone()
    )
    assert torch.equal(loaded(images()[0]), run.model(images()[0]))


def test_save_backbone_keeps_it_whole(tmp_path):
    run = trainer(tmp_path)
    run.fit(ImprintedClassifier(small_backbone(), "qi", save_backbone=True), Points(*images()))
    run.save_checkpoint(tmp_path / "it.ckpt")
    other = small_backbone()
    nn.init.zeros_(other[0].weight)
    loaded = ImprintedClassifier.load_from_checkpoint(tmp_path / "it.ckpt", backbone=other)
    assert torch.equal(loaded(images()[0]), run.model(images()[0]))


def test_another_backbone_than_the_checkpoints_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.fit(ImprintedClassifier(small_backbone(), "qi"), Points(*images()))
    run.save_checkpoint(tmp_path / "it.ckpt")
    other = small_backbone()
    nn.init.zeros_(other[0].weight)
    with pytest.raises(ImprintError, match="imprinted on a backbone with sha256="):
        ImprintedClassifier.load_from_checkpoint(tmp_path / "it.ckpt", backbone=other)


def test_a_checkpoint_without_a_head_is_refused(tmp_path):
    run = trainer(tmp_path)
    run.fit(classifier(), Points())
    run.save_checkpoint(tmp_path / "it.ckpt")
    file = torch.load(tmp_path / "it.ckpt", weights_only=True)
    del file["state_dict"]["head.proxies"]
    torch.save(file, tmp_path / "it.ckpt")
    with pytest.raises(ImprintError, match=r"has no 'head.proxies'"):
        ImprintedClassifier.load_from_checkpoint(tmp_path / "it.ckpt", backbone=nn.Identity())


@pytest.mark.parametrize("recipes", [("qi", "whitened"), ("whitened", "qi")])
def test_a_checkpoint_of_another_recipe_is_called_that(tmp_path, recipes):
    written, read = (ImprintedClassifier(nn.Identity(), recipe) for recipe in recipes)
    run = trainer(tmp_path)
    run.fit(written, Points())
    run.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(ImprintError, match="of different recipes; give the recipe of the"):
        run.test(read, Points(), ckpt_path=tmp_path / "it.ckpt")


def test_a_fitted_classifier_takes_a_checkpoint_whose_recipe_auto_chose_otherwise(tmp_path):
    written, fitted = ImprintedClassifier(nn.Identity(), "qi"), ImprintedClassifier(nn.Identity())
    run = trainer(tmp_path)
    run.fit(written, Points())
    run.save_checkpoint(tmp_path / "it.ckpt")
    whitened = imprint(POINTS, LABELS, "whitened").state_dict()
    fitted.head.load_state_dict(whitened)
    run.test(fitted, Points(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert torch.equal(fitted.head(POINTS), written.head(POINTS))


@pytest.mark.slow
def test_a_fresh_process_has_the_same_tensors_bitwise_and_gives_the_same_logits(tmp_path):
    model = ImprintedClassifier("efficientnet_lite0", "robust", k=2, image_size=32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=generator)
    run = trainer(tmp_path)
    run.fit(model, Points(x, torch.arange(12) % 3, class_names=["a", "b", "c"]))
    run.save_checkpoint(tmp_path / "it.ckpt")
    expected = {"x": x, "logits": model(x).detach(), "tensors": dict(model.state_dict())}
    torch.save(expected, tmp_path / "expected.pt")
    # Another process may split its sums among threads in another way, and round them otherwise.
    code = (
        "import sys, torch; from imprint_pl import ImprintedClassifier;"
        "file = torch.load(sys.argv[2]);"
        "model = ImprintedClassifier.load_from_checkpoint(sys.argv[1]);"
        "assert model.class_names == ['a', 'b', 'c'];"
        "torch.testing.assert_close(model.state_dict(), file['tensors'], rtol=0, atol=0);"
        "torch.testing.assert_close(model(file['x']), file['logits'], rtol=1e-5, atol=1e-5)"
    )
    arguments = [tmp_path / "it.ckpt", tmp_path / "expected.pt"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)


def test_a_second_fit_is_a_second_fit(tmp_path):
    model = classifier()
    trainer(tmp_path).fit(model, Points())
    trainer(tmp_path).fit(model, Points(POINTS[:4].flip(0), LABELS[:4].flip(0)))
    expected = imprint(POINTS[:4], LABELS[:4], "qi")
    torch.testing.assert_close(model.head.proxies, expected.proxies)


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_second_fit_with_the_same_trainer_is_one_too(tmp_path, epochs):
    model, run = classifier(), trainer(tmp_path, max_epochs=epochs)
    run.fit(model, Points())
    run.fit(model, Points(POINTS[:4], LABELS[:4]))
    expected = imprint(POINTS[:4], LABELS[:4], "qi")
    torch.testing.assert_close(model.head.proxies, expected.proxies)


def test_a_checkpoint_from_within_the_epoch_starts_it_again(tmp_path):
    class SaveInTheMiddle(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    trainer(tmp_path, callbacks=[SaveInTheMiddle()]).fit(classifier(), Points(batch_size=2))
    model, run = classifier(), trainer(tmp_path)
    run.fit(model, Points(batch_size=2), ckpt_path=tmp_path / "middle.ckpt")
    torch.testing.assert_close(model.head.proxies, imprint(POINTS, LABELS, "qi").proxies)
    assert run.callback_metrics["val/accuracy"] == 1


@pytest.mark.parametrize("epochs", [5, -1])
def test_more_epochs_stop_after_one_and_say_so(tmp_path, epochs, caplog):
    run = trainer(tmp_path, max_epochs=epochs)
    with caplog.at_level("INFO"):
        run.fit(classifier(), Points())
    assert run.global_step == 1
    assert "Imprinting takes one epoch" in caplog.text


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (dict(limit_train_batches=1), 2),
        (dict(limit_train_batches=2), 4),
        (dict(limit_train_batches=0.67), 4),
        (dict(overfit_batches=2), 4),
        (dict(fast_dev_run=True), 2),
        (dict(fast_dev_run=2), 4),
    ],
)
def test_a_shortened_epoch_imprints_what_it_saw_and_names_the_rest(tmp_path, options, rows):
    model = classifier()
    absent = "2 of 3 .* never predicted: 1, 2" if rows == 2 else "1 of 3 .* never predicted: 2"
    with pytest.warns(UserWarning, match=absent):
        trainer(tmp_path, **options).fit(model, Points(batch_size=2, num_classes=3))
    assert model.head.num_classes == 3
    expected = imprint(POINTS[:rows], LABELS[:rows], "qi")
    torch.testing.assert_close(model.head.proxies, expected.proxies)


def test_a_sanity_check_and_a_validation_before_the_end_are_skipped(tmp_path):
    run = trainer(tmp_path, num_sanity_val_steps=2, val_check_interval=1)
    with pytest.warns(UserWarning, match="head is still empty") as caught:
        run.fit(classifier(), Points(batch_size=2))
    ours = [w for w in caught if "head is still empty" in str(w.message)]
    assert len(ours) == 1
    assert run.callback_metrics["val/accuracy"] == 1


def test_an_iterable_data_set_without_a_length_works(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(POINTS, LABELS, strict=True))

    model = classifier()
    trainer(tmp_path).fit(model, DataLoader(Stream(), batch_size=4))
    torch.testing.assert_close(model.head.proxies, imprint(POINTS, LABELS, "qi").proxies)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_give_a_float32_store_and_a_working_head(tmp_path, precision):
    x, y = images()
    model = ImprintedClassifier(small_backbone(), "robust", k=2)
    run = trainer(tmp_path, precision=precision)
    run.fit(model, Points(x, y))
    assert run.callback_metrics["val/accuracy"] == 1
    run.test(model, Points(x, y), verbose=False)
    assert run.callback_metrics["test/accuracy"] == 1


def test_the_backbones_own_precision_option_works(tmp_path):
    x, y = images()
    run = trainer(tmp_path)
    model = ImprintedClassifier(small_backbone(), "qi", precision="bf16")
    run.fit(model, Points(x, y))
    assert run.callback_metrics["val/accuracy"] == 1
    assert model.embed(x[:1]).dtype == torch.float32


def test_dict_batches_and_preprocessed_floats_work(tmp_path):
    x, y = images()
    loader = DataLoader([{"image": a, "label": b} for a, b in zip(x, y, strict=True)], batch_size=7)
    run = trainer(tmp_path)
    run.fit(ImprintedClassifier(small_backbone(), "qi"), loader, loader)
    assert run.callback_metrics["val/accuracy"] == 1


def test_predict_gives_scores_with_and_without_labels(tmp_path):
    model = classifier()
    run = trainer(tmp_path)
    run.fit(model, Points())
    scores = torch.cat(run.predict(model, Points()))
    torch.testing.assert_close(scores, model(POINTS))
    unlabelled = torch.cat(run.predict(model, DataLoader(POINTS, batch_size=4)))
    torch.testing.assert_close(unlabelled, scores)


def test_fitting_leaves_the_global_generator_alone_and_a_head_can_be_trained_after(tmp_path):
    model = ImprintedClassifier(small_backbone(), "robust", k=2)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    trainer(tmp_path, inference_mode=True).fit(model, Points(*images()))
    head = copy.deepcopy(model.head)
    nn.functional.cross_entropy(head(torch.randn(3, 8)), torch.tensor([0, 1, 2])).backward()
    assert head.proxies.grad.abs().sum() > 0
    assert expected.shape == (1,)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_an_empty_head_is_a_clear_error(tmp_path, command):
    with pytest.raises(ImprintError, match="no proxies yet; fit first, or give ckpt_path"):
        getattr(trainer(tmp_path), command)(classifier(), Points())


def test_a_class_without_images_is_named(tmp_path):
    names = ["shirt", "shoe", "bag", "hat"]
    with pytest.raises(ImprintError, match=r"class 3 \('hat'\) has no training sample"):
        trainer(tmp_path).fit(classifier(), Points(class_names=names))


def test_data_of_another_task_are_refused(tmp_path):
    model = classifier()
    trainer(tmp_path).fit(model, Points(class_names=["a", "b", "c"]))
    with pytest.raises(ImprintError, match=r"imprinted for the classes \[a, b, c\] \(3\)") as error:
        trainer(tmp_path).test(model, Points(class_names=["a", "B", "c"]), verbose=False)
    assert "'B' is none of the head's; did you mean 'b'?" in str(error.value)
    with pytest.raises(ImprintError, match="some names stand for two classes"):
        trainer(tmp_path).test(model, Points(class_names=["a", "b", "b"]), verbose=False)
    with pytest.raises(ImprintError, match="label 3 is out of range for a head of 3 classes"):
        trainer(tmp_path).test(model, Points(y=LABELS + 3), verbose=False)


@pytest.mark.parametrize("names", [["c", "a", "b"], np.array(["c", "a", "b"]), ("c", "a", "b")])
def test_classes_in_another_order_are_measured_by_name(tmp_path, names):
    model = classifier()
    trainer(tmp_path).fit(model, Points(class_names=["a", "b", "c"]))
    # One of the two samples of "a" lies where those of "b" are.
    x = POINTS.clone()
    x[0] = POINTS[2]
    run = trainer(tmp_path)
    run.test(model, Points(x, (LABELS + 1) % 3, class_names=names), verbose=False)
    assert run.callback_metrics["test/accuracy"] == pytest.approx(5 / 6)
    assert model.class_accuracy.tolist() == [0.5, 1, 1]


def test_some_of_the_classes_are_measured_by_name_and_the_others_not_at_all(tmp_path):
    model = classifier()
    trainer(tmp_path).fit(model, Points(class_names=["a", "cafe\u0301", "c"]))
    of_two = LABELS != 0
    data = Points(POINTS[of_two], 2 - LABELS[of_two], class_names=["c", "caf\u00e9"])
    run = trainer(tmp_path)
    run.test(model, data, verbose=False)
    assert run.callback_metrics["test/accuracy"] == run.callback_metrics["test/macro_f1"] == 1
    assert model.class_accuracy[1:].tolist() == [1, 1]
    assert model.class_accuracy[0].isnan()
    assert "test/accuracy/a" not in run.callback_metrics
    data = Points(POINTS, LABELS, class_names=["c", "a"])
    with pytest.raises(ImprintError, match="label 2 is out of range for a head of 2 classes"):
        trainer(tmp_path).test(model, data, verbose=False)


@pytest.mark.parametrize("recipe", ["auto", "qi", "kernel", "lda"])
def test_a_single_class_is_measured(tmp_path, recipe):
    model = ImprintedClassifier(nn.Identity(), recipe)
    run = trainer(tmp_path)
    run.fit(model, Points(y=LABELS * 0, class_names=["a"]))
    assert run.callback_metrics["val/accuracy"] == run.callback_metrics["val/macro_f1"] == 1
    assert model.class_accuracy.tolist() == [1]


def test_embeddings_that_are_not_finite_name_the_batch(tmp_path):
    x = POINTS.clone()
    x[5, 0] = torch.nan
    with pytest.raises(ImprintError, match="batch 1: 1 of 2 embeddings .* sample 1"):
        trainer(tmp_path).fit(classifier(), Points(x))


def test_labels_that_are_not_numbers_of_classes_are_refused(tmp_path):
    with pytest.raises(ImprintError, match="expected one integer a sample"):
        trainer(tmp_path).fit(classifier(), Points(y=LABELS.float()))


def test_a_failed_fit_keeps_the_checkpoint_of_the_one_before(tmp_path):
    run = trainer(tmp_path)
    run.fit(classifier(), Points())
    run.save_checkpoint(tmp_path / "it.ckpt")
    before = (tmp_path / "it.ckpt").read_bytes()
    with pytest.raises(ImprintError):
        trainer(tmp_path).fit(classifier(), Points(class_names=list("abcd")))
    assert (tmp_path / "it.ckpt").read_bytes() == before


def test_a_checkpoint_names_its_weights_but_not_where_they_lie(tmp_path):
    weights = tmp_path / "secret_folder" / "lite0.pt"
    weights.parent.mkdir()
    from imprint_pl.embedding.backbone import load_backbone

    torch.save(load_backbone("efficientnet_lite0").model.state_dict(), weights)
    model = ImprintedClassifier(
        "efficientnet_lite0", "qi", image_size=32, weights=str(weights), pretrained=True
    )
    run = trainer(tmp_path)
    x = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    run.fit(model, Points(x))
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert b"secret_folder" not in (tmp_path / "it.ckpt").read_bytes()
    assert torch.load(tmp_path / "it.ckpt", weights_only=True)["backbone"]["weights"] == "lite0.pt"
    # The embedded weights are the same, whatever the file was called.
    loaded = ImprintedClassifier.load_from_checkpoint(tmp_path / "it.ckpt")
    assert torch.equal(loaded(x), model(x))
    with pytest.warns(UserWarning, match="imprinted with image_size=32, this model has"):
        ImprintedClassifier.load_from_checkpoint(tmp_path / "it.ckpt", image_size=48)


class Failing(Points):
    def train_dataloader(self):
        raise OSError("no such disk")


@pytest.mark.parametrize("data", [Points, Failing])
def test_no_warning_filter_outlives_a_fit(data, tmp_path, recwarn):
    before = list(warnings.filters)
    model = classifier()
    assert warnings.filters == before
    run = trainer(tmp_path)
    for _ in range(2):
        with contextlib.suppress(OSError):
            run.fit(model, data())
        assert warnings.filters == before
    assert not [w for w in recwarn if "configure_optimizers" in str(w.message)]
    assert not [w for w in recwarn if "eval mode" in str(w.message)]
    assert sum(isinstance(c, IntendedWarnings) for c in run.callbacks) == 1
