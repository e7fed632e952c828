"""Tools that average a model's weights leave a head's classes and constants alone: those of torch,
timm and Lightning, before and after the imprint.
"""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import (
    ImprintCallback,
    ImprintedClassifier,
    ImprintedHead,
    ImprintError,
    attach,
    detach,
    imprint,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*smaller than the logging interval.*"
)

CLASSES, SIZE = 12, 16
DECAYS = (0.5, 0.9, 0.95, 0.99, 0.997, 0.999, 0.9995, 0.9999, 0.99995, 0.99999)
# Fitted, not only normalised: a bias, and maps with constants of their own.
RECIPES = ("qi", "lda", "whitened", "kernel")


def blobs():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(CLASSES).repeat(10)
    centres = 3 * torch.randn(CLASSES, SIZE, generator=generator)
    return centres[y] + 0.2 * torch.randn(len(y), SIZE, generator=generator), y


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, 32), nn.ReLU(), nn.Linear(32, CLASSES))


TOOLS = {
    "AveragedModel": lambda m, d: AveragedModel(m, avg_fn=get_ema_avg_fn(d), use_buffers=True),
    "multi": lambda m, d: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(d), use_buffers=True),
    "equal weights": lambda m, d: AveragedModel(m, use_buffers=True),
    "without buffers": lambda m, d: AveragedModel(m, avg_fn=get_ema_avg_fn(d)),
    "ModelEma": lambda m, d: ModelEma(m, decay=d),
    "ModelEmaV2": lambda m, d: ModelEmaV2(m, decay=d),
    "ModelEmaV3": lambda m, d: ModelEmaV3(m, decay=d),
}


def update(tool, model, times=1):
    step = tool.update_parameters if isinstance(tool, AveragedModel) else tool.update
    for _ in range(times):
        step(model)


def averaged(tool):
    return tool.ema if isinstance(tool, ModelEma) else tool.module


def labels(module, x):
    with torch.no_grad():
        return module.eval()(x).argmax(1)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_average_gives_the_heads_labels_at_every_decay(recipe, tool):
    x, y = blobs()
    model = net()
    head = attach(model, "2", data=(x, y), recipe=recipe)
    constants = {name: head.state_dict()[name] for name in ("bias", "proxy_classes")}
    for decay in DECAYS:
        average = TOOLS[tool](model, decay)
        update(average, model, times=20)
        inner = averaged(average)
        assert torch.equal(labels(inner, x), labels(model, x)), decay
        saved = inner.state_dict()
        for name, value in constants.items():
            assert torch.equal(saved[f"2.{name}"], value), (name, decay)
        loaded = net()
        attach(loaded, "2")
        loaded.load_state_dict(saved)
        assert torch.equal(labels(loaded, x), labels(model, x)), decay


def test_what_a_norm_has_learned_does_not_drift_in_a_long_average():
    # decay·w + (1 − decay)·w in float32 loses up to a percent of w at such a decay.
    x, y = blobs()
    model = nn.Sequential(imprint(x, y, "whitened"))
    average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.99999), use_buffers=True)
    update(average, model, times=300)
    for name in ("mean", "matrix"):
        own, theirs = (getattr(m[0].norm_inf.steps[0], name) for m in (model, average.module))
        assert torch.equal(own, theirs)


def test_a_heads_constants_move_copy_and_pickle_with_it_but_are_no_buffers():
    x, y = blobs()
    head = imprint(x, y, "whitened")
    assert not list(head.buffers())
    expected = head(x)
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(x), expected)
        assert other.proxy_classes.data_ptr() != head.proxy_classes.data_ptr()
    double = copy.deepcopy(head).double()
    assert (double.bias.dtype, double.proxy_classes.dtype) == (torch.float64, torch.int64)
    assert double.norm_inf.steps[0].matrix.dtype == torch.float64
    assert {t.device.type for t in copy.deepcopy(head).to("meta").state_dict().values()} == {
        "meta",
        "cpu",  # the settings
    }
    # A state dict is a copy: what is written into it does not reach the head.
    head.state_dict()["proxy_classes"].zero_()
    assert head.proxy_classes.tolist() == y.unique().tolist()


