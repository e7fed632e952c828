"""What people do with any LightningModule: several loaders, hyperparameters of their own,
subclasses, strict loading."""

from math import nan
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BatchSizeFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from test_classifier import LABELS, POINTS, Points, classifier, trainer
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from imprint_pl import ImprintedClassifier, ImprintError, imprint
from imprint_pl.cli.wandb_results import WandbResults
from imprint_pl.lightning.outsiders import Outsiders

CLEAN = DataLoader(TensorDataset(POINTS, LABELS), batch_size=4)
SHIFTED = DataLoader(TensorDataset(POINTS[:3], (LABELS[:3] + 1) % 3), batch_size=2)


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(zip(POINTS, LABELS, strict=True))


def expect_head(model):
    torch.testing.assert_close(model.head.proxies, imprint(POINTS, LABELS, "qi").proxies)


# Several training loaders.


@pytest.mark.parametrize(
    "loaders", [[CLEAN], {"a": CLEAN}, [[CLEAN]], CombinedLoader([CLEAN], "max_size")]
)
def test_a_collection_of_one_training_loader_is_that_loader(tmp_path, loaders):
    model = ImprintedClassifier(nn.Identity(), "qi", keep="embeddings")
    trainer(tmp_path).fit(model, loaders, CLEAN)
    expect_head(model)


@pytest.mark.parametrize(
    ("loaders", "kind"),
    [
        ([CLEAN, CLEAN], "list of 2"),
        ({"a": CLEAN, "b": CLEAN}, "dict of 2"),
        (CombinedLoader([CLEAN, CLEAN, CLEAN], "min_size"), "list of 3"),
        (CombinedLoader([CLEAN, CLEAN], "sequential"), "list of 2"),
    ],
)
def test_several_training_loaders_are_refused_in_one_sentence(tmp_path, loaders, kind):
    with pytest.raises(ImprintError, match=f"the training data is a {kind} loaders: give the one"):
        trainer(tmp_path).fit(classifier(), loaders)


# Several loaders to measure.


def check_class_accuracy(found, expected=((1, 1, 1), (nan, 0, 0))):
    """Of the shifted loader, which has no sample of class 0."""
    expected = torch.tensor(expected, dtype=found.dtype).view(found.shape)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_each_validation_loader_has_its_own_figures(tmp_path):
    save = ModelCheckpoint(tmp_path, monitor="val/accuracy/dataloader_idx_1", mode="max")
    model, run = classifier(), trainer(tmp_path, callbacks=[save])
    run.fit(model, CLEAN, [CLEAN, SHIFTED])
    metrics = run.callback_metrics
    assert metrics["val/accuracy/dataloader_idx_0"] == 1
    assert metrics["val/accuracy/dataloader_idx_1"] == 0
    assert metrics["val/macro_f1/dataloader_idx_0"] == 1
    assert metrics["val/accuracy/2/dataloader_idx_0"] == 1
    assert metrics["val/accuracy/2/dataloader_idx_1"] == 0
    assert "val/accuracy" not in metrics
    assert save.best_model_score == 0
    check_class_accuracy(model.class_accuracy)


@pytest.mark.parametrize("command", ["validate", "test"])
def test_each_loader_has_its_own_result_and_one_keeps_the_plain_names(tmp_path, command):
    model, run = classifier(), trainer(tmp_path)
    run.fit(model, CLEAN)
    stage = "val" if command == "validate" else "test"
    measure = getattr(run, command)
    clean, shifted = measure(model, [CLEAN, SHIFTED], verbose=False)
    assert clean[f"{stage}/accuracy/dataloader_idx_0"] == 1
    assert shifted[f"{stage}/accuracy/dataloader_idx_1"] == 0
    assert not any("dataloader_idx_1" in name for name in clean)
    assert not any("dataloader_idx_0" in name for name in shifted)
    for loaders in (SHIFTED, [SHIFTED], {"it": SHIFTED}):
        (only,) = measure(model, loaders, verbose=False)
        assert only[f"{stage}/accuracy"] == 0
        assert not any("dataloader_idx" in name for name in only)
        check_class_accuracy(model.class_accuracy, [[nan, 0, 0]])


def test_a_loader_whose_length_nobody_knows_has_its_own_figures_too(tmp_path):
    model, run = classifier(), trainer(tmp_path)
    run.fit(model, CLEAN)
    loaders = {"stream": DataLoader(Unsized(), batch_size=4), "shifted": SHIFTED}
    run.test(model, loaders, verbose=False)
    assert run.callback_metrics["test/accuracy/dataloader_idx_0"] == 1
    assert run.callback_metrics["test/accuracy/dataloader_idx_1"] == 0
    check_class_accuracy(model.class_accuracy)


