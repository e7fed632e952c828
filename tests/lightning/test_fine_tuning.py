"""Fine-tuning from an imprinted head: what the callback says and logs, and what stays."""

import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from lightning.pytorch.loggers import CSVLogger
from projects import Plain
from test_callback import AtFitStart, project, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from imprint_pl import ImprintCallback, ImprintedHead, ImprintError, attach, imprint
from imprint_pl.lightning.fine_tuning import compare_statistics

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*smaller than the logging interval.*"
)

SAID = {
    "fit_start": "layer 'net.2' is now an imprinted head, which is fine-tuned",
    "validation": "an imprinted head is measured beside layer 'net.2' in each validation",
    "train_end": "layer 'net.2' is now an imprinted head: ",
}


@pytest.mark.parametrize("when", SAID)
def test_each_when_says_once_what_was_imprinted_and_logs_it(when, tmp_path, caplog):
    logger = CSVLogger(tmp_path)
    callback = ImprintCallback(Plain.layer, "qi", when)
    options = dict(max_epochs=2, logger=logger, log_every_n_steps=1, enable_checkpointing=False)
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        trainer(tmp_path, callback, **options).fit(project(Plain), **Plain.data())
    (line,) = [line for line in caplog.messages if "imprinted head" in line]
    assert line.startswith(SAID[when])
    assert "recipe qi from 400 samples of 10 classes" in line
    known = callback.head.held_out_accuracy
    if when != "validation":  # the line tells of its first head
        assert f"; {100 * known:.1f} % of held-out samples are right" in line
    assert logger.experiment.hparams["imprint/recipe"] == "qi"
    rows = [row for row in logger.experiment.metrics if "imprint/samples" in row]
    assert not rows  # written already
    written = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    names = written[0].split(",")
    logged = [dict(zip(names, row.split(","), strict=True)) for row in written[1:]]
    logged = [row for row in logged if row["imprint/samples"]]
    assert len(logged) == (2 if when == "validation" else 1)
    assert {row["imprint/samples"] for row in logged} == {"400"}
    assert {row["imprint/classes"] for row in logged} == {"10"}
    assert float(logged[-1]["imprint/held_out_accuracy"]) == pytest.approx(known)
    steps = {"fit_start": ["0"], "validation": ["6", "12"], "train_end": ["12"]}
    assert [row["step"] for row in logged] == steps[when]


def test_the_line_says_what_auto_chose(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        callback = ImprintCallback(Plain.layer, when="train_end")
        trainer(tmp_path, callback, enable_checkpointing=False).fit(project(Plain), **Plain.data())
    chosen = callback.head.settings["recipe"]
    assert any(f"recipe {chosen}, which auto chose, from 400" in line for line in caplog.messages)


class Deep(LightningModule):
    """Two batch-norm layers, fresh; the images of a class are alike but for noise."""

    def __init__(self, rate=1e-4):
        super().__init__()
        self.rate, self.modes = rate, []
        self.body = nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.BatchNorm1d(32)
        )
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.body(x))

    def training_step(self, batch, batch_idx):
        self.modes.append([part.training for part in self.body if isinstance(part, NORM)])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_epoch_start(self):
        self.train()  # as some projects do

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.rate)


NORM = nn.BatchNorm1d


def far_points(samples=160):
    """Four classes far from the origin: the running statistics of fresh layers do not fit them."""
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(4, 16, generator=generator)
    y = torch.arange(samples) * 4 // samples  # sorted by class
    return centres[y] + 5 + torch.randn(samples, 16, generator=generator), y


def fit_deep(folder, *, rate=1e-4, epochs=1, size=32, **options):
    seed_everything(0, verbose=False)
    module, seen = Deep(rate), AtFitStart()
    callback = ImprintCallback("fc", "ridge", **options)
    loader = DataLoader(TensorDataset(*far_points()), size, shuffle=True)
    run = trainer(folder, callback, seen, max_epochs=epochs, enable_checkpointing=False)
    run.fit(module, loader, loader)
    return module, seen


def statistics(state):
    return {name: value.clone() for name, value in state.items() if "running" in name}


