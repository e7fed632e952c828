"""Fine-tuning from an imprinted head: what the callback says and logs, and what stays."""

import logging

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from projects import Plain
from test_callback import project, trainer
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

from imprint_pl import ImprintCallback, ImprintedHead, ImprintError, attach, imprint

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
