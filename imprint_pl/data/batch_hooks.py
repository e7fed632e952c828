"""Calls a Trainer's batch hooks for passes over data outside of the Trainer's loops.

Between loader and module, a Trainer calls the batch hooks of the DataModule or of the module, and
the hooks may use the Trainer.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import nn

from imprint_pl.data.lightning_packages import both, overrides

# The hooks that a Trainer calls for each batch, in this order.
BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


def batch_hooks(module: nn.Module, data: Any) -> Callable[[Any, torch.device], Any]:
    """Return a function that prepares a batch as a Trainer does before the module sees it.

    A hook of the DataModule takes precedence over the module's, as in a Trainer.

    Args:
        module: A LightningModule, or any other module, which has no hooks.
        data: A DataModule; anything else has no hooks.

    Returns:
        A function of a batch and the device to move it to.
    """

    def hook(name: str) -> Callable | None:
        owner = next((owner for owner in (data, module) if overrides(name, owner)), None)
        return None if owner is None else getattr(owner, name)

    before, move, after = map(hook, BATCH_HOOKS)

    def transfer(batch: Any, device: torch.device) -> Any:
        batch = batch if before is None else before(batch, 0)
        batch = move_data_to_device(batch, device) if move is None else move(batch, device, 0)
        return batch if after is None else after(batch, 0)

    return transfer


@contextmanager
def in_training(module: nn.Module, data: Any, trainer: Trainer | None = None) -> Iterator[None]:
    """Give module and DataModule a Trainer that trains, until the context ends.

    Some hooks ask `self.trainer.training`, or skip their work without a Trainer. A module or
    DataModule that has a Trainer keeps it; otherwise it gets `trainer` or, without that, a new one.
    """
    is_data = isinstance(data, both(LightningDataModule))
    hooked = any(overrides(name, module) for name in BATCH_HOOKS)
    if not is_data and not hooked:
        yield
        return
    kinds = both(LightningModule, LightningDataModule)
    owners: list[Any] = [owner for owner in (module, data) if isinstance(owner, kinds)]
    theirs = [_trainer_of(owner) for owner in owners]
    trainer = trainer or next(filter(None, theirs), None) or _new_trainer()
    without = [owner for owner, own in zip(owners, theirs, strict=True) if own is None]
    idle = {id(one): one for one in (trainer, *filter(None, theirs)) if one.state.stage is None}
    try:
        for one in idle.values():
            one.training = True
        for owner in without:
            owner.trainer = trainer
        yield
    finally:
        for one in idle.values():
            one.state.stage = None
        for owner in without:
            owner.trainer = None


def _trainer_of(owner: Any) -> Trainer | None:
    # The `trainer` of a LightningModule raises where there is none; that of a DataModule is None.
    return owner._trainer if hasattr(owner, "_trainer") else owner.trainer


def _new_trainer() -> Trainer:
    # A new Trainer reports devices and settings, which concern a fit only; silence it.
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Trainer(
                accelerator="cpu",
                devices=1,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                plugins=[LightningEnvironment()],
            )
    finally:
        logger.setLevel(level)


def transfer_of(
    trainer: Trainer, pl_module: LightningModule, data: Any = None
) -> Callable[[Any], Any]:
    """Return a function that prepares a batch as a Trainer's loops do before the module sees it.

    Args:
        trainer: The Trainer, whose precision and device apply.
        pl_module: The module that may have batch hooks.
        data: The DataModule that may have batch hooks. Default: the Trainer's.
    """
    is_data = isinstance(data, both(LightningDataModule))
    hooked = batch_hooks(pl_module, data if is_data else datamodule_of(trainer))
    device = trainer.strategy.root_device
    return lambda batch: hooked(trainer.precision_plugin.convert_input(batch), device)


def datamodule_of(trainer: Trainer) -> LightningDataModule | None:
    """Return the DataModule of this run; `trainer.datamodule` may be that of an earlier run."""
    selector = trainer._data_connector._datahook_selector
    return None if selector is None else selector.datamodule
