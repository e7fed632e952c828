"""Recommends the next step in one sentence that follows from the figures by fixed rules.

The first rule that holds decides:

1. a weak class has few training images: add some; if it has very few, give all classes the same
   weight until then, if the recipe can;
2. most of a weak class's errors go to one other class: compare the two;
3. a class is weak otherwise: add images like those that were missed;
4. images are perhaps labelled wrong: look at their labels;
5. two classes make up a large part of all errors: compare them;
6. there are so few test images that the accuracy is hardly known: hold out more;
7. nothing stands out.

A class is weak if its recall is significantly lower than the accuracy of all images. For a class
with few training images, which is a reason in itself, the upper end of its interval must be lower
than that accuracy. For other classes a binomial test with Bonferroni's correction decides: even the
worst of equally good classes would rarely have so few correct images.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imprint_pl.errors import shown
from imprint_pl.evaluation.classes import ClassFigures, Figure, Measured
from imprint_pl.evaluation.predictions import Predictions

# An image is perhaps labelled wrong if the head gives another class at least the first probability,
# and its label at most the second.
SURE, UNLIKELY = 0.95, 0.02
# If the head recognises a smaller share of a class, its labels are not suspected.
RECOGNISED = 0.5
# A class has few training images if it has fewer than this number, or than this share of the
# median class.
FEW, FEW_OF_MEDIAN = 20, 0.5
# A class that is smaller than this share of the median class also gains by class weights. For
# larger classes they change little, or cost other classes more (tried on subsets of TrashNet).
RARE_OF_MEDIAN = 0.1
# One class dominates the errors of another class from the first share on. A pair dominates all
# errors from the second share and the number of errors on.
OF_CLASS, OF_ALL, PAIR_ERRORS = 0.5, 1 / 3, 5
# Largest probability that a class that is as good as all others is called weak.
BY_CHANCE = 0.025
# An accuracy is too uncertain if its interval is wider than this.
WIDE = 0.1


class Pair(NamedTuple):
    """Two classes that are confused with each other; `errors` counts both directions."""

    one: int
    other: int
    errors: int


def suspicious(predictions: Predictions) -> Tensor:
    """Return the images that are perhaps labelled wrong, `(S,)` int64, the likeliest first."""
    worst = predictions.worst()
    C, labels = len(predictions.class_names), predictions.labels
    right = torch.bincount(labels[labels == predictions.predicted], minlength=C)
    recognised = right >= RECOGNISED * torch.bincount(labels, minlength=C)
    worst = worst[recognised[labels[worst]]]
    sure = predictions.probabilities[worst] >= SURE
    return worst[sure & (predictions.of_true[worst] <= UNLIKELY)]


def most_confused(measured: Measured) -> Pair | None:
    """Return the two classes that are confused most often; `None` without an error."""
    errors = measured.confusion.without_diagonal()
    if not len(errors.counts):
        return None
    C = errors.num_classes
    one, other = errors.true.minimum(errors.predicted), errors.true.maximum(errors.predicted)
    pairs, place = torch.unique(one * C + other, return_inverse=True)
    counts = torch.zeros(len(pairs), dtype=torch.int64).index_add(0, place, errors.counts)
    most = int(counts.argmax())
    return Pair(int(pairs[most]) // C, int(pairs[most]) % C, int(counts[most]))


class Step(NamedTuple):
    """The recommended next step.

    Attributes:
        rule: "few", "confused", "weak", "label", "pair", "unsure", "good", or "none" if no image
            was measured.
        text: a sentence with the numbers on which the recommendation is based.
    """

    rule: str
    text: str


def next_step(measured: Measured, predictions: Predictions, balance: str = "") -> Step:
    """Recommends the next step, by the first rule that holds.

    Args:
        measured, predictions: those of a loader.
        balance: settings that help small classes, such as "class_weight: balanced", if the recipe
            takes them and the fit did not use them; otherwise empty.
    """
    if not measured.images:
        return Step("none", "No image was measured: give validation or test images.")
    if len(measured.classes) == 1:
        return Step("none", "There is a single class, so that every image is right: add a second.")
    weak = next((found for found in measured.weakest() if _is_weak(found, measured)), None)
    if weak is not None and weak.trained is not None and _has_few(weak, measured):
        helps = balance and weak.trained < RARE_OF_MEDIAN * _median_trained(measured)
        until = f" Until there are more, fit with {balance}." if helps else ""
        return Step(
            "few",
            f"Add training images of {name_of(weak)}: it has {weak.trained:,}, and a recall of "
            f"{recall_of(weak)}.{until}",
        )
    names = [name_of(found) for found in measured.classes]
    if weak is not None and weak.mistaken_for is not None:
        if weak.mistaken >= OF_CLASS * weak.wrong and weak.mistaken > 1:
            return Step(
                "confused",
                f"Compare {name_of(weak)} with {names[weak.mistaken_for]}: {weak.mistaken:,} of "
                f"{weak.images:,} images of the first are taken for the second (recall "
                f"{percent(weak.recall)}). Add images that tell the two apart, or merge them.",
            )
        return Step(
            "weak",
            f"Add images of {name_of(weak)} like those that were missed: its recall is "
            f"{recall_of(weak)}, below the accuracy of all images, {percent(measured.accuracy)}.",
        )
    labels = suspicious(predictions)
    if len(labels):
        doubt = suspicion(predictions, int(labels[0]), len(labels))
        return Step("label", f"Check the label of {doubt}.")
    wrong = measured.images - measured.right
    pair = most_confused(measured)
    if pair is not None and pair.errors >= max(PAIR_ERRORS, OF_ALL * wrong):
        # In a task of two classes every error is between them.
        of_all = f"all {wrong:,}" if pair.errors == wrong else f"{pair.errors:,} of {wrong:,}"
        if len(names) > 2:
            return Step(
                "pair",
                f"Compare {names[pair.one]} with {names[pair.other]}: {of_all} errors are between "
                "the two. Add images that tell them apart, or merge them.",
            )
    low, high = measured.accuracy.interval or (0.0, 1.0)
    if high - low > WIDE:
        return Step(
            "unsure",
            f"Measure on more images: {measured.right:,} of {measured.images:,} right means an "
            f"accuracy between {100 * low:.0f} and {100 * high:.0f} %.",
        )
    errors = "no error" if not wrong else f"{wrong:,} error{'s' * (wrong != 1)}"
    return Step(
        "good",
        f"Nothing stands out: {errors} in {measured.images:,} images, no class is weak beyond "
        "chance, and no label looks wrong. For more accuracy, add images or try another backbone.",
    )


def suspicion(predictions: Predictions, index: int, count: int = 1) -> str:
    """Return a sentence on why the label of an image is in doubt, and how many more there are."""
    names = predictions.class_names
    more = f"; {count - 1:,} more {'is' if count == 2 else 'are'} in doubt" if count > 1 else ""
    return (
        f"{shown(predictions.name_of(index))}: labelled {shown(names[predictions.labels[index]])}, "
        f"but taken for {shown(names[predictions.predicted[index]])} with a probability of "
        f"{certainty(float(predictions.probabilities[index]))}{more}"
    )


def weakness(found: ClassFigures, measured: Measured) -> str:
    """Return a sentence on how well a class is recognised, and with which class it is confused."""
    mostly = ""
    if found.mistaken_for is not None:
        other = name_of(measured.classes[found.mistaken_for])
        if found.mistaken == found.wrong:
            mostly = f", {'the other' if found.wrong == 1 else 'all others'} taken for {other}"
        elif found.mistaken > 1:
            mostly = f", most often taken for {other} ({found.mistaken:,})"
    return f"{name_of(found)}: recall {recall_of(found)}{mostly}"


def recall_of(found: ClassFigures) -> str:
    """Return the recall of a class as text, with its numbers and its interval."""
    return f"{percent(found.recall)} ({found.right:,} of {found.images:,}; {between(found.recall)})"


def name_of(found: ClassFigures) -> str:
    return shown(found.name)


def percent(figure: Figure) -> str:
    return "none" if figure.value is None else f"{100 * figure.value:.1f} %"


def between(figure: Figure) -> str:
    """Return an interval as text; empty if there is none."""
    if figure.interval is None:
        return ""
    low, high = figure.interval
    return f"95 % interval {100 * low:.0f} to {100 * high:.0f} %"


def certainty(probability: float) -> str:
    """Return a probability in percent as text; never 100 %, since no head is that sure.

    >>> certainty(0.99999), certainty(0.87)
    ('over 99.9 %', '87.0 %')
    """
    return "over 99.9 %" if probability > 0.999 else f"{100 * probability:.1f} %"


def _is_weak(found: ClassFigures, measured: Measured) -> bool:
    from scipy.stats import binom

    accuracy = measured.accuracy.value
    if found.recall.interval is None or accuracy is None:
        return False
    if _has_few(found, measured):
        return found.recall.interval.high < accuracy
    # With many classes, some class has few correct images by chance (Bonferroni).
    least = BY_CHANCE / sum(other.images > 0 for other in measured.classes)
    return bool(binom.cdf(found.right, found.images, accuracy) < least)


def _has_few(found: ClassFigures, measured: Measured) -> bool:
    if found.trained is None:
        return False
    median = _median_trained(measured)
    # If every class has as few images, their number is not what makes this class weak.
    return found.trained < FEW_OF_MEDIAN * median or found.trained < min(FEW, median)


def _median_trained(measured: Measured) -> int:
    """Return the number of training images of the median class; 0 if unknown."""
    trained = sorted(found.trained for found in measured.classes if found.trained is not None)
    return trained[len(trained) // 2] if trained else 0
