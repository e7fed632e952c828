"""Hides Lightning's warnings about things that a fit of `ImprintedClassifier` does on purpose. They
are hidden during this fit only, since they matter in fits of the user's other modules.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack

from lightning.pytorch import Callback, LightningModule, Trainer

# A frozen backbone, nothing to optimise, an epoch of one step.
INTENDED = (
    ".*`LightningModule.configure_optimizers` returned `None`.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    ".*`training_step` returned `None`.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*Using ModelCheckpoint with manual optimization and every_n_train_steps.*",
    # Values of `train/…` are broadcast from rank 0, so that sync_dist is not needed.
    ".*It is recommended to use `self.log..train/.*sync_dist=True.*",
)


class IntendedWarnings(Callback):
    """A callback that the module adds in `configure_callbacks`. Unlike a module, a callback is told
    of exceptions, after which the warnings must be shown again."""

    def __init__(self) -> None:
        self._undo = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()
        self._undo.enter_context(warnings.catch_warnings())
        for message in INTENDED:
            warnings.filterwarnings("ignore", message)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._undo.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._undo.close()
