"""The embeddings of one epoch, gathered over batches and over ranks: float32, on the CPU, in the
order of the data set. It does not know what the embeddings are for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.large import RowFile, empty_rows, room
from imprint_pl.numerics.values import check_classes, check_values
from imprint_pl.ranks import concatenate, gather_rows

# Rows that wait on a GPU before they are looked at.
GPU_ROWS = 8192


class Collector:
    """Takes the batches of an epoch; subclasses say in `take` what they keep of one, and bring it
    together on rank 0 in `gather`. `grows` says whether memory grows with the number of samples.

    Batches on a GPU wait there until there are 8,192 rows: to look at one, the processor has to
    wait for the GPU, and the GPU then for the processor.
    """

    grows = False

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, embeddings: Tensor, labels: Tensor) -> None:
        """Adds a batch `(B, d)` with labels `(B,)`.

        Raises:
            ImprintError: what `take` says of a batch; for one on a GPU perhaps later, at the latest
                by `gather`.
        """
        # Copies: a model may give a part of something larger (the first token of all), which would
        # stay in memory whole, and a loader may fill the same tensors anew.
        self._waiting.append((embeddings.detach().clone(), labels.clone()))
        if embeddings.device.type == "cpu" or sum(len(x) for x, _ in self._waiting) >= GPU_ROWS:
            self.take_waiting()

    def take_waiting(self) -> None:
        """Takes the batches that wait."""
        waiting, self._waiting = self._waiting, []
        for embeddings, labels in waiting:
            self.take(embeddings, labels)

    def take(self, embeddings: Tensor, labels: Tensor) -> None:
        """A batch, in the order of `add`."""
        raise NotImplementedError

    def gather(self) -> Any:
        """What all ranks keep, on rank 0; `None` on the others."""
        raise NotImplementedError


class RowStore(Collector):
    """Collects rows with labels; `gather` brings them together on rank 0 and empties the store.

    Rows that do not fit into the budget of memory (see `numerics/large.py`) go to a file.

    Args:
        dealt: how many samples a `DistributedSampler` deals to the ranks (see `sampler_length`);
            what it repeats to make them even is dropped. `None` keeps every row.
    """

    grows = True

    def __init__(self, dealt: int | None = None) -> None:
        super().__init__()
        self.dealt = dealt
        self._embeddings: list[Tensor] = []
        self._file: RowFile | None = None
        self._room, self._bytes = 0.0, 0
        self._dim: int | None = None
        self._labels: list[Tensor] = []

    def take(self, embeddings: Tensor, labels: Tensor) -> None:
        """A batch `(B, d)` with labels `(B,)`.

        Raises:
            ImprintError: see `check_batch`.
        """
        embeddings = embeddings.to("cpu", torch.float32)
        check_batch(embeddings, len(self._labels), self._dim)
        if not self._labels:
            self._room = room()
        self._dim = embeddings.shape[1]
        self._bytes += embeddings.nbytes
        self._embeddings.append(embeddings)
        if self._bytes > self._room:
            self._file = self._file or RowFile(2 * self._bytes)
            for rows in self._embeddings:
                self._file.append(rows)
            self._embeddings = []
        self._labels.append(labels.to("cpu", torch.int64))

    def gather(self) -> tuple[Tensor, Tensor] | None:
        """`(N, d)` and `(N,)` of all ranks on rank 0, `None` on the others."""
        self.take_waiting()
        file, self._file, self._bytes, self._dim = self._file, None, 0, None
        embeddings = concatenate(self._embeddings) if file is None else file.rows()
        x, y = gather_rows(embeddings, empty_rows), gather_rows(concatenate(self._labels))
        return None if x is None or y is None else (x[: self.dealt], y[: self.dealt])


def on_gpu(x: Tensor, y: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Moved to the GPU where there is one with room for them; GEN and NC1 are faster there."""
    if device.type != "cuda" or 3 * x.nbytes > torch.cuda.mem_get_info(device)[0]:
        return x, y
    return x.to(device), y.to(device)


def check_batch(embeddings: Tensor, batch: int, dim: int | None) -> None:
    """Checks the embeddings `(B, d)` of batch number `batch`; `dim` is the d of those before it.

    Raises:
        ImprintError: another d, or a value that is not finite or too large; names the batch and
            the sample.
    """
    if dim is not None and embeddings.shape[1] != dim:
        raise ImprintError(
            f"batch {batch} has embeddings of {embeddings.shape[1]} numbers, those before it had "
            f"{dim}: the backbone has to give all images embeddings of one size"
        )
    check_values(embeddings, f"batch {batch}: ")


def check_labels(labels: Tensor, batch: int, num_classes: int | None) -> None:
    """Checks the labels `(B,)` of batch number `batch`; `num_classes` may be unknown.

    Raises:
        ImprintError: a label out of range; names the batch and the sample.
    """
    if len(labels):
        check_classes(max(1, int(labels.max()) + 1))
    outside = labels < 0
    if num_classes is not None:
        outside |= labels >= num_classes
    if outside.any():
        first = int(outside.nonzero()[0])
        among = ", 1, …" if num_classes is None else f"..{num_classes - 1} for {num_classes=}"
        raise ImprintError(
            f"label {int(labels[first])} of sample {first} in batch {batch} is out of range: "
            f"labels are 0{among}"
        )
