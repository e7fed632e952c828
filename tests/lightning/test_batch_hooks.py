"""A pass through somebody's module sees what a Trainer's forward would see: batch hooks, layers of
`configure_model`, modules that `torch.compile` has run, precision, both Lightning packages.
"""

import copy
import sys

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintCallback, ImprintedClassifier, ImprintError, attach, detach, extend
from imprint_pl.data import Digits
from imprint_pl.data.lightning_packages import both
from imprint_pl.embedding import embed
from imprint_pl.gallery import ImprintGallery
from imprint_pl.lightning.outsiders import Outsiders

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*",
    "ignore:.*smaller than the logging interval.*",
    "ignore:.*have overridden `on_after_batch_transfer`.*",
)

CLASSES, SIZE = 4, 16


def data(seed=0):
    """Inputs as they come, far from where the body tells them apart, and as a hook makes them."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(CLASSES).repeat(25)
    ready = torch.randn(CLASSES, SIZE, generator=torch.Generator().manual_seed(0))[y]
    ready = ready + 0.1 * torch.randn(len(y), SIZE, generator=generator)
    return 500 + 40 * ready, ready, y


RAW, READY, Y = data()


def batches(x=RAW, y=Y):
    return DataLoader(TensorDataset(x, y), 10)


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(SIZE, 32), nn.ReLU())
        self.fc = nn.Linear(32, CLASSES)

    def forward(self, x):
        return self.fc(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-6)


class Data(LightningDataModule):
    def train_dataloader(self):
        return batches()

    val_dataloader = test_dataloader = train_dataloader


class After:
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return (batch[0] - 500) / 40, batch[1]


class Before:
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return [(batch[0] - 500) / 40, *batch[1:]]


class Moving:
    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        x, y = batch
        return (x.to(device) - 500) / 40, y.to(device)


class InTraining:
    """Asks what the Trainer does, as tutorials of kornia do."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            raise RuntimeError("only for training")
        return (batch[0] - 500) / 40, batch[1]


