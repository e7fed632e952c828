"""Which samples belong to a task: choosing classes, drawing shots, holding a part out.

Plain functions from labels to positions, in data-set order; they never touch an image. All chance
comes from one seeded order of each class, in which the held-out part stands first and the shots
follow: so a class's draw does not depend on which other classes were chosen, and with one seed
5 shots are among its 10 shots.
"""

import difflib
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError

NAMES_SHOWN = 20


def resolve_classes(classes: Sequence[int | str] | None, class_names: Sequence[str]) -> list[int]:
    """Turn the classes a user asked for into indices, in the order given.

    Args:
        classes: indices into `class_names`, names, or a mixture; None takes all. Where all names
            are numbers, a number is a name.
        class_names: the names of all classes, in label order.

    Returns:
        Indices into `class_names`, without repetition.

    Raises:
        ImprintError: for an unknown or repeated class, or an empty list.

    >>> resolve_classes(["Dog", 0], ["Cat", "Bird", "Dog"])
    [2, 0]
    """
    if classes is None:
        return list(range(len(class_names)))
    if isinstance(classes, str) or len(classes) == 0:
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
        if requested in class_names:
            return class_names.index(requested)
        raise ImprintError(f"unknown class {requested!r}: {near_names(requested, class_names)}")
    if isinstance(requested, bool) or not isinstance(requested, Integral):
        raise ImprintError(
            f"classes contains {requested!r}, of type {type(requested).__name__}: "
            "give indices (int) or names (str)"
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
    # Folders named 1, 2, 10 sort as text: index 1 is the folder 10, and a command line cannot tell
    # the number 1 from the name "1". So numbers are names where all names are numbers.
    if not all(name.isdecimal() for name in class_names):
        return {}
    by_number = {int(name): index for index, name in enumerate(class_names)}
    return by_number if len(by_number) == len(class_names) else {}


def near_names(requested: str, class_names: Sequence[str]) -> str:
    """Say which classes a misspelt name may have meant, or which there are."""
    by_lower_case = {name.lower(): name for name in class_names}
    near = difflib.get_close_matches(requested.lower(), by_lower_case, n=3, cutoff=0.6)
    if near:
        return "did you mean " + " or ".join(repr(by_lower_case[name]) for name in near) + "?"
    shown = ", ".join(repr(name) for name in class_names[:NAMES_SHOWN])
    more = len(class_names) - NAMES_SHOWN
    return f"the classes are {shown}" + (f" and {more} more" if more > 0 else "")


def relabel(labels: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Keep the samples of the chosen classes and number the classes 0..C-1 in the order given.

    Args:
        labels: `(N,)` int64, the original labels.
        chosen: the original labels to keep; `chosen[j]` becomes label j.

    Returns:
        Positions `(M,)` of the samples kept, ascending, and their new labels `(M,)`, both int64.

    >>> relabel(torch.tensor([2, 0, 1, 2]), [2, 0])
    (tensor([0, 1, 3]), tensor([0, 1, 0]))
    """
    size = 1 + max([*chosen, int(labels.max()) if labels.numel() else 0])
    new_label = torch.full((size,), -1, dtype=torch.int64)
    new_label[torch.tensor(chosen)] = torch.arange(len(chosen))
    mapped = new_label[labels]
    positions = torch.nonzero(mapped >= 0).flatten()
    return positions, mapped[positions]


def draw(
    labels: Tensor,
    class_names: Sequence[str],
    chosen: Sequence[int],
    held_fraction: float = 0.0,
    shots: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Hold a part of each class out and draw the shots from the rest.

    Args:
        labels: `(N,)` int64, of the whole split: the draw of a class must not depend on `chosen`.
        class_names: names of all classes by label, for the errors.
        chosen: the classes to draw from, as labels.
        held_fraction: of each class's samples, rounded, but at least one and not all of them;
            0 holds nothing out.
        shots: samples to draw of each class; None takes all that are not held out.
        seed: of both draws.

    Returns:
        Positions of the samples drawn and of those held out, both int64 and ascending: the data
        set's order stays.

    Raises:
        ImprintError: if a class has a single sample and a part is to be held out, or fewer samples
            than `shots`: taking what there is would silently make the classes unequal.
    """
    orders = _class_orders(labels, len(class_names), seed)
    drawn, held = [], []
    for index in chosen:
        order, name = orders[index], class_names[index]
        count = _held_count(len(order), held_fraction, index, name)
        rest = order[count:]
        if shots is not None and len(rest) < shots:
            besides = f" besides the {count} held out" if count else ""
            raise ImprintError(
                f"shots={shots}, but class {index} ({name!r}) has {len(rest)} training "
                f"image{'s' * (len(rest) != 1)}{besides}: ask for fewer shots, add images, or "
                "leave the class out with classes=[...]"
            )
        drawn.append(rest[:shots])
        held.append(order[:count])
    return torch.cat(drawn).sort().values, torch.cat(held).sort().values


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
