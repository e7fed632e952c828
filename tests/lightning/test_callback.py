"""ImprintCallback in projects that know nothing of imprinting: tests/projects.py."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from projects import PROJECTS, Elaborate, LitDigits, Plain, digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintCallback, ImprintError, attach, detach
from imprint_pl.lightning.layer import layer_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*smaller than the logging interval.*"
)


def trainer(folder, *callbacks, **kwargs):
    options = dict(
        enable_checkpointing=True,
        default_root_dir=folder,
        callbacks=list(callbacks),
    )
    return quiet_trainer(**(options | kwargs))


def project(kind, seed=0):
    seed_everything(seed, verbose=False)
    return kind()


def test_data(kind):
    """For `trainer.test`: the loader or DataModule of the project, or nothing."""
    data = kind.data()
    return {"dataloaders": data["val_dataloaders"]} if "val_dataloaders" in data else data


test_data.__test__ = False


def logits(module, x):
    with torch.no_grad():
        out = module.eval()(x) if not isinstance(module, LitDigits) else module.eval().model(x)
    return out["logits"] if isinstance(out, dict) else out


class AtFitStart(Callback):
    """Remembers what the optimizer was built with, and the state of the module then."""

    def on_fit_start(self, trainer, pl_module):
        self.parameters = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
        self.state = copy.deepcopy(pl_module.state_dict())
        self.modes = {name: part.training for name, part in pl_module.named_modules()}
        self.frozen = {n for n, p in pl_module.named_parameters() if not p.requires_grad}
        self.random = torch.get_rng_state()


RELOAD = """
import sys, torch
import projects
from test_callback import logits, test_data, trainer
from imprint_pl import ImprintCallback, attach, detach

folder = sys.argv[1]
for kind in projects.PROJECTS:
    for when in ("fit_start", "train_end"):
        saved = torch.load(f"{folder}/{kind.__name__}-{when}.pt", weights_only=True)
        module = kind()
        head = attach(module, kind.layer)
        state = torch.load(saved["checkpoint"], weights_only=True)["state_dict"]
        module.load_state_dict(state, strict=True)
        assert torch.equal(logits(module, projects.digits()[0]), saved["logits"]), (kind, when)
        assert head.norm_inf.name == "l2"
        assert type(detach(module, kind.layer)).__name__ == "Linear"
        # By Lightning, with the callback alone.
        tester = trainer(folder, ImprintCallback(kind.layer))
        got = tester.test(kind(), ckpt_path=saved["checkpoint"], verbose=False, **test_data(kind))
        for key, value in saved["tested"].items():
            assert abs(got[0][key] - value) < 0.02, (kind, when, key, got[0][key], value)