def test_frozen_batch_norm_keeps_its_statistics_and_its_modes_come_back(tmp_path, recwarn):
    module, seen = fit_deep(tmp_path, epochs=2, freeze_batch_norm=True)
    assert not [one for one in recwarn if "in eval mode" in str(one.message)]
    assert not any(mode for step in module.modes for mode in step)
    torch.testing.assert_close(
        statistics(module.state_dict()), statistics(seen.state), rtol=0, atol=0
    )
    assert all(part.training for part in module.modules() if part is not module.fc)
    # Its weights are trained.
    assert not torch.equal(module.body[1].weight, seen.state["body.1.weight"])


def test_batch_norm_that_the_user_froze_stays_frozen(tmp_path):
    class HalfFrozen(Deep):
        def on_train_epoch_start(self):
            self.body[1].eval()

    module = HalfFrozen()
    loader = DataLoader(TensorDataset(*far_points()), 32, shuffle=True)
    callback = ImprintCallback("fc", "ridge", freeze_batch_norm=True)
    module.body[1].eval()
    trainer(tmp_path, callback, enable_checkpointing=False).fit(module, loader)
    assert [part.training for part in module.body if isinstance(part, NORM)] == [False, True]


def test_without_it_batch_norm_trains_as_ever_and_a_warning_says_what_that_costs(tmp_path):
    with pytest.warns(UserWarning, match="head in the place of 'fc' is right on 1?..? % .*freeze"):
        module, seen = fit_deep(tmp_path)
    assert all(mode for step in module.modes for mode in step)
    # Measuring it left the statistics as they were.
    for name, value in statistics(seen.state).items():
        assert torch.equal(value, torch.full_like(value, float("var" in name))), name
    assert not torch.equal(module.body[1].running_mean, seen.state["body.1.running_mean"])


def test_no_warning_where_both_kinds_of_statistics_agree(tmp_path, recwarn):
    fit_deep(tmp_path, freeze_batch_norm=True)
    seed_everything(0, verbose=False)
    module = Deep()
    x, y = far_points()
    for part in module.body:
        if isinstance(part, NORM):
            part.momentum = None  # the mean of all batches
    for _ in range(5):
        module.body(x)
    loader = DataLoader(TensorDataset(x, y), 80, shuffle=True)
    callback = ImprintCallback("fc", "ridge")
    trainer(tmp_path, callback, enable_checkpointing=False).fit(module, loader)
    assert not [one for one in recwarn if "batch norm" in str(one.message)]


def test_a_batch_of_one_sample_is_no_reason_to_fail(tmp_path):
    net = Deep()
    found = compare_statistics(
        net,
        "fc",
        imprint(net.eval().body(far_points()[0]).detach(), far_points()[1], "qi"),
        lambda: DataLoader(TensorDataset(*far_points(4)), 1),
    )
    assert found is None  # in eval mode
    net.train()
    found = compare_statistics(
        net,
        "fc",
        imprint(torch.randn(8, 32), torch.arange(8) % 4, "qi"),
        lambda: DataLoader(TensorDataset(*far_points(4)), 1),
    )
    assert found.running == found.batch


@pytest.mark.parametrize("rate", [1e-3, 1e-5])
def test_a_learning_rate_that_may_cost_the_start_is_named_with_a_cure(rate, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit_deep(tmp_path, rate=rate, freeze_batch_norm=True)
    (line,) = [line for line in caplog.messages if "imprinted head" in line]
    frozen, _, said = line.partition("; 2 batch-norm layers are frozen")
    assert frozen != line
    assert said == (
        "; the layers before it are trained with lr=0.001 of AdamW, which may cost the head its "
        "start: ImprintCallback(backbone_lr=1e-05) keeps it"
        if rate > 1e-5
        else ""
    )


def test_the_line_names_the_largest_rate_of_a_schedule(tmp_path, caplog):
    def cycle(body, head):
        optimizer = torch.optim.SGD(body + head, lr=1e-6)
        step = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=20)
        return [optimizer], [dict(scheduler=step, interval="step")]

    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit_stepping(tmp_path, cycle)
    assert any("trained with lr=0.02 of SGD" in line for line in caplog.messages)


