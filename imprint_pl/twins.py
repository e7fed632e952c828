"""Lightning's classes as projects have them: `import lightning.pytorch` and `import
pytorch_lightning` are one code in two packages, whose classes do not know each other.
"""

from __future__ import annotations

import sys

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def both(*classes: type) -> tuple[type, ...]:
    """The classes of `lightning`, and after each its twin where that package is loaded: without,
    nothing can be an instance of it.

    >>> class Mine(both(Callback)[0]): ...
    >>> isinstance(Mine(), both(Callback))
    True
    """
    found = []
    for cls in classes:
        found.append(cls)
        for ours, theirs in TWINS.items():
            if cls.__module__.startswith(ours + "."):
                module = sys.modules.get(theirs + cls.__module__.removeprefix(ours))
                found += [getattr(module, cls.__name__)] if hasattr(module, cls.__name__) else []
    return tuple(found)


def averaging_callbacks(trainer: Trainer) -> list[Callback]:
    """Those of a Trainer's callbacks that keep a copy of the module, and average its weights."""
    kinds = both(WeightAveraging, StochasticWeightAveraging)
    return [callback for callback in trainer.callbacks if isinstance(callback, kinds)]