print("all equal")
"""


@pytest.mark.slow
def test_fit_test_checkpoint_reload_in_a_fresh_process_and_detach(tmp_path):
    for kind in PROJECTS:
        for when in ("fit_start", "train_end"):
            module = project(kind)
            before = copy.deepcopy(layer_of(module, kind.layer).state_dict())
            callback = ImprintCallback(kind.layer, "qi", when)
            run = trainer(tmp_path / f"{kind.__name__}-{when}", callback)
            run.fit(module, **kind.data())
            assert callback.head is layer_of(module, kind.layer)
            tested = run.test(module, verbose=False, **test_data(kind))[0]
            path = callback.checkpoint_path
            if when == "fit_start":
                path = run.checkpoint_callback.best_model_path
            saved = {
                "checkpoint": str(path),
                "logits": logits(module, digits()[0]),
                "tested": tested,
            }
            torch.save(saved, tmp_path / f"{kind.__name__}-{when}.pt")
            original = detach(module, kind.layer)
            assert logits(module, digits()[0]).shape == (600, 10)
            if when == "fit_start":  # of "train_end" it has been trained
                torch.testing.assert_close(original.state_dict(), before, rtol=0, atol=0)
    finished = run_script(RELOAD, tmp_path, tmp_path)
    assert "all equal" in finished.stdout


def run_script(code, folder, *arguments):
    # A file, since the other processes of DDP start it again.
    script = folder / "script.py"
    script.write_text(code)
    here = Path(__file__).parent
    own = os.environ.get("PYTHONPATH", "")
    paths = [str(here), str(here.parent), str(here.parents[1]), own]
    finished = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        capture_output=True,
        timeout=240,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished


@pytest.mark.parametrize("kind", PROJECTS)
def test_the_optimizers_parameters_are_the_heads(kind, tmp_path):
    module, seen = project(kind), AtFitStart()
    callback = ImprintCallback(kind.layer, "qi")
    trainer(tmp_path, callback, seen, enable_checkpointing=False).fit(module, **kind.data())
    head = layer_of(module, kind.layer)
    for parameter in (head.proxies, head.log_scale):
        assert any(parameter is own for own in seen.parameters)
    assert not any(p is q for p in head.replaced.parameters() for q in seen.parameters)
    # It was trained: proxies and logit scale have moved.
    assert not torch.equal(head.proxies, seen.state[f"{kind.layer}.proxies"])
    assert head.log_scale != seen.state[f"{kind.layer}.log_scale"]


@pytest.mark.parametrize("kind", PROJECTS)
def test_the_pass_leaves_statistics_modes_gradients_and_random_state_alone(kind, tmp_path):
    states = []
    for callbacks in ([], [ImprintCallback(kind.layer, "qi")]):
        module, seen = project(kind), AtFitStart()
        module.train()
        trainer(tmp_path, *callbacks, seen, max_epochs=0, enable_checkpointing=False).fit(
            module, **kind.data()
        )
        states.append(seen)
    plain, imprinted = states
    for name, value in plain.state.items():
        if not name.startswith(kind.layer + "."):
            assert torch.equal(value, imprinted.state[name]), name
    inside = {n for n in imprinted.modes if n.startswith(kind.layer + ".")}
    assert {n: m for n, m in imprinted.modes.items() if n not in inside} == plain.modes
    assert imprinted.frozen == plain.frozen
    assert torch.equal(imprinted.random, plain.random)


@pytest.mark.parametrize("kind", PROJECTS)
def test_validation_measures_a_head_beside_a_training_that_does_not_notice(kind, tmp_path):
    runs = []
    for callbacks in ([], [ImprintCallback(kind.layer, "qi", "validation")]):
        module = project(kind)
        run = trainer(tmp_path, *callbacks, max_epochs=2, enable_checkpointing=False)
        run.fit(module, **kind.data())
        runs.append((module, dict(run.callback_metrics)))
    (plain, its_metrics), (watched, metrics) = runs
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)
    added = {"imprinted/accuracy", "imprinted/balanced_accuracy", "imprinted/macro_f1"}
    assert set(metrics) - set(its_metrics) == added
    for name, value in its_metrics.items():
        assert metrics[name] == value, name
    assert 0.5 < metrics["imprinted/accuracy"] <= 1


def test_the_validations_accuracy_is_that_of_the_same_head_by_hand(tmp_path):
    module = project(Plain)
    callback = ImprintCallback(Plain.layer, "qi", "validation")
    run = trainer(tmp_path, callback, enable_checkpointing=False)
    run.fit(module, **Plain.data())
    x, y = digits()
    expected = copy.deepcopy(module)
    attach(expected, Plain.layer, data=(x[:400], y[:400]), recipe="qi")
    accuracy = (logits(expected, x[400:]).argmax(1) == y[400:]).float().mean()
    assert run.callback_metrics["imprinted/accuracy"] == pytest.approx(float(accuracy))
    assert isinstance(layer_of(module, Plain.layer), nn.Linear)


def test_several_callbacks_may_imprint_for_one_module(tmp_path):
    module = project(Plain)
    callbacks = [ImprintCallback(Plain.layer, "qi", when) for when in ("validation", "train_end")]
    run = trainer(tmp_path, *callbacks, enable_checkpointing=False)
    run.fit(module, **Plain.data())
    accuracy = (logits(module, digits()[0][400:]).argmax(1) == digits()[1][400:]).float().mean()
    assert run.callback_metrics["imprinted/accuracy"] == pytest.approx(float(accuracy))


def test_a_validation_of_a_single_class_is_measured(tmp_path):
    x, _ = digits()
    loader = DataLoader(TensorDataset(x[:20], torch.zeros(20, dtype=torch.long)), batch_size=10)
    callback = ImprintCallback(Plain.layer, "qi", "validation", num_classes=1)
    run = trainer(tmp_path, callback)
    run.fit(project(Plain), loader, loader)
    assert run.callback_metrics["imprinted/accuracy"] == 1
    assert run.callback_metrics["imprinted/macro_f1"] == 1


def test_each_of_several_validation_loaders_is_measured(tmp_path):
    class TwoLoaders(Plain):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            super().validation_step(batch, batch_idx)

    run = trainer(tmp_path, ImprintCallback(Plain.layer, "qi", "validation"))
    data = TwoLoaders.data()
    run.fit(project(TwoLoaders), data["train_dataloaders"], [data["val_dataloaders"]] * 2)
    both = [run.callback_metrics[f"imprinted/accuracy/dataloader_idx_{i}"] for i in (0, 1)]
    assert both[0] == both[1] > 0.5


@pytest.mark.parametrize(
    "averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1)]
)
def test_weights_can_be_averaged_from_an_imprinted_head_on(averaging, tmp_path):
    module = project(Plain)
    callbacks = [ImprintCallback(Plain.layer, "qi"), averaging()]
    run = trainer(tmp_path, *callbacks, max_epochs=3, enable_checkpointing=False)
    run.fit(module, **Plain.data())
    assert layer_of(module, Plain.layer).num_classes == 10
    assert run.callback_metrics["val_acc"] > 0.4
    late = [ImprintCallback(Plain.layer, "qi", "train_end"), averaging()]
    with pytest.raises(ImprintError, match="give ImprintCallback after it"):
        trainer(tmp_path, *late).fit(project(Plain), **Plain.data())
    trainer(tmp_path, *late[::-1]).fit(module := project(Plain), **Plain.data())
    assert torch.equal(layer_of(module, Plain.layer).proxies, late[0].head.proxies)


def test_fit_start_gives_the_head_that_attach_gives_from_the_whole_training_set(tmp_path):
    # The loader shuffles and drops the last 16 of 400.
    module, seen = project(Plain), AtFitStart()
    expected = attach(copy.deepcopy(module), Plain.layer, data=digits_of(0, 400), recipe="qi")
    run = trainer(tmp_path, ImprintCallback(Plain.layer, "qi"), seen, enable_checkpointing=False)
    run.fit(module, **Plain.data())
    torch.testing.assert_close(seen.state["net.2.proxies"], expected.proxies.detach())


def digits_of(start, end):
    x, y = digits()
    return x[start:end], y[start:end]


def test_train_end_imprints_the_trained_embeddings(tmp_path):
    module = project(Plain)
    run = trainer(tmp_path, ImprintCallback(Plain.layer, "qi", "train_end"))
    run.fit(module, **Plain.data())
    trained = copy.deepcopy(module)
    detach(trained, Plain.layer)
    expected = attach(trained, Plain.layer, data=digits_of(0, 400), recipe="qi")
    torch.testing.assert_close(layer_of(module, Plain.layer).proxies, expected.proxies)
    # The other checkpoints hold the trained layer, and load as they are.
    run.test(
        module,
        ckpt_path=run.checkpoint_callback.best_model_path,
        verbose=False,
        dataloaders=Plain.data()["val_dataloaders"],
    )
    assert isinstance(layer_of(module, Plain.layer), nn.Linear)


def test_class_names_of_the_datamodule_are_the_heads(tmp_path):
    module = project(Elaborate)
    trainer(tmp_path, ImprintCallback(Elaborate.layer, "qi"), enable_checkpointing=False).fit(
        module, **Elaborate.data()
    )
    assert layer_of(module, Elaborate.layer).name_of(3) == "three"


def test_the_default_recipe_can_be_fine_tuned_with_the_backbone(tmp_path):
    accuracies = []
    for callbacks in ([], [ImprintCallback(Plain.layer)]):
        module = project(Plain)
        first = module.net[0][0].weight.detach().clone()
        run = trainer(tmp_path, *callbacks, enable_checkpointing=False)
        run.fit(module, **Plain.data())
        assert all(p.isfinite().all() for p in module.parameters())
        assert not torch.equal(module.net[0][0].weight, first)
        accuracies.append(run.callback_metrics["val_acc"])
    assert accuracies[1] > accuracies[0] + 0.1


def test_a_fit_resumed_from_a_checkpoint_goes_on_with_its_head(tmp_path):
    module = project(LitDigits)
    run = trainer(tmp_path, ImprintCallback(LitDigits.layer, "qi"))
    run.fit(module)
    fresh = project(LitDigits, seed=1)
    path = run.checkpoint_callback.best_model_path
    seen = AtFitStart()
    again = trainer(tmp_path, ImprintCallback(LitDigits.layer, "qi"), seen, max_epochs=2)
    again.fit(fresh, ckpt_path=path)
    torch.testing.assert_close(seen.state, dict(module.state_dict()), rtol=0, atol=0)
    assert any(p is fresh.model.fc.proxies for p in seen.parameters)
    assert again.global_step == 2 * run.global_step


def test_fast_dev_run_reads_on_until_every_class_was_there(tmp_path):
    order = digits()[1][:400].sort(stable=True).indices
    x, y = (part[order] for part in digits_of(0, 400))
    loader = DataLoader(TensorDataset(x, y), 50)
    module = project(Plain)
    trainer(tmp_path, ImprintCallback(Plain.layer, "qi"), fast_dev_run=True).fit(module, loader)
    assert layer_of(module, Plain.layer).proxy_classes.tolist() == list(range(10))


def test_without_training_data_it_says_so_and_takes_what_is_given(tmp_path):
    for when in ("fit_start", "train_end", "validation"):
        run = trainer(tmp_path, ImprintCallback(Plain.layer, "qi", when), limit_train_batches=0)
        with pytest.raises(ImprintError, match="limit_train_batches=0 leaves no training data"):
            run.fit(project(Plain), **Plain.data())
    module = project(Plain)
    callback = ImprintCallback(Plain.layer, "qi", data=digits_of(0, 400))
    trainer(tmp_path, callback, limit_train_batches=0).fit(module, **Plain.data())
    assert not layer_of(module, Plain.layer).is_empty
    loader = Plain.data()["val_dataloaders"]
    watcher = trainer(tmp_path, ImprintCallback(Plain.layer, "qi", "validation"))
    with pytest.raises(ImprintError, match="no training data to imprint from: give data="):
        watcher.validate(project(Plain), loader, verbose=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layer="net.1.classifer"), "Plain has no layer 'net.1.classifer'"),
        (dict(layer="net.3"), "did you mean .*'net.2'"),
        (dict(layer="net.0.0"), r"input of layer 'net.0.0' has shape .*an embedding has \(B, d\)"),
        (dict(layer="net.2", when="fit"), "unknown when='fit'; did you mean 'fit_start'"),
        (dict(layer="net.2", recipe="qui"), "unknown recipe 'qui'"),
        (dict(layer="net.2", recipe="knn", votes="uniform", temperature=None, distance="cosine"),
         "no gradient reaches its proxies"),
        (dict(layer="net.2", unpack=lambda batch: (batch[0], batch[1][:3])), "3 labels"),
    ],
)  # fmt: skip
def test_mistakes_are_named(arguments, message, tmp_path):
    with pytest.raises(ImprintError, match=message):
        trainer(tmp_path, ImprintCallback(**arguments)).fit(project(Plain), **Plain.data())


def test_unpack_takes_any_batch(tmp_path):
    class Nested(Plain):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch["data"]["pair"], batch_idx)

    x, y = digits_of(0, 400)
    rows = [{"data": {"pair": (image, label)}} for image, label in zip(x, y, strict=True)]
    module = project(Nested)
    callback = ImprintCallback("net.2", "qi", unpack=lambda batch: batch["data"]["pair"])
    trainer(tmp_path, callback).fit(module, DataLoader(rows, 64))
    assert not module.net[2].is_empty


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions_give_the_head_of_float32_up_to_rounding(precision, tmp_path):
    module, seen = project(Plain), AtFitStart()
    expected = attach(copy.deepcopy(module), Plain.layer, data=digits_of(0, 400), recipe="qi")
    options = dict(precision=precision, enable_checkpointing=False)
    run = trainer(tmp_path, ImprintCallback(Plain.layer, "qi"), seen, **options)
    run.fit(module, **Plain.data())
    got = seen.state["net.2.proxies"].float()
    torch.testing.assert_close(got, expected.proxies.detach(), rtol=0, atol=0.01)
    assert run.callback_metrics["val_acc"].isfinite()


@pytest.mark.slow
def test_one_epoch_from_an_imprinted_head_beats_one_from_random_weights(tmp_path):
    # Digits, embedded as they are: 64 pixels through fixed random features.
    x, y = digits_of(0, 600)
    generator = torch.Generator().manual_seed(0)
    x = (x.flatten(1) @ torch.randn(64, 256, generator=generator)).relu()

    class Probe(LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(256, 10)
            self.accuracies = []

        def forward(self, x):
            return self.fc(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.fc(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.accuracies.append((self.fc(batch[0]).argmax(1) == batch[1]).float().mean().item())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    def accuracies(seed, *callbacks):
        seed_everything(seed, verbose=False)
        loader = DataLoader(TensorDataset(x[:400], y[:400]), 32, shuffle=True)
        probe = Probe()
        options = dict(max_epochs=5, enable_checkpointing=False, num_sanity_val_steps=0)
        trainer(tmp_path, *callbacks, **options).fit(
            probe, loader, DataLoader(TensorDataset(x[400:], y[400:]), 200)
        )
        return probe.accuracies

    random = torch.tensor([accuracies(seed) for seed in range(10)])
    head = torch.tensor(
        [accuracies(s, ImprintCallback("fc", "kernel", projection_dim=300)) for s in range(10)]
    )
    assert head[:, 0].mean() > random[:, 0].mean() + 2 * (random[:, 0].std() + head[:, 0].std())
    assert head[:, 4].mean() >= random[:, 4].mean()


def imprint_on(devices, folder):
    """Every project at fit start and beside a validation; heads and metrics of rank 0."""
    results = {}
    for kind in PROJECTS:
        for when in ("fit_start", "validation"):
            module, seen = project(kind), AtFitStart()
            callback = ImprintCallback(kind.layer, "qi", when)
            options = dict(enable_checkpointing=False, num_sanity_val_steps=0)
            options |= dict(devices=devices, strategy="ddp" if devices > 1 else "auto")
            run = trainer(folder, callback, seen, **options)
            data = kind.data()
            if when == "fit_start":
                run.fit(module, **data)
                proxies = seen.state[f"{kind.layer}.proxies"]
                assert not torch.equal(callback.head.proxies, proxies)  # fine-tuned
            else:
                callback.data = data.get("train_dataloaders")
                run.validate(module, verbose=False, **test_data(kind))
                proxies = callback.head.proxies.detach()
            for on_this_rank in (proxies, callback.head.proxies.detach()):
                assert (run.strategy.all_gather(on_this_rank) == on_this_rank).all()
            metrics = {k: float(v) for k, v in run.callback_metrics.items() if "imprinted" in k}
            results[f"{kind.__name__} {when}"] = proxies, metrics
    if run.is_global_zero:
        torch.save(results, f"{folder}/{devices}.pt")


TWO_PROCESSES = """
import sys
import torch
from test_callback import imprint_on