def test_with_backbone_lr_the_line_names_it_and_advises_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        fit_deep(tmp_path, rate=1e-3, freeze_batch_norm=True, backbone_lr=2e-5)
    (line,) = [line for line in caplog.messages if "imprinted head" in line]
    assert line.endswith("; the layers before it are trained with at most lr=2e-05")


class Stepping(Deep):
    """Trains with an optimizer that a function makes from two lists: body and head."""

    def __init__(self, make, manual=False):
        super().__init__()
        self.make, self.automatic_optimization = make, not manual

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return self.make(list(self.body.parameters()), list(self.fc.parameters()))


def fit_stepping(folder, make, backbone_lr=None, manual=False, more=(), **options):
    seed_everything(0, verbose=False)
    module = Stepping(make, manual)
    callback = ImprintCallback("fc", "ridge", freeze_batch_norm=True, backbone_lr=backbone_lr)
    loader = DataLoader(TensorDataset(*far_points()), 32, shuffle=True)
    run = trainer(folder, callback, *more, max_epochs=2, enable_checkpointing=False, **options)
    run.fit(module, loader)
    return module


SGD, ADAMW = partial(torch.optim.SGD, momentum=0.9, nesterov=True), torch.optim.AdamW


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}]
)
def test_backbone_lr_trains_as_groups_with_two_learning_rates_do(optimizer, options, tmp_path):
    def groups(body, head):
        return optimizer([dict(params=body, lr=1e-3), dict(params=head, lr=1e-2)], lr=1.0)

    expected = fit_stepping(tmp_path, groups, **options).state_dict()
    found = fit_stepping(tmp_path, lambda b, h: optimizer(b + h, lr=1e-2), 1e-3, **options)
    torch.testing.assert_close(found.state_dict(), expected, rtol=1e-4, atol=1e-6)
    whole = fit_stepping(tmp_path, lambda b, h: optimizer(b + h, lr=1e-2), **options)
    assert not torch.allclose(whole.body[0].weight, found.body[0].weight, rtol=1e-3)


def test_backbone_lr_holds_for_each_step_of_a_schedule(tmp_path):
    def scheduled(params, lr):
        optimizer = ADAMW(params, lr=lr)
        step = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (n + 1) / 5)
        return [optimizer], [dict(scheduler=step, interval="step")]

    # 10 steps with 1/5, 2/5, … of 1e-3: the rate passes the limit after the fifth.
    def limited(body, head):
        optimizer = ADAMW([dict(params=body), dict(params=head)], lr=1e-3)
        shares = [lambda n: min((n + 1) / 5, 1), lambda n: (n + 1) / 5]
        step = torch.optim.lr_scheduler.LambdaLR(optimizer, shares)
        return [optimizer], [dict(scheduler=step, interval="step")]

    expected = fit_stepping(tmp_path, limited)
    found = fit_stepping(tmp_path, lambda b, h: scheduled(b + h, 1e-3), 1e-3)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6)


def test_backbone_lr_holds_where_the_module_steps_several_optimizers_itself(tmp_path):
    def both(lr):
        return lambda body, head: [ADAMW(body, lr=lr), SGD(head, lr=1e-2)]

    expected = fit_stepping(tmp_path, both(1e-3), manual=True)
    found = fit_stepping(tmp_path, both(1e-2), 1e-3, manual=True)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6)


def test_backbone_lr_holds_for_layers_that_are_unfrozen_later(tmp_path):
    class Unfreezing(Callback):
        def setup(self, trainer, pl_module, stage):
            pl_module.body.requires_grad_(False)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.body.requires_grad_(True)
                more = dict(params=list(pl_module.body.parameters()), lr=self.rate)
                trainer.optimizers[0].add_param_group(more)

    def found(rate, limit):
        unfreezing = Unfreezing()
        unfreezing.rate = rate
        make = lambda body, head: ADAMW(head, lr=1e-2)  # noqa: E731
        return fit_stepping(tmp_path, make, limit, more=[unfreezing]).state_dict()

    torch.testing.assert_close(found(1e-2, 1e-3), found(1e-3, None), rtol=1e-4, atol=1e-6)