def test_a_state_dict_keeps_its_keys_and_names_one_that_is_missing_or_averaged():
    x, y = blobs()
    state = imprint(x, y, "lda").state_dict()
    assert set(state) == {"proxies", "log_scale", "bias", "proxy_classes", "_extra_state"}
    head = ImprintedHead()
    head.load_state_dict(state)
    assert torch.equal(head.proxy_classes, torch.arange(CLASSES))
    with pytest.raises(RuntimeError, match='Missing key.*"proxy_classes"'):
        ImprintedHead().load_state_dict({k: v for k, v in state.items() if k != "proxy_classes"})
    with pytest.raises(RuntimeError, match='Unexpected key.*"other"'):
        ImprintedHead().load_state_dict(state | {"other": state["bias"]})
    with pytest.raises(ImprintError, match="proxy_classes is torch.float32 instead of torch.int64"):
        ImprintedHead().load_state_dict(state | {"proxy_classes": torch.zeros(CLASSES)})


# Without the first of timm's, which is no nn.Module: attach does not find it in a module.
@pytest.mark.parametrize("tool", [name for name in TOOLS if name != "ModelEma"])
def test_an_average_inside_a_module_gets_the_head_that_the_module_gets(tool):
    x, y = blobs()
    outer = nn.Module()
    outer.net = net()
    outer.average = TOOLS[tool](outer.net, 0.9)
    attach(outer, "net.2", data=(x, y), recipe="lda")
    update(outer.average, outer.net, times=3)
    assert torch.equal(labels(averaged(outer.average), x), labels(outer.net, x))
    detach(outer, "net.2")
    assert isinstance(averaged(outer.average)[2], nn.Linear)


# Inside a Trainer.


class Lit(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), 1e-4)


def trainer(folder, *callbacks, epochs=1):
    return quiet_trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=[*callbacks, ModelCheckpoint(folder, filename="last", enable_version_counter=0)],
        enable_checkpointing=True,
    )


def loader():
    return DataLoader(TensorDataset(*blobs()), 12)


AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.9999),
    "ema of 0.5": lambda: EMAWeightAveraging(decay=0.5),
    "equal weights": WeightAveraging,
    "swa": lambda: StochasticWeightAveraging(1e-4, swa_epoch_start=1),
}


def accuracy(module):
    x, y = blobs()
    return (labels(module, x) == y).float().mean().item()


@pytest.mark.parametrize("name", AVERAGING)
@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_a_fine_tuned_head_is_right_averaged_saved_resumed_and_fitted_again(name, first, tmp_path):
    def callbacks():
        both = [ImprintCallback("net.2", "lda"), AVERAGING[name]()]
        return both if first else both[::-1]

    module = Lit()
    run = trainer(tmp_path, *callbacks())
    run.fit(module, loader(), loader())
    assert run.callback_metrics["accuracy"] == accuracy(module) == 1
    assert run.validate(module, loader(), verbose=False)[0]["accuracy"] == 1
    saved = tmp_path / "last.ckpt"
    tester = trainer(tmp_path / "test", ImprintCallback("net.2"))
    assert tester.validate(Lit(), loader(), saved, verbose=False)[0]["accuracy"] == 1
    resumed = Lit()
    longer = trainer(tmp_path / "resumed", *callbacks(), epochs=2)
    longer.fit(resumed, loader(), loader(), ckpt_path=saved)
    trainer(tmp_path / "again", *callbacks()).fit(module, loader(), loader())
    for fitted in (resumed, module):
        assert accuracy(fitted) == 1
        assert fitted.net[2].proxy_classes.tolist() == list(range(CLASSES))


