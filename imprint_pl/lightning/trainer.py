"""What `ImprintedClassifier` needs from its Trainer: one training loader, at least one batch, and
full precision while it imprints. The messages for other Trainers are here, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_warn

from imprint_pl.data.lightning_packages import both, callbacks_of, is_fast_dev_run
from imprint_pl.data.loaders import expected_samples, loader_at
from imprint_pl.errors import ImprintError

STOPPED = "the Trainer was told to stop (max_time, or a callback's should_stop)"


def check_trainer(trainer: Trainer) -> None:
    """Raises an `ImprintError` for a Trainer that cannot fit an `ImprintedClassifier`."""
    if 0 in (trainer.limit_train_batches, trainer.max_epochs):
        raise ImprintError(no_head(trainer))
    if any(isinstance(c, both(StochasticWeightAveraging)) for c in callbacks_of(trainer)):
        raise ImprintError(
            "StochasticWeightAveraging needs an optimizer, and imprinting has none: leave it out "
            "of the Trainer's callbacks"
        )


def check_saved(trainer: Trainer) -> None:
    """Warns at the end of a fit if a ModelCheckpoint has saved nothing because of its schedule."""
    kinds = both(ModelCheckpoint)
    savers: list[Any] = [c for c in trainer.checkpoint_callbacks if isinstance(c, kinds)]
    for saver in [] if is_fast_dev_run(trainer) else savers:
        if saver.save_top_k != 0 and not (saver.best_model_path or saver.last_model_path):
            rank_zero_warn(
                "a ModelCheckpoint has saved nothing: imprinting is one epoch and one step, at its "
                "end; leave out every_n_train_steps, train_time_interval and every_n_epochs"
            )


def the_loader(loaders: Any) -> tuple[Any, list[Any]]:
    """Returns the only training loader of a Trainer, and the keys that lead to it.

    The keys are none, or those of a list or dict with one loader. The same keys lead to the
    loader's batch in a batch of the Trainer.

    Raises:
        ImprintError: there are several loaders.
    """
    keys = []
    while isinstance(loaders, list | tuple | Mapping):
        if len(loaders) != 1:
            raise ImprintError(
                f"the training data is a {type(loaders).__name__} of {len(loaders)} loaders: give "
                "the one to imprint from (torch's ConcatDataset makes one data set of several)"
            )
        keys.append(next(iter(loaders)) if isinstance(loaders, Mapping) else 0)
        loaders = loaders[keys[-1]]
    return loaders, keys


def samples_to_come(trainer: Trainer) -> int | None:
    """Returns how many samples a Trainer that validates, tests or predicts will see; None if a
    loader does not know."""
    if trainer.predicting:
        loaders, batches = trainer.predict_dataloaders, trainer.num_predict_batches
    elif trainer.testing:
        loaders, batches = trainer.test_dataloaders, trainer.num_test_batches
    else:
        loaders, batches = trainer.val_dataloaders, trainer.num_val_batches
    counts = [
        expected_samples(loader_at(index, loaders), of_loader, trainer.world_size)
        for index, of_loader in enumerate(batches)
    ]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def no_head(trainer: Trainer) -> str:
    """Returns a sentence that says why a fit without any training batch has no head."""
    reason = "the training loader gave none"
    if trainer.limit_train_batches == 0:
        reason = "limit_train_batches=0 leaves none"
    elif trainer.max_epochs == 0:
        reason = "max_epochs=0 leaves none, give max_epochs=1"
    elif 0 <= trainer.max_steps <= trainer.global_step:
        reason = f"this Trainer has taken its max_steps={trainer.max_steps} already, give a new one"
        if trainer.max_steps == 0:
            reason = "max_steps=0 leaves none, give max_epochs=1"
    elif trainer.should_stop:
        reason = f"before the first {STOPPED}"
    return f"the fit had no training batch to imprint a head from: {reason}"


@contextmanager
def outside_the_trainers_precision(device: torch.device) -> Iterator[None]:
    """Turns off the Trainer's autocast and default type, which are meant for the backbone only, for
    sums and GEN inside a step."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
