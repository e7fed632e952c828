"""Which samples a task takes: exact cases, and properties that hold for any labels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from imprint_pl.data.tasks import draw, relabel, resolve_classes
from imprint_pl.errors import ImprintError

NAMES = ["airplane", "bird", "cat", "dog"]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 0])


def test_all_classes_without_a_choice():
    assert resolve_classes(None, NAMES) == [0, 1, 2, 3]


def test_indices_and_names_keep_the_order_given():
    assert resolve_classes([2, "airplane", 3], NAMES) == [2, 0, 3]


def test_a_misspelt_class_is_answered_with_near_names():
    with pytest.raises(ImprintError, match=r"unknown class 'Airplan'.*did you mean 'airplane'"):
        resolve_classes(["Airplan"], NAMES)


def test_a_strange_class_is_answered_with_the_classes_there_are():
    with pytest.raises(ImprintError, match=r"the classes are 'airplane', 'bird', 'cat', 'dog'$"):
        resolve_classes(["zzzz"], NAMES)


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_an_error(index):
    with pytest.raises(ImprintError, match=rf"unknown class {index}: the indices run from 0 to 3"):
        resolve_classes([index], NAMES)


@pytest.mark.parametrize("classes", [[1, 1], ["bird", 1]])
def test_a_class_given_twice_is_an_error(classes):
    with pytest.raises(ImprintError, match=r"names class 1 \('bird'\) twice"):
        resolve_classes(classes, NAMES)


@pytest.mark.parametrize("classes", [[], "cat", [True], [1.0]])
def test_what_is_no_list_of_classes_is_an_error(classes):
    with pytest.raises(ImprintError, match="classes"):
        resolve_classes(classes, NAMES)


def test_a_number_is_a_name_where_all_names_are_numbers():
    folders = ["01", "10", "2"]
    assert resolve_classes([2, 1], folders) == resolve_classes(["2", "01"], folders) == [2, 0]
    with pytest.raises(ImprintError, match=r"unknown class 0: did you mean '10' or '01'"):
        resolve_classes([0], folders)
    assert resolve_classes([2, 1], ["1", "10", "two"]) == [2, 1]
    assert resolve_classes([1], ["1", "01"]) == [1]


def test_relabel_numbers_the_classes_in_the_order_given_and_keeps_the_samples_order():
    positions, labels = relabel(LABELS, [3, 0])
    assert positions.tolist() == [0, 3, 4, 7, 8, 11]
    assert labels.tolist() == [1, 0, 1, 0, 1, 1]


def test_relabel_accepts_a_class_without_samples():
    positions, labels = relabel(torch.tensor([1, 1]), [3, 1])
    assert positions.tolist() == [0, 1]
    assert labels.tolist() == [1, 1]


def test_nothing_drawn_and_nothing_held_out_is_everything_in_order():
    drawn, held = draw(LABELS, NAMES, range(4))
    assert drawn.tolist() == list(range(12))
    assert held.tolist() == []


def test_a_quarter_is_held_out_of_each_class_and_at_least_one():
    drawn, held = draw(LABELS, NAMES, range(4), held_fraction=0.25)
    assert torch.bincount(LABELS[held]).tolist() == [1, 1, 1, 1]
    assert sorted(drawn.tolist() + held.tolist()) == list(range(12))


def test_never_a_whole_class_is_held_out():
    drawn, held = draw(LABELS, NAMES, range(4), held_fraction=0.99)
    assert torch.bincount(LABELS[drawn]).tolist() == [1, 1, 1, 1]
    assert torch.bincount(LABELS[held]).tolist() == [3, 2, 2, 1]


def test_a_single_image_cannot_be_parted():
    labels = torch.tensor([0, 0, 1])
    with pytest.raises(ImprintError, match=r"class 1 \('bird'\) has a single image"):
        draw(labels, NAMES[:2], [0, 1], held_fraction=0.5)
    drawn, held = draw(labels, NAMES[:2], [0], held_fraction=0.5)
    assert len(drawn) == len(held) == 1


def test_too_few_images_for_the_shots_name_the_class_and_the_count():
    with pytest.raises(ImprintError, match=r"shots=3, but class 3 \('dog'\) has 2 training images"):
        draw(LABELS, NAMES, range(4), shots=3)
    with pytest.raises(ImprintError, match=r"has 1 training image besides the 1 held out"):
        draw(LABELS, NAMES, [3], held_fraction=0.5, shots=2)


def test_the_draw_of_a_class_does_not_depend_on_the_others_chosen():
    alone, alone_held = draw(LABELS, NAMES, [2], held_fraction=0.3, shots=1, seed=5)
    among, among_held = draw(LABELS, NAMES, [3, 2, 0], held_fraction=0.3, shots=1, seed=5)
    assert among[LABELS[among] == 2].tolist() == alone.tolist()
    assert among_held[LABELS[among_held] == 2].tolist() == alone_held.tolist()


def test_other_seeds_draw_other_shots():
    labels = torch.zeros(100, dtype=torch.int64)
    draws = {tuple(draw(labels, ["a"], [0], shots=5, seed=seed)[0].tolist()) for seed in range(5)}
    assert len(draws) == 5


@settings(deadline=None, max_examples=60)
@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=60).map(torch.tensor),
    fraction=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 10),
)
def test_shots_are_exact_nested_ordered_and_apart_from_what_is_held_out(labels, fraction, seed):
    names = [str(label) for label in range(4)]
    counts = torch.bincount(labels, minlength=4)
    chosen = [label for label in range(4) if counts[label] >= 4]
    if not chosen:
        return
    before = torch.random.get_rng_state()
    few, held = draw(labels, names, chosen, fraction, shots=1, seed=seed)
    more, held_again = draw(labels, names, chosen, fraction, shots=2, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert held.tolist() == held_again.tolist() == sorted(held.tolist())
    assert set(few.tolist()) <= set(more.tolist())
    assert more.tolist() == sorted(more.tolist())
    assert not set(more.tolist()) & set(held.tolist())
    assert sorted(labels[more].tolist()) == sorted(chosen * 2)
