import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_moments import direct_within, unbalanced

from imprint_pl.collapse import NC1, VCI, nc1, vci


def direct_nc1(x, y, average, as_published=False):
    """Straight from the definition, with a pseudo-inverse of the whole matrix."""
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in y.unique()])
    deviations = means - x.mean(0)
    between = deviations.T @ deviations / len(means)
    within = direct_within(x, y, average)
    if as_published:
        within = within + torch.outer(x.mean(0), x.mean(0))
    inverse = torch.linalg.pinv(between, rtol=1e-10, hermitian=True)
    return (torch.trace(within @ inverse) / len(means)).item()


def direct_vci(x, y, average):
    x = x.double()
    means = torch.stack([x[y == c].mean(0) for c in y.unique()])
    deviations = means - x.mean(0)
    between = deviations.T @ deviations / len(means)
    total = between + direct_within(x, y, average)
    inverse = torch.linalg.pinv(total, rtol=1e-10, hermitian=True)
    rank = torch.linalg.matrix_rank(between, rtol=1e-10, hermitian=True)
    return 1 - (torch.trace(inverse @ between) / rank).item()


def test_nc1_and_vci_of_the_acceptance_embeddings_are_the_known_values(acceptance):
    x, y = F.normalize(acceptance["train_embeddings"]), acceptance["train_labels"]
    assert nc1(x, y) == pytest.approx(1.166977, rel=1e-4)
    assert nc1(x, y, as_published=True) == pytest.approx(1.742717, rel=1e-4)
    assert vci(x, y) == pytest.approx(0.216461, rel=1e-4)
    assert vci(x, y, as_published=True) == pytest.approx(0.216626, rel=1e-4)
    assert nc1(acceptance["train_embeddings"], y) == pytest.approx(1.189186, rel=1e-4)


@pytest.mark.parametrize("average", ["macro", "micro"])
@pytest.mark.parametrize("as_published", [False, True])
def test_nc1_of_unequal_classes_equals_the_definition(average, as_published):
    x, y = unbalanced()
    expected = direct_nc1(x, y, average, as_published)
    assert nc1(x, y, average=average, as_published=as_published) == pytest.approx(expected)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_vci_of_unequal_classes_equals_the_definition(average):
    x, y = unbalanced()
    assert vci(x, y, average=average) == pytest.approx(direct_vci(x, y, average))


def test_macro_and_micro_differ_on_unequal_classes():
    x, y = unbalanced()
    assert abs(nc1(x, y, average="macro") - nc1(x, y, average="micro")) > 0.01


def test_classes_that_never_occur_do_not_count():
    x, y = unbalanced()
    assert nc1(x, y * 7) == nc1(x, y)
    metric = NC1(40, 4, average="micro")
    metric.update(x, y * 7)
    assert metric.compute().item() == pytest.approx(nc1(x, y, average="micro"))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    batches=st.integers(1, 57),
    average=st.sampled_from(["macro", "micro"]),
)
@pytest.mark.parametrize(("metric_class", "function"), [(NC1, nc1), (VCI, vci)])
def test_metric_is_the_function_however_the_samples_are_dealt(
    metric_class, function, seed, batches, average
):
    x, y = unbalanced(seed)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    plain = metric_class(5, 4, average=average)
    counted = metric_class(5, 4, average=average, class_counts=torch.bincount(y))
    for rows in order.tensor_split(batches):
        plain.update(x[rows], y[rows])
        counted.update(x[rows], y[rows])
    expected = function(x, y, average=average)
    assert plain.compute().item() == pytest.approx(expected, rel=1e-8)
    assert counted.compute().item() == pytest.approx(expected, rel=1e-8)


def test_metric_forgets_on_reset():
    x, y = unbalanced()
    metric = NC1(5, 4)
    metric.update(x + 100 * torch.rand(57, 1), y)
    metric.reset()
    metric.update(x, y)
    assert metric.compute().item() == pytest.approx(nc1(x, y))


@pytest.mark.parametrize("function", [nc1, vci])
def test_fewer_than_two_classes_is_nan_with_a_warning(function):
    with pytest.warns(UserWarning, match="compares classes, and there is 1"):
        assert function(torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)) != 0


def test_more_dimensions_than_samples_does_not_explode():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 500, generator=generator), torch.arange(30) % 3
    assert nc1(x, y) == pytest.approx(direct_nc1(x, y, "macro"), rel=1e-6)
    assert vci(x, y) == pytest.approx(direct_vci(x, y, "macro"), abs=1e-9)


def test_metric_that_would_not_fit_into_memory_says_what_to_give():
    with pytest.raises(ValueError, match="give class_counts"):
        NC1(10_000, 1280)


def test_unknown_average_is_named():
    with pytest.raises(ValueError, match="average='weighted'"):
        nc1(torch.randn(4, 2), torch.tensor([0, 1, 0, 1]), average="weighted")


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_an_unbalanced_part_of_the_acceptance_embeddings_equals_the_definition(acceptance, average):
    x, y = F.normalize(acceptance["train_embeddings"]), acceptance["train_labels"]
    kept = (torch.arange(len(y)) % 10 >= y) | (torch.arange(len(y)) % 7 == 0)
    x, y = x[kept][:, :200], y[kept]
    assert torch.bincount(y).max() > 2 * torch.bincount(y).min()
    assert nc1(x, y, average=average) == pytest.approx(direct_nc1(x, y, average), rel=1e-6)
    assert vci(x, y, average=average) == pytest.approx(direct_vci(x, y, average), rel=1e-6)
