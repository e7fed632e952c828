"""recipe="auto"."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from imprint_pl import ImprintedHead, ImprintError
from imprint_pl.method import auto
from imprint_pl.method.imprinting import imprint
from imprint_pl.method.recipes import RECIPES, resolve
from imprint_pl.method.selection import draw_shots


def accuracy(head, acceptance):
    right = head(acceptance["test_embeddings"]).argmax(1) == acceptance["test_labels"]
    return 100 * right.double().mean().item()


@pytest.mark.slow
def test_auto_on_real_embeddings_beats_a_trained_probe_and_knows_how_sure_it_is(acceptance):
    head = imprint(acceptance["train_embeddings"], acceptance["train_labels"])
    assert accuracy(head, acceptance) >= 88.4
    probabilities = head(acceptance["test_embeddings"]).softmax(1)
    error = multiclass_calibration_error(probabilities, acceptance["test_labels"], 10, n_bins=15)
    assert error <= 0.03


def test_it_says_what_it_tried_and_what_it_chose(acceptance):
    x, y = acceptance["train_embeddings"][:400], acceptance["train_labels"][:400]
    head = imprint(x, y, "auto", seed=3)
    assert [row["recipe"] for row in head.tried] == [c["recipe"] for c in auto.ONE_LAYER]
    assert sum(row["chosen"] for row in head.tried) == 1
    chosen = next(row for row in head.tried if row["chosen"])
    assert head.settings["recipe"] == chosen["recipe"]
    assert head.settings["chosen_by"] == "auto"
    for row in head.tried:
        assert 0.5 < row["accuracy"] < 1
        assert row["difference"] == pytest.approx(row["accuracy"] - head.tried[0]["accuracy"])


def test_what_it_gives_is_the_chosen_recipes_head(acceptance):
    x, y = acceptance["train_embeddings"][:400], acceptance["train_labels"][:400]
    head = imprint(x, y, "auto", seed=3)
    chosen = dict(auto.ONE_LAYER[[row["chosen"] for row in head.tried].index(True)])
    same = imprint(x, y, **chosen, seed=3)
    assert torch.equal(head(x), same(x))


@pytest.mark.parametrize("n", [400, 4000])
def test_it_leaves_kernel_for_a_recipe_that_is_better_beyond_doubt(n):
    # One feature decides, and the distances that the kernel sees are those of 299 noisy others.
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % 2
    x = 30 * torch.randn(n, 300, generator=generator)
    x[:, 0] = 6.0 * y - 3 + torch.randn(n, generator=generator)
    head = imprint(x, y, "auto")
    first, chosen = head.tried[0], next(row for row in head.tried if row["chosen"])
    assert chosen["recipe"] in ("ridge", "lda")
    assert chosen["difference"] > 2 * chosen["standard_error"]
    assert chosen["accuracy"] > first["accuracy"] + 0.01


def test_a_lead_within_two_standard_errors_changes_nothing(monkeypatch):
    right = torch.zeros(100, dtype=torch.bool)
    right[:80] = True
    little, much = right.clone(), right.clone()
    little[80:83] = True  # three more right: 0.03 against 2 · 0.02
    much[80:90] = True
    y = torch.ones(100, dtype=torch.int64)
    right, little, much = (auto.Labelled(each.long(), y) for each in (right, little, much))
    answers = iter([right, little])
    monkeypatch.setattr(auto, "ONE_LAYER", (dict(recipe="qi"), dict(recipe="lda")))
    monkeypatch.setattr(auto, "_labelled", lambda *_: next(answers))
    x, y = torch.randn(20, 3), torch.arange(20) % 2
    assert imprint(x, y).settings["recipe"] == "qi"
    answers = iter([right, much])
    assert imprint(x, y).settings["recipe"] == "lda"


def test_one_sample_a_class_is_enough():
    x = 3 * torch.eye(4)
    head = imprint(x, torch.arange(4))
    assert head.settings["recipe"] == "kernel"
    assert head.tried == []
    assert head(x).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("counts", [[1, 30], [2, 2, 2], [700, 1, 3], [5]])
def test_uneven_and_tiny_classes_are_labelled(counts):
    generator = torch.Generator().manual_seed(1)
    y = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    x = 8 * torch.eye(len(counts), 6)[y] + torch.randn(len(y), 6, generator=generator)
    head = imprint(x, y)
    assert head(x).isfinite().all()
    assert (head(x).argmax(1) == y).double().mean() > 0.9


@pytest.mark.slow
def test_thousands_of_samples_with_rare_classes_are_compared_on_all_classes():
    generator = torch.Generator().manual_seed(1)
    y = torch.cat([torch.zeros(9000, dtype=torch.long), torch.tensor([1, 1, 2, 2, 2])])
    x = 12 * torch.eye(3, 6)[y] + torch.randn(len(y), 6, generator=generator)
    sample, (held,) = auto._comparison(y, seed=0)
    trained = torch.ones(len(sample), dtype=torch.bool)
    trained[held] = False
    assert (torch.bincount(y[sample][trained], minlength=3) >= 2).all()
    assert len(held) == auto.LABELLED
    assert len(torch.unique(sample)) == len(sample)
    assert imprint(x, y)(x[-5:]).argmax(1).tolist() == [1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("samples", "classes", "trained", "labelled"),
    [
        *((600, 3, 480, 600), (748, 3, 598, 748), (900, 3, 300, 600), (3000, 3, 1000, 2000)),
        *((7000, 3, 2000, 3000), (9000, 300, 3000, 3000), (30000, 300, 6000, 3000)),
    ],
)
def test_a_third_is_imprinted_and_of_few_samples_all_are_labelled_in_turn(
    samples, classes, trained, labelled
):
    y = torch.arange(samples) % classes
    rows, held = auto._comparison(y, seed=0)
    assert abs(len(rows) - len(held[0]) - trained) <= 3  # folds are whole samples of each class
    assert sum(map(len, held)) == labelled
    assert len(torch.cat(held).unique()) == labelled


def layers(n, seed):
    """Three classes: 200 early features that say nothing, of which some hardly vary, and 20 late
    ones that tell the classes apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    early = torch.randn(n, 200, generator=generator) ** 5
    late = (torch.randn(n, 20, generator=generator) + 3 * torch.eye(3, 20)[y]).relu()
    return torch.cat([early, late], 1), y


