"""The imprint epoch: what it keeps of the embeddings as they go by, and how rank 0 makes a head of
them after the last batch. `classifier.py` calls both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from imprint_pl.collapse import nc1
from imprint_pl.data.batch import split_batch
from imprint_pl.data.lightning_packages import both
from imprint_pl.data.loaders import expected_samples, sampler_length
from imprint_pl.errors import ImprintError
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.recipes import Auto, Recipe
from imprint_pl.method.selection import weibull_typical
from imprint_pl.method.threshold import set_threshold
from imprint_pl.numerics.labels import names_of
from imprint_pl.ranks import helped, work_for_rank_zero
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.memory import check_memory
from imprint_pl.training_set.reservoir import EmbeddingReservoir
from imprint_pl.training_set.store import RowStore, on_gpu
from imprint_pl.training_set.sums import EmbeddingSums, needs_only_sums


def empty(checkpoint: Any = None) -> str:
    """What to do about a head without proxies, that of a checkpoint where one was given."""
    if checkpoint:
        return (
            f"{checkpoint} was written before its fit had imprinted the head: give the checkpoint "
            "of a fit that has ended, or go on with trainer.fit(…, ckpt_path=…), which imprints it "
            "from the whole training set"
        )
    return "the head has no proxies yet; fit first, or give ckpt_path"


def check_saved(trainer: Trainer) -> None:
    """Warns, at the end of a fit, of a ModelCheckpoint whose moment never came."""
    for callback in trainer.checkpoint_callbacks:
        meant = isinstance(callback, both(ModelCheckpoint)) and callback.save_top_k != 0
        if meant and not (callback.best_model_path or callback.last_model_path):
            rank_zero_warn(
                "a ModelCheckpoint has saved nothing: imprinting is one epoch and one step, at its "
                "end; leave out every_n_train_steps, train_time_interval and every_n_epochs"
            )


class ImprintEpoch:
    """Takes the batches of one epoch, then makes the head.

    Sums are kept where the recipe needs no more (see `needs_only_sums`), otherwise the embeddings,
    or `max_per_class` of each class.

    Args:
        trainer: in its train loop, at the start of the epoch.
        parts: of the recipe.
        seed: of every random choice.
        weibull: as for `imprint`; it asks for the embeddings, as do `keep` and `accept`.
        keep, keep_sources, accept, max_per_class: as for `ImprintedClassifier`.

    Attributes:
        state: on rank 0, once finished, what `keep` asks for.
    """

    def __init__(
        self,
        trainer: Trainer,
        parts: Recipe | Auto,
        seed: int,
        weibull: list[float] | None,
        *,
        keep: str | None = None,
        keep_sources: bool = False,
        accept: float | None = None,
        max_per_class: int | None = None,
    ) -> None:
        self.trainer = trainer
        self.keep, self.keep_sources, self.accept = keep, keep_sources, accept
        self.state: State | None = None
        self.data = trainer.datamodule
        self.parts, self.seed, self.weibull = parts, seed, weibull
        data = trainer.datamodule
        loader, self._keys = the_loader(trainer.train_dataloader)
        self.class_names = names_of(data) or None
        self.num_classes = len(self.class_names or []) or getattr(data, "num_classes", None)
        self.dealt = sampler_length(loader)
        # Cut short on purpose, it may miss classes.
        limit = trainer.limit_train_batches
        # 1 is one batch, 1.0 all of them.
        self.shortened = bool(trainer.fast_dev_run) or limit != 1.0 or isinstance(limit, int)
        self.progress = trainer.progress_bar_callback is not None
        samples = expected_samples(loader, trainer.num_training_batches, trainer.world_size)
        self.samples, self.seen, self.batches = samples, 0, 0
        self.start = time.perf_counter()
        self.kept = RowStore()
        only_head = weibull is None and keep is None and accept is None
        summed = only_head and needs_only_sums(parts, samples)
        if max_per_class is not None:
            if summed:
                raise ImprintError(
                    f"max_per_class={max_per_class}: this recipe keeps sums, not embeddings, and "
                    "has nothing to bound; leave it out"
                )
            self.kept = EmbeddingReservoir(max_per_class, seed, self.num_classes, self.dealt)
        elif summed:
            self.kept = EmbeddingSums(
                parts,
                num_classes=self.num_classes,
                class_counts=getattr(data, "class_counts", None),
                samples=samples,
                dealt=self.dealt,
                seed=seed,
            )

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """`(images, labels)` of a batch as the Trainer gives it, see `split_batch`."""
        for key in self._keys:
            batch = batch[key]
        return split_batch(batch)

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """A batch `(B, d)` with labels `(B,)`.

        Raises:
            ImprintError: a batch that cannot be; more embeddings than there is memory for.
        """
        self._check_memory(embeddings)
        self.kept.add(embeddings, labels)
        self.batches += 1

    def cut_short(self) -> None:
        """Called before `finish` where the last batch has not come: says what is imprinted instead.

        Raises:
            ImprintError: not even a first batch came.
        """
        if self.batches == 0:
            raise ImprintError(no_head(self.trainer))
        known = self.trainer.num_training_batches
        of = f" of {known}" if known != float("inf") else ""
        reason = "no other came, whatever the training loader's len() says"
        if self.trainer.should_stop:
            # Somebody's wish, as a limit is: the rest may hold whole classes.
            self.shortened, reason = True, STOPPED
        rank_zero_warn(f"the head is imprinted from {self.batches}{of} training batches: {reason}")

    def _check_memory(self, embeddings: Tensor) -> None:
        """Before the first batch; where nobody knows how many will come, before each."""
        first, known = self.seen == 0, self.samples is not None
        self.seen += len(embeddings)
        if not isinstance(self.kept, RowStore) or (known and not first):
            return
        strategy, result = self.trainer.strategy, None
        if self.trainer.is_global_zero:
            try:
                result = check_memory(self.samples if known else self.seen, embeddings.shape[1])
            except ImprintError as error:
                result = error
        if known:
            # One rank decides: the others would wait for ever for one that has left.
            result = strategy.broadcast(result)
        if isinstance(result, ImprintError):
            raise result
        if result is not None and known:
            rank_zero_info(result)

    def finish(
        self, classifier: Tensor | None, device: torch.device
    ) -> tuple[dict[str, Tensor], dict[str, float]] | ImprintError | None:
        """The head's state, on the CPU, and what is to be logged, on rank 0; `None` on the others.

        An error is returned, not raised: the other ranks wait for a head and must get it instead.

        Args:
            classifier: as for `imprint_parts`.
            device: where to compute, if it has room.
        """
        summed = isinstance(self.kept, EmbeddingSums)
        embed_seconds = time.perf_counter() - self.start
        samples = (self.dealt,) if isinstance(self.kept, RowStore) else ()
        gathered = self.kept.gather(*samples)
        if gathered is None:
            work_for_rank_zero()
            return None
        start = time.perf_counter()
        try:
            with helped():
                if summed:
                    head = gathered.imprint(self.class_names, classifier, self.shortened)
                    value, images = gathered.nc1(), len(gathered)
                else:
                    head, value, images = self._imprint_rows(*gathered, classifier, device)
        except ImprintError as error:
            return error
        # On the CPU, for ranks with GPUs of their own.
        state = {name: tensor.cpu() for name, tensor in head.state_dict().items()}
        return state, {
            "nc1": value,
            "temperature": head.temperature,
            "embed_seconds": embed_seconds,
            "gen_seconds": time.perf_counter() - start,
            "images_per_second": images / embed_seconds,
        }

    def _imprint_rows(
        self, x: Tensor, y: Tensor, classifier: Tensor | None, device: torch.device
    ) -> tuple[ImprintedHead, float, int]:
        """The head, NC1 and the number of samples, from embeddings `(N, d)` and labels `(N,)`."""
        x, y = on_gpu(x, y, device)
        whole = x, y
        if self.weibull is not None:
            rows = weibull_typical(x, y, *self.weibull)
            x, y = x[rows], y[rows]
        head = imprint_parts(
            x,
            y,
            self.parts,
            class_names=self.class_names,
            num_classes=self.num_classes,
            seed=self.seed,
            classifier=classifier,
            progress=self.progress,
            allow_empty=self.shortened,
            values_checked=True,
        )
        if self.accept is not None:
            set_threshold(head, x, y, self.accept, classifier)
        if self.keep is not None:
            self.state = State.of(
                *whole,
                head,
                self.keep,
                sources=self._sources(len(whole[1])),
                accept=self.accept,
                weibull=self.weibull,
                classifier=classifier,
            )
        # As the paper has it: on unit vectors, whatever the recipe.
        value = nc1(nn.functional.normalize(x), y) if len(y.unique()) > 1 else float("nan")
        return head, value, len(y)

    def _sources(self, samples: int) -> list[str]:
        if not self.keep_sources:
            return []
        named = getattr(self.data, "sample_names", lambda split: None)("train")
        return list(named or [f"train {i}" for i in range(samples)])[:samples]


STOPPED = "the Trainer was told to stop (max_time, or a callback's should_stop)"


def the_loader(loaders: Any) -> tuple[Any, list[Any]]:
    """The training loader that a Trainer has, and the keys that lead to it, as they lead to its
    batch: none, or those of a list or dict with one loader.

    Raises:
        ImprintError: several loaders.
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


def no_head(trainer: Trainer) -> str:
    """Why a fit that had no training batch has no head, as a sentence."""
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
    """For sums and GEN inside a step of the Trainer: its autocast and default type are meant for
    the backbone alone."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