def test_a_rate_below_backbone_lr_changes_nothing(tmp_path):
    make = lambda body, head: ADAMW(body + head, lr=1e-3)  # noqa: E731
    expected = fit_stepping(tmp_path, make).state_dict()
    found = fit_stepping(tmp_path, make, 1e-3).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_after_the_fit_the_optimizer_steps_as_ever(tmp_path):
    kept = []

    def make(body, head):
        kept.append(torch.optim.SGD(body + head, lr=1.0))
        return kept[0]

    module = fit_stepping(tmp_path, make, 1e-6)
    before = module.body[0].weight.detach().clone()
    module.body[0].weight.grad = torch.ones_like(before)
    kept[0].step()
    torch.testing.assert_close(module.body[0].weight.detach(), before - 1)


@pytest.mark.parametrize("arguments", [dict(freeze_batch_norm=True), dict(backbone_lr=1e-4)])
def test_what_keeps_the_start_goes_with_fit_start_alone(arguments):
    (name,) = arguments
    with pytest.raises(ImprintError, match=f"{name} is not used with when='train_end'"):
        ImprintCallback("fc", when="train_end", **arguments)


@pytest.mark.parametrize("rate", [0, -1e-4, float("nan")])
def test_a_backbone_lr_that_trains_nothing_is_refused(rate):
    with pytest.raises(ImprintError, match=f"backbone_lr={rate:g} .*requires_grad"):
        ImprintCallback("fc", backbone_lr=rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(recipe="qui"), "unknown recipe 'qui'; did you mean 'qi'"),
        (dict(recipe="qi", gne="mean"), "gne"),
        (dict(recipe="qi", k=3), "k=3 is not used"),
        (dict(recipe="auto", lam=0.1), "lam=0.1 is not used by recipe='auto'"),
        (dict(recipe="qi", gen="no_such_module.Part"), "no_such_module cannot be imported"),
    ],
)
def test_a_wrong_recipe_is_refused_before_any_data_are_read(arguments, message):
    with pytest.raises(ImprintError, match=message):
        ImprintCallback("fc", **arguments)
    with pytest.raises(ImprintError, match=message):
        attach(nn.Sequential(nn.Linear(2, 2)), "0", data=[], **arguments)


def test_keywords_of_imprint_that_are_not_the_recipes_are_accepted():
    ImprintCallback("fc", "qi", shots=5, seed=3, num_classes=4, weibull=(0.1, 0.9))


def test_suggested_layers_are_layers_and_no_internals():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
            self.loss, self.accuracy = nn.CrossEntropyLoss(), MulticlassAccuracy(2)

        def forward(self, x):
            return self.head(self.body(x))

    net = Net()
    for wrong in ("norm", "nothing.like.it", "head.norm", "accuracies", "losss", ""):
        with pytest.raises(ImprintError) as error:
            attach(net, wrong)
        assert not any(name in str(error.value) for name in ("norm_inf", "'accuracy'", "'loss'"))
        attach(net, "head")
    with pytest.raises(ImprintError, match="; the last one is 'head'"):
        attach(net, "xyz")


def test_the_held_out_accuracy_is_that_of_the_samples_that_were_left_out():
    # On a line: one sample of each class lies among the other class.
    x = torch.tensor(
        [[0.0, 1], [0.1, 1], [0.2, 1], [5.1, 1], [5.0, 1], [5.2, 1], [5.3, 1], [0.3, 1]]
    )
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    head = imprint(x, y, "janson")
    assert head.held_out_accuracy == 0.75
    again = ImprintedHead()
    again.load_state_dict(head.state_dict())
    assert again.held_out_accuracy == 0.75
    other = ImprintedHead()
    other.take(head)
    assert other.held_out_accuracy == 0.75
    assert imprint(x, y, "janson", calibrate=False).held_out_accuracy is None