def test_confusion_and_outsiders_are_each_loaders_own(tmp_path):
    results, outsiders = WandbResults(), Outsiders(Points(-POINTS))
    model, run = classifier(accept=1.0), trainer(tmp_path, callbacks=[results, outsiders])
    run.fit(model, CLEAN)
    run.test(model, [CLEAN, SHIFTED], verbose=False)
    assert results.confusion.tolist() == [[2, 0, 0], [0, 2, 0], [0, 0, 2]]
    second = results.predictions[1].confusion.dense()
    assert second.tolist() == [[0, 0, 0], [2, 0, 0], [0, 1, 0]]
    for loader in (0, 1):
        assert f"test/outsiders_auroc/dataloader_idx_{loader}" in run.callback_metrics
        assert f"test/accepted/dataloader_idx_{loader}" in run.callback_metrics


def test_a_test_that_fails_leaves_no_hook_on_the_head(tmp_path):
    class Fails(Callback):
        def on_test_batch_end(self, *_):
            raise OSError("the plug was pulled")

    callbacks = [WandbResults(), Outsiders(Points(-POINTS)), Fails()]
    model, run = classifier(accept=1.0), trainer(tmp_path, callbacks=callbacks)
    run.fit(model, CLEAN)
    with pytest.raises(OSError, match="plug"):
        run.test(model, CLEAN, verbose=False)
    assert not model.head._forward_hooks


# Hyperparameters.


class Mine(LightningDataModule):
    def __init__(self, seed=7, recipe="mine", k=None, root=Path("photos")):
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self):
        return CLEAN

    val_dataloader = test_dataloader = train_dataloader


def test_names_that_module_and_data_share_are_logged_apart(tmp_path):
    logger = CSVLogger(tmp_path)
    model = classifier()
    run = trainer(tmp_path, logger=logger, enable_checkpointing=False)
    run.fit(model, Mine())
    logged = logger.experiment.hparams
    assert (logged["seed"], logged["model/seed"]) == (7, 0)
    assert (logged["recipe"], logged["model/recipe"]) == ("mine", "qi")
    # One value stays one name, and without such data all names are plain.
    assert "model/k" not in logged
    assert "k" in logged
    assert model.hparams.seed == 0
    other = CSVLogger(tmp_path / "other")
    trainer(tmp_path, logger=other).fit(classifier(), Points())
    assert other.experiment.hparams["seed"] == 0


def test_a_datas_hyperparameter_that_is_an_object_leaves_the_checkpoint_readable(tmp_path):
    run = trainer(tmp_path, enable_checkpointing=False)
    run.fit(classifier(), Mine())
    with pytest.warns(UserWarning, match=r"'root' is no plain value \(PosixPath\) and is left out"):
        run.save_checkpoint(tmp_path / "it.ckpt")
    loaded = ImprintedClassifier.load_from_checkpoint(tmp_path / "it.ckpt", backbone=nn.Identity())
    expect_head(loaded)
    assert Mine.load_from_checkpoint(tmp_path / "it.ckpt").hparams.seed == 7


def test_a_callback_whose_state_takes_code_to_read_is_what_the_message_names(tmp_path):
    class Keeper(Callback):
        def state_dict(self):
            return {"where": Path("here")}

    run = trainer(tmp_path, callbacks=[Keeper()])
    run.fit(classifier(), CLEAN)
    run.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(ImprintError, match=r"holds a pathlib.PosixPath, which takes code to make"):
        ImprintedClassifier.load_from_checkpoint(tmp_path / "it.ckpt", backbone=nn.Identity())


# Subclasses.


class WithKeywords(ImprintedClassifier):
    def __init__(self, mine=3, **kwargs):
        super().__init__(**kwargs)
        self.mine = mine


class WithFixedRecipe(ImprintedClassifier):
    def __init__(self, mine=3, **kwargs):
        super().__init__(recipe="qi", **kwargs)
        self.mine = mine


class WithOwnSignature(ImprintedClassifier):
    def __init__(self, settings):
        super().__init__(None, settings["recipe"], k=settings["k"])
        self.mine = settings["mine"]
        self.save_hyperparameters()


class WithArguments(ImprintedClassifier):
    def __init__(self, *args, mine=3, **kwargs):
        super().__init__(*args, **kwargs)
        self.mine = mine


@pytest.mark.parametrize(
    ("make", "loaded_with", "recipe", "k"),
    [
        (lambda: WithKeywords(5, recipe="robust", k=2, backbone=None), True, "robust", 2),
        (lambda: WithFixedRecipe(5, backbone=None), True, "qi", None),
        (lambda: WithOwnSignature(dict(recipe="robust", k=2, mine=5)), False, "robust", 2),
        (lambda: WithArguments(None, "robust", k=2, mine=5), True, "robust", 2),
    ],
)
def test_a_subclass_loads_with_what_it_was_made_of(tmp_path, make, loaded_with, recipe, k):
    model, run = make(), trainer(tmp_path)
    run.fit(model, CLEAN)
    run.save_checkpoint(tmp_path / "it.ckpt")
    keywords = {"backbone": None} if loaded_with else {}
    loaded = type(model).load_from_checkpoint(tmp_path / "it.ckpt", **keywords)
    assert type(loaded) is type(model)
    assert loaded.mine == 5
    assert loaded.parts.parameters["recipe"] == recipe
    assert loaded.parts.parameters.get("k") == k
    assert torch.equal(loaded(POINTS), model(POINTS))


