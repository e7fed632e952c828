"""Selects the samples of a task: chooses and merges classes, draws shots, holds a part out.

Plain functions from labels to positions, in data-set order; they never touch an image. The seed
shuffles each class: the first samples are held out, the next ones are the shots. So the draw from a
class does not depend on the other chosen classes, and with the same seed 5 shots are among 10.
"""

import difflib
import random
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.numerics.labels import place_of

NAMES_SHOWN = 20
IN_QUOTES = "; YAML makes other values of yes, no, on, off, null and 1.0: put such names in quotes"

# The paper's subsets of ten classes, of any data set.
SUBSETS = {
    "all": slice(None),
    "even": slice(0, None, 2),
    "odd": slice(1, None, 2),
    "short": slice(0, 3),
}
PAPER_TASK = re.compile(r"paper-(\d+)in1-(\d+)")
PAPER_SEED, PAPER_LABELS, PAPER_SHUFFLES, IMAGENET_CLASSES = 420, 10, 10, 1000

# One label of a task: the original classes that it merges, mostly a single one.
Group = int | Sequence[int]


def resolve_task(
    classes: Sequence[int | str | Sequence[int | str]] | str | None,
    class_names: Sequence[str],
    d: int | None = None,
    num_labels: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Turn a user's choice of classes into the labels of a task.

    Args:
        classes: A list of classes (see `resolve_classes`), in which an inner list is merged into
            one label; or a name: "all", "even", "odd", "short" (the first three), or
            "paper-3in1-0", see `paper_d_in_1`. None takes all.
        class_names: The names of all classes, in label order.
        d: Makes a d-in-1 task of the classes, see `d_in_1`.
        num_labels: Number of labels of the d-in-1 task.
        seed: Seed of the d-in-1 task.

    Returns:
        One list of indices into `class_names` for each label.

    Raises:
        ImprintError: If classes are unknown or repeated, or too few for the task.

    >>> resolve_task([["Cat", 2], "Bird"], ["Cat", "Bird", "Dog"])
    [[0, 2], [1]]
    """
    given = _as_list(classes)
    if d is None and num_labels is not None:
        raise ImprintError(f"num_labels={num_labels} is for d-in-1 tasks: give d too, as in d=3")
    merges = not isinstance(given, str) and any(_is_inner(entry) for entry in given or ())
    paper = PAPER_TASK.fullmatch(given) if isinstance(given, str) else None
    if d is not None and (merges or paper):
        raise ImprintError(f"d={d} and classes={given!r} both merge classes: give one of the two")
    if paper:
        return paper_d_in_1(int(paper[1]), int(paper[2]), len(class_names))
    if not merges:
        chosen = resolve_classes(given, class_names)
        return [[c] for c in chosen] if d is None else d_in_1(chosen, d, num_labels, seed)
    inner = [list(entry) if _is_inner(entry) else [entry] for entry in given]
    if [] in inner:
        raise ImprintError(f"classes={given!r} has an empty list: name the classes to merge")
    flat = iter(resolve_classes([entry for group in inner for entry in group], class_names))
    return [[next(flat) for _ in group] for group in inner]


def _is_inner(entry: Any) -> bool:
    return isinstance(entry, Sequence) and not isinstance(entry, str)


def _as_list(classes: Any) -> Any:
    """Turn an array, a tensor or a series of classes into a list of plain values."""
    if isinstance(classes, set | frozenset | Mapping):
        raise ImprintError(
            f"classes={classes!r} have no order, and labels need one: give a list, as in "
            "classes=[0, 1, 2]"
        )
    return classes.tolist() if hasattr(classes, "tolist") else classes


def d_in_1(
    classes: Sequence[int], d: int, num_labels: int | None = None, seed: int = 0
) -> list[list[int]]:
    """Draw a d-in-1 task: labels that each merge `d` original classes, multimodal on purpose.

    The classes are shuffled and cut into `num_labels` blocks; label j takes the first d of block j.
    So with the same seed and number of labels the classes of a 2-in-1 label are among those of the
    3-in-1 label.

    Args:
        classes: The original classes to draw from.
        d: Number of original classes of each label.
        num_labels: Number of labels; None makes as many as the classes suffice for.
        seed: Seed of the shuffle.

    Returns:
        `num_labels` lists of d classes, each ascending.

    >>> d_in_1(range(10), d=3, num_labels=3, seed=0)
    [[0, 6, 9], [2, 3, 4], [1, 5, 8]]
    """
    if d < 1 or (num_labels is not None and num_labels < 1):
        raise ImprintError(f"d={d}, num_labels={num_labels}: both are at least 1")
    num_labels = num_labels or len(classes) // d
    if num_labels == 0 or d * num_labels > len(classes):
        raise ImprintError(
            f"d={d} with num_labels={max(num_labels, 1)} asks for {d * max(num_labels, 1)} "
            f"classes, but there are {len(classes)}: ask for a smaller d or fewer labels"
        )
    shuffled = random.Random(seed).sample(list(classes), len(classes))
    block = len(classes) // num_labels
    return [sorted(shuffled[j * block : j * block + d]) for j in range(num_labels)]


def paper_d_in_1(d: int, shuffle: int, num_classes: int) -> list[list[int]]:
    """Return one of the paper's hundred d-in-1 tasks on ImageNet, "paper-<d>in1-<shuffle>".

    Args:
        d: Number of original classes of each label, 1 to 10.
        shuffle: Which of the ten shuffles of the same hundred classes, 0 to 9.
        num_classes: Number of classes of the data set; the tasks need ImageNet's.

    Returns:
        10 lists of d ImageNet classes, each ascending (Westerhoff et al. 2025, section 4).
    """
    if num_classes != IMAGENET_CLASSES:
        raise ImprintError(
            f"classes='paper-{d}in1-{shuffle}' is a task of ImageNet's 1000 classes, the data has "
            f"{num_classes}: give d={d} and num_labels=… instead"
        )
    if not (1 <= d <= 10 and shuffle < PAPER_SHUFFLES):
        raise ImprintError(
            f"classes='paper-{d}in1-{shuffle}': the paper's tasks run from paper-1in1-0 to "
            "paper-10in1-9 (d, then the shuffle)"
        )
    generator = random.Random(PAPER_SEED)
    classes = generator.sample(range(IMAGENET_CLASSES), PAPER_LABELS * 10)
    for _ in range(shuffle + 1):
        generator.shuffle(classes)
    return [sorted(classes[10 * j : 10 * j + d]) for j in range(PAPER_LABELS)]


def merged_name(group: Sequence[int], class_names: Sequence[str]) -> str:
    """Return the name of a label: its classes' names, as in "0+3"."""
    return "+".join(class_names[index] for index in group)


def resolve_classes(
    classes: Sequence[int | str] | str | None, class_names: Sequence[str]
) -> list[int]:
    """Turn classes that a user named into indices, in the order given.

    Args:
        classes: Indices into `class_names`, names, or a mixture; None takes all. Where all names
            are numbers, a number is a name. Or the name of a subset: "all", "even", "odd" or
            "short" (the first three), by index.
        class_names: The names of all classes, in label order.

    Returns:
        Indices into `class_names`, without repetition.

    Raises:
        ImprintError: If a class is unknown or repeated, or the list is empty.

    >>> resolve_classes(["Dog", 0], ["Cat", "Bird", "Dog"])
    [2, 0]
    """
    classes = _as_list(classes)
    if classes is None:
        return list(range(len(class_names)))
    if isinstance(classes, str):
        if classes in SUBSETS:
            return list(range(len(class_names)))[SUBSETS[classes]]
        if place_of(classes, class_names) is not None:
            raise ImprintError(f"classes={classes!r}: give a list, as in classes=[{classes!r}]")
        known = did_you_mean(classes, [*SUBSETS, *class_names])
        raise ImprintError(
            f"classes={classes!r} is unknown{known}: give {', '.join(SUBSETS)}, "
            "paper-<d>in1-<shuffle> for ImageNet, or a list as in classes=[0, 1, 2]"
        )
    if len(classes) == 0:
        raise ImprintError(
            f"classes={classes!r} is not a list of at least one class: give indices or names, "
            "as in classes=[0, 1, 2], or leave it out for all classes"
        )
    chosen: list[int] = []
    for requested in classes:
        index = _class_index(requested, class_names)
        if index in chosen:
            raise ImprintError(
                f"classes={list(classes)!r} names class {index} ({class_names[index]!r}) twice: "
                "give each class once"
            )
        chosen.append(index)
    return chosen


def _class_index(requested: int | str, class_names: Sequence[str]) -> int:
    if isinstance(requested, str):
        place = place_of(requested, class_names)
        if place is not None:
            return place
        raise ImprintError(f"unknown class {requested!r}: {near_names(requested, class_names)}")
    if isinstance(requested, bool) or not isinstance(requested, Integral):
        raise ImprintError(
            f"classes contains {requested!r}, of type {type(requested).__name__}: "
            f"give indices (int) or names (str){IN_QUOTES}"
        )
    by_number = _by_number(class_names)
    if requested in by_number:
        return by_number[requested]
    if by_number:
        raise ImprintError(f"unknown class {requested}: {near_names(str(requested), class_names)}")
    if not 0 <= requested < len(class_names):
        raise ImprintError(
            f"unknown class {requested}: the indices run from 0 to {len(class_names) - 1}; "
            f"{near_names(str(requested), class_names)}"
        )
    return int(requested)


def _by_number(class_names: Sequence[str]) -> dict[int, int]:
    # If all names are numbers, numbers are names: a command line cannot tell the number 1 from the
    # name "1", and index 1 would be the folder 10, since folders 1, 2, 10 are sorted as text.
    if not all(name.isdecimal() for name in class_names):
        return {}
    by_number = {int(name): index for index, name in enumerate(class_names)}
    return by_number if len(by_number) == len(class_names) else {}


def near_names(requested: str, class_names: Sequence[str]) -> str:
    """Return a text that names the classes that a misspelt name may mean, or else all classes."""
    by_lower_case = {name.lower(): name for name in class_names}
    near = difflib.get_close_matches(requested.lower(), by_lower_case, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(by_lower_case[name]) for name in near) + "?"
    shown = ", ".join(repr(name) for name in class_names[:NAMES_SHOWN])
    more = len(class_names) - NAMES_SHOWN
    return f"the classes are {shown}" + (f" and {more} more" if more > 0 else "")


def relabel(labels: Tensor, chosen: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Keep the samples of the chosen classes and number the labels 0..C-1 in the order given.

    Args:
        labels: `(N,)` int64, the original labels.
        chosen: The original labels to keep; those of `chosen[j]` (one or several) become label j.

    Returns:
        Positions `(M,)` of the samples kept, ascending, and their new labels `(M,)`, both int64.

    >>> relabel(torch.tensor([2, 0, 1, 2]), [2, 0])
    (tensor([0, 1, 3]), tensor([0, 1, 0]))
    """
    groups = _groups(chosen)
    size = 1 + max(*(c for group in groups for c in group), int(labels.max()) if len(labels) else 0)
    new_label = torch.full((size,), -1, dtype=torch.int64)
    for label, group in enumerate(groups):
        new_label[group] = label
    mapped = new_label[labels]
    positions = torch.nonzero(mapped >= 0).flatten()
    return positions, mapped[positions]


def _groups(chosen: Sequence[Group]) -> list[list[int]]:
    return [list(group) if isinstance(group, Sequence) else [group] for group in chosen]


def draw(
    labels: Tensor,
    class_names: Sequence[str],
    chosen: Sequence[Group],
    held_fraction: float = 0.0,
    shots: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Hold a part of each original class out and draw the shots of each label from the rest.

    Args:
        labels: `(N,)` int64 of the whole split: the draw from a class must not depend on `chosen`.
        class_names: Names of all classes by label, for the errors.
        chosen: The classes to draw from, as original labels, or lists of labels that are merged.
        held_fraction: Part of each class's samples to hold out, rounded, but at least one sample
            and not all of them; 0 holds nothing out.
        shots: Samples to draw from each entry of `chosen`, at random among its classes; None takes
            all that are not held out.
        seed: Seed of the draws.

    Returns:
        Positions of the drawn and of the held-out samples, both int64 and ascending.

    Raises:
        ImprintError: If a part is to be held out of a class with a single sample, or a label has
            fewer samples than `shots`: using all of them would silently make the labels unequal.
    """
    orders = _class_orders(labels, len(class_names), seed)
    drawn, held = [], []
    for group in _groups(chosen):
        counts = [_held_count(len(orders[c]), held_fraction, c, class_names[c]) for c in group]
        parts = [orders[c].tensor_split([n]) for c, n in zip(group, counts, strict=True)]
        rest = torch.cat([part[1] for part in parts])
        if len(group) > 1:
            generator = torch.Generator().manual_seed(seed)
            rest = rest[torch.randperm(len(rest), generator=generator)]
        if shots is not None and len(rest) < shots:
            index, name = "+".join(map(str, group)), merged_name(group, class_names)
            besides = f" besides the {sum(counts)} held out" if sum(counts) else ""
            raise ImprintError(
                f"shots={shots}, but class {index} ({name!r}) has {len(rest)} training "
                f"image{'s' * (len(rest) != 1)}{besides}: ask for fewer shots, add images, or "
                "leave the class out with classes=[...]"
            )
        drawn.append(rest[:shots])
        held += [part[0] for part in parts]
    return torch.cat(drawn).sort().values, torch.cat(held).sort().values


def part(labels: Tensor, num_classes: int, share: float, seed: int = 0) -> Tensor:
    """Draw the same share of each class, two samples at least where it has as many.

    Args:
        labels: `(N,)` int64.
        num_classes: Number of classes.
        share: The share to draw, rounded; 1 and more takes all.
        seed: Seed of the draw.

    Returns:
        Positions of the drawn samples, ascending.

    >>> len(part(torch.tensor([0] * 10 + [1] * 3), num_classes=2, share=0.4))
    6
    """
    orders = _class_orders(labels, num_classes, seed)
    drawn = [order[: max(2, round(share * len(order)))] for order in orders]
    return torch.cat(drawn).sort().values


def _held_count(available: int, fraction: float, index: int, name: str) -> int:
    if fraction == 0 or available == 0:
        return 0
    if available == 1:
        raise ImprintError(
            f"class {index} ({name!r}) has a single image, so no part of it can be held out "
            f"(fraction {fraction}): add images of the class or provide the splits yourself"
        )
    return min(max(round(fraction * available), 1), available - 1)


def _class_orders(labels: Tensor, num_classes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.bincount(labels, minlength=num_classes).tolist()
    grouped = torch.argsort(labels, stable=True).split(counts)
    return [group[torch.randperm(len(group), generator=generator)] for group in grouped]
