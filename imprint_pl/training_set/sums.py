"""The embeddings of one epoch as sums, for GEN and for NC1, and a small held-out sample for the
temperature: memory does not grow with the number of images. `store.py` keeps the embeddings, for
the recipes that must see them all.
"""

from __future__ import annotations

import copy
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn

from imprint_pl.collapse import nc1_of
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.holdout import HELD
from imprint_pl.method.inputs import checked
from imprint_pl.method.pipeline import calibrate_from_sums, head_of_sums
from imprint_pl.method.recipes import Auto, Recipe
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.order import in_order, keys
from imprint_pl.parts.by_name import steps_of
from imprint_pl.ranks import positions_in_dataset, ranks, travelling_device
from imprint_pl.training_set.reservoir import Reservoir
from imprint_pl.training_set.store import Collector, check_batch, check_labels

# Rows that are added to the sums at once: a product of a few rows wastes most of its time.
BLOCK = 2048
# Bytes of Gram matrices a class, which NC1 takes where the class counts are not known beforehand.
LARGEST_GRAMS = 2**30


def needs_only_sums(parts: Recipe | Auto, samples: int | None) -> bool:
    """Whether a recipe needs nothing but sums; `auto` has to see the embeddings.

    Its GEN takes `Moments`, and its NORM_pre learns nothing from the embeddings: it may draw
    (`random_projection`). Of fewer `samples` than it makes features, the rows are smaller than
    their Gram matrix, and faster to solve.
    """
    if isinstance(parts, Auto):
        return False
    learned = [step for step in steps_of(parts.norm_pre) if getattr(step, "learns", False)]
    drawn = all(hasattr(step, "draw") for step in learned)
    few = samples is not None and any(samples < step.features(0, samples) for step in learned)
    return parts.gen.from_moments and drawn and not few


