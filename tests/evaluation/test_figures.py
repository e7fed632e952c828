"""The figures of an evaluation and their intervals: hand-made cases, and scikit-learn's answers."""

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
)

from imprint_pl.evaluation.classes import measure
from imprint_pl.evaluation.intervals import bootstrap, of_f1, wilson
from imprint_pl.evaluation.predictions import Predictions, from_rows, rows_of
from imprint_pl.lightning.metrics import TaskMetrics


def predictions_of(labels, predicted, classes, **more):
    labels, predicted = torch.as_tensor(labels), torch.as_tensor(predicted)
    logits = 5.0 * torch.eye(classes)[predicted]
    rows = rows_of(logits, labels)
    names = [f"class {i}" for i in range(classes)]
    return from_rows(rows, labels, names, more.get("names"))


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    predicted = torch.where(
        torch.rand(200, generator=generator) < 0.3,
        torch.randint(0, 5, (200,), generator=generator),
        labels,
    )
    # Class 4 is predicted and has no image; class 5 is neither there nor predicted.
    return predictions_of(labels, predicted, 6)


def test_figures_of_classes_are_those_of_scikit_learn(random):
    found, y, given = measure(random), random.labels.numpy(), random.predicted.numpy()
    assert found.confusion.dense().tolist() == confusion_matrix(y, given, labels=range(6)).tolist()
    for score, name in ((recall_score, "recall"), (precision_score, "precision"), (f1_score, "f1")):
        expected = score(y, given, labels=range(6), average=None, zero_division=0)
        for one, value in zip(found.classes[:4], expected, strict=False):
            assert getattr(one, name).value == pytest.approx(value)
    assert found.accuracy.value == pytest.approx((y == given).mean())
    # scikit-learn, too, leaves out a class without images.
    assert found.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(y, given))
    assert found.classes[4].recall.value is None
    assert found.classes[4].precision.value == 0
    assert found.classes[5].f1.value is None
    assert [c.label for c in found.weakest()] == sorted(
        range(4), key=lambda c: found.classes[c].recall.value
    )


def test_the_metrics_of_a_trainer_say_the_same(random):
    metrics = TaskMetrics(6)
    metrics.add(torch.eye(6)[random.predicted], random.labels, None)
    values, found = metrics.compute(), measure(random)
    assert values["accuracy"].item() == pytest.approx(found.accuracy.value)
    assert values["balanced_accuracy"].item() == pytest.approx(found.balanced_accuracy.value)
    assert values["macro_f1"].item() == pytest.approx(found.macro_f1.value)


def test_one_class_and_nothing_at_all_are_measured():
    one = measure(predictions_of([0, 0], [0, 0], 1))
    assert one.accuracy.value == one.balanced_accuracy.value == one.macro_f1.value == 1
    nothing = torch.empty(0, dtype=torch.int64)
    none = measure(predictions_of(nothing, nothing, 2))
    assert none.accuracy == none.balanced_accuracy == none.macro_f1 == (None, None)


def test_all_right_of_few_is_not_certain():
    # Wilson 1927: n / (n + z²) is the lower end where all n are right.
    z = 1.959964
    assert wilson(25, 25).low == pytest.approx(25 / (25 + z**2), abs=1e-4)
    assert wilson(25, 25).high == 1
    assert wilson(0, 0) is None
    low = wilson(25, 25).low
    assert of_f1(25, 0).low == pytest.approx(2 * low / (1 + low), abs=1e-4)


def test_the_interval_of_f1_holds_its_value(random):
    for one in measure(random).classes[:4]:
        for figure in (one.recall, one.precision, one.f1):
            assert figure.interval.low < figure.value < figure.interval.high


def test_the_bootstrap_is_that_of_images_drawn_class_by_class(random):
    found = bootstrap(random.confusion)
    assert found == bootstrap(random.confusion)
    generator = np.random.default_rng(1)
    y, right = random.labels.numpy(), (random.labels == random.predicted).numpy()
    draws = [
        np.mean([generator.choice(right[y == c], (y == c).sum()).mean() for c in range(4)])
        for _ in range(1000)
    ]
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.balanced_accuracy.low == pytest.approx(low, abs=0.015)
    assert found.balanced_accuracy.high == pytest.approx(high, abs=0.015)
    value = measure(random).macro_f1.value
    assert found.macro_f1.low < value < found.macro_f1.high


def test_without_an_error_there_is_nothing_to_draw():
    assert bootstrap(predictions_of([0, 1, 1], [0, 1, 1], 2).confusion) == (None, None)


def test_the_errors_of_which_the_head_is_surest_come_first():
    logits = torch.tensor([[0.0, 3.0], [0.0, 1.0], [9.0, 0.0], [0.0, 2.0], [torch.nan, 0.0]])
    labels = torch.tensor([0, 0, 0, 0, 1])
    rows = rows_of(logits, labels, logits.amax(1) >= 2.5)
    found = from_rows(rows, labels, ["a", "b"], None, threshold=True)
    # The embedding of the last one is not finite: it comes last, and has no probability.
    assert found.worst().tolist()[:3] == [0, 3, 1]
    assert found.probabilities[4].isnan()
    assert found.accepted.tolist()[:4] == [True, False, True, False]
    assert found.of_true[0] == pytest.approx(torch.tensor([0.0, 3.0]).softmax(0)[0].item())


def test_a_class_without_proxies_has_a_score_of_minus_infinity_and_spoils_nothing():
    logits = torch.tensor([[-torch.inf, 1.0, 0.0], [-torch.inf, -torch.inf, -torch.inf]])
    rows = rows_of(logits, torch.tensor([0, 0]))
    assert rows.isfinite().all()
    assert rows[0, 3] == 0


def test_files_are_named_below_the_folder_of_all():
    found = predictions_of([0, 1], [0, 1], 2, names=["/a/b/x/1.png", "/a/b/y/1.png"])
    assert [found.name_of(i) for i in (0, 1)] == ["x/1.png", "y/1.png"]
    assert found.folder == "/a/b"
    assert predictions_of([0], [0], 2).name_of(0) == "image 0"
    assert isinstance(found, Predictions)
