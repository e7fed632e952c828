"""Resizing as two matrix products, for exported models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imprint_pl.embedding.preprocess import Preprocess


class MatrixResize(nn.Module):
    """`Preprocess` as two matrix products, one for each side: `(B, 3, H, W)` → `(B, 3, *size)`.

    Row i of a matrix holds the weights of the antialiased filter for output pixel i; crop and
    padding only choose the rows. H and W may therefore be variable in an exported file.

    Args:
        preprocess: The preprocessing to copy; the results agree up to float32 rounding.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.size, self.target = preprocess.size, preprocess.resize
        self.bicubic = preprocess.interpolation == "bicubic"
        self.crop_mode = preprocess.crop_mode
        self.register_buffer("mean", preprocess.mean.detach().cpu().float().clone())
        self.register_buffer("std", preprocess.std.detach().cpu().float().clone())

    def forward(self, images: Tensor) -> Tensor:
        # Use float64, since float32 is not exact enough for pixel positions in large images.
        sides = [torch.arange(images.shape[axis]).double() for axis in (2, 3)]
        lengths = [side.max() + 1 for side in sides]
        down, across = (
            self._matrix(side, length, target, size)
            for side, length, target, size in zip(
                sides, lengths, self._targets(*lengths), self.size, strict=True
            )
        )
        fill = (255 * self.mean).round() if self.crop_mode == "border" else 0 * self.mean
        # Rows outside the image become 0, so subtract the fill first and add it at the end.
        images = images[:, : self.mean.shape[1]].float() - fill
        images = self._clipped(images @ across.T, fill)
        images = self._clipped(down @ images, fill) + fill
        return (images - 255 * self.mean) / (255 * self.std)

    def _clipped(self, images: Tensor, fill: Tensor) -> Tensor:
        if not self.bicubic:
            return images
        return torch.minimum(torch.maximum(images, -fill), 255 - fill)

    def _targets(self, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sides of the resized image, before the crop, as `Preprocess` does."""
        rows, columns = self.target
        if self.crop_mode == "squash":
            return torch.full_like(height, rows), torch.full_like(width, columns)
        if self.crop_mode == "center" and rows == columns:
            shorter = torch.minimum(height, width)
            return torch.floor(rows * height / shorter), torch.floor(rows * width / shorter)
        ratios = height / rows, width / columns
        best = torch.minimum if self.crop_mode == "center" else torch.maximum
        ratio = best(*ratios)
        return (height / ratio).round().clamp(min=1), (width / ratio).round().clamp(min=1)

    def _matrix(self, side: Tensor, length: Tensor, target: Tensor, size: int) -> Tensor:
        """Return `(size, length)`: the part of the resize to `target` that the crop keeps."""
        # `Preprocess` rounds to even, as torch does, and pads the smaller half at the front.
        missing = (size - target).clamp(min=0)
        cut = ((target - size).clamp(min=0) / 2).round()
        place = torch.arange(size).double() + cut - (missing / 2).floor()
        scale = length / target
        centre = (place + 0.5) * scale
        far = ((side + 0.5)[None] - centre[:, None]) / scale.clamp(min=1)
        weights = _cubic(far.abs()) if self.bicubic else (1 - far.abs()).clamp(min=0)
        weights = weights / weights.sum(1, keepdim=True).where(
            weights.sum(1, keepdim=True) != 0, 1.0
        )
        inside = (place >= 0) & (place < target)
        return (weights * inside[:, None]).float()


def _cubic(far: Tensor) -> Tensor:
    """Keys' cubic convolution with a = −½, which PIL and torch use for antialiasing."""
    near = (1.5 * far - 2.5) * far * far + 1
    outer = ((-0.5 * far + 2.5) * far - 4) * far + 2
    return near.where(far < 1, outer.where(far < 2, 0.0))