@pytest.mark.parametrize("name", AVERAGING)
def test_a_head_of_the_end_survives_validation_by_the_same_trainer_and_its_file(name, tmp_path):
    module, ours = Lit(), ImprintCallback("net.2", "lda", when="train_end")
    run = trainer(tmp_path, AVERAGING[name](), ours)
    run.fit(module, loader(), loader())
    assert run.validate(module, loader(), verbose=False)[0]["accuracy"] == 1
    assert accuracy(module) == 1
    # The averaging callbacks write their own copy of the module into every checkpoint.
    tester = trainer(tmp_path / "test", ImprintCallback("net.2"))
    found = tester.validate(Lit(), loader(), ours.checkpoint_path, verbose=False)
    assert found[0]["accuracy"] == 1


@pytest.mark.parametrize("first", [True, False], ids=["ours first", "ours last"])
def test_the_head_of_a_validation_is_of_the_averaged_weights_that_are_validated(first, tmp_path):
    class Remember(Callback):
        def on_validation_batch_start(self, trainer, pl_module, *_):
            self.module = copy.deepcopy(pl_module)

    module, seen = Lit(), Remember()
    both = [ImprintCallback("net.2", "qi", when="validation"), EMAWeightAveraging(decay=0.9)]
    run = trainer(tmp_path, *(both if first else both[::-1]), seen)
    run.fit(module, loader(), loader())
    ours = both[0]
    expected = attach(seen.module, "net.2", data=blobs(), recipe="qi", num_classes=CLASSES)
    torch.testing.assert_close(ours.head.proxies, expected.proxies, rtol=0, atol=1e-6)
    assert run.callback_metrics["imprinted/accuracy"] == 1


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("when", ["fit_start", "train_end"])
def test_a_users_own_averaging_callback_gets_the_head_too(when, tool, tmp_path):
    class Average(Callback):
        def setup(self, trainer, pl_module, stage):
            self.tool = TOOLS[tool](pl_module, 0.9)

        def on_train_batch_end(self, trainer, pl_module, *_):
            update(self.tool, pl_module)

    theirs = Average()
    ours = ImprintCallback("net.2", "lda", when=when)
    trainer(tmp_path, ours, theirs).fit(Lit(), loader(), loader())
    assert accuracy(averaged(theirs.tool)) == 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("make", [lambda: EMAWeightAveraging(decay=0.9), WeightAveraging])
def test_averaging_beside_an_imprinted_classifier_gives_its_head(make, recipe, tmp_path):
    x, y = blobs()
    model = ImprintedClassifier(nn.Identity(), recipe)
    run = trainer(tmp_path, make())
    run.fit(model, loader(), loader())
    assert run.callback_metrics["val/accuracy"] == 1
    assert run.validate(model, loader(), verbose=False)[0]["val/accuracy"] == 1
    assert (model(x).argmax(1) == y).all()
    loaded = ImprintedClassifier.load_from_checkpoint(
        tmp_path / "last.ckpt", backbone=nn.Identity()
    )
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)
    assert loaded.head.proxy_classes.equal(model.head.proxy_classes)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_users_own_average_of_an_imprinted_classifier_has_its_head(tool, tmp_path):
    class Average(Callback):
        def setup(self, trainer, pl_module, stage):
            self.tool = TOOLS[tool](pl_module, 0.9)

        def on_train_batch_end(self, trainer, pl_module, *_):
            update(self.tool, pl_module)

    theirs = Average()
    model = ImprintedClassifier(nn.Identity(), "lda")
    trainer(tmp_path, theirs).fit(model, loader(), loader())
    assert accuracy(averaged(theirs.tool)) == 1


def test_weight_averaging_that_needs_an_optimizer_is_refused_in_a_sentence(tmp_path):
    model = ImprintedClassifier(nn.Identity(), "qi")
    with pytest.raises(ImprintError, match="needs an optimizer.*: leave it out"):
        trainer(tmp_path, StochasticWeightAveraging(1e-3)).fit(model, loader(), loader())
