"""Keeps the predictions for each image of a validation or test, for callbacks that report them.

A hook on the module's head reads the scores that the module computes anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler, SequentialSampler, Subset
from torch.utils.hooks import RemovableHandle

from imprint_pl.data.batch import split_batch
from imprint_pl.data.batch_hooks import datamodule_of
from imprint_pl.data.loaders import loader_at, sampler_length
from imprint_pl.errors import ImprintError
from imprint_pl.evaluation.predictions import Predictions, from_rows, rows_of
from imprint_pl.lightning.metrics import labels_of_head, places_of, stage_of
from imprint_pl.method.head import NONE, ImprintedHead
from imprint_pl.numerics.labels import names_of
from imprint_pl.training_set.store import RowStore


class PredictionKeeper(Callback):
    """Keeps the predictions of the last validation or test; subclasses report them.

    Attributes:
        predictions: on rank 0, for each loader by its number, those of all ranks' images in the
            loader's order; empty if the module had no filled head.
    """

    def __init__(self) -> None:
        self.predictions: dict[int, Predictions] = {}
        self._stores: dict[int, RowStore] = {}
        self._head: ImprintedHead | None = None
        self._hook: RemovableHandle | None = None
        # The scores of the current batch.
        self._scores: Tensor | None = None
        self._accepted: Tensor | None = None

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self.predictions, self._stores, self._scores = {}, {}, None
        heads = [module for module in pl_module.modules() if isinstance(module, ImprintedHead)]
        # There may be no head, as before an ImprintCallback adds one. Then keep nothing.
        self._head = heads[0] if len(heads) == 1 and not trainer.sanity_checking else None
        if self._head is not None:
            self._hook = self._head.register_forward_hook(self._hear)
            data = names_of(datamodule_of(trainer))
            self._places = None if self._head.is_empty else places_of(data, self._head)

    def _hear(self, head: ImprintedHead, inputs: Any, scores: Tensor) -> None:
        self._scores, self._accepted = scores.detach(), None
        if head.threshold is not None:
            # Logits are scores over the temperature.
            plain = self._scores / head.log_scale.detach().exp()
            known = None if head.familiar.is_empty else head.familiarity(inputs[0], plain)
            self._accepted = head.decide(plain, known) != NONE

    def _add(self, trainer: Trainer, batch: Any, loader: int) -> None:
        scores, self._scores = self._scores, None
        # The scores are None if the head was empty.
        if scores is None or self._head is None:
            return
        labels = split_batch(batch)[1]
        if len(labels) != len(scores):
            raise ImprintError(
                f"the head has scored {len(scores)} embeddings for a batch of {len(labels)} "
                f"images, so that {type(self).__name__} cannot tell which are whose: leave the "
                "callback out"
            )
        labels = labels_of_head(labels, self._places, self._head.num_classes)
        if loader not in self._stores:
            loaders = getattr(trainer, f"{stage_of(trainer)}_dataloaders")
            self._stores[loader] = RowStore(sampler_length(loader_at(loader, loaders)))
        rows = rows_of(scores, labels.to(scores.device), self._accepted)
        self._stores[loader].add(rows, labels)

    def _end(self, trainer: Trainer) -> None:
        head, stores = self._head, self._stores
        self._stop()
        if head is None:
            return
        class_names = [head.name_of(label) for label in range(head.num_classes)]
        for number, store in sorted(stores.items()):
            gathered = store.gather()
            if gathered is None or not len(gathered[1]):
                continue
            rows, labels = gathered
            loader = loader_at(number, getattr(trainer, f"{stage_of(trainer)}_dataloaders"))
            files = files_of(loader.dataset) if in_order(loader) else None
            files = None if files is None or len(files) < len(labels) else files[: len(labels)]
            threshold = head.threshold is not None
            self.predictions[number] = from_rows(rows, labels, class_names, files, threshold)

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._head = None
        self._stores = {}

    # Lightning's hooks, which do the same for validation and test.

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(trainer, batch, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._add(trainer, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()


def in_order(loader: Any) -> bool:
    """Whether a loader returns the samples in the order of its data set, so that image i of the
    loader is sample i of the data set."""
    sampler = getattr(loader, "sampler", None)
    batches = getattr(loader, "batch_sampler", None)
    # A user's own batch sampler has its own order and ignores the sampler.
    own = batches is not None and type(batches) is not torch.utils.data.BatchSampler
    if isinstance(sampler, DistributedSampler):
        return not own and not sampler.shuffle and sampler.dataset is loader.dataset
    return not own and isinstance(sampler, SequentialSampler)


def files_of(dataset: Any) -> list[str] | None:
    """Returns the file of each sample of a data set of ours or torchvision; `None` without any."""
    if isinstance(dataset, Subset):
        files = files_of(dataset.dataset)
        return None if files is None else [files[index] for index in dataset.indices]
    paths = getattr(dataset, "paths", None)
    if paths is None:
        pairs = getattr(dataset, "samples", None)
        is_pairs = isinstance(pairs, list) and all(isinstance(p, tuple) and p for p in pairs)
        paths = [pair[0] for pair in pairs or []] if is_pairs else None
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return None
    return paths
