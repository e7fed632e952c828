"""Near-copies cannot vouch for each other: λ, the temperature, the choice of auto."""

from pathlib import Path

import numpy as np
import pytest
import torch

from imprint_pl.method.calibration import fit_temperature
from imprint_pl.method.holdout import copies_of, held_out_scores
from imprint_pl.method.imprinting import imprint
from imprint_pl.method.pipeline import Request
from imprint_pl.method.recipes import resolve
from imprint_pl.numerics.copies import Copies
from imprint_pl.numerics.moments import Moments
from imprint_pl.parts.gen.choice_of_lam import LeftOut, Spectrum
from imprint_pl.parts.gen.ridge import Ridge
from imprint_pl.training_set.sums import TrainingSums

PART = Path(__file__).parents[1] / "data" / "fashion_mnist_part.npz"


def photographs():
    part = np.load(PART)
    names = "train_embeddings", "train_labels", "test_embeddings", "test_labels"
    return [
        torch.from_numpy(part[name]).float() if "emb" in name else torch.from_numpy(part[name])
        for name in names
    ]


def with_copies(x, y, share, seed=0):
    """The set with a share of its rows a second time, slightly changed."""
    generator = torch.Generator().manual_seed(seed)
    again = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    length = (x - x.mean(0)).square().mean().sqrt()
    changed = x[again] + 0.1 * length * torch.randn(len(again), x.shape[1], generator=generator)
    return torch.cat([x, changed]), torch.cat([y, y[again]])


def accuracy(head, x, y):
    return (head(x).argmax(1) == y).double().mean().item()


@pytest.mark.parametrize("recipe", ["ridge", "kernel", "auto"])
@pytest.mark.parametrize("samples", [300, pytest.param(1200, marks=pytest.mark.slow)])
def test_slightly_changed_copies_of_a_twentieth_lose_at_most_half_a_point(recipe, samples):
    x, y, test_x, test_y = photographs()
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))[:samples]
    x, y = x[rows], y[rows]
    alone = accuracy(imprint(x, y, recipe, calibrate=False), test_x, test_y)
    copied = imprint(*with_copies(x, y, 0.05), recipe, calibrate=False)
    assert accuracy(copied, test_x, test_y) >= alone - 0.005


