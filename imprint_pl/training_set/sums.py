"""Training embeddings as sums, from which a head with its temperature can be made. The memory does
not grow with the number of images. `store.py` keeps the embeddings themselves, for recipes that
need them all.

`TrainingSums` serves `partial_fit` and, inside `EmbeddingSums`, an imprint epoch.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imprint_pl.collapse import nc1_of
from imprint_pl.method.familiarity import add_units, unit_sums
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.holdout import HELD, calibrate_head, with_lam
from imprint_pl.method.inputs import checked
from imprint_pl.method.pipeline import Request, Sums, few_for, kept_gram, learns_from_sums
from imprint_pl.method.recipes import Auto, Recipe
from imprint_pl.method.threshold import Limits, set_limits_of_sums
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.order import in_order, keys
from imprint_pl.numerics.passes import CHUNK
from imprint_pl.parts.by_name import steps_of
from imprint_pl.parts.norm.base import transform
from imprint_pl.parts.norm.layers import check_width, last_columns
from imprint_pl.ranks import positions_in_dataset, ranks, travelling_device
from imprint_pl.training_set.reservoir import Reservoir
from imprint_pl.training_set.store import Collector, check_batch, check_labels

# Rows that are added to the sums at once, since matrix products of a few rows are inefficient.
BLOCK = 2048
# Most bytes of the Gram matrices for NC1 if the class counts are not known beforehand.
LARGEST_GRAMS = 2**30


def needs_only_sums(parts: Recipe | Auto, samples: int | None) -> bool:
    """Whether an epoch can keep sums alone for a recipe; `auto` needs the embeddings.

    This is so if its GEN takes `Moments` and its NORM_pre learns nothing, learns from sums alone
    (`join`), or only draws random numbers (`random_projection`). With fewer `samples` than
    features the answer is no, since the rows are smaller than their Gram matrix and faster to
    solve.
    """
    if isinstance(parts, Auto):
        return False
    learned = [step for step in steps_of(parts.norm_pre) if getattr(step, "learns", False)]
    drawn = all(hasattr(step, "draw") for step in learned) or learns_from_sums(parts.norm_pre)
    if getattr(parts.gen, "class_weight", None) is not None:
        # The weight of a sample is only known after the last sample.
        return False
    few = samples is not None and any(samples < step.features(0, samples) for step in learned)
    return parts.gen.from_moments and drawn and not few


class TrainingSums:
    """Sums of NORM_pre(x), and a bounded sample of the rows to hold out for the temperature.

    NORM_pre is fitted on the first batch and then stays as it is. If it learns from sums alone
    (`join`), the sums are those of x instead, and it is fitted for each head on all samples so far.
    The sample is drawn by the rows' contents, so it does not depend on the order, the batches or
    the ranks. The head is the same as from all rows at once, except that NORM_pre may have been
    fitted on the first batch.

    Args:
        parts: of a recipe whose GEN takes sums.
        x: `(n, d)`, the first batch, which is not added yet.
        y: `(n,)`, its labels, from 0.
        num_classes: C; labels above it make room for more classes.
        seed: fixes every random choice.
        limits: the limits to fit; for a threshold, sums for the familiarity are kept, too.
    """

    def __init__(
        self,
        parts: Recipe,
        x: Tensor,
        y: Tensor,
        num_classes: int = 1,
        seed: int = 0,
        limits: Limits | None = None,
    ) -> None:
        check_width(parts.layer_widths, x.shape[1])
        self.parts, self.seed, self.input_dim = parts, seed, x.shape[1]
        self.norm_pre: Any
        self.norm_pre, empty = parts.fresh()
        self.norm_inf = empty.norm_inf
        self.norm_pre.to(x.device)
        raw = learns_from_sums(self.norm_pre)
        if getattr(self.norm_pre, "learns", False) and not raw:
            rows = in_order(x, y)
            present, labels = torch.unique(y.to(x.device)[rows], return_inverse=True)
            self.norm_pre.fit(x[rows], labels, len(present), seed)
        features = x.shape[1] if raw else self.norm_pre(x[:1]).shape[1]
        device = _roomy_device(x, features)
        self.moments = Moments.zeros(num_classes, features, gram=kept_gram(parts), device=device)
        self._reservoir = Reservoir(HELD, seed)
        self.limits = limits or Limits()
        self.unit: Moments | None = None
        if self.limits.accept is not None:
            self.unit = unit_sums(x[:0], y[:0], num_classes, parts.layer_widths).to(device)

    def __len__(self) -> int:
        """How many samples were added: on this rank before `gather`, on all ranks after it."""
        return int(self.moments.counts.sum())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch `(B, d)` with labels `(B,)`, whose values were checked."""
        if not len(y):
            return
        self._reservoir.add(x, y, keys(x))
        if x.device != self.moments.sums.device:
            self._to(_roomy_device(x, self.moments.sums.shape[1]))
        classes = max(self.moments.num_classes, int(y.max()) + 1)
        self.moments = _with_room(self.moments, classes)
        device = self.moments.sums.device
        norm_pre = self.norm_pre.to(device)
        for rows, labels in zip(x.split(CHUNK), y.split(CHUNK), strict=True):
            z = rows.to(device)
            z = z if learns_from_sums(norm_pre) else transform(norm_pre, z)
            self.moments.add(z, labels.to(device))
            if self.unit is not None:
                self.unit = _with_room(self.unit, classes)
                add_units(self.unit, rows, labels, self.parts.layer_widths)

    def relabel(self, places: Tensor, num_classes: int) -> None:
        """Changes label c to `places[c]`; there are `num_classes` classes from now on."""
        self.moments = self.moments.relabelled(places, num_classes)
        if self.unit is not None:
            self.unit = self.unit.relabelled(places, num_classes)
        self._reservoir.relabel(places)

    def gather(self) -> None:
        """Adds up the sums of all ranks; rank 0 gets the sample, too, and can make the head."""
        classes = _most(self.moments.num_classes)
        self.moments = _with_room(self.moments, classes).all_reduce()
        if self.unit is not None:
            self.unit = _with_room(self.unit, classes).all_reduce()
        self._reservoir.gather(self.input_dim)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Returns at most `HELD` of the rows, `(n, d)`, and their labels `(n,)`, in the order of
        `in_order`, on the CPU."""
        drawn = self._reservoir.drawn()
        if drawn is None:
            return torch.zeros(0, self.input_dim), torch.zeros(0, dtype=torch.int64)
        rows = in_order(drawn.x, drawn.y)
        return drawn.x[rows], drawn.y[rows]

    def head(
        self, class_names: list[str] | None = None, classifier: Tensor | None = None
    ) -> ImprintedHead:
        """Makes the head of all samples so far, with its temperature.

        A class without samples has no proxy. All heads share one NORM_inf, which never changes,
        except that one that learns from sums is fitted for each head.
        """
        device = self.moments.sums.device
        x, y = (part.to(device) for part in self.sample())
        samples, C = len(self), self.moments.num_classes
        request = Request(C, class_names, self.seed, classifier)
        gen = self.parts.gen
        sums = Sums.of_kept(self.norm_pre.to(device), self.norm_inf, self.moments)
        if samples == len(y) and few_for(gen, sums.norm_pre, x):
            # All rows are in the sample, and solving with them is faster than with a Gram matrix.
            sums = Sums.of(sums.norm_pre, sums.norm_inf, gen, x, y, C)
        # With more samples than `HELD` these rows are a random part of them, and near-copies
        # outside it are not found.
        sums = sums.with_rows(gen, x, y, self.seed)
        head = sums.head(self.parts, request)
        calibrate_head(head, x, y, self.parts, request, sums, samples)
        if self.limits:
            parts = self.parts
            if (chosen := head.settings.get("chosen_lam")) is not None:
                parts = with_lam(parts, chosen)
            set_limits_of_sums(head, x, y, parts, request, self.limits, samples, self.unit, sums)
        return head

    def cpu(self) -> TrainingSums:
        """Moves itself to the CPU, for a file; returns itself."""
        self._to(torch.device("cpu"))
        return self

    def _to(self, device: torch.device) -> None:
        self.moments = self.moments.to(device)
        self.unit = None if self.unit is None else self.unit.to(device)
        self.norm_pre.to(device)


class UnitSums:
    """Sums of the last layer's unit vectors, for NC1.

    They hold one Gram matrix if the class counts are known beforehand, otherwise one for each
    class, or none if these would take too much memory.

    Args:
        x: `(n, d)`, the first batch, which is not added yet.
        num_classes: C; labels above it make room for more classes.
        class_counts: `(C,)`, samples of each class, where they are known beforehand.
        layer_widths: of embeddings that hold several layers.
    """

    def __init__(
        self,
        x: Tensor,
        num_classes: int,
        class_counts: Tensor | None,
        layer_widths: list[int] | None = None,
    ) -> None:
        self.class_counts, self.layer_widths = class_counts, layer_widths
        d = last_columns(x, layer_widths).shape[1]
        weights, gram = None, "per_class"
        if class_counts is not None:
            weights, gram = 1 / class_counts.double().clamp(min=1), "pooled"
        elif _gram_bytes(num_classes, d) > LARGEST_GRAMS:
            gram = "none"
        self.moments = Moments.zeros(
            num_classes, d, gram=gram, class_weights=weights, device=_roomy_device(x, d)
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds a batch `(B, d)` with labels `(B,)`; the rows are scaled to unit length here."""
        self._make_room(int(y.max()) + 1)
        device = self.moments.sums.device
        x = last_columns(x, self.layer_widths).to(device)
        self.moments.add(nn.functional.normalize(x), y.to(device))

    def gather(self) -> None:
        """Adds up the sums of all ranks."""
        self._make_room(_most(self.moments.num_classes))
        self.moments = self.moments.all_reduce()

    def nc1(self) -> float:
        """Returns the macro NC1 of the unit vectors.

        It is NaN for fewer than two classes, and, with a warning, without a Gram matrix that fits
        the class counts.
        """
        counts = self.moments.counts
        if (counts > 0).sum() < 2:
            return float("nan")
        reason = None
        if self.moments.gram is None:
            gigabytes = _gram_bytes(*self.moments.sums.shape) / 2**30
            reason = f"without them it would keep {gigabytes:.1f} GiB of sums"
        elif self.class_counts is not None and not torch.equal(
            self.class_counts.to(counts), counts
        ):
            reason = "those that it gave are not those of the samples that came"
        if reason is not None:
            warnings.warn(
                "train/nc1 is NaN: it needs the number of samples of each class before the epoch "
                f"({reason}): let the data module have class_counts (C,) that are right, and do "
                "not cut the epoch short",
                stacklevel=2,
            )
            return float("nan")
        return nc1_of(self.moments)

    def _make_room(self, classes: int) -> None:
        if classes <= self.moments.num_classes:
            return
        if _gram_bytes(classes, self.moments.sums.shape[1]) > LARGEST_GRAMS:
            self.moments.gram = None
        self.moments = self.moments.padded(classes)


