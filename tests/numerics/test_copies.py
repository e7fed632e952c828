"""Near-copies among rows, `numerics/copies.py`: exact cases, and sets that look like copies."""

import pytest
import torch

from imprint_pl.numerics.copies import Copies, CopyFinder


def one_class(n):
    return torch.zeros(n, dtype=torch.int64)


def pairs(x, y=None, places=None):
    found = CopyFinder(x, one_class(len(x)) if y is None else y).find(places)
    return set(zip(found.first.tolist(), found.second.tolist(), strict=True))


def points(n, d=20, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_the_one_pair_that_lies_close_is_found_in_both_orders():
    x = torch.tensor([[0.0], [1e-4], [1.0], [2.0], [3.0], [4.0]])
    assert pairs(x) == {(0, 1), (1, 0)}
    # A copy with another label is a copy.
    y = torch.tensor([0, 1, 0, 0, 0, 0])
    assert pairs(x.repeat(1, 9), y) == {(0, 1), (1, 0)}


@pytest.mark.parametrize("d", [10, 20, 64, 65, 1280])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_slightly_changed_rows_are_found_and_no_others_in_any_dimension_and_scale(d, scale):
    x = points(200, d)
    changed = x[:20] + 0.02 * points(20, d, 1)
    found = pairs(scale * (7 + torch.cat([x, changed])))
    assert found == {(i, 200 + i) for i in range(20)} | {(200 + i, i) for i in range(20)}


@pytest.mark.parametrize("times", [2, 5])
def test_a_set_in_which_every_image_occurs_several_times_is_full_of_copies(times):
    x = points(100).repeat(times, 1) + 0.02 * points(100 * times, seed=1)
    assert len(pairs(x)) == 100 * times * (times - 1)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(50, 3),
        torch.arange(400)[:, None] % 8 * torch.ones(3),
        points(300),
        points(2),
        torch.zeros(0, 3),
    ],
    ids=["all equal", "eight values", "random", "two rows", "none"],
)
def test_rows_that_are_alike_as_usual_are_no_copies(x):
    assert pairs(x) == set()


def test_the_samples_of_tight_classes_are_no_copies_of_each_other():
    centres = 100 * points(10)
    y = torch.arange(10).repeat_interleave(6)
    x = centres[y] + points(60, seed=1)
    assert pairs(x, y) == set()


def test_copies_of_some_rows_are_looked_for_among_all():
    x = points(150)
    x = torch.cat([x, x[:10] + 0.01])
    assert pairs(x, places=torch.tensor([3, 50])) == {(3, 153)}


def test_copies_of_rows_and_among_rows():
    copies = Copies(torch.tensor([0, 2, 2, 3]), torch.tensor([2, 0, 3, 2]), 5)
    assert copies.of(torch.tensor([0])).tolist() == [2]
    assert copies.of(torch.tensor([2])).tolist() == [0, 3]
    assert copies.of(torch.tensor([0, 2])).tolist() == [3]
    assert copies.of(torch.tensor([4])).tolist() == []
    part = copies.among(torch.tensor([4, 3, 2]))
    assert part.first.tolist() == [2, 1]
    assert part.second.tolist() == [1, 2]
    assert part.rows == 3