def test_a_dozen_samples_of_several_layers_are_known_by_the_last_one():
    right = []
    for seed in range(5):
        x, y = layers(12, seed)
        new_x, new_y = layers(300, 100 + seed)
        head = imprint(x, y, layer_widths=[200, 20])
        assert head.tried[0]["norm_pre"] == "last+power+l2+nystrom"
        right.append((head(new_x).argmax(1) == new_y).double().mean().item())
    assert sum(right) / len(right) > 0.8


@pytest.mark.parametrize(
    ("samples", "first"),
    [(20, "last+power+l2+nystrom"), (21, "join+power+l2+nystrom"), (501, "join+nystrom")],
)
def test_what_comes_first_of_several_layers_depends_on_the_number_of_samples(samples, first):
    candidates = auto._candidates(30, samples, [10, 20], samples)
    assert candidates[0] == dict(recipe="kernel", norm_pre=first)
    assert sorted(map(str, candidates)) == sorted(map(str, auto.SEVERAL_LAYERS))


def test_keywords_of_parts_are_refused():
    with pytest.raises(ImprintError, match="k=5 is not used by recipe='auto'.*robust"):
        imprint(torch.eye(3), torch.arange(3), k=5)
    assert resolve("auto").parameters == {"recipe": "auto"}


def test_a_saved_head_of_auto_is_the_same_in_a_fresh_process(acceptance, tmp_path):
    x, y = acceptance["train_embeddings"][:200], acceptance["train_labels"][:200]
    head = imprint(x, y)
    torch.save({"head": head.state_dict(), "x": x, "logits": head(x).detach()}, tmp_path / "f.pt")
    code = (
        "import sys, torch; from imprint_pl import ImprintedHead;"
        "file = torch.load(sys.argv[1], weights_only=True); head = ImprintedHead();"
        "head.load_state_dict(file['head']); assert torch.equal(head(file['x']), file['logits']);"
        "assert head.settings['chosen_by'] == 'auto' and len(head.tried) > 4"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "f.pt"], check=True)
    other = ImprintedHead()
    other.load_state_dict(head.state_dict())
    assert other.temperature == head.temperature


@pytest.mark.slow
@pytest.mark.parametrize("shots", [5, 20, 50, 100])
def test_with_few_shots_auto_is_close_to_the_best_single_recipe(acceptance, shots):
    x, y = acceptance["train_embeddings"], acceptance["train_labels"]
    single = [name for name in RECIPES if name not in ("hosoda", "janson", "ls")]
    means = {}
    for recipe in ["auto", *single]:
        found = []
        for seed in range(10):
            rows = draw_shots(y, shots, seed)
            found.append(
                accuracy(imprint(x[rows], y[rows], recipe, seed=seed, calibrate=False), acceptance)
            )
        means[recipe] = sum(found) / len(found)
    print(shots, {name: round(value, 2) for name, value in means.items()})
    assert means["auto"] > max(means.values()) - 0.5
