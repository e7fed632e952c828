"""wandb: the workspace against a stored specification, what a fit and a sweep leave, offline."""

import json
import re
import struct
from pathlib import Path

import pandas as pd
import pytest
import wandb
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from places import ROOT
from projects import Plain, digits
from torch.utils.data import DataLoader, TensorDataset

from imprint_pl import ImprintCallback, attach
from imprint_pl.cli import main
from imprint_pl.experiments.dashboard import workspace

STORED = ROOT / "tests" / "dashboard_workspace.json"
FIT = ["--config", "configs/d_in_1_digits.yaml", "--config", "configs/loggers/wandb.yaml"]
FIT += ["--model.k", "3", "--data.shots", "20", "--model.image_size", "32"]


@pytest.fixture(autouse=True)
def offline_in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_DIR", "WANDB_API_KEY", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    # A run stays open until its process ends, and so does what wandb knows of the folder.
    wandb.finish()
    wandb.teardown()


def specification():
    """The workspace as wandb's server gets it, without the ids that are drawn anew each time."""

    def plain(value):
        if isinstance(value, dict):
            drawn = ("id", "__id__", "i")
            return {k: plain(v) for k, v in value.items() if k not in drawn}
        return [plain(v) for v in value] if isinstance(value, list) else value

    spec = workspace("somebody", "project")._to_model().spec
    return plain(json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)))


def test_the_workspace_is_the_stored_one():
    # After a change on purpose: look at it in wandb, then store `specification()`.
    assert specification() == json.loads(STORED.read_text())


def records(folder):
    """(summary, config, tags and group, history keys) of an offline run, as wandb wrote them."""
    summary, config, run, history = {}, {}, None, set()
    for record in stored(folder):
        if record.HasField("run"):
            run = record.run
            items = record.run.config.update
        else:
            items = record.config.update
        config |= {item.key: json.loads(item.value_json) for item in items}
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        history |= {item.key or item.nested_key[0] for item in record.history.item}
    return summary, config, run, history


def history_rows(folder):
    """Each row of an offline run's history: name → value."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row}
        for row in (record.history.item for record in stored(folder) if record.HasField("history"))
    ]


def stored(folder):
    from wandb.proto import wandb_internal_pb2

    # As the end of the process would: what is written is on disk only then.
    wandb.finish()
    wandb.teardown()
    for data in chunks(next(folder.glob("*.wandb")).read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        yield record


def chunks(log):
    """The records of wandb's file, a LevelDB log behind seven bytes of its own."""
    place, parts, block = 7, b"", 32768
    while place + 7 <= len(log):
        left = block - place % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        parts += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def the_run():
    (folder,) = Path("wandb").glob("offline-run-*")
    return folder


def test_in_a_users_project_before_and_after_come_into_one_chart():
    def fit(module, *callbacks, before=False):
        logger = WandbLogger(project="p", offline=True, save_dir=type(module).__name__)
        trainer = Trainer(max_epochs=2, logger=logger, callbacks=list(callbacks))
        x, y = digits()
        data = DataLoader(TensorDataset(x, y), 64)
        if before:
            trainer.validate(module, data, verbose=False)
        trainer.fit(module, data, data)
        (folder,) = Path(type(module).__name__).glob("wandb/offline-run-*")
        return [row for row in history_rows(folder) if "val_acc" in row]

    # Beside each other: in the same row of the history.
    beside = fit(Plain(), ImprintCallback(Plain.layer, "qi", "validation"))
    assert len(beside) == 2
    for row in beside:
        assert row["val_acc"] < row["imprinted/accuracy"] <= 1

    # Imprinted, then fine-tuned: one line of the user's own metric, from step 0 on.
    class Tuned(Plain):
        pass

    module, (x, y) = Tuned(), digits()
    attach(module, Plain.layer, data=(x, y), recipe="qi")
    tuned = fit(module, before=True)
    assert [row["trainer/global_step"] for row in tuned] == [0, 9, 19]
    assert tuned[0]["val_acc"] == pytest.approx(beside[0]["imprinted/accuracy"], abs=0.1)


@pytest.mark.parametrize("gallery", [None, "file", "wandb"])
def test_a_fit_logs_its_results_and_images_only_when_asked(gallery):
    assert main(["fit", *FIT, *(["--gallery", gallery] if gallery else [])]) == 0
    folder = the_run()
    summary, config, _, history = records(folder)
    (run,) = Path("runs").glob("*/version_0")
    own = json.loads((run / "summary.json").read_text())
    for name in ("accuracy", "macro_f1", "nc1", "gen_seconds"):
        assert summary[name] == pytest.approx(own[name], abs=1e-6)
    assert config["gen"] == "kmeans"
    assert config["task"] == own["task"]
    assert "checkpoint" not in config
    assert {"per_class", "predictions"} <= set(history)
    assert not {"evaluation", "errors"} & set(history)
    assert any(name.startswith("confusion_matrix") for name in history)
    assert ("proxies" in history) == (gallery is not None)
    images = list(folder.rglob("*.png"))
    assert len(images) == (gallery == "wandb")
    assert ("gallery" in history) == (gallery == "wandb")
    (table,) = folder.rglob("confusion_matrix*.table.json")
    counted = json.loads(table.read_text())
    count = counted["columns"].index("nPredictions")
    right = sum(row[count] for row in counted["data"] if row[0] == row[1])
    total = sum(row[count] for row in counted["data"])
    assert right / total == pytest.approx(own["accuracy"], abs=1e-6)


def test_the_page_of_an_evaluation_is_logged_only_when_asked():
    assert main(["fit", *FIT, "--evaluation", "wandb"]) == 0
    folder = the_run()
    summary, _, _, history = records(folder)
    assert 0 < summary["balanced_accuracy"] <= 1
    assert {"evaluation", "errors", "per_class", "predictions"} <= set(history)
    assert len(list(folder.rglob("*.html"))) == len(list(folder.rglob("errors*.png"))) == 1


def test_a_sweep_is_a_run_each_grouped_and_tagged(tmp_path, capfd):
    folder = tmp_path / "section_5_1"
    folder.mkdir()
    place = {"backbone": "b", "data": "digits", "task": "x" * 80, "gen": "kmeans", "shots": None}
    rows = [place | {"recipe": "robust", "k": k, "accuracy": k / 10, "id": f"r{k}"} for k in (1, 5)]
    pd.DataFrame(rows).to_parquet(folder / "results.parquet")
    assert main(["dashboard", str(folder), "--project", "p", "--offline"]) == 0
    output = capfd.readouterr().out
    assert "2 runs in the project p" in output
    assert "wandb login" in output
    assert "wandb sync" in output
    found = {path.name.rpartition("-")[2]: path for path in Path("wandb").glob("offline-run-*")}
    assert set(found) == {"r1", "r5"}
    summary, config, run, _ = records(found["r5"])
    assert summary["accuracy"] == 0.5
    assert config["k"] == 5
    assert "shots" not in config
    assert run.run_group == "section_5_1"
    assert run.display_name.startswith("robust k=5 · b · digits")
    assert set(run.tags) == {"b", "digits", "x" * 64, "robust"}


def test_without_a_login_it_says_what_to_do(monkeypatch, capfd):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert main(["dashboard"]) == 2
    error = capfd.readouterr().err
    assert re.search(r"error: .*wandb login.*--offline", error)
    assert "Traceback" not in error


def test_offline_it_says_what_to_do(capfd):
    assert main(["dashboard", "--entity", "me"]) == 0
    assert "dashboard --project imprint_pl --entity me" in capfd.readouterr().out