def test_gcv_is_fooled_by_the_copies_that_leave_one_out_sees_through():
    x, y, _, _ = photographs()
    x, y = x[::3], y[::3]
    copied = with_copies(x, y, 0.05)
    chosen = {lam: imprint(*copied, "ridge", lam=lam, calibrate=False) for lam in ("gcv", "loo")}
    alone = imprint(x, y, "ridge", calibrate=False).settings["chosen_lam"]
    assert chosen["gcv"].settings["chosen_lam"] < 1e-2 * alone
    assert alone / 4 < chosen["loo"].settings["chosen_lam"] < 4 * alone


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("n", "d"), [(12, 4), (8, 20)])
def test_leaving_out_is_the_regression_of_the_other_rows(n, d, intercept):
    """The same Nλ, without the row and its copies, made row by row."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    y = torch.arange(n) % 3
    x[n - 1] = x[0] + 0.01
    y[n - 1] = 0
    moments = Moments.of(x, y, 3)
    spectrum = Spectrum(moments, intercept)
    pair = Copies(torch.tensor([0, n - 1]), torch.tensor([n - 1, 0]), n)
    scored = n - 2
    losses = spectrum.leave_out(LeftOut(x, y, scored, pair))
    z = torch.cat([x, x.new_full((n, 1), spectrum.constant)], 1) if intercept else x
    for lam, loss in list(zip(spectrum.grid.tolist(), losses.tolist(), strict=True))[8:]:
        expected = 0.0
        for i in range(scored):
            kept = torch.ones(n, dtype=torch.bool)
            kept[[i, n - 1] if i == 0 else [i]] = False
            gram = z[kept].T @ z[kept] + n * lam * torch.eye(z.shape[1], dtype=z.dtype)
            one_hot = torch.eye(3, dtype=z.dtype)[y]
            weights = torch.linalg.solve(gram, z[kept].T @ one_hot[kept])
            expected += (one_hot[i] - z[i] @ weights).square().sum().item()
        assert loss == pytest.approx(expected, rel=1e-5)


def test_a_class_that_would_have_no_sample_left_is_not_foretold():
    x, y = torch.eye(4, dtype=torch.float64), torch.tensor([0, 0, 1, 1])
    pair = Copies(torch.tensor([2, 3]), torch.tensor([3, 2]), 4)
    nobody = Copies(pair.first[:0], pair.second[:0], 4)
    spectrum = Spectrum(Moments.of(x, y, 2))
    both = spectrum.leave_out(LeftOut(x, y, 4, pair))
    alone = spectrum.leave_out(LeftOut(x[:2], y[:2], 2, nobody.among(torch.arange(2))))
    assert torch.allclose(both, alone)
    assert spectrum.leave_out(LeftOut(x[2:], y[2:], 2, pair.among(torch.tensor([2, 3])))) is None


def test_sums_of_a_stream_choose_the_lambda_of_all_rows_and_copies_do_not_fool_it():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(6000) % 10
    x = torch.randn(10, 60, generator=generator)[y] + 3 * torch.randn(6000, 60, generator=generator)
    sums = TrainingSums(resolve("ridge"), x[:100], y[:100], 10)
    sums.add(x, y)
    alone = imprint(x, y, "ridge").settings["chosen_lam"]
    assert sums.head().settings["chosen_lam"] == alone
    x, y = with_copies(x, y, 0.05)
    copied = TrainingSums(resolve("ridge"), x[:100], y[:100], 10)
    copied.add(x, y)
    assert alone / 4 < copied.head().settings["chosen_lam"] < 4 * alone


@pytest.mark.parametrize("recipe", ["qi", "robust", "ridge"])
def test_a_held_out_sample_is_scored_by_a_head_that_has_not_seen_its_copy(recipe):
    x, y, _, _ = photographs()
    x, y = x[::4], y[::4]
    n = len(y)
    x, y = torch.cat([x, 1.001 * x[:30]]), torch.cat([y, y[:30]])
    held = [torch.arange(30), torch.arange(30, 60)]
    copies = copies_of(x, y, held)
    assert set(range(n, n + 30)) <= set(copies[0].tolist())
    without = torch.ones(len(y), dtype=torch.bool)
    without[held[0]] = without[copies[0]] = False
    request, parts = Request(10), resolve(recipe, **({"lam": 0.1} if recipe == "ridge" else {}))
    scored = held_out_scores(x, y, parts, request, held[:1])
    keywords = {"lam": 0.1} if recipe == "ridge" else {}
    head = imprint(x[without], y[without], recipe, calibrate=False, **keywords)
    assert torch.equal(scored.y, y[:30])
    if recipe != "robust":  # its clusters are drawn in another order of the rows
        assert torch.allclose(scored.scores, head.scores(x[:30]), atol=1e-4)


def test_the_temperature_is_that_of_the_set_without_copies():
    x, y, _, _ = photographs()
    x, y = x[::3], y[::3]
    alone = imprint(x, y, "ridge", lam=1e-3).temperature
    again = torch.arange(len(y)).repeat(2)
    shift = 1 + 1e-3 * (torch.arange(len(again)) >= len(y)).float()[:, None]
    twice = imprint(x[again] * shift, y[again], "ridge", lam=1e-3).temperature
    assert 0.8 * alone < twice < 1.25 * alone
    # What copies that vouch for each other would have said.
    half = imprint(x[again] * shift, y[again], "ridge", lam=1e-3, calibrate=False)
    assert fit_temperature(half.scores(x), y) < 0.8 * alone


def test_ridge_of_sums_without_rows_chooses_by_gcv():
    x, y = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    moments = Moments.of(x, y, 3)
    assert Ridge()(moments).chosen == Ridge("gcv")(moments).chosen


def test_one_sample_a_class_and_its_copy_are_one_sample_a_class():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    head = imprint(x, torch.arange(5), "ridge")
    assert head.settings["lam"] == "loo"
    assert head(x).argmax(1).tolist() == [0, 1, 2, 3, 4]
