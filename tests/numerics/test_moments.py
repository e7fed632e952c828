from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint_pl.numerics.moments import Moments

WEIGHTS = torch.tensor([1.0, 0.5, 3.0])


def direct_within(x, y, average):
    """Straight from the definition, one class at a time."""
    x = x.double()
    parts = [(x[y == c] - x[y == c].mean(0)) for c in y.unique()]
    if average == "micro":
        return sum(p.T @ p for p in parts) / len(x)
    return sum(p.T @ p / len(p) for p in parts) / len(parts)


def unbalanced(seed=0, n=57, d=4, classes=5):
    generator = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.arange(classes), torch.randint(0, 3, (n - classes,), generator=generator)])
    return torch.randn(n, d, generator=generator) + y[:, None], y


def test_sums_of_hand_placed_points_are_exact():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    moments = Moments.of(x, torch.tensor([0, 0, 2]), 3)
    assert moments.counts.tolist() == [2, 0, 1]
    assert moments.sums.tolist() == [[4, 0], [0, 0], [0, 5]]
    assert moments.gram.tolist() == [[10, 0], [0, 25]]
    assert moments.means[0].tolist() == [2, 0]
    assert moments.global_mean.tolist() == pytest.approx([4 / 3, 5 / 3])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 57), max_size=6))
def test_batches_of_any_size_in_any_order_give_the_same_sums(seed, cuts):
    x, y = unbalanced(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    bounds = [0, *sorted(cuts), len(x)]
    fed = Moments.zeros(5, 4)
    for start, end in pairwise(bounds):
        fed.add(x[order[start:end]], y[order[start:end]])
    whole = Moments.of(x, y, 5)
    torch.testing.assert_close(fed.counts, whole.counts)
    torch.testing.assert_close(fed.sums, whole.sums)
    torch.testing.assert_close(fed.gram, whole.gram)


def test_moments_of_two_halves_add_up_and_a_class_can_be_subtracted():
    x, y = unbalanced()
    whole = Moments.of(x, y, 5)
    halves = Moments.of(x[:30], y[:30], 5) + Moments.of(x[30:], y[30:], 5)
    torch.testing.assert_close(halves.gram, whole.gram)
    without = whole - Moments.of(x[y == 1], y[y == 1], 5)
    direct = Moments.of(x[y != 1], y[y != 1], 5)
    for name in ("counts", "sums", "gram"):
        torch.testing.assert_close(getattr(without, name), getattr(direct, name))


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_within_equals_the_definition_from_a_gram_a_class(average):
    x, y = unbalanced()
    moments = Moments.of(x, y, 5, gram="per_class")
    torch.testing.assert_close(moments.within(average), direct_within(x, y, average))


def test_within_macro_equals_the_definition_from_weights_known_beforehand():
    x, y = unbalanced()
    moments = Moments.of(x, y, 5, class_weights=1 / torch.bincount(y).double())
    torch.testing.assert_close(moments.within("macro"), direct_within(x, y, "macro"))


def test_within_macro_of_unequal_classes_is_refused_from_one_pooled_gram():
    x, y = unbalanced()
    with pytest.raises(ValueError, match="differ in size"):
        Moments.of(x, y, 5).within("macro")


@pytest.mark.parametrize("options", [{}, {"gram": "per_class"}, {"class_weights": WEIGHTS}])
def test_a_gram_matrix_of_several_blocks_is_whole_and_symmetric(options):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 1100, generator=generator), torch.arange(60) % 3
    moments = Moments.zeros(3, 1100, **options)
    for rows, labels in zip(x.split(25), y.split(25), strict=True):
        moments.add(rows, labels)
    z = x.double()
    grams = torch.stack([z[y == c].T @ z[y == c] for c in range(3)])
    weights = options.get("class_weights", torch.ones(3)).double()
    per_class = "gram" in options
    expected = grams if per_class else torch.einsum("c,cij->ij", weights, grams)
    torch.testing.assert_close(moments.gram, expected)
    torch.testing.assert_close(moments.gram.mT, moments.gram, rtol=1e-12, atol=1e-12)


def test_the_classes_with_samples_are_numbered_without_gaps():
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    moments = Moments.of(
        x, torch.tensor([0, 0, 2]), 3, gram="per_class", class_weights=torch.tensor([1.0, 2.0, 3.0])
    )
    present = moments.present()
    assert present.counts.tolist() == [2, 1]
    assert present.sums.tolist() == [[4, 0], [0, 5]]
    assert present.gram.tolist() == [[[10, 0], [0, 0]], [[0, 0], [0, 25]]]
    assert present.class_weights.tolist() == [1, 3]


def test_half_precision_input_is_summed_in_float64():
    x = torch.full((4096, 1), 1.0009765625, dtype=torch.float16)
    moments = Moments.of(x, torch.zeros(4096, dtype=torch.int64), 1)
    assert moments.sums.item() == 4096 * 1.0009765625


def test_relabelled_moves_counts_sums_and_class_grams_and_leaves_out_minus_one():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    moments = Moments.of(x, torch.tensor([0, 1, 2]), 3, gram="per_class")
    moved = moments.relabelled(torch.tensor([3, -1, 0]), 4)
    assert moved.counts.tolist() == [1, 0, 0, 1]
    assert moved.sums.tolist() == [[5, 6], [0, 0], [0, 0], [1, 2]]
    assert moved.gram[3].tolist() == [[1, 2], [2, 4]]
    assert moved.gram[1].abs().sum() == 0


def test_padded_adds_empty_classes_and_keeps_a_pooled_gram():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    moments = Moments.of(x, torch.tensor([0, 1]), 2, class_weights=torch.tensor([0.5, 2.0]))
    padded = moments.padded(4)
    assert padded.counts.tolist() == [1, 1, 0, 0]
    assert padded.class_weights.tolist() == [0.5, 2.0, 1.0, 1.0]
    assert torch.equal(padded.gram, moments.gram)