def test_what_a_subclass_cannot_get_from_the_file_is_a_keyword(tmp_path):
    class WithNet(ImprintedClassifier):
        def __init__(self, net, where, **kwargs):
            super().__init__(net, **kwargs)
            self.where = where

    net = nn.Linear(2, 2)
    model = WithNet(net, Path("here"), recipe="qi")
    run = trainer(tmp_path, enable_checkpointing=False)
    run.fit(model, CLEAN)
    with pytest.warns(UserWarning, match="is no plain value"):
        run.save_checkpoint(tmp_path / "it.ckpt")
    with pytest.raises(ImprintError, match="WithNet cannot be made .* 'net' and 'where'.*keywords"):
        WithNet.load_from_checkpoint(tmp_path / "it.ckpt")
    loaded = WithNet.load_from_checkpoint(tmp_path / "it.ckpt", net=net, where=1)
    assert torch.equal(loaded(POINTS), model(POINTS))
    with pytest.raises(ImprintError, match="has no argument 'recpie'; did you mean 'recipe'"):
        WithNet.load_from_checkpoint(tmp_path / "it.ckpt", recpie="qi")


# Strict loading.


@pytest.mark.parametrize("save_backbone", [False, True])
def test_a_good_file_loads_strictly_with_and_without_its_backbone(tmp_path, save_backbone):
    backbone = nn.Linear(2, 3)
    model, run = ImprintedClassifier(backbone, "qi", save_backbone=save_backbone), trainer(tmp_path)
    run.fit(model, CLEAN)
    run.save_checkpoint(path := tmp_path / "it.ckpt")
    for strict in (True, False, None):
        loaded = ImprintedClassifier.load_from_checkpoint(path, backbone=backbone, strict=strict)
        assert torch.equal(loaded(POINTS), model(POINTS))
    state = torch.load(path, weights_only=True)["state_dict"]
    assert any(name.startswith("backbone.") for name in state) == save_backbone
    for strict in (True, False):
        other = ImprintedClassifier(backbone, "qi")
        other.load_state_dict(state, strict=strict)
        assert torch.equal(other(POINTS), model(POINTS))
    inner = nn.ModuleDict({"it": ImprintedClassifier(backbone, "qi")})
    inner.load_state_dict({f"it.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(inner["it"](POINTS), model(POINTS))
    strictly = ImprintedClassifier(backbone, "qi")
    strictly.strict_loading = True
    trainer(tmp_path).test(strictly, CLEAN, ckpt_path=path, verbose=False)
    assert torch.equal(strictly(POINTS), model(POINTS))


def test_strict_names_what_only_the_model_has(tmp_path):
    class Wider(ImprintedClassifier):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.extra = nn.Linear(2, 2)

    run = trainer(tmp_path)
    run.fit(ImprintedClassifier(None, "qi"), CLEAN)
    run.save_checkpoint(path := tmp_path / "it.ckpt")
    with pytest.raises(ImprintError, match=r"Wider differ in 'extra.weight': strict=False passes"):
        Wider.load_from_checkpoint(path, backbone=None, strict=True)
    expect_head(Wider.load_from_checkpoint(path, backbone=None))
    with pytest.raises(RuntimeError, match="extra.weight"):
        Wider(backbone=None, recipe="qi").load_state_dict(run.model.state_dict())


def test_a_saved_backbone_of_another_architecture_is_called_that(tmp_path):
    run = trainer(tmp_path)
    run.fit(ImprintedClassifier(nn.Linear(2, 3), "qi", save_backbone=True), CLEAN)
    run.save_checkpoint(path := tmp_path / "it.ckpt")
    with pytest.raises(ImprintError, match="of the same architecture"):
        ImprintedClassifier.load_from_checkpoint(path, backbone=nn.Linear(2, 4))


# The Trainer's other options.


@pytest.mark.parametrize(
    "options",
    [
        dict(inference_mode=False),
        dict(barebones=True, enable_checkpointing=False),
        dict(reload_dataloaders_every_n_epochs=1),
        dict(num_sanity_val_steps=-1),
        dict(detect_anomaly=True),
        dict(deterministic=True),
        dict(precision="64-true"),
        dict(callbacks=[BatchSizeFinder(init_val=1, max_trials=1)]),
    ],
)
@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_options_of_the_trainer_leave_the_head_as_it_is(tmp_path, options):
    model, run = classifier(), trainer(tmp_path, **options)
    data = Points()
    run.fit(model, data)
    expect_head(model.float())
    assert len(torch.cat(run.predict(model, data))) == len(POINTS)
