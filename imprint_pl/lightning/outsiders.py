"""The callback `Outsiders`: measures how well images that belong to no class are told from others
by their familiarity or best score, and how many of each reach the head's threshold
(`method/threshold.py`).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.batch_hooks import in_training, transfer_of
from imprint_pl.data.folders import ImageFiles
from imprint_pl.embedding.batches import run_batches, unlabelled
from imprint_pl.lightning.classifier import ImprintedClassifier
from imprint_pl.method.head import ImprintedHead


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an insider's best score is above an outsider's (ties count half).

    Args:
        inside, outside: `(n, C)` and `(m, C)`, scores of samples of the classes and of none.

    >>> auroc(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 1.5], [2.5, 0.0]]))
    0.75
    """
    best = torch.cat([inside.amax(1), outside.amax(1)]).double()
    # Use ranks: torchmetrics applies a sigmoid to values outside of [0, 1], which makes ties.
    ranks = torch.unique(best, return_inverse=True)[1].double()
    inner = torch.cat([torch.ones(len(inside)), torch.zeros(len(outside))]).long().to(best.device)
    return binary_auroc(ranks / max(ranks.max().item(), 1), inner).item()


def false_positive_rate(inside: Tensor, outside: Tensor, accept: float = 0.95) -> float:
    """Share of outsiders that reach a threshold which at least `accept` of the insiders reach.

    Args:
        inside, outside: `(n,)` and `(m,)`, the score of each sample; insiders should be higher.
        accept: share of insiders.

    >>> false_positive_rate(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.5]), 0.75)
    0.5
    """
    place = int((1 - accept) * len(inside) + 1e-9)
    return (outside >= inside.sort().values[place]).double().mean().item()


class Outsiders(Callback):
    """Logs, at the end of validation and test, how well outsiders are told from insiders.

    The score is the familiarity, or in a head that was fitted without `accept` the best class
    score. The callback logs `val/outsiders_auroc`, `val/outsiders_fpr95` (share of outsiders that
    reach a threshold which 95 % of the stage's own images reach) and, if the head has a threshold,
    `val/accepted` (share of the stage's own images that reach it) and `val/rejected` (share of
    outsiders that do not); `test/…` likewise.
    With several loaders each has its own: `val/accepted/dataloader_idx_0`, ….

    Args:
        data: images that belong to no class; its test split is used, with its own batch hooks.
            Files of a flat folder are `ImageFiles`.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self.data = data
        self._undo = ExitStack()
        # The loader of the current batch, and the best scores of each loader's batches.
        self._loader: int | str = 0
        self._scores: dict[int | str, list[Tensor]] = {}

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(pl_module)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._loader = dataloader_idx

    on_test_batch_start = on_validation_batch_start

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log("val", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log("test", trainer, pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._undo.close()

    def _listen(self, module: LightningModule) -> None:
        # Keep the scores of the stage's own images, so that the head need not run on them again.
        self._scores = {}
        self._undo.callback(_head_of(module).register_forward_hook(self._heard).remove)

    def _heard(self, head: ImprintedHead, inputs: Any, logits: Tensor) -> None:
        scores = logits.detach()
        if not head.familiar.is_empty:
            scores = head.familiarity(inputs[0].detach(), scores / head.log_scale.exp())[:, None]
        self._scores.setdefault(self._loader, []).append(scores.amax(1, keepdim=True).cpu())

    def _log(self, stage: str, trainer: Trainer, module: LightningModule) -> None:
        insiders, self._scores = self._scores, {}
        with self._undo:
            if trainer.sanity_checking or not insiders:
                return
            self._loader = "outside"
            self.data.prepare_data()
            self.data.setup("test")
            if isinstance(module, ImprintedClassifier) and isinstance(self.data, ImageDataModule):
                # Read outsiders in the same way as the images of the fit.
                self.data.shrink_for(module.max_side, module.backbone.least_side)
            transfer = transfer_of(trainer, module, self.data)
            with (
                in_training(module, self.data, trainer),
                trainer.precision_plugin.forward_context(),
            ):
                of_files = isinstance(self.data, ImageFiles)
                loader = self.data.predict_dataloader() if of_files else self.data.test_dataloader()
                for _ in run_batches(module, loader, transfer=transfer, unpack=unlabelled):
                    pass  # `_heard` keeps the scores.
        outside = torch.cat(self._scores.pop("outside"))
        for number, scores in insiders.items():
            inside = torch.cat(scores)
            values = {
                "outsiders_auroc": auroc(inside, outside),
                "outsiders_fpr95": false_positive_rate(inside[:, 0], outside[:, 0]),
            }
            head = _head_of(module)
            if head.threshold is not None:
                least = head.threshold / (head.temperature if head.familiar.is_empty else 1.0)
                values["accepted"] = (inside >= least).double().mean().item()
                values["rejected"] = (outside < least).double().mean().item()
            # Add Lightning's suffix for loaders, which it only adds inside a step.
            suffix = f"/dataloader_idx_{number}" if len(insiders) > 1 else ""
            for name, value in values.items():
                module.log(
                    f"{stage}/{name}{suffix}",
                    value,
                    sync_dist=True,
                    batch_size=1,
                    add_dataloader_idx=not suffix,
                )


def _head_of(module: LightningModule) -> ImprintedHead:
    return cast(ImprintedHead, module.head)
