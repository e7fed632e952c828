"""NORMs `join` and `last`: embeddings of several layers of a backbone, side by side.

Such wide embeddings are `(B, Σd)`, the layers in the order of the forward pass, the last layer in
the last columns. `layer_widths` says how many columns each layer has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.values import is_count
from imprint_pl.parts.norm.base import Norm
from imprint_pl.parts.norm.learned import MOST_FEATURES, Learned

# A feature is constant if its standard deviation is a smaller share of its size than this. float32
# keeps seven digits, so such a deviation is little more than rounding.
CONSTANT = 1e-5
# The inverse of a smaller standard deviation is outside the range of float32.
LEAST_DEVIATION = 1e-30


class JoinLayers(Learned):
    """join: makes every layer count alike, whatever its scale and width.

    z = (x − mean) / (std · √w), with mean and std `(Σd,)` the mean and the standard deviation
    (divided by N) of each feature over the training embeddings, and w the width of the feature's
    layer. A feature that is constant there becomes 0. The mean squared length of a layer's part is
    then 1 (less its share of constant features).

    A feature is constant where its deviation is at most 1e-5 of its root mean square.

    Args:
        layer_widths: How many features each layer has, in the order of the columns.

    Raises:
        ImprintError: If `layer_widths` is no list of positive whole numbers, or does not add up to
            the width of the embeddings.

    >>> x = torch.tensor([[1.0, 10.0, 5.0], [3.0, 50.0, 5.0]])
    >>> JoinLayers([1, 2]).fit(x, torch.tensor([0, 1]), 2)(x)
    tensor([[-1.0000, -0.7071,  0.0000],
            [ 1.0000,  0.7071,  0.0000]])
    """

    name = "join"
    fixed = True
    maps = True
    from_moments = True
    constants = ("mean", "scale")
    mean: Tensor
    scale: Tensor

    def __init__(self, layer_widths: list[int] | None = None) -> None:
        super().__init__()
        self.layer_widths = checked_widths(layer_widths)

    def fit(self, x: Tensor, y: Tensor, num_classes: int, seed: int = 0) -> JoinLayers:
        check_width(self.layer_widths, x.shape[1])
        return self.fit_moments(Moments.of(x, y, num_classes, gram="diagonal"))

    def fit_moments(self, moments: Moments) -> JoinLayers:
        check_width(self.layer_widths, moments.sums.shape[1])
        mean = moments.global_mean
        size = moments.squares / moments.counts.sum()
        std = (size - mean.square()).clamp_min(0).sqrt()
        varies = (std > CONSTANT * size.sqrt()) & (std > LEAST_DEVIATION)
        widths = torch.tensor(self.layer_widths, device=std.device)
        roots = widths.to(std.dtype).sqrt().repeat_interleave(widths)
        self._set(mean, mean=mean, scale=(1 / (std * roots)).where(varies, 0))
        return self

    def of_moments(self, moments: Moments) -> Moments:
        return moments.shifted(self.mean).scaled(self.scale)

    def features(self, dim: int, samples: int) -> int:
        return sum(self.layer_widths)

    def apply_fitted(self, x: Tensor) -> Tensor:
        if not self.mean.shape == self.scale.shape == (sum(self.layer_widths),):
            raise ImprintError(
                f"join has constants of {tuple(self.mean.shape)} and {tuple(self.scale.shape)} "
                f"for layer_widths={self.layer_widths}: the file is damaged, or of another model"
            )
        return (x - self.mean) * self.scale


class LastLayer(Norm):
    """last: keeps the columns of the last layer, and drops those of the layers before it.

    Args:
        layer_widths: How many features each layer has, in the order of the columns.

    Raises:
        ImprintError: If `layer_widths` is no list of positive whole numbers, or does not add up to
            the width of the embeddings.

    >>> LastLayer([2, 1])(torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3.]])
    """

    name = "last"
    maps = True

    def __init__(self, layer_widths: list[int] | None = None) -> None:
        super().__init__()
        self.layer_widths = checked_widths(layer_widths)

    @property
    def input_dim(self) -> int:  # type: ignore[override]
        return sum(self.layer_widths)

    def features(self, dim: int, samples: int) -> int:
        return self.layer_widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """`(..., Σd)` → `(..., d)`, d the width of the last layer."""
        check_width(self.layer_widths, x.shape[-1])
        return last_columns(x, self.layer_widths)


def last_columns(x: Tensor, layer_widths: list[int] | None) -> Tensor:
    """Return the last layer of `x (..., Σd)`, `(..., d)`; without widths `x` is the last layer."""
    return x if layer_widths is None else x[..., -layer_widths[-1] :]


def checked_widths(layer_widths: Any) -> list[int]:
    """Return the widths as Python's numbers.

    Raises:
        ImprintError: If they are no list of positive whole numbers, or too many.
    """
    texts = isinstance(layer_widths, str | bytes | dict)
    widths = list(layer_widths) if isinstance(layer_widths, Iterable) and not texts else []
    if not widths or not all(map(is_count, widths)):
        raise ImprintError(
            f"layer_widths={layer_widths!r:.200}: give the number of features of each layer, the "
            "last layer's included, such as [320, 1280]"
        )
    if sum(map(int, widths)) > MOST_FEATURES:
        raise ImprintError(
            f"layer_widths add up to {sum(map(int, widths)):,} features: at most "
            f"{MOST_FEATURES:,} are possible"
        )
    return [int(width) for width in widths]


def check_width(layer_widths: list[int] | None, dim: int) -> None:
    """Raise an `ImprintError` unless the widths, where there are any, add up to `dim`."""
    if layer_widths is not None and sum(layer_widths) != dim:
        raise ImprintError(
            f"layer_widths={layer_widths} add up to {sum(layer_widths)}, and the embeddings have "
            f"{dim} numbers: give the width of every layer in the embeddings, the last layer's "
            "included"
        )
