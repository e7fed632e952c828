"""Lightning's classes under both of its names.

`lightning.pytorch` and `pytorch_lightning` are two packages with the same code, so an object of one
package is no instance of the other's class.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def both(*classes: type) -> tuple[type, ...]:
    """Return classes of `lightning`, each followed by its twin of `pytorch_lightning`.

    Twins are left out where `pytorch_lightning` is not loaded: nothing can be an instance of them.

    >>> class Mine(both(Callback)[0]): ...
    >>> isinstance(Mine(), both(Callback))
    True
    """
    found: list[type] = []
    for cls in classes:
        found.append(cls)
        for ours, theirs in TWINS.items():
            if cls.__module__.startswith(ours + "."):
                module = sys.modules.get(theirs + cls.__module__.removeprefix(ours))
                found += [getattr(module, cls.__name__)] if hasattr(module, cls.__name__) else []
    return tuple(found)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return a Trainer's callbacks, an attribute that type checkers do not know."""
    return trainer.callbacks  # type: ignore[attr-defined]


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return whether a Trainer has `fast_dev_run` set, an attribute unknown to type checkers."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def averaging_callbacks(trainer: Trainer) -> list[Callback]:
    """Return a Trainer's callbacks that keep a copy of the module with averaged weights."""
    kinds = both(WeightAveraging, StochasticWeightAveraging)
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, kinds)]


def overrides(method: str, owner: Any) -> bool:
    """Return whether a LightningModule or DataModule overrides a method of Lightning's."""
    parents = both(LightningModule, LightningDataModule)
    return any(isinstance(owner, p) and is_overridden(method, owner, p) for p in parents)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder that a run writes into. Every rank must call this: it is a broadcast."""
    return Path(trainer.log_dir or trainer.default_root_dir)
