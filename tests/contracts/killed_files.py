"""Writes a checkpoint, its state, a head, an export, a summary and a report, over and over, in
processes that are killed at random moments; run by test_faults.py.

Prints how many of each were there after the kills, all of them whole. Processes are forked, since
importing takes seconds, and nothing is computed before.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import torch
from lightning.pytorch import Trainer

from imprint_pl import ImprintedClassifier, ImprintedHead
from imprint_pl.cli.summary import summarise, write_summary
from imprint_pl.data import Digits
from imprint_pl.experiments.report.page import write_page
from imprint_pl.experiments.results import COLUMNS
from imprint_pl.export import TorchExport
from imprint_pl.training_set.kept_file import read_state, state_path

KILLS = 12
PIECE = 4096


class Flat(torch.nn.Module):
    def forward(self, images):
        return images.flatten(1)


class Half(torch.nn.Module):
    def forward(self, images):
        return images.float() / 2


def classifier():
    preprocess = {"size": 8, "mean": [0.5], "std": [0.5]}
    return ImprintedClassifier(Flat(), "knn", keep="embeddings", preprocess=preprocess)


def write_slowly(path, content):
    """As a slow disk would: many kills come while a file is half written."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), PIECE):
            file.write(content[start : start + PIECE])
            time.sleep(0.002)


def write(folder, exported):
    torch.set_num_threads(1)
    Path.write_bytes = write_slowly
    model = classifier()
    flags = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer = Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **flags)
    trainer.fit(model, Digits())
    rows = pd.DataFrame({name: [] for name in [*COLUMNS, "method", "group"]})
    page = dict(sentences=[], tests=None, made={}, figures={}, galleries=[])
    while True:
        trainer.save_checkpoint(folder / "a.ckpt")
        model.save_state(folder / "a.ckpt")
        model.head.save_pretrained(folder / "head")
        write_summary(folder, summarise(trainer, model, "val"), model)
        write_page(folder / "report.html", name="a", rows=rows, **page)
        if exported:
            TorchExport().write_module(Half(), folder / "half.pt2", [], {})


def whole(folder):
    """What is there; each raises where it is not whole."""
    images = torch.zeros(2, 3, 9, 9, dtype=torch.uint8)
    readers = {
        "a.ckpt": lambda path: ImprintedClassifier.load_from_checkpoint(path, backbone=Flat()),
        state_path("a.ckpt").name: read_state,
        "head/model.safetensors": lambda path: ImprintedHead.from_pretrained(path.parent),
        "summary.json": lambda path: json.loads(path.read_text()),
        "report.html": lambda path: path.read_text().index("</html>"),
        "half.pt2": lambda path: TorchExport().load(path)(images),
    }
    there = [name for name in readers if (folder / name).exists()]
    for name in there:
        readers[name](folder / name)
    return there


def main(folder, seed):
    moments, counts = random.Random(seed), {}
    for kill in range(KILLS):
        place = folder / str(kill // 3)
        place.mkdir(exist_ok=True)
        process = os.fork()
        if process == 0:
            write(place, kill % 3 == 0)
        # Some before the first round is done, most while the second writes over it.
        time.sleep(moments.uniform(0.5, 6.0))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        for name in whole(place):
            counts[name] = counts.get(name, 0) + 1
    print(json.dumps(counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
