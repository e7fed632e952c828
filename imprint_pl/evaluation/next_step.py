"""What to do next, in one sentence that follows from the figures by fixed rules.

The first rule that holds says the step:

1. a weak class has few training images: add some, and where it has very few, have classes weigh
   alike until then, if the recipe can;
2. most of a weak class's errors go to one other class: compare the two;
3. a class is weak otherwise: add images like those that were missed;
4. images are perhaps labelled wrong: look at their labels;
5. two classes make up a large part of all errors: compare them;
6. there are so few test images that the accuracy is hardly known: hold out more;
7. nothing stands out.

A class is weak where its recall is below the accuracy of all images beyond chance. For one with few
training images, which is a reason in itself, the upper end of its interval has to be lower. For
others, the worst of equally good classes would rarely have as few images right (binomial test,
Bonferroni's correction).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from imprint_pl.errors import shown
from imprint_pl.evaluation.classes import ClassFigures, Figure, Measured
from imprint_pl.evaluation.predictions import Predictions

# An image is perhaps labelled wrong where the head gives another class at least this probability,
# and its label at most that.
SURE, UNLIKELY = 0.95, 0.02
# Where the head recognises a smaller share of a class, it is not the labels that are wrong.
RECOGNISED = 0.5
# A class has few training images with fewer than these, or than this part of the median class.
FEW, FEW_OF_MEDIAN = 20, 0.5
# A class that is smaller than this part of the median class gains by class weights, too. For larger
# ones they change little, or cost other classes more (tried on subsets of TrashNet).
RARE_OF_MEDIAN = 0.1
# One class dominates the errors of another, or a pair the errors of all, from these shares and
# this number on.
OF_CLASS, OF_ALL, PAIR_ERRORS = 0.5, 1 / 3, 5
# How often at most a class may be called weak that is as good as all the others.
BY_CHANCE = 0.025
# An accuracy is hardly known where its interval is wider.
WIDE = 0.1


class Pair(NamedTuple):
    """Two classes that are taken for each other; `errors` in both directions."""

    one: int
    other: int
    errors: int


def suspicious(predictions: Predictions) -> Tensor:
    """The images that are perhaps labelled wrong, `(S,)` int64, the likeliest first."""
    worst = predictions.worst()
    C, labels = len(predictions.class_names), predictions.labels
    right = torch.bincount(labels[labels == predictions.predicted], minlength=C)
    recognised = right >= RECOGNISED * torch.bincount(labels, minlength=C)
    worst = worst[recognised[labels[worst]]]
    sure = predictions.probabilities[worst] >= SURE
    return worst[sure & (predictions.of_true[worst] <= UNLIKELY)]


def most_confused(measured: Measured) -> Pair | None:
    """The two classes that are taken for each other most often; `None` without an error."""
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
    """What to do next.

    Attributes:
        rule: "few", "confused", "weak", "label", "pair", "unsure", "good", or "none" where no image
            was measured.
        text: a sentence with the numbers that it follows from.
    """

    rule: str
    text: str


def next_step(measured: Measured, predictions: Predictions, balance: str = "") -> Step:
    """Says what to do next, by the first rule that holds.

    Args:
        measured, predictions: of a loader.
        balance: settings for the sake of small classes, such as "class_weight: balanced", where
            the fit can have some that it had not.
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
    """Says why the label of an image is in doubt, and how many more there are."""
    names = predictions.class_names
    more = f"; {count - 1:,} more {'is' if count == 2 else 'are'} in doubt" if count > 1 else ""
    return (
        f"{shown(predictions.name_of(index))}: labelled {shown(names[predictions.labels[index]])}, "
        f"but taken for {shown(names[predictions.predicted[index]])} with a probability of "
        f"{certainty(float(predictions.probabilities[index]))}{more}"
    )


def weakness(found: ClassFigures, measured: Measured) -> str:
    """Says how well a class is recognised, and what it is mistaken for."""
    mostly = ""
    if found.mistaken_for is not None:
        other = name_of(measured.classes[found.mistaken_for])
        if found.mistaken == found.wrong:
            mostly = f", {'the other' if found.wrong == 1 else 'all others'} taken for {other}"
        elif found.mistaken > 1:
            mostly = f", most often taken for {other} ({found.mistaken:,})"
    return f"{name_of(found)}: recall {recall_of(found)}{mostly}"


def recall_of(found: ClassFigures) -> str:
    """A recall with its numbers and its interval."""
    return f"{percent(found.recall)} ({found.right:,} of {found.images:,}; {between(found.recall)})"


def name_of(found: ClassFigures) -> str:
    return shown(found.name)


def percent(figure: Figure) -> str:
    return "none" if figure.value is None else f"{100 * figure.value:.1f} %"


def between(figure: Figure) -> str:
    """An interval in words; empty where there is none."""
    if figure.interval is None:
        return ""
    low, high = figure.interval
    return f"95 % interval {100 * low:.0f} to {100 * high:.0f} %"


def certainty(probability: float) -> str:
    """A probability in percent; never 100, since no head is that sure.

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
    # With many classes, one has few images right by chance.
    least = BY_CHANCE / sum(other.images > 0 for other in measured.classes)
    return bool(binom.cdf(found.right, found.images, accuracy) < least)


def _has_few(found: ClassFigures, measured: Measured) -> bool:
    if found.trained is None:
        return False
    median = _median_trained(measured)
    # Where every class has as few, it is not the number that makes this one weak.
    return found.trained < FEW_OF_MEDIAN * median or found.trained < min(FEW, median)


def _median_trained(measured: Measured) -> int:
    """How many training images the class in the middle has; 0 where nobody knows."""
    trained = sorted(found.trained for found in measured.classes if found.trained is not None)
    return trained[len(trained) // 2] if trained else 0