class WhereATrainerIs:
    """Does nothing without a Trainer, as torchgeo's data modules."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer:
            return (batch[0] - 500) / 40, batch[1]
        return batch


HOOKS = [After, Before, Moving, InTraining, WhereATrainerIs]


def expected(recipe="qi"):
    return attach(Lit(), "fc", data=batches(READY), recipe=recipe).proxies


def check(head):
    torch.testing.assert_close(head.proxies, expected(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("hook", HOOKS)
def test_attach_calls_the_batch_hooks_of_data_module_and_module(hook):
    hooked = type("Hooked", (hook, Data), {})()
    module = Lit()
    check(attach(module, "fc", data=hooked, recipe="qi"))
    assert (hooked.trainer, module._trainer) == (None, None)
    for given in (batches(), (RAW, Y), Data()):
        module = type("HookedLit", (hook, Lit), {})()
        check(attach(module, "fc", data=given, recipe="qi"))
        assert module._trainer is None


def test_a_hook_of_the_data_module_takes_the_place_of_the_modules():
    class Wrong:
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return -batch[0], batch[1]

    module = type("HookedLit", (Wrong, Lit), {})()
    check(attach(module, "fc", data=type("Hooked", (After, Data), {})(), recipe="qi"))
    # Hook by hook: those that the DataModule leaves alone are the module's.
    module = type("HookedLit", (After, Lit), {})()
    check(attach(module, "fc", data=Data(), recipe="qi"))


@pytest.mark.parametrize("hook", HOOKS)
def test_extend_calls_the_hooks_for_old_and_new_classes(hook):
    old, new = Y < 3, Y == 3
    results = []
    for raw in (False, True):
        x = RAW if raw else READY
        for given in (x[new], batches(x[new], Y[new])):
            module = type("HookedLit", (hook, Lit), {})() if raw else Lit()
            module.fc = nn.Linear(32, 3)
            torch.nn.init.ones_(module.fc.weight)
            layer = extend(module, "fc", {"new": given}, old_data=(x[old], Y[old]), recipe="qi")
            results.append(layer.head.proxies)
    # A DataModule's hooks are for the new classes, too.
    own = type("Old", (hook, Data), {"train_dataloader": lambda self: batches(RAW[old], Y[old])})
    module = Lit()
    module.fc = nn.Linear(32, 3)
    layer = extend(module, "fc", {"new": RAW[new]}, old_data=own(), recipe="qi")
    results.append(layer.head.proxies)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)
    module = type("HookedLit", (hook, Lit), {})()
    alone = extend(module, "fc", {"new": RAW[new]}).weight
    torch.testing.assert_close(
        alone, extend(Lit(), "fc", {"new": READY[new]}).weight, rtol=1e-3, atol=1e-3
    )


def test_a_data_module_of_a_run_before_has_no_say():
    callback = ImprintCallback("fc", "qi")
    run = trainer(callback)
    run.fit(Lit(), type("Hooked", (After, Data), {"class_names": list("abcd")})())
    assert callback.head.class_names == list("abcd")
    run.fit_loop.epoch_progress.reset()
    run.fit(Lit(), batches(READY), batches(READY))
    assert callback.head.class_names == []
    torch.testing.assert_close(callback.head.proxies, expected(), rtol=0, atol=1e-3)


def test_tensors_that_a_hook_cannot_take_are_refused_in_a_sentence():
    class OfDicts:
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"image": (batch["image"] - 500) / 40, "label": batch["label"]}

    def fresh():
        module = Lit()
        module.fc = nn.Linear(32, CLASSES)
        return module

    dicts = [{"image": RAW, "label": Y}]
    own = type("Dicts", (OfDicts, Data), {"train_dataloader": lambda self: dicts})()
    with pytest.raises(ImprintError, match="cannot take a batch .*: give a loader whose batches"):
        extend(fresh(), "fc", {"new": RAW}, old_data=own)
    extend(fresh(), "fc", {"new": dicts}, old_data=own)
    module = type("HookedLit", (OfDicts, Lit), {})()
    with pytest.raises(ImprintError, match="cannot take a batch .*: give a loader whose batches"):
        attach(module, "fc", data=(RAW, Y))


@pytest.mark.parametrize("when", ["fit_start", "validation", "train_end"])
def test_a_callback_with_data_of_its_own_calls_the_hooks_of_that_data(when, tmp_path):
    callback = ImprintCallback("fc", "qi", when, type("Own", (WhereATrainerIs, Data), {})())
    ready = batches(READY)
    trainer(callback, folder=tmp_path).fit(Lit(), ready, ready)
    torch.testing.assert_close(callback.head.proxies, expected(), rtol=0, atol=1e-3)
    assert callback.data.trainer is None


def trainer(*callbacks, folder=None, **options):
    return quiet_trainer(callbacks=list(callbacks), default_root_dir=folder, **options)


def test_after_a_fit_attach_has_its_precision_and_its_trainer_trains_for_the_pass():
    module, own = type("HookedLit", (InTraining, Lit), {})(), trainer(precision="bf16-true")
    module.trainer = own
    module.to(torch.bfloat16)
    head = attach(module, "fc", data=batches(), recipe="qi")
    torch.testing.assert_close(head.proxies.float(), expected(), rtol=0, atol=0.02)
    assert module.trainer is own
    assert own.state.stage is None


def test_outsiders_go_through_the_hooks_of_their_own_data(tmp_path):
    seen = []

    class Embedder(nn.Module):
        def forward(self, x):
            seen.append((x.mean().item(), torch.is_autocast_enabled("cpu")))
            return x

    outside = type("Outside", (WhereATrainerIs, Data), {})()
    model = ImprintedClassifier(Embedder(), "qi")
    run = trainer(Outsiders(outside), folder=tmp_path, precision="bf16-mixed")
    run.fit(model, batches(READY), batches(READY))
    assert run.callback_metrics["val/outsiders_auroc"] == pytest.approx(0.5, abs=0.01)
    assert max(abs(mean) for mean, _ in seen) < 5
    assert all(autocast for _, autocast in seen)


def test_a_gallery_and_a_cache_do_not_pass_by_the_hooks(tmp_path):
    class Hooked(Digits):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return torch.zeros_like(batch[0]), batch[1]

    class Own(ImprintedClassifier):
        def embed(self, images):
            seen.append(images.float().mean().item())
            return super().embed(images) + 1

    seen = []
    hooked = Hooked(classes="short", shots=5)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    preprocess = {"size": 8, "mean": (0.5,), "std": (0.5,)}
    model = Own(backbone, "qi", preprocess=preprocess)
    trainer(ImprintGallery(folder=tmp_path), folder=tmp_path).fit(model, hooked)
    assert set(seen) == {0.0}
    with pytest.raises(ImprintError, match="Hooked.on_before_batch_transfer may change batches"):
        embed(model.backbone, hooked, tmp_path, name="mine")


# Modules that torch.compile has run.


def test_a_module_that_was_compiled_and_run_can_be_attached_to_and_extended():
    module = nn.Sequential(nn.Linear(SIZE, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    module.compile(backend="eager")
    with torch.no_grad():
        module(READY[:10])
        module(READY)
        attach(module, "2", data=batches(READY), recipe="qi")
        assert torch.equal(module(READY).argmax(1), Y)
        detach(module, "2")
        extend(module, "2", {"new": READY[:5]}, old_data=(READY, Y))
        assert module(READY).shape == (100, CLASSES + 1)


def test_validation_of_a_compiled_module_is_watched():
    module = Lit()
    plain = trainer()
    plain.fit(torch.compile(module, backend="eager"), batches(READY), batches(READY))
    run = trainer(ImprintCallback("fc", "qi", when="validation"))
    run.fit(module, batches(READY), batches(READY))
    assert run.callback_metrics["imprinted/accuracy"] == 1


# Layers that configure_model makes.


class Late(Lit):
    def __init__(self):
        LightningModule.__init__(self)
        self.body = self.fc = None

    def configure_model(self):
        if self.fc is None:
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(SIZE, 32), nn.ReLU())
            self.fc = nn.Linear(32, CLASSES)


class LateEachTime(Late):
    def configure_model(self):
        self.fc = None
        super().configure_model()


@pytest.mark.parametrize("kind", [Late, LateEachTime])
@pytest.mark.parametrize("more", [[], [EMAWeightAveraging]], ids=["alone", "averaged"])
@pytest.mark.parametrize("when", ["fit_start", "validation", "train_end"])
def test_a_layer_of_configure_model_is_found_before_the_optimizer_is_built(when, more, kind):
    module, callback = kind(), ImprintCallback("fc", "qi", when)
    run = trainer(*(cls() for cls in more), callback)
    run.fit(module, batches(READY), batches(READY))
    torch.testing.assert_close(callback.head.proxies, expected(), rtol=0, atol=1e-3)
    assert (module.fc is callback.head) == (when != "validation")
    assert "configure_model" not in module.__dict__
    if when == "fit_start":
        trained = [p for group in run.optimizers[0].param_groups for p in group["params"]]
        assert any(parameter is callback.head.proxies for parameter in trained)


def test_attach_and_extend_find_a_layer_of_configure_model():
    check(attach(Late(), "fc", data=(READY, Y), recipe="qi"))
    assert extend(Late(), "fc", {"new": READY[:5]}).out_features == CLASSES + 1
    with pytest.raises(ImprintError, match="Late has no layer 'fd'; did you mean 'fc'"):
        attach(Late(), "fd")


class Hidden(Late):
    fc = None

    def __init__(self):
        LightningModule.__init__(self)
        self.body = None


@pytest.mark.parametrize("when", ["fit_start", "validation", "train_end"])
def test_a_layer_that_an_attribute_of_the_class_hides_is_found_and_replaced(when):
    module, callback = Hidden(), ImprintCallback("fc", "qi", when)
    run = trainer(callback)
    run.fit(module, batches(READY), batches(READY))
    torch.testing.assert_close(callback.head.proxies, expected(), rtol=0, atol=1e-3)
    assert (module.fc is callback.head) == (when != "validation")
    if when == "train_end":
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(module)(READY).argmax(1), Y)
            layer = detach(module, "fc")
            assert module.fc is layer
            assert torch.equal(module(READY), layer(module.body(READY)))


# `import pytorch_lightning` beside `import lightning`.


def twin():
    return pytest.importorskip("pytorch_lightning")


def test_both_knows_the_classes_of_both_packages():
    pl = twin()
    assert both(LightningModule, Trainer) == (
        LightningModule,
        pl.LightningModule,
        Trainer,
        pl.Trainer,
    )
    fabric = pytest.importorskip("lightning_fabric.plugins.environments")
    from lightning.fabric.plugins.environments import LightningEnvironment

    assert both(LightningEnvironment)[1] is fabric.LightningEnvironment


def test_the_other_package_is_not_imported_for_it(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    assert both(LightningModule) == (LightningModule,)
    assert "pytorch_lightning" not in sys.modules


def other(kind):
    """The same class on top of pytorch_lightning."""
    pl = twin()
    base = pl.LightningDataModule if issubclass(kind, LightningDataModule) else pl.LightningModule
    plain = (LightningModule, LightningDataModule)
    body = {}
    for cls in reversed(kind.__mro__):
        if cls not in plain and not any(issubclass(p, cls) for p in plain):
            body |= {n: v for n, v in vars(cls).items() if n not in ("__dict__", "__weakref__")}

    def __init__(self):
        base.__init__(self)
        if base is pl.LightningModule:
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(SIZE, 32), nn.ReLU())
            self.fc = nn.Linear(32, CLASSES)

    return type(kind.__name__, (base,), body | {"__init__": __init__})


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_trainer_of_pytorch_lightning_imprints_in_its_precision(precision):
    pl = twin()
    callback = ImprintCallback("fc", "qi")
    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    run = pl.Trainer(
        max_epochs=1, accelerator="cpu", precision=precision, callbacks=[callback], **options
    )
    run.fit(other(Lit)(), other(type("Hooked", (After, Data), {}))())
    atol = 0.02 if precision == "bf16-true" else 1e-3
    torch.testing.assert_close(callback.head.proxies.float(), expected(), rtol=0, atol=atol)


@pytest.mark.parametrize("when", ["fit_start", "train_end"])
def test_averaging_of_pytorch_lightning_is_known(when):
    pl = twin()
    from pytorch_lightning.callbacks import EMAWeightAveraging as OtherEMA

    options = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    module, ours = other(Lit)(), ImprintCallback("fc", "qi", when)
    run = pl.Trainer(
        max_epochs=1, callbacks=[OtherEMA(decay=0.9), ours], accelerator="cpu", **options
    )
    run.fit(module, batches(READY), batches(READY))
    assert run.validate(module, batches(READY), verbose=False)[0]["accuracy"] == 1
    late = pl.Trainer(
        max_epochs=1, callbacks=[ours, OtherEMA(decay=0.9)], accelerator="cpu", **options
    )
    if when == "train_end":
        with pytest.raises(ImprintError, match="give ImprintCallback after it"):
            late.fit(other(Lit)(), batches(READY))


def test_attach_knows_modules_and_data_of_pytorch_lightning():
    twin()
    hooked = other(type("Hooked", (InTraining, Data), {}))()
    check(attach(other(Lit)(), "fc", data=hooked, recipe="qi"))
    check(attach(Lit(), "fc", data=hooked, recipe="qi"))
    loaders = sys.modules["pytorch_lightning.utilities"].CombinedLoader([batches(), batches()])
    with pytest.raises(ImprintError, match="CombinedLoader of loaders: give the one"):
        attach(other(Lit)(), "fc", data=loaders)
