"""The Trainer of tests: an epoch on the CPU; nothing on screen or disk that no test asks for."""

from lightning.pytorch import Trainer

QUIET = dict(
    max_epochs=1,
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)


def quiet_trainer(**options):
    return Trainer(**(QUIET | options))
