"""The callback `Evaluation`, and what the commands write, in every kind of run."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from trainers import quiet_trainer

from imprint_pl import Evaluation, ImprintCallback, ImprintedClassifier, ImprintError
from imprint_pl.cli import main
from imprint_pl.data import Digits, ImageFolder
from imprint_pl.lightning.outsiders import Outsiders
from imprint_pl.lightning.predictions import files_of, in_order

FILES = {
    *("predictions.csv", "per_class.csv", "confusion_matrix.csv", "confusion_matrix.png"),
    "evaluation.html",
}


class Flat(nn.Module):
    """Pixels as embeddings; counts the images that go through it."""

    seen = 0

    def forward(self, x):
        self.seen += len(x)
        return x.flatten(1).float()


def classifier(recipe="qi", backbone=None, **options):
    plain = dict(size=8, mean=[0.0], std=[1.0])
    return ImprintedClassifier(backbone or Flat(), recipe, preprocess=plain, **options)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def names(folder):
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def photos(tmp_path):
    """Digits 0 to 2 as files, one of a digit 2 in the folder of the 0s."""
    data = Digits(classes=[0, 1, 2])
    data.setup()
    images, labels = data.train_dataset.__getitems__(list(range(90)))
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        for split in ("train", "test"):
            folder = tmp_path / "photos" / split / f"digit{label}"
            if split == "test" and label == 2 and i < 10:
                folder = folder.parent / "digit0"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0].numpy()).resize((60, 60)).save(folder / f"{i:03}.png")
    return tmp_path / "photos"


def test_a_fit_writes_all_of_it_without_a_second_pass(tmp_path):
    evaluation, data, flat = Evaluation(), Digits(), Flat()
    model = classifier(backbone=flat)
    trainer = quiet_trainer(logger=CSVLogger(tmp_path), callbacks=[evaluation])
    trainer.fit(model, data)
    folder = tmp_path / "lightning_logs" / "version_0"
    assert names(folder) >= FILES | {"errors.png"}
    assert flat.seen == 1437 + 360
    samples = rows(folder / "predictions.csv")
    assert [int(row["true_label"]) for row in samples] == data.val_dataset.labels.tolist()
    assert [int(row["index"]) for row in samples] == list(range(360))
    right = sum(row["label"] == row["true_label"] for row in samples) / 360
    assert right == pytest.approx(trainer.callback_metrics["val/accuracy"].item())
    found = evaluation.written[0].measured
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        logged = trainer.callback_metrics[f"val/{name}"].item()
        assert getattr(found, name).value == pytest.approx(logged)
    counts = torch.bincount(data.train_dataset.labels)
    assert [c.trained for c in found.classes] == counts.tolist()
    assert not model.head._forward_hooks


def test_without_the_callback_nothing_is_written(tmp_path):
    trainer = quiet_trainer(logger=CSVLogger(tmp_path))
    trainer.fit(classifier(), Digits(classes=[0, 1]))
    assert not list(tmp_path.rglob("evaluation.html"))


def test_a_trial_writes_nothing(tmp_path):
    run = quiet_trainer(default_root_dir=tmp_path, callbacks=[Evaluation()], fast_dev_run=1)
    run.fit(classifier(), Digits(classes=[0, 1]))
    assert not list(tmp_path.rglob("*.csv"))


def test_a_fit_without_validation_writes_nothing(tmp_path):
    run = quiet_trainer(default_root_dir=tmp_path, callbacks=[Evaluation()])
    run.fit(ImprintedClassifier(None, "qi"), DataLoader(TensorDataset(X, Y), 8))
    assert not list(tmp_path.rglob("*.csv"))


Y = torch.arange(24) % 3
X = torch.eye(3)[Y] + 0.1 * torch.randn(24, 3, generator=torch.Generator().manual_seed(0))


def loader(shuffle=False, x=X, y=Y):
    return DataLoader(TensorDataset(x, y), batch_size=5, shuffle=shuffle)


def test_without_a_logger_the_files_have_a_folder_of_their_own(tmp_path):
    run = quiet_trainer(default_root_dir=tmp_path, callbacks=[Evaluation()])
    run.fit(ImprintedClassifier(None, "qi"), loader(), loader())
    assert names(tmp_path) == set()
    assert names(tmp_path / "evaluation") == FILES
    # A test after it does not write over it.
    run.test(run.lightning_module, loader(), verbose=False)
    assert names(tmp_path / "evaluation") == FILES
    assert names(tmp_path / "evaluation" / "test") == FILES


def test_a_test_without_a_fit_writes_the_same_files(tmp_path):
    model = ImprintedClassifier(None, "qi")
    quiet_trainer().fit(model, loader())
    run = quiet_trainer(callbacks=[Evaluation(folder=str(tmp_path))])
    run.test(model, loader(), verbose=False)
    assert names(tmp_path) == FILES
    # Nobody knows what the head was imprinted from.
    assert {row["training_images"] for row in rows(tmp_path / "per_class.csv")} == {""}


def test_several_loaders_have_a_folder_each(tmp_path):
    model, evaluation = ImprintedClassifier(None, "qi"), Evaluation(folder=str(tmp_path))
    quiet_trainer().fit(model, loader())
    run = quiet_trainer(callbacks=[evaluation])
    run.test(model, [loader(), loader(y=(Y + 1) % 3)], verbose=False)
    assert names(tmp_path) == set()
    assert names(tmp_path / "dataloader_idx_0") == names(tmp_path / "dataloader_idx_1") == FILES
    assert [evaluation.written[i].measured.accuracy.value for i in (0, 1)] == [1, 0]


def test_batches_of_the_sanity_check_are_not_counted(tmp_path):
    class Project(LightningModule):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x)

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    evaluation = Evaluation(folder=str(tmp_path))
    run = quiet_trainer(
        callbacks=[ImprintCallback("fc", "qi"), evaluation], num_sanity_val_steps=2, max_epochs=2
    )
    run.fit(Project(), loader(), loader())
    # In a module of one's own the last validation counts.
    assert evaluation.written[0].measured.images == 24
    assert evaluation.written[0].measured.accuracy.value == 1


def test_outsiders_are_on_the_page_and_not_among_the_images(tmp_path):
    evaluation = Evaluation(folder=str(tmp_path))
    callbacks = [evaluation, Outsiders(Digits(classes=[7, 8, 9]))]
    for order in (callbacks, callbacks[::-1]):
        quiet_trainer(callbacks=order).fit(classifier(accept=0.9), Digits(classes=[0, 1]))
        assert evaluation.written[0].measured.images == 71
        text = (tmp_path / "evaluation.html").read_text()
        assert "AUROC against outsiders" in text
        assert "none of these" in text


def test_a_failing_validation_leaves_no_hook():
    class Fails(Digits):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.validating or self.trainer.state.stage == "validate":
                raise KeyError("stop")
            return batch

    model = classifier()
    with pytest.raises(KeyError):
        quiet_trainer(callbacks=[Evaluation()]).fit(model, Fails(classes=[0, 1]))
    assert not model.head._forward_hooks


def test_a_loader_in_another_order_has_no_pictures_of_other_images(tmp_path):
    x = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8)
    run = quiet_trainer(callbacks=[Evaluation(folder=str(tmp_path))])
    run.fit(classifier(), loader(x=x), loader(shuffle=True, x=x, y=Y.flip(0)))
    assert "errors.png" not in names(tmp_path)
    # In its own order it has.
    run = quiet_trainer(callbacks=[Evaluation(folder=str(tmp_path))])
    run.fit(classifier(), loader(x=x), loader(x=x, y=Y.flip(0)))
    assert "errors.png" in names(tmp_path)


def test_the_order_and_the_files_of_a_loader_are_known_only_where_they_are():
    data = TensorDataset(X, Y)
    assert in_order(DataLoader(data, 4))
    assert not in_order(DataLoader(data, 4, shuffle=True))

    class Backwards(torch.utils.data.BatchSampler):
        pass

    backwards = Backwards(range(24), 4, False)
    assert not in_order(DataLoader(data, batch_sampler=backwards))
    assert not in_order([X])
    assert files_of(data) is None

    class Torchvision:
        def __init__(self):
            self.samples = [("a.png", 0), ("b.png", 1), ("c.png", 0)]

    assert files_of(Subset(Torchvision(), [2, 0])) == ["c.png", "a.png"]


def test_an_image_with_a_wrong_label_is_named_on_the_page(photos, tmp_path):
    folder = tmp_path / "run"
    run = quiet_trainer(callbacks=[Evaluation(folder=str(folder))])
    data = ImageFolder(str(photos), num_workers=0)
    run.fit(classifier("ridge"), data)
    samples = rows(folder / "predictions.csv")
    assert [row["file"] for row in samples] == data.sample_names("val")
    wrong = [row for row in samples if row["label"] != row["true_label"]]
    assert {(row["true_class"], row["class"]) for row in wrong} == {("digit0", "digit2")}
    text = (folder / "evaluation.html").read_text()
    assert "Perhaps labelled wrong" in text
    assert f"digit0/{wrong[0]['file'][-7:]}" in text
    # The same image is a picture on the page.
    assert "data:image/jpeg" in text


def test_the_head_is_asked_once_for_a_batch():
    class Twice(ImprintedClassifier):
        def forward(self, images):
            return self.head(self.embed(images).repeat(2, 1))[: len(images)]

    with pytest.raises(ImprintError, match="has scored 10 embeddings for a batch of 5"):
        quiet_trainer(callbacks=[Evaluation()]).fit(Twice(None, "qi"), loader(), loader())


def test_tensorboard_gets_the_confusion_matrix(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = quiet_trainer(logger=TensorBoardLogger(tmp_path), callbacks=[Evaluation()])
    run.fit(ImprintedClassifier(None, "qi"), loader(), loader())
    events = EventAccumulator(run.log_dir)
    events.Reload()
    assert events.Tags()["images"] == ["val/confusion_matrix"]
    assert "val/balanced_accuracy" in events.Tags()["scalars"]


# The commands.

QUICK = ["--config", "configs/quickstart.yaml", "--model.recipe", "qi", "--model.image_size", "32"]


def test_the_commands_write_it_unless_told_not_to(tmp_path, capfd, monkeypatch):
    options = [*QUICK, "--data.classes", "[0,1,2]", "--data.shots", "20"]
    options += ["--trainer.default_root_dir", str(tmp_path)]
    cached = ["--cache_dir", str(tmp_path / "cache"), "--gallery", "file"]
    assert main(["fit", *options, *cached]) == 0
    shown = capfd.readouterr().out
    folder = tmp_path / "Digits" / "version_0"
    assert names(folder) >= FILES
    assert "weakest classes:" in shown
    assert f"evaluation: {folder / 'evaluation.html'}" in shown
    assert "next: " in shown
    summary = json.loads((folder / "summary.json").read_text())
    samples = rows(folder / "predictions.csv")
    right = sum(row["label"] == row["true_label"] for row in samples) / len(samples)
    assert right == pytest.approx(summary["accuracy"])
    recalls = [float(row["recall"]) for row in rows(folder / "per_class.csv")]
    assert sum(recalls) / 3 == pytest.approx(summary["balanced_accuracy"], abs=1e-5)
    text = (folder / "evaluation.html").read_text()
    assert "The training images nearest to each proxy" in text
    # From the cache come embeddings; the pictures are those of the data set.
    assert ("errors.png" in names(folder)) == (right < 1)

    checkpoint = ["--ckpt_path", str(next(tmp_path.rglob("imprinted.ckpt")))]
    assert main(["test", *options, *checkpoint]) == 0
    tested = rows(tmp_path / "Digits" / "version_1" / "predictions.csv")
    assert main(["predict", *options, *checkpoint]) == 0
    predicted = rows(tmp_path / "Digits" / "version_2" / "predictions.csv")
    # `predict` says the same, in the same columns.
    assert [{name: row[name] for name in predicted[0]} for row in tested] == predicted

    assert main(["validate", *options, *checkpoint, "--evaluation", "false"]) == 0
    folder = tmp_path / "Digits" / "version_3"
    assert names(folder) & (FILES | {"errors.png"}) == {"per_class.csv"}


SCRIPT = """
import sys
from lightning.pytorch import Trainer
from imprint_pl import Evaluation, ImprintedClassifier
from imprint_pl.data import Digits

devices, folder = int(sys.argv[1]), sys.argv[2]
trainer = Trainer(
    max_epochs=1, accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False,
    strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False,
    callbacks=[Evaluation(folder=folder)],
)
# 109 test images: two processes get one of them twice.
data = Digits(classes=[0, 1, 2], batch_size=16)
trainer.fit(ImprintedClassifier("efficientnet_lite0", "qi", image_size=32), data)
"""


@pytest.mark.slow
def test_two_processes_write_each_image_once_in_the_order_of_the_data(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    for devices in ("1", "2"):
        command = [sys.executable, str(tmp_path / "run.py"), devices, str(tmp_path / devices)]
        subprocess.run(command, check=True, timeout=300, cwd=tmp_path)
    one, two = (rows(tmp_path / devices / "predictions.csv") for devices in ("1", "2"))
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        for name in ("index", "label", "class", "true_label", "true_class"):
            assert first[name] == second[name]
        assert float(first["probability"]) == pytest.approx(float(second["probability"]), abs=1e-3)
    assert names(tmp_path / "1") == names(tmp_path / "2")
