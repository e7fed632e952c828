"""The imprint epoch: it collects the embeddings of all batches, or their sums, and rank 0 makes a
head after the last batch. `classifier.py` runs it as a Trainer's training epoch.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from tqdm import tqdm

from imprint_pl.collapse import nc1
from imprint_pl.data.batch import split_batch
from imprint_pl.data.batch_hooks import datamodule_of
from imprint_pl.data.facts import DataFacts
from imprint_pl.data.lightning_packages import is_fast_dev_run
from imprint_pl.data.loaders import expected_samples, sampler_length
from imprint_pl.errors import ImprintError
from imprint_pl.lightning.trainer import STOPPED, no_head, the_loader
from imprint_pl.method.familiarity import MOST_BYTES
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint_parts
from imprint_pl.method.recipes import Auto, Recipe
from imprint_pl.method.selection import weibull_typical
from imprint_pl.method.threshold import Limits, set_limits
from imprint_pl.numerics.large import check_budget, taken, within_budget
from imprint_pl.parts.norm.base import transform
from imprint_pl.parts.norm.layers import last_columns
from imprint_pl.ranks import on_rank_zero
from imprint_pl.training_set.kept import State, check_keep
from imprint_pl.training_set.memory import check_room
from imprint_pl.training_set.reservoir import EmbeddingReservoir
from imprint_pl.training_set.store import Collector, RowStore, on_gpu
from imprint_pl.training_set.sums import EmbeddingSums, needs_only_sums


@dataclass(frozen=True)
class EpochOptions:
    """The options of a fit besides its recipe, which `ImprintedClassifier` describes.

    Raises:
        ImprintError: a value is out of range, or two options exclude each other.
    """

    seed: int = 0
    weibull: tuple[float, float] | None = None
    keep: str | None = None
    keep_sources: bool = False
    accept: float | None = None
    coverage: float | None = None
    max_per_class: int | None = None
    memory_budget: float | None = None
    most_bytes: int = MOST_BYTES

    def __post_init__(self) -> None:
        keep, most, limits = self.keep, self.max_per_class, self.limits
        check_budget(self.memory_budget)
        if keep is not None:
            check_keep(keep, bool(limits))
        if most is not None and most < 1:
            raise ImprintError(f"max_per_class={most}: give a number from 1 on")
        if most is not None and keep is not None:
            raise ImprintError(
                f"max_per_class={most} drops samples that keep={keep!r} has to keep: give one of "
                "them"
            )

    @property
    def limits(self) -> Limits:
        """The limits to fit with the head."""
        return Limits(self.accept, self.coverage, self.most_bytes)

    @property
    def needs_rows(self) -> bool:
        """Whether these options need the embeddings, even if the recipe does not."""
        return not (self.weibull is None and self.keep is None)


class Finished(NamedTuple):
    """The results of an imprint epoch, on every rank.

    Attributes:
        head: the head; on any device on rank 0, on the CPU on the other ranks.
        logged: values to log, by their names after `train/`.
        state: the state for `keep`; only on rank 0.
    """

    head: ImprintedHead
    logged: dict[str, float]
    state: State | None


class Imprinted(NamedTuple):
    """The results of an epoch on rank 0: head, NC1, number of samples, and the state to keep."""

    head: ImprintedHead
    nc1: float
    samples: int
    state: State | None = None


class ImprintEpoch:
    """Takes the batches of one epoch, then makes the head.

    Only sums are kept if these suffice for recipe and options (see `needs_only_sums`), otherwise
    the embeddings, or `max_per_class` of each class.

    Args:
        trainer: the Trainer, in its train loop, at the start of the epoch.
        parts: the parts of the recipe; `begin` may change them after the first batch.
        options: the other options of the fit.

    Attributes:
        batches: how many batches have come.

    Raises:
        ImprintError: several training loaders.
    """

    def __init__(self, trainer: Trainer, parts: Recipe | Auto, options: EpochOptions) -> None:
        self.trainer, self.options = trainer, options
        loader, self._keys = the_loader(trainer.train_dataloader)
        self.facts = DataFacts(datamodule_of(trainer), loader)
        # An epoch that is shortened on purpose may lack classes. A limit of 1 is one batch, 1.0 all
        # batches.
        limit = trainer.limit_train_batches
        self.shortened = is_fast_dev_run(trainer) or limit != 1.0 or isinstance(limit, int)
        self.samples = expected_samples(loader, trainer.num_training_batches, trainer.world_size)
        self._dealt = sampler_length(loader)
        self.seen = self.batches = 0
        self.start = time.perf_counter()
        self.begin(parts)

    def begin(self, parts: Recipe | Auto) -> None:
        """Chooses what to keep for the parts of a recipe.

        It is called again with the first batch, when the layers in the embeddings are known.

        Raises:
            ImprintError: `max_per_class` is given, but only sums are kept.
        """
        self.parts, options = parts, self.options
        self.kept: Collector
        dealt, num_classes = self._dealt, self.facts.num_classes
        most = options.max_per_class
        self._summed = not options.needs_rows and needs_only_sums(parts, self.samples)
        if self._summed and isinstance(parts, Recipe):
            if most is not None:
                raise ImprintError(
                    f"max_per_class={most}: this recipe keeps sums, not embeddings, and has "
                    "nothing to bound; leave it out"
                )
            self.kept = EmbeddingSums(
                parts,
                num_classes=num_classes,
                class_counts=self.facts.class_counts,
                samples=self.samples,
                dealt=dealt,
                seed=options.seed,
                limits=options.limits,
            )
        elif most is not None:
            self.kept = EmbeddingReservoir(most, options.seed, num_classes, dealt)
        else:
            self.kept = RowStore(dealt)

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Returns `(images, labels)` of a Trainer's batch, see `split_batch`."""
        for key in self._keys:
            batch = batch[key]
        return split_batch(batch)

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Adds a batch `(B, d)` with labels `(B,)`.

        Raises:
            ImprintError: the batch is invalid, or there is not enough memory for the embeddings.
        """
        with within_budget(self.options.memory_budget):
            if self.kept.grows:
                self._check_room(embeddings)
            self.kept.add(embeddings, labels)
        self.batches += 1

    def _check_room(self, embeddings: Tensor) -> None:
        """Checks the memory before the first batch, or before each batch if their number is not
        known."""
        self.seen += len(embeddings)
        samples = self.seen if self.samples is None else self.samples
        needed = partial(check_room, samples, embeddings.shape[1], self._in_memory)
        if self.samples is None:
            # Do not communicate here, since ranks may have different numbers of batches.
            if self.trainer.is_global_zero:
                needed()
        elif self.batches == 0 and (estimate := on_rank_zero(needed)) is not None:
            self._say(estimate)

    def _say(self, text: str) -> None:
        """Says something above the progress bar, if there is one."""
        shown = self.trainer.progress_bar_callback
        if shown is not None and getattr(shown, "is_enabled", False):
            # This leaves bars of tqdm whole, and of rich, which replaces stderr while it draws.
            tqdm.write(text, file=sys.stderr)
        else:
            rank_zero_info(text)

    @property
    def _in_memory(self) -> str | None:
        """Returns why the embeddings have to be in memory; `None` if they need not."""
        if self.options.keep == "embeddings":
            return "keep='embeddings' keeps them"
        if isinstance(self.parts, Recipe) and getattr(self.parts.gen, "every_sample", False):
            return f"gen={self.parts.gen.name!r} makes each of them a proxy"
        return None

    def cut_short(self) -> None:
        """Warns that the head is imprinted without all batches; called before `finish`.

        Raises:
            ImprintError: there was no batch at all.
        """
        if self.batches == 0:
            raise ImprintError(no_head(self.trainer))
        known = self.trainer.num_training_batches
        of = f" of {known}" if known != float("inf") else ""
        reason = "no other came, whatever the training loader's len() says"
        if self.trainer.should_stop:
            # The user stopped the epoch, so missing classes are accepted, as with a limit.
            self.shortened, reason = True, STOPPED
        rank_zero_warn(f"the head is imprinted from {self.batches}{of} training batches: {reason}")

    def finish(self, classifier: Tensor | None, device: torch.device) -> Finished:
        """Makes the head on rank 0, with the help of the other ranks; called on every rank.

        Args:
            classifier: as for `imprint_parts`.
            device: the device to compute on, if it has enough memory.

        Returns:
            The results, on every rank.

        Raises:
            ImprintError: on every rank, if the recipe cannot be imprinted from these samples.
        """
        progress = self.trainer.progress_bar_callback is not None
        with within_budget(self.options.memory_budget, progress):
            return self._finish(classifier, device)

    def _finish(self, classifier: Tensor | None, device: torch.device) -> Finished:
        embed_seconds = time.perf_counter() - self.start
        gathered = self.kept.gather()
        make = self._imprint_sums if self._summed else self._imprint_rows

        def imprint() -> Finished:
            start = time.perf_counter()
            made = make(gathered, classifier, device)
            logged = {
                "nc1": made.nc1,
                # Reading this number waits for the GPU, so that its work counts in the time below.
                "temperature": made.head.temperature,
                "embed_seconds": embed_seconds,
                "gen_seconds": time.perf_counter() - start,
                "images_per_second": made.samples / embed_seconds,
            }
            return Finished(made.head, logged, made.state)

        return on_rank_zero(imprint, lambda done: Finished(done.head.cpu(), done.logged, None))

    def _imprint_sums(
        self, sums: EmbeddingSums, classifier: Tensor | None, device: torch.device
    ) -> Imprinted:
        """Makes the head from sums, on their device."""
        head = sums.imprint(self.facts.class_names, classifier, self.shortened)
        head.name_classes(self.facts.names_of_dataset)
        return Imprinted(head, sums.nc1(), len(sums))

    def _imprint_rows(
        self, rows: tuple[Tensor, Tensor], classifier: Tensor | None, device: torch.device
    ) -> Imprinted:
        """Makes the head from embeddings `(N, d)` and labels `(N,)`, with its limits and state."""
        options = self.options
        whole = x, y = on_gpu(*rows, device)
        if options.weibull is not None:
            typical = weibull_typical(x, y, *options.weibull)
            x, y = taken(x, typical), y[typical]
        head = imprint_parts(
            x,
            y,
            self.parts,
            class_names=self.facts.class_names,
            num_classes=self.facts.num_classes,
            seed=options.seed,
            classifier=classifier,
            progress=self.trainer.progress_bar_callback is not None,
            allow_empty=self.shortened,
            values_checked=True,
        )
        head.name_classes(self.facts.names_of_dataset)
        set_limits(head, x, y, options.limits, classifier)
        state = None
        if options.keep is not None:
            state = State.of(
                *whole,
                head,
                options.keep,
                sources=self._sources(len(whole[1])),
                limits=options.limits,
                weibull=options.weibull,
                classifier=classifier,
            )
        # As in the paper, NC1 is that of the last layer's unit vectors, whatever the recipe.
        unit = transform(nn.functional.normalize, last_columns(x, self.parts.layer_widths))
        value = nc1(unit, y) if len(y.unique()) > 1 else float("nan")
        return Imprinted(head, value, len(y), state)

    def _sources(self, samples: int) -> list[str]:
        if not self.options.keep_sources:
            return []
        named = getattr(self.facts.data, "sample_names", lambda split: None)("train")
        return list(named or [f"train {i}" for i in range(samples)])[:samples]


def warn_of_absent(head: ImprintedHead) -> None:
    """Warns of the classes of a head that have no proxy."""
    absent = set(range(head.num_classes)) - set(head.proxy_classes.tolist())
    if absent:
        names = [head.name_of(label) for label in sorted(absent)]
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        rank_zero_warn(
            f"{len(names)} of {head.num_classes} classes had no sample in this shortened epoch and "
            f"are never predicted: {', '.join(names[:10])}{more}"
        )
