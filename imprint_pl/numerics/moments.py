"""The sums that everything needs: class counts, class sums and the Gram matrix of the embeddings.

The mean, NC1 and the closed forms are functions of these sums.
Sums add up over batches, ranks and files, and a class can be subtracted again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from imprint_pl.numerics.passes import blocks
from imprint_pl.ranks import ranks, travelling_device

# Columns of a Gram matrix computed at a time. The matrix is symmetric, so that blocks of its lower
# triangle need not be computed.
COLUMNS = 256


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 if the device has no float64 (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass
class Moments:
    """Sums over labelled embeddings, in float64.

    Attributes:
        counts: `(C,)`, samples of each class; the sum of their weights where they have weights.
        sums: `(C, d)`, sum of each class.
        gram: one of four kinds. `(d, d)`: Σ w z zᵀ over all samples, with the weight w of the
            sample's class. `(C, d, d)`: a Gram matrix for each class. `(d,)`: the diagonal of
            Σ z zᵀ. `None`: only counts and sums are kept.
        class_weights: `(C,)`, or `None` for ones; used only in `gram`. With weights 1 / count, if
            the counts are known beforehand, the Gram matrix gives the average of the classes'
            covariances.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor | None = None
    class_weights: Tensor | None = None

    @classmethod
    def zeros(
        cls,
        num_classes: int,
        dim: int,
        *,
        gram: str = "pooled",
        class_weights: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Moments:
        """Make empty sums. `gram` is "none", "diagonal" `(d,)`, "pooled" `(d, d)` or "per_class"
        `(C, d, d)`."""
        shapes = {
            "none": (),
            "diagonal": (dim,),
            "pooled": (dim, dim),
            "per_class": (num_classes, dim, dim),
        }
        if gram not in shapes:
            raise ValueError(f"gram={gram!r}: expected one of {list(shapes)}")
        dtype = sum_dtype(torch.device(device))

        def empty(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            counts=empty(num_classes),
            sums=empty(num_classes, dim),
            gram=None if gram == "none" else empty(*shapes[gram]),
            class_weights=None if class_weights is None else class_weights.to(device, dtype),
        )

    @classmethod
    def of(
        cls, x: Tensor, y: Tensor, num_classes: int, weights: Tensor | None = None, **options: Any
    ) -> Moments:
        """Add up embeddings `x (N, d)` with labels `y (N,)` in 0..C−1 and `weights (N,)`.

        The weights are those of `add`, the options those of `zeros`.
        """
        return cls.zeros(num_classes, x.shape[1], device=x.device, **options).add(x, y, weights)

    @property
    def num_classes(self) -> int:
        return self.counts.shape[0]

    @property
    def pooled_gram(self) -> Tensor:
        """`(d, d)`, Σ z zᵀ over all samples, unweighted; a `ValueError` where it was not kept."""
        if self.gram is None or self.gram.ndim != 2 or self.class_weights is not None:
            raise ValueError('this asks for Moments with gram="pooled" and no class_weights')
        return self.gram

    @property
    def squares(self) -> Tensor:
        """`(d,)`, the squares of each feature over all samples: the diagonal of the pooled Gram."""
        if self.gram is not None and self.gram.ndim == 1:
            return self.gram
        return self.pooled_gram.diagonal()

    @property
    def means(self) -> Tensor:
        """`(C, d)`, the class means; NaN for a class without samples."""
        return self.sums / self.counts[:, None]

    @property
    def global_mean(self) -> Tensor:
        """`(d,)`, the mean of all samples."""
        return self.sums.sum(0) / self.counts.sum()

    def present(self) -> Moments:
        """The sums of the classes that have samples, numbered without gaps."""
        kept = (self.counts > 0).nonzero().flatten()
        places = torch.full_like(self.counts, -1, dtype=torch.int64)
        places[kept] = torch.arange(len(kept), device=places.device)
        return self.relabelled(places, len(kept))

    def relabelled(self, places: Tensor, num_classes: int) -> Moments:
        """Return the sums with other labels: class c becomes `places[c]`.

        Args:
            places: `(C,)` int64, all different; −1 leaves the class out. A pooled Gram matrix is
                not changed, so subtract such a class from it beforehand.
            num_classes: number of classes of the result. Those that are not in `places` are empty
                and have weight 1.
        """
        places = places.to(self.counts.device)
        kept = places >= 0
        places = places[kept]

        def moved(rows: Tensor, fill: float = 0.0) -> Tensor:
            result = rows.new_full((num_classes, *rows.shape[1:]), fill)
            result[places] = rows[kept]
            return result

        gram = self.gram
        if gram is not None and gram.ndim == 3:
            gram = moved(gram)
        weights = None if self.class_weights is None else moved(self.class_weights, 1.0)
        return Moments(moved(self.counts), moved(self.sums), gram, weights)

    def padded(self, num_classes: int) -> Moments:
        """Return the sums with empty classes added at the end, up to `num_classes`."""
        return self.relabelled(torch.arange(self.num_classes), num_classes)

    def to(self, device: torch.device | str) -> Moments:
        """Return the sums on a device, in the number type of `sum_dtype`.

        If they are on this device already, the memory is shared.
        """
        dtype = sum_dtype(torch.device(device))
        return self._each(lambda tensor: tensor.to(device, dtype))

    def all_reduce(self) -> Moments:
        """Add up the sums of all processes, on each of them; with one process, return itself.

        All processes need the same number of classes and the same kind of Gram matrix.
        """
        if ranks() == 1:
            return self

        def total(own: Tensor) -> Tensor:
            sent = own.to(travelling_device(), copy=True)
            dist.all_reduce(sent)
            return sent.to(own)

        totals = replace(self, class_weights=None)._each(total)
        return replace(totals, class_weights=self.class_weights)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Moments:
        return Moments(
            function(self.counts),
            function(self.sums),
            None if self.gram is None else function(self.gram),
            None if self.class_weights is None else function(self.class_weights),
        )

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> Moments:
        """Adds a batch in place: `x (B, d)` of any float dtype, `y (B,)` in 0..C−1.

        With `weights (B,)`, a row of weight w counts as w rows. Weights cannot be combined with a
        Gram matrix for each class or with `class_weights`.
        """
        if weights is not None:
            return self._add_weighted(x, y, weights)
        # Add up block by block, so that no float64 copy of a large set is made.
        for block in blocks(len(x), "adding up"):
            rows, labels = x[block].to(self.sums.dtype), y[block]
            self.counts += torch.bincount(labels, minlength=self.num_classes)
            self.sums.index_add_(0, labels, rows)
            if self.gram is None:
                continue
            if self.gram.ndim == 1:
                self.gram += rows.square().sum(0)
            elif self.gram.ndim == 3:
                for c in labels.unique().tolist():
                    of_class = rows[labels == c]
                    _add_upper(self.gram[c], of_class, of_class)
            elif self.class_weights is None:
                _add_upper(self.gram, rows, rows)
            else:
                _add_upper(self.gram, rows * self.class_weights[labels, None], rows)
        if self.gram is None or self.gram.ndim == 1:
            return self
        if self.gram.ndim == 2:
            _mirror(self.gram)
        else:
            for c in y.unique().tolist():
                _mirror(self.gram[c])
        return self

    def _add_weighted(self, x: Tensor, y: Tensor, weights: Tensor) -> Moments:
        if self.class_weights is not None or (self.gram is not None and self.gram.ndim == 3):
            raise ValueError("weights of rows ask for one Gram matrix and no class_weights")
        weights = weights.to(self.sums)
        for block in blocks(len(x), "adding up"):
            rows, labels, of_rows = x[block].to(self.sums.dtype), y[block], weights[block]
            weighted = rows * of_rows[:, None]
            self.counts.index_add_(0, labels, of_rows)
            self.sums.index_add_(0, labels, weighted)
            if self.gram is not None and self.gram.ndim == 1:
                self.gram += (weighted * rows).sum(0)
            elif self.gram is not None:
                _add_upper(self.gram, weighted, rows)
        if self.gram is not None and self.gram.ndim == 2:
            _mirror(self.gram)
        return self

    def __add__(self, other: Moments) -> Moments:
        return self._combine(other, 1)

    def __sub__(self, other: Moments) -> Moments:
        return self._combine(other, -1)

    def _combine(self, other: Moments, sign: int) -> Moments:
        gram = None
        if self.gram is not None and other.gram is not None:
            gram = self.gram + sign * other.gram
        return Moments(
            self.counts + sign * other.counts,
            self.sums + sign * other.sums,
            gram,
            self.class_weights,
        )

    def shifted(self, by: Tensor) -> Moments:
        """Return the sums of z − by, `by (d,)`; a Gram matrix has to be pooled and unweighted."""
        by, gram = by.to(self.sums), self.gram
        half = self.sums.sum(0) - self.counts.sum() / 2 * by
        if gram is not None and gram.ndim == 1:
            gram = gram - 2 * half * by
        elif gram is not None:
            cross = torch.outer(half, by)
            gram = self.pooled_gram - cross - cross.T
        return Moments(self.counts, self.sums - torch.outer(self.counts, by), gram)

    def scaled(self, by: Tensor) -> Moments:
        """Return the sums of z · by, `by (d,)`, feature by feature."""
        by, gram = by.to(self.sums), self.gram
        if gram is not None:
            gram = gram * by.square() if gram.ndim == 1 else by[:, None] * gram * by
        return Moments(self.counts, self.sums * by, gram, self.class_weights)

    def within(self, average: str = "macro") -> Tensor:
        """Compute Σ_W `(d, d)`, the within-class covariance (biased: divided by n).

        `"macro"` averages the covariances of the classes that have samples; `"micro"` pools all
        samples. A pooled Gram matrix gives `"micro"`. `"macro"` needs a Gram matrix for each class,
        `class_weights` of 1 / count, or classes of equal size.
        """
        present = self.counts > 0
        counts, sums = self.counts[present], self.sums[present]
        weights = torch.ones_like(counts) if average == "micro" else 1 / counts
        if self.gram is None or self.gram.ndim == 1:
            raise ValueError("the within-class covariance asks for Moments with a Gram matrix")
        if self.gram.ndim == 3:
            gram = torch.einsum("c,cij->ij", weights, self.gram[present])
        else:
            kept = torch.ones_like(counts)
            if self.class_weights is not None:
                kept = self.class_weights[present]
            ratio = weights / kept
            if not torch.allclose(ratio, ratio[:1]):
                raise ValueError(
                    f"average={average!r} cannot be had from this pooled Gram matrix: the classes "
                    'differ in size; keep Moments with gram="per_class" or with class_weights'
                )
            gram = self.gram * ratio[0]
        scatter = gram - (sums.T * (weights / counts)) @ sums
        return scatter / (weights * counts).sum()


def gram_of_rows(x: Tensor) -> Tensor:
    """Compute x xᵀ `(n, n)` for rows `x (n, d)`, in little more than half the time of `x @ x.T`.

    >>> gram_of_rows(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]])
    """
    gram = x.new_zeros(len(x), len(x))
    _add_upper(gram, x.T, x.T)
    _mirror(gram)
    return gram


def _add_upper(gram: Tensor, x: Tensor, z: Tensor) -> None:
    """Adds the upper triangle, in whole blocks, of the symmetric matrix xᵀz `(d, d)` to `gram`."""
    for start in range(0, len(gram), COLUMNS):
        end = min(start + COLUMNS, len(gram))
        gram[:end, start:end].addmm_(x[:, :end].T, z[:, start:end])


def _mirror(gram: Tensor) -> None:
    """Copies the blocks of the upper triangle below the diagonal."""
    for start in range(COLUMNS, len(gram), COLUMNS):
        end = min(start + COLUMNS, len(gram))
        gram[start:end, :start] = gram[:start, start:end].T