imprint_on(2, sys.argv[1])
# Threads of gloo that outlive Python may abort it: "terminate called without an active exception".
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_head_and_the_accuracy_of_one(tmp_path):
    run_script(TWO_PROCESSES, tmp_path, tmp_path)
    imprint_on(1, tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert len(one) == 6
    for name, (proxies, metrics) in one.items():
        # The images of Elaborate have noise of their own in every process.
        noisy = name.startswith("Elaborate")
        options = dict(rtol=0, atol=0.02 if noisy else 1e-5)
        torch.testing.assert_close(two[name][0], proxies, **options)
        assert two[name][1] == pytest.approx(metrics, abs=0.05 if noisy else 1e-6)
        assert ("imprinted/accuracy" in metrics) == name.endswith("validation")


def test_a_validation_that_fails_leaves_no_hook_behind(tmp_path):
    class Failing(Plain):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            raise ValueError("in the middle of a step")

    module = project(Failing)
    run = trainer(tmp_path, ImprintCallback(Plain.layer, "qi", "validation"))
    with pytest.raises(ValueError, match="in the middle"):
        run.fit(module, **Plain.data())
    assert not layer_of(module, Plain.layer)._forward_pre_hooks
    assert not module._load_state_dict_pre_hooks


def test_a_set_up_that_fails_leaves_the_module_with_its_own_setup(tmp_path):
    class Failing(Callback):
        def setup(self, trainer, pl_module, stage):
            assert "setup" in vars(pl_module)
            raise ValueError("somebody else's callback")

    module = project(Plain)
    run = trainer(tmp_path, ImprintCallback(Plain.layer, "qi"), Failing())
    with pytest.raises(ValueError, match="somebody else's"):
        run.fit(module, **Plain.data())
    assert "setup" not in vars(module)
    assert isinstance(layer_of(module, Plain.layer), nn.Linear)
    assert not module._load_state_dict_pre_hooks
