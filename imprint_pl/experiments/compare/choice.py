"""Recommends a backbone, by paired differences on the same images, ties and speeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from imprint_pl.evaluation.intervals import CONFIDENCE
from imprint_pl.experiments.compare.run import Measured, Round
from imprint_pl.numerics.measures import ACCURACY, difference

# How many backbones a sentence names.
MOST_NAMED = 4
# Ratios of speeds that differ by less than this share from 1 are called equal, and from 1/2 half.
ABOUT = 0.07


class Gap(NamedTuple):
    """How much better the best backbone is than another on the same images, in fractions.

    Attributes:
        other: the other one.
        value: the difference of the accuracies.
        margin: half the width of the interval; all intervals hold jointly with 95 % confidence.
    """

    other: Measured
    value: float
    margin: float

    @property
    def is_tie(self) -> bool:
        """Whether the difference may be due to chance."""
        return self.value <= self.margin


class Choice(NamedTuple):
    """The backbone to take.

    Attributes:
        chosen: the fastest of those that cannot be told apart from the best.
        best: the one with the highest accuracy.
        gaps: from the best to every other one, the next best first.
        front: the Pareto front of accuracy and speed, the fastest first.
    """

    chosen: Measured
    best: Measured
    gaps: list[Gap]
    front: list[Measured]


def chosen_of(found: Round) -> Choice:
    """Chooses among backbones, each with the layers that are better for it.

    The differences are paired: only images that exactly one of two backbones predicts correctly
    count. With m differences, each has the confidence 1 − 0.05 / m (Bonferroni), so that the best
    of many backbones is not called better through chance alone.
    """
    backbones = better_layers(found)
    best, *others = backbones
    gaps = [_gap(best, other, len(others)) for other in others]
    tied = [best, *(gap.other for gap in gaps if gap.is_tie)]
    fastest = max(tied, key=_speed)
    # A speed that is only a few percent higher may be due to chance.
    chosen = fastest if _speed(fastest) > (1 + ABOUT) * _speed(best) else best
    return Choice(chosen, best, gaps, front_of(backbones))


def better_layers(found: Round) -> list[Measured]:
    """Return each backbone once, with the layers of the higher accuracy; the best first."""
    first: dict[str, Measured] = {}
    for one in found.measured:
        first.setdefault(one.candidate.name, one)
    return list(first.values())


def front_of(measured: Sequence[Measured]) -> list[Measured]:
    """Return the Pareto front of accuracy and speed, the fastest first."""
    front: list[Measured] = []
    for one in sorted(measured, key=lambda one: (-_speed(one), -one.accuracy)):
        if not front or one.accuracy > front[-1].accuracy:
            front.append(one)
    return front


def sentences(found: Round, on: str) -> list[str]:
    """Return sentences that recommend a backbone and say why, the recommendation first.

    Args:
        found: the round on all images.
        on: the name of the split, such as "validation".
    """
    choice = chosen_of(found)
    images = f"{found.images:,} {on} image{'s' * (found.images != 1)}"
    best, chosen, name = choice.best, choice.chosen, _name
    said: list[str] = []
    ties = [gap for gap in choice.gaps if gap.is_tie]
    if not choice.gaps:
        said.append(f"{name(best)} has an accuracy of {_percent(best.accuracy)} on {images}.")
    elif not ties:
        second = choice.gaps[0]
        said.append(
            f"{name(best)} is better than {name(second.other)} by {_points(second)} and "
            f"{_faster(best, second.other)}: {_percent(best.accuracy)} against "
            f"{_percent(second.other.accuracy)} on {images}."
        )
    else:
        others = _and([name(gap.other) for gap in ties])
        by = ", ".join(f"{_points(gap)}" for gap in ties[:MOST_NAMED])
        said.append(
            f"It is a tie: on {images} {name(best)}, {_percent(best.accuracy)}, cannot be told "
            f"apart from {others} (better by {by})."
        )
        if chosen is best:
            said.append(f"{name(best)} is the fastest of them.")
        else:
            said.append(f"{name(chosen)} is the fastest of them, {_faster(chosen, best)}.")
    said += _of_layers(found, chosen)
    faster = [one for one in choice.front if _speed(one) > _speed(chosen)]
    if faster and not ties:
        one = faster[-1]
        gap = next((gap for gap in choice.gaps if gap.other is one), None)
        if gap is not None and gap is not choice.gaps[0]:
            said.append(
                f"Where time matters more, {name(one)} is {_faster(one, chosen)} and worse by "
                f"{_points(gap)}."
            )
    listed = [f"{name(one)} ({_percent(one.accuracy)}, {_rate(one)})" for one in choice.front]
    said.append(
        f"Pareto front, where more accuracy costs time: {', '.join(listed)}."
        if len(listed) > 1
        else f"Pareto front: {listed[0]} alone; no other is faster or more accurate."
    )
    return said


def _of_layers(found: Round, chosen: Measured) -> list[str]:
    """Return sentences on whether all layers are better than the last one."""
    other = next(
        (
            one
            for one in found.measured
            if one.candidate == chosen.candidate and one.layers != chosen.layers
        ),
        None,
    )
    if other is None:
        return []
    gap = _gap(chosen, other, 1)
    what = {"last": "the last layer", "all": "all layers"}
    if gap.is_tie:
        return [
            f"For {_name(chosen)}, the last layer and all layers are a tie ({what[chosen.layers]} "
            f"better by {_points(gap)})."
        ]
    return [
        f"For {_name(chosen)}, {what[chosen.layers]} "
        f"{'are' if chosen.layers == 'all' else 'is'} better than {what[other.layers]} by "
        f"{_points(gap)}."
    ]


def _gap(best: Measured, other: Measured, comparisons: int) -> Gap:
    from scipy.stats import norm

    found = difference(ACCURACY, best.predicted, other.predicted, best.true)
    margin = norm.ppf(1 - (1 - CONFIDENCE) / 2 / comparisons) * found.standard_error
    return Gap(other, found.value, float(margin))


def _speed(one: Measured) -> float:
    return one.candidate.images_a_second


def _name(one: Measured) -> str:
    return one.candidate.name


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(gap: Gap) -> str:
    """Return a difference with its margin as text, in percentage points.

    A difference that is rounded to 0 has no sign.
    """
    return f"{100 * gap.value + 0:.1f} ± {100 * gap.margin:.1f} points"


def _faster(one: Measured, other: Measured) -> str:
    """Return in words how fast a backbone is compared with another."""
    ratio = _speed(one) / _speed(other)
    if abs(ratio - 1) < ABOUT:
        return "as fast"
    if abs(ratio - 0.5) < ABOUT / 2:
        return "half as fast"
    if abs(ratio - 2) < 2 * ABOUT:
        return "twice as fast"
    # "0.13 times as fast" would be hard to imagine.
    return f"{ratio:.2g} times as fast" if ratio > 1 else f"{1 / ratio:.2g} times as slow"


def _rate(one: Measured) -> str:
    speed = _speed(one)
    return f"{speed:,.0f} images a second" if speed >= 10 else f"{speed:.1f} images a second"


def _and(names: Sequence[str]) -> str:
    if len(names) > MOST_NAMED:
        names = [*names[: MOST_NAMED - 1], f"{len(names) - MOST_NAMED + 1} more"]
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