class _Started(NamedTuple):
    """The sums of `EmbeddingSums`, which are made when the first batch shows d."""

    sums: TrainingSums
    unit: UnitSums


class EmbeddingSums(Collector):
    """Collects rows with labels like `RowStore`, but keeps only sums.

    `gather` adds up the sums of all ranks on rank 0, where `imprint` makes the head. It keeps
    `TrainingSums` for the head and `UnitSums` for NC1. With C classes and embeddings of d numbers
    NC1 takes 8 d² bytes, or 8 C d² if the class counts are not known.

    Args:
        parts: of a recipe for which `needs_only_sums` holds.
        num_classes: C; the largest label + 1 by default.
        class_counts: `(C,)`, samples of each class, where the data knows them beforehand.
        samples: how many samples will come; `None` where that is not known.
        dealt: how many samples a `DistributedSampler` deals to the ranks (see `sampler_length`);
            repeated samples are dropped.
        seed: fixes NORM_pre's random choices and the held-out sample.
        limits: as for `TrainingSums`.
    """

    def __init__(
        self,
        parts: Recipe,
        *,
        num_classes: int | None = None,
        class_counts: Tensor | None = None,
        samples: int | None = None,
        dealt: int | None = None,
        seed: int = 0,
        limits: Limits | None = None,
    ) -> None:
        super().__init__()
        self.parts, self.seed, self.limits = parts, seed, limits
        self.num_classes, self.dealt = num_classes, dealt
        self.class_counts = None
        # Ignore counts that do not add up to the number of samples: the epoch is cut short.
        class_counts = None if class_counts is None else torch.as_tensor(class_counts)
        if class_counts is not None and int(class_counts.sum()) == samples:
            self.num_classes = num_classes or len(class_counts)
            if self.num_classes == len(class_counts):
                self.class_counts = class_counts
        self._started: _Started | None = None
        self._batches = self._seen = 0
        self._rows: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        """How many samples are in the sums: of this rank before `gather`, of all ranks after it."""
        counted = 0 if self._started is None else len(self._started.sums)
        return counted + sum(len(labels) for _, labels in self._rows)

    def take(self, embeddings: Tensor, labels: Tensor) -> None:
        """Takes a batch `(B, d)` with labels `(B,)`.

        Raises:
            ImprintError: see `check_batch`; a label out of range.
        """
        x, labels = embeddings.float(), labels.to("cpu", torch.int64)
        dim = None if self._started is None else self._started.sums.input_dim
        check_batch(x, self._batches, dim)
        check_labels(labels, self._batches, self.num_classes)
        if self._started is None:
            C = self.num_classes or 1
            sums = TrainingSums(self.parts, x, labels, C, self.seed, self.limits)
            unit = UnitSums(x, C, self.class_counts, self.parts.layer_widths)
            self._started = _Started(sums, unit)
        positions = positions_in_dataset(self._seen, len(labels))
        kept = slice(None) if self.dealt is None else positions < self.dealt
        self._rows.append((x[kept], labels[kept]))
        self._batches += 1
        self._seen += len(labels)
        if sum(len(labels) for _, labels in self._rows) >= BLOCK:
            self._add_rows()

    def gather(self) -> EmbeddingSums | None:
        """Returns the sums of all ranks on rank 0, `None` on the other ranks."""
        self.take_waiting()
        self._add_rows()
        for part in self.kept:
            part.gather()
        return self if ranks() == 1 or dist.get_rank() == 0 else None

    def imprint(
        self,
        class_names: list[str] | None = None,
        classifier: Tensor | None = None,
        allow_empty: bool = False,
    ) -> ImprintedHead:
        """Returns the head that `imprint_parts` makes of the same embeddings, with its temperature.

        Raises:
            ImprintError: as for `imprint_parts`.
        """
        counts = self.kept.sums.moments.counts
        seen = (counts > 0).nonzero().flatten()
        # Check C, the names and classes without samples with one dummy sample per class.
        checked(torch.zeros(len(seen), 1), seen.cpu(), len(counts), class_names, allow_empty)
        return self.kept.sums.head(class_names, classifier)

    def nc1(self) -> float:
        """See `UnitSums.nc1`."""
        return self.kept.unit.nc1()

    @property
    def kept(self) -> _Started:
        """The sums, after the first batch."""
        if self._started is None:
            raise RuntimeError("no batch was added")
        return self._started

    def _add_rows(self) -> None:
        if not sum(len(labels) for _, labels in self._rows):
            return
        x, y = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        self._rows = []
        for part in self.kept:
            part.add(x, y)


def _gram_bytes(num_classes: int, dim: int) -> int:
    return 8 * num_classes * dim**2


def _roomy_device(x: Tensor, dim: int) -> torch.device:
    """Returns the GPU of `x` if it has room for the sums and for solving, else the CPU."""
    room = 6 * _gram_bytes(1, dim)
    if x.device.type == "cuda" and room < torch.cuda.mem_get_info(x.device)[0]:
        return x.device
    return torch.device("cpu")


def _with_room(moments: Moments, classes: int) -> Moments:
    return moments if classes == moments.num_classes else moments.padded(classes)


def _most(number: int) -> int:
    """Returns the largest of the numbers of all ranks."""
    if ranks() == 1:
        return number
    largest = torch.tensor(number, device=travelling_device())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