class EmbeddingSums(Collector):
    """Collects rows with labels as `RowStore` does, but keeps sums; `gather` adds up those of
    all ranks on rank 0, where `imprint` makes the head.

    Kept are the `Moments` of NORM_pre's output, those of unit vectors for NC1, and a held-out
    sample. With C classes and embeddings of d numbers NC1 asks for 8 d² bytes, or 8 C d² where the
    class counts are not known.

    Args:
        parts: of a recipe for which `needs_only_sums` holds.
        num_classes: C; the largest label + 1 by default.
        class_counts: `(C,)`, samples of each class, where the data knows them beforehand.
        samples: how many samples will come; `None` where that is not known.
        dealt: how many samples a `DistributedSampler` deals to the ranks (see `sampler_length`);
            what it repeats is dropped.
        seed: of NORM_pre's random choices and the held-out sample.
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
    ) -> None:
        super().__init__()
        self.parts, self.seed = parts, seed
        self.num_classes, self.samples, self.dealt = num_classes, samples, dealt
        self.class_counts = None
        # Counts of another number of samples: the epoch is cut short.
        class_counts = None if class_counts is None else torch.as_tensor(class_counts)
        if class_counts is not None and int(class_counts.sum()) == samples:
            self.num_classes = num_classes or len(class_counts)
            if self.num_classes == len(class_counts):
                self.class_counts = class_counts
        self.norm_pre, self.head = parts.fresh()
        self.moments: Moments | None = None
        self.unit_moments: Moments | None = None
        self._batches = self._seen = 0
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._held = Reservoir(HELD, seed)
        self._sample: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        """Samples in the sums: of this rank before `gather`, of all ranks after it."""
        counted = 0 if self.moments is None else int(self.moments.counts.sum())
        return counted + sum(len(labels) for _, labels in self._rows)

    def take(self, embeddings: Tensor, labels: Tensor) -> None:
        """A batch `(B, d)` with labels `(B,)`.

        Raises:
            ImprintError: see `check_batch`; a label out of range.
        """
        x, labels = embeddings.float(), labels.to("cpu", torch.int64)
        check_batch(x, self._batches, None if self.moments is None else self.input_dim)
        check_labels(labels, self._batches, self.num_classes)
        if self.moments is None:
            self._start(x)
        positions = positions_in_dataset(self._seen, len(labels))
        kept = slice(None) if self.dealt is None else positions < self.dealt
        self._rows.append((x.to(self.device)[kept], labels[kept]))
        self._batches += 1
        self._seen += len(labels)
        if sum(len(labels) for _, labels in self._rows) >= BLOCK:
            self._flush()

    def gather(self) -> EmbeddingSums | None:
        """The sums of all ranks on rank 0, `None` on the others."""
        self.take_waiting()
        self._flush()
        self._sample = self._held.gather(self.input_dim)
        if self._sample is not None:
            x, y, _ = self._sample
            rows = in_order(x, y)
            self._sample = x[rows], y[rows]
        if ranks() == 1:
            return self
        device = travelling_device()
        classes = torch.tensor(self.moments.num_classes, device=device)
        dist.all_reduce(classes, dist.ReduceOp.MAX)
        self._grow(int(classes))
        for moments in (self.moments, self.unit_moments):
            _reduce(moments, device)
        return self if dist.get_rank() == 0 else None

    def imprint(
        self,
        class_names: list[str] | None = None,
        classifier: Tensor | None = None,
        allow_empty: bool = False,
    ) -> ImprintedHead:
        """The head that `imprint_parts` makes of the same embeddings, temperature included.

        Raises:
            ImprintError: as `imprint_parts`.
        """
        counts = self.moments.counts
        seen = (counts > 0).nonzero().flatten()
        # One sample a class stands for all: C, names and classes without samples are checked.
        checked(torch.zeros(len(seen), 1), seen.cpu(), len(counts), class_names, allow_empty)
        head = ImprintedHead(self.head.norm_inf, copy.deepcopy(self.head.agg))
        head = head_of_sums(self.moments, self.parts, head, class_names, self.seed, classifier)
        rest = (self.parts, self.norm_pre, self._sample, len(self), self.seed, classifier)
        calibrate_from_sums(head, self.moments, *rest)
        return head

    def nc1(self) -> float:
        """NC1 of the unit vectors, macro; NaN for fewer than two classes, or with a warning."""
        counts = self.moments.counts
        if (counts > 0).sum() < 2:
            return float("nan")
        reason = None
        if self.unit_moments.gram is None:
            gigabytes = _gram_bytes(len(counts), self.input_dim) / 2**30
            reason = f"without them it would keep {gigabytes:.1f} GiB of sums"
        elif self.class_counts is not None and not torch.equal(
            self.class_counts.to(counts), self.unit_moments.counts
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
        return nc1_of(self.unit_moments)

    @property
    def input_dim(self) -> int:
        """d of the embeddings."""
        return self.unit_moments.sums.shape[1]

    # The sums.

    def _start(self, x: Tensor) -> None:
        gram = "pooled" if self.parts.gen.needs_gram else "none"
        row = x[:1]
        # The steps that learn draw; each sees what those before it give.
        self.norm_pre.to(x.device)
        for step in steps_of(self.norm_pre):
            if getattr(step, "learns", False):
                step.draw(row, self.samples, self.seed)
            row = step(row)
        d, features = x.shape[1], row.shape[1]
        C = self.num_classes or 1
        weights, unit_gram = None, "per_class"
        if self.class_counts is not None:
            weights, unit_gram = 1 / self.class_counts.double().clamp(min=1), "pooled"
        elif _gram_bytes(C, d) > LARGEST_GRAMS:
            unit_gram = "none"
        self.device = _device(x, 8 * (d**2 + features**2))
        self.norm_pre.to(self.device)
        self.moments = Moments.zeros(C, features, gram=gram, device=self.device)
        self.unit_moments = Moments.zeros(
            C, d, gram=unit_gram, class_weights=weights, device=self.device
        )

    def _flush(self) -> None:
        if not self._rows:
            return
        x, y = (torch.cat(parts) for parts in zip(*self._rows, strict=True))
        self._rows = []
        if not len(y):
            return
        # By what the rows hold, not by their positions: the sample is that of the set of rows.
        self._held.add(x, y, keys(x))
        self._grow(int(y.max()) + 1)
        y = y.to(self.device)
        self.moments.add(self.norm_pre(x), y)
        self.unit_moments.add(nn.functional.normalize(x), y)

    def _grow(self, classes: int) -> None:
        """Makes room for classes that nobody announced."""
        if classes <= self.moments.num_classes:
            return
        if _gram_bytes(classes, self.input_dim) > LARGEST_GRAMS:
            self.unit_moments.gram = None
        for moments in (self.moments, self.unit_moments):
            more = classes - moments.num_classes
            moments.counts = _padded(moments.counts, more)
            moments.sums = _padded(moments.sums, more)
            if moments.gram is not None and moments.gram.ndim == 3:
                moments.gram = _padded(moments.gram, more)


def _gram_bytes(num_classes: int, dim: int) -> int:
    return 8 * num_classes * dim**2


def _device(x: Tensor, gram_bytes: int) -> torch.device:
    """The GPU of `x` where it has room for the sums and for solving, else the CPU."""
    if x.device.type == "cuda" and 6 * gram_bytes < torch.cuda.mem_get_info(x.device)[0]:
        return x.device
    return torch.device("cpu")


def _padded(rows: Tensor, more: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])


def _reduce(moments: Moments, device: torch.device) -> None:
    """Adds up the sums of all ranks, on rank 0."""
    for name in ("counts", "sums", "gram"):
        own = getattr(moments, name)
        if own is not None:
            total = own.to(device)
            dist.reduce(total, 0)
            setattr(moments, name, total.to(own.device))
