"""What a command leaves behind says how the probabilities came about."""

import json

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier
from imprint_pl.cli.summary import print_summary, summarise, write_summary


def summary_of(x, y, folder, recipe="ridge", **keywords):
    model = ImprintedClassifier(nn.Identity(), recipe, **keywords)
    trainer = quiet_trainer(default_root_dir=folder)
    trainer.fit(model, DataLoader(TensorDataset(x, y), batch_size=20))
    summary = summarise(trainer, model, "val")
    write_summary(folder, summary, model)
    return summary, json.loads((folder / "summary.json").read_text()), model.head


def test_a_small_lam_keeps_its_digits_in_the_summary(blobs, tmp_path):
    x, y = blobs
    for recipe in ("ridge", "auto"):
        _, written, head = summary_of(1e-4 * x, y, tmp_path, recipe)
        assert head.settings["chosen_lam"] > 0
        assert written["chosen_lam"] == float(f"{head.settings['chosen_lam']:.6g}") > 0
        assert written["calibrated"] is True
    assert summary_of(x, y, tmp_path, lam=3.2e-9)[1]["lam"] == 3.2e-9


def test_the_summary_says_that_nothing_was_calibrated(tmp_path, capsys):
    summary, written, head = summary_of(torch.eye(4), torch.arange(4), tmp_path)
    assert head.settings["calibrated"] is False
    assert written["calibrated"] is False
    print_summary(summary)
    assert "the probabilities are not calibrated" in capsys.readouterr().out
