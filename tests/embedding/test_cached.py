"""The embedding cache: what it shares, what it notices, and what survives a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_sets
import torch
from PIL import Image
from places import ROOT
from torch import nn
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier
from imprint_pl.cli import main
from imprint_pl.data import (
    MNIST,
    ArrayDataset,
    CombiDigits,
    Digits,
    EmbeddingDataModule,
    ImageDataModule,
    ImageFiles,
    ImageFolder,
    Splits,
)
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.embedding.row_cache import RowCache
from imprint_pl.errors import ImprintError


class Means(nn.Module):
    """Mean and largest value of each image, counted."""

    def __init__(self, offset=0.0):
        super().__init__()
        self.offset = nn.Parameter(torch.tensor([offset]))
        self.images = 0

    def forward(self, images):
        self.images += len(images)
        flat = images.flatten(1)
        return torch.stack([flat.mean(1), flat.amax(1)], 1) + self.offset


def means(size=8, offset=0.0):
    return load_backbone(Means(offset), preprocess={"size": size, "mean": [0.5], "std": [0.5]})


def embed_means(data, folder, backbone=None):
    return embed(backbone or means(), data, folder, name="means")


def parts(folder):
    return sorted(Path(folder).glob("*/part-*"))


def test_embeddings_are_those_of_the_backbone_in_the_data_set_s_order(tmp_path):
    data, backbone = Digits(batch_size=100), means()
    embedded = embed_means(data, tmp_path, backbone)
    data.setup()
    for split in ("train", "val", "test"):
        x, y = embedded.arrays(split)
        dataset = getattr(data, f"{split}_dataset")
        assert (x.dtype, tuple(x.shape)) == (torch.float32, (len(dataset), 2))
        assert torch.equal(x, backbone(dataset.images))
        assert torch.equal(y, dataset.labels)
    batch = next(iter(embedded.train_dataloader()))
    assert [tuple(tensor.shape) for tensor in batch] == [(100, 2), (100,)]
    assert (embedded.class_names, embedded.task) == (data.class_names, "digits")


def test_a_second_time_reads_only_and_says_so(tmp_path):
    first = embed_means(Digits(), tmp_path)
    backbone = means()
    again = embed_means(Digits(), tmp_path, backbone)
    assert backbone.model.images == 0
    assert (first.use.embedded, first.use.read) == (1797, 0)
    assert (again.use.embedded, again.use.read) == (0, 1797)
    assert torch.equal(first.arrays()[0], again.arrays()[0])
    assert str(again.use).startswith("1,797 embeddings read, 0 images embedded in")


def test_tasks_of_one_data_set_share_what_they_have_in_common(tmp_path):
    few = embed_means(Digits(classes="even", shots=5), tmp_path)
    assert few.use.embedded == 25 + len(few.test_dataset)
    merged = embed_means(Digits(d=3, num_labels=3), tmp_path)
    assert merged.task == "digits (3-in-1, seed 0)"
    rest = embed_means(Digits(), tmp_path)
    assert few.use.embedded + merged.use.embedded + rest.use.embedded == 1797
    images = Digits(classes="even", shots=5)
    images.setup()
    for name in ("labels", "original_labels"):
        assert torch.equal(getattr(few.train_dataset, name), getattr(images.train_dataset, name))
    assert torch.equal(few.arrays()[0], means()(images.train_dataset.images))


def test_further_tasks_are_made_of_the_same_splits(tmp_path):
    whole = embed_means(Digits(), tmp_path)
    task = EmbeddingDataModule(whole.splits, classes=[[1, 7], 4], shots=9)
    images = Digits(classes=[[1, 7], 4], shots=9)
    task.setup()
    images.setup()
    assert task.class_names == images.class_names == ["1+7", "4"]
    assert torch.equal(task.arrays()[0], means()(images.train_dataset.images))


def test_embeddings_of_one_s_own_are_a_data_module(blobs):
    x, y = blobs
    splits = Splits(["a", "b", "c"], ArrayDataset(x, y), ArrayDataset(x[:9], y[:9]))
    data = EmbeddingDataModule(splits, classes=["c", "a"], shots=4)
    data.setup()
    assert data.class_names == ["c", "a"]
    assert torch.equal(data.arrays()[1].bincount(), torch.tensor([4, 4]))
    found, labels = next(iter(data.test_dataloader()))
    assert torch.equal(found, x[:9][y[:9] != 1])
    assert labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_what_changes_the_embeddings_changes_the_key(tmp_path):
    embed_means(Digits(shots=1), tmp_path)
    others = [means(offset=1.0), means(size=4)]
    for backbone in others:
        assert embed_means(Digits(shots=1), tmp_path, backbone).use.read == 0
    assert embed(means(), Digits(shots=1), tmp_path, name="means 2").use.read == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert embed_means(Digits(shots=1), tmp_path).use.read == 0
    assert embed_means(Digits(shots=1), tmp_path).use.embedded == 0


def test_weights_that_change_in_place_change_the_key(tmp_path):
    backbone = means()
    embed_means(Digits(shots=1), tmp_path, backbone)
    backbone.model.load_state_dict({"offset": torch.tensor([1.0])})
    assert embed_means(Digits(shots=1), tmp_path, backbone).use.read == 0
    with torch.no_grad():
        backbone.model.offset.add_(1)
    assert embed_means(Digits(shots=1), tmp_path, backbone).use.read == 0


def changed_digits(change):
    class Changed(Digits):
        def load(self):
            splits = super().load()
            change(splits)
            return splits

    return Changed(shots=2)


def test_another_pixel_is_another_data_set_and_another_label_is_not(tmp_path):
    embed_means(Digits(shots=2), tmp_path)

    def brighten(splits):
        splits.train.images[0, 0, 0, 0] += 1

    def turn_around(splits):
        splits.train.labels = 9 - splits.train.labels
        splits.test.labels = 9 - splits.test.labels

    assert embed_means(changed_digits(brighten), tmp_path).use.embedded == 20
    assert embed_means(changed_digits(turn_around), tmp_path).use.folders == (
        embed_means(Digits(shots=2), tmp_path).use.folders
    )


def write_photos(folder):
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.full((9 + i, 12, 3), 40 * label + i, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def test_image_files_are_known_by_name_size_and_time_wherever_their_folder_is(tmp_path):
    write_photos(tmp_path / "photos")
    cache = tmp_path / "cache"
    three = load_backbone(Means(), preprocess={"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3})

    def fit(folder="photos"):
        return embed_means(ImageFolder(str(tmp_path / folder), num_workers=0), cache, three).use

    assert fit().embedded == 10
    (tmp_path / "photos").rename(tmp_path / "moved")
    assert fit("moved").embedded == 0
    data = ImageFolder(str(tmp_path / "moved"), num_workers=0)
    embedded = embed_means(data, cache, three)
    assert embedded.sample_names("test") == data.sample_names("test")
    os.utime(tmp_path / "moved" / "cat" / "3.png", (1, 1))
    assert fit("moved").embedded > 0


def test_a_union_and_its_sources_share_their_embeddings(tmp_path):
    tiny_sets.write_mnist(tmp_path)
    tiny_sets.write_usps(tmp_path)
    tiny_sets.write_svhn(tmp_path)
    tiny_sets.write_mnist_m_files(tmp_path)
    root, cache = str(tmp_path), tmp_path / "cache"
    backbone = load_backbone(Means(), preprocess={"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3})
    alone = embed_means(MNIST(root=root), cache, backbone)
    union = embed_means(CombiDigits(root=root, classes=[3, [0, 8]], num_workers=2), cache, backbone)
    assert (alone.use.embedded, union.use.read) == (30, 6 + 3)
    data = CombiDigits(root=root, classes=[3, [0, 8]], num_workers=0)
    data.setup()
    expected = torch.cat([backbone(images) for images, _ in data.train_dataloader()])
    assert torch.allclose(union.arrays()[0], expected, atol=1e-6)
    assert torch.equal(union.train_dataset.original_labels, data.train_dataset.original_labels)
    assert union.original_class_names == data.original_class_names


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def of_another_cache(path):
    positions, rows = torch.arange(5), torch.zeros(5, 2)
    other = RowCache(path.parent, {"another": "key"})
    path.unlink()
    other.write(positions, rows)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, of_another_cache])
def test_a_damaged_or_foreign_part_is_named_and_made_again(tmp_path, damage):
    expected = embed_means(Digits(), tmp_path).arrays()[0]
    damaged = max(parts(tmp_path), key=lambda path: path.stat().st_size)
    damage(damaged)
    with pytest.warns(UserWarning, match="embedding cache: removed .*part-00000") as caught:
        again = embed_means(Digits(), tmp_path)
    assert len(caught) == 1
    assert again.use.embedded == 1437
    assert torch.equal(again.arrays()[0], expected)
    assert embed_means(Digits(), tmp_path).use.embedded == 0


def test_what_a_killed_writer_left_unfinished_is_written_over(tmp_path):
    embed_means(Digits(shots=1), tmp_path)
    for folder in tmp_path.iterdir():
        (folder / "unfinished").write_bytes(b"half a part")
    embed_means(Digits(), tmp_path)
    assert embed_means(Digits(), tmp_path).use.embedded == 0
    left = {path.name for path in tmp_path.glob("*/*") if not path.name.startswith("part-")}
    assert left <= {"key.json", "lock", "unfinished"}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_ten_kills_and_two_writers_leave_whole_files_and_equal_embeddings(tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("killed_fills.py")), str(tmp_path), "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    assert "removed" not in finished.stderr
    seen = json.loads(finished.stdout.splitlines()[-1])
    # Killed in the middle, and what was whole was kept.
    assert 0 < seen["after_kills"][-1] < 113
    assert seen["after_kills"] == sorted(seen["after_kills"])
    assert 0 < seen["rerun_embedded"] == 1797 - min(16 * seen["after_kills"][-1], 1797)
    assert seen["together_embedded"] == 0
    assert seen["alone_embedded"] == 1797
    assert seen["equal"] == [True, True]
    assert seen["parts"] == [113, 113, 113]


def test_a_module_of_one_s_own_needs_a_name_and_data_must_be_readable_by_position(tmp_path):
    with pytest.raises(ImprintError, match=r"'Means' is a module of your own.*name=…"):
        embed(means(), Digits(), tmp_path)
    with pytest.raises(ImprintError, match="not ImageFiles: give one of imprint_pl.data"):
        embed_means(ImageFiles([__file__]), tmp_path)

    class NoFingerprint(Digits):
        def load(self):
            splits = super().load()
            splits.train = nn.Module()  # anything without fingerprint
            splits.train.labels = splits.test.labels
            return splits

    with pytest.raises(ImprintError, match=r"Module of 'digits' has no fingerprint\(\)"):
        embed_means(NoFingerprint(), tmp_path)


def test_an_image_without_a_finite_embedding_is_named_and_not_kept(tmp_path):
    class Broken(Means):
        def forward(self, images):
            rows = super().forward(images)
            rows[images.flatten(1).mean(1) == images.flatten(1).mean(1)[7]] = torch.nan
            return rows

    backbone = load_backbone(Broken(), preprocess={"size": 8, "mean": [0.5], "std": [0.5]})
    with pytest.raises(ImprintError, match="image 7 of 'digits' has NaN or infinite values"):
        embed_means(Digits(), tmp_path, backbone)
    assert parts(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ImprintError, match=r"cannot write embeddings into .*file"):
        embed_means(Digits(), tmp_path / "file")


def test_no_global_generator_is_touched(tmp_path):
    state = torch.random.get_rng_state()
    embed_means(Digits(shots=3, d=2), tmp_path)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_user_data_modules_with_a_load_of_their_own_are_cached(tmp_path):
    class Mine(ImageDataModule):
        name = "mine"

        def load(self):
            images = torch.arange(40, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4)
            dataset = ArrayDataset(images, torch.arange(40) % 2)
            return Splits(["even", "odd"], dataset, dataset)

    embedded = embed_means(Mine(), tmp_path)
    # Train and test are the same images here, and are embedded once.
    assert embedded.use.embedded == 40
    assert embedded.arrays("test")[0].shape == (40, 2)


QUICK = ["--config", "configs/d_in_1_digits.yaml", "--data.shots", "30", "--model.image_size", "32"]


def summary_of(output):
    folder = output.splitlines()[-1].removeprefix("run: ")
    return json.loads(Path(folder, "summary.json").read_text())


@pytest.mark.slow
def test_fit_through_the_cache_equals_fit_without_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["embed", *QUICK, "--cache_dir", "cache"]) == 0
    output = capfd.readouterr().out
    assert "embedding cache: 0 embeddings read, 414 images embedded in" in output
    assert output.splitlines()[-1].startswith("cache: cache/efficientnet_lite0-")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]
    assert main(["fit", *QUICK]) == 0
    plain = summary_of(capfd.readouterr().out)
    assert main(["fit", *QUICK, "--cache_dir", "cache"]) == 0
    output = capfd.readouterr().out
    assert "embedding cache: 414 embeddings read, 0 images embedded in" in output
    cached = summary_of(output)
    assert cached["embed_seconds"] < 2
    assert (cached["embedded_images"], cached["cached_images"]) == (0, 414)
    for name in ("accuracy", "macro_f1", "task", "num_proxies", "shots", "d", "weights_sha256"):
        assert cached[name] == plain[name]
    states = [
        torch.load(summary["checkpoint"], weights_only=True)["state_dict"]
        for summary in (plain, cached)
    ]
    assert torch.allclose(states[0]["head.proxies"], states[1]["head.proxies"], atol=1e-5)
    # The checkpoint of a cached fit takes images.
    code = (
        "import sys, torch; from imprint_pl import ImprintedClassifier; from "
        "imprint_pl.data import Digits; model = "
        "ImprintedClassifier.load_from_checkpoint(sys.argv[1]).eval(); data = "
        "Digits(d=3, num_labels=3); data.setup(); y = data.test_dataset.labels; "
        "print((model(data.test_dataset.images).argmax(1) == y).double().mean().item())"
    )
    command = [sys.executable, "-c", code, cached["checkpoint"]]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert float(found.stdout.splitlines()[-1]) == pytest.approx(plain["accuracy"], abs=1e-6)


def test_mixed_precision_has_embeddings_of_its_own(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = [
        *QUICK,
        "--data.shots",
        "2",
        "--cache_dir",
        "cache",
        "--trainer.accelerator",
        "cpu",
    ]
    assert main(["embed", *arguments]) == 0
    assert main(["embed", *arguments, "--trainer.precision", "bf16-mixed"]) == 0
    output = capfd.readouterr().out
    assert output.count("embedding cache: 0 embeddings read, 330 images embedded") == 2
    assert main(["embed", *arguments, "--trainer.precision", "bf16-true"]) == 2
    assert "--cache_dir with --trainer.precision bf16-true" in capfd.readouterr().err


def test_embed_needs_a_folder(capfd):
    assert main(["embed", "--data", "Digits"]) == 2
    assert "embed needs --cache_dir DIR" in capfd.readouterr().err


def test_a_model_in_python_fits_on_cached_embeddings_and_then_takes_images(tmp_path):

    model = ImprintedClassifier("efficientnet_lite0", recipe="qi", image_size=32)
    embedded = embed(model.backbone, Digits(classes="short", shots=10), tmp_path)
    trainer = quiet_trainer()
    trainer.fit(model, embedded)
    assert model.class_names == ["0", "1", "2"]
    data = Digits(classes="short")
    data.setup()
    with torch.no_grad():
        scores = model.eval()(data.test_dataset.images)
    accuracy = (scores.argmax(1) == data.test_dataset.labels).double().mean().item()
    assert accuracy == pytest.approx(trainer.callback_metrics["val/accuracy"].item())
    assert accuracy > 0.6


def test_help_of_embed_names_the_cache(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["embed", "--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "python -m imprint_pl embed" in output
    assert "--cache_dir" in output
