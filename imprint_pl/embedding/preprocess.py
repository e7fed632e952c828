"""Turns uint8 images of any size into a backbone's input, on the backbone's device.

The result equals the model's own transform of a PIL image, to about one step of 255.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from imprint_pl.errors import ImprintError

# The keywords of `Preprocess`; the first three are required.
PREPROCESS_KEYS = ("size", "mean", "std", "interpolation", "resize", "crop_pct", "crop_mode")
# An image is a strip if it is this many times longer than the part that the centre crop keeps.
STRIP = 4


class Preprocess(nn.Module):
    """uint8 images to normalised float32 ones, on the device of this module.

    Agrees with the usual transforms on PIL images to about 1/255 before normalisation.

    Input is `(B, C, H, W)`, or a list of `(C, H, W)` of any sizes; output `(B, len(mean), *size)`.
    Grey is repeated for three means, alpha (of 2 or 4 channels) is dropped.

    Args:
        size: Side of the output in pixels, or (height, width).
        mean: A number for each channel, for values in [0, 1].
        std: A number for each channel, for values in [0, 1].
        interpolation: "bilinear" or "bicubic", always with antialiasing.
        resize: Side in pixels before the crop; `crop_mode` says which side.
        crop_pct: size / resize, instead of `resize` (as in timm, `resize` is rounded down).
        crop_mode: "center" makes the shorter side `resize`, "border" the longer one (the rest is
            filled with the mean), "squash" both; then the centre is cut out. Default: "center"
            where `resize` or `crop_pct` is given, else "squash".

    Attributes:
        config: The settings as plain values: `Preprocess(**config)` is equal to this one.

    >>> Preprocess(2, [0.5], [0.5])(torch.tensor([[[[0, 255], [51, 255]]]], dtype=torch.uint8))
    tensor([[[[-1.0000,  1.0000],
              [-0.6000,  1.0000]]]])
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        size: int | Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str = "bilinear",
        resize: int | Sequence[int] | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
    ) -> None:
        super().__init__()
        crop_mode = crop_mode or ("squash" if resize is None and crop_pct is None else "center")
        if interpolation not in ("bilinear", "bicubic"):
            raise ImprintError(f"interpolation {interpolation!r}: expected 'bilinear' or 'bicubic'")
        if crop_mode not in ("center", "squash", "border"):
            raise ImprintError(f"crop_mode {crop_mode!r}: expected 'center', 'squash' or 'border'")
        if resize is not None and crop_pct is not None:
            raise ImprintError(f"resize={resize} and crop_pct={crop_pct}: give one of the two")
        if len(mean) != len(std) or len(mean) not in (1, 3) or min(std) <= 0:
            raise ImprintError(f"mean={mean}, std={std}: expected 1 or 3 numbers each, std above 0")
        self.size = pair_of_sides(size, "size")
        self.interpolation, self.crop_mode = interpolation, crop_mode
        if resize is None:
            resize = [math.floor(side / (crop_pct or 1.0)) for side in self.size]
        self.resize = pair_of_sides(resize, "resize")
        self.config: dict[str, Any] = {
            "size": list(self.size),
            "mean": [float(value) for value in mean],
            "std": [float(value) for value in std],
            "interpolation": interpolation,
            "resize": list(self.resize),
            "crop_mode": crop_mode,
        }
        # Not persistent, since they belong to the settings, not to the weights.
        for name in ("mean", "std"):
            values = torch.tensor(self.config[name]).view(1, -1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    @property
    def least_side(self) -> int:
        """Pixels that the shorter side of an image needs in order not to be enlarged."""
        return max(self.resize)

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            return self._batch(images)
        groups: dict[torch.Size, list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.shape, []).append(index)
        out = self.mean.new_empty(len(images), self.mean.shape[1], *self.size, dtype=torch.float32)
        for indices in groups.values():
            stacked = torch.stack([images[index] for index in indices])
            out[torch.tensor(indices)] = self._batch(stacked)
        return out

    def _batch(self, images: Tensor) -> Tensor:
        channels, out_channels = images.shape[1], self.mean.shape[1]
        if not 1 <= channels <= 4 or (channels > 2 and out_channels == 1):
            raise ImprintError(
                f"images of shape {tuple(images.shape)}: expected (B, C, H, W) with 1 (grey), "
                f"2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels for a model of {out_channels}; "
                "images stored (B, H, W, C) need .permute(0, 3, 1, 2)"
            )
        images = images[:, : 1 if channels < 3 else 3].to(self.mean.device).float()
        images = self._crop(self._resize(self._middle(images))).expand(-1, out_channels, -1, -1)
        return (images - 255 * self.mean.float()) / (255 * self.std.float())

    def _middle(self, images: Tensor) -> Tensor:
        """Cut the ends off a strip that the centre crop would drop anyway.

        Resizing a whole image of 1 x 5000 pixels would take gigabytes.
        """
        short, long = sorted(images.shape[-2:])
        squares = math.ceil(self.size[0] / self.resize[0]) + 4
        square = self.size[0] == self.size[1] and self.resize[0] == self.resize[1]
        if self.crop_mode != "center" or not square or long <= STRIP * squares * short:
            return images
        # Keep the parity of the length, so that the centre stays where it is.
        kept = squares * short + (squares * short + long) % 2
        return images.narrow(-2 if images.shape[-2] == long else -1, (long - kept) // 2, kept)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if self.crop_mode == "squash":
            return self.resize
        if self.crop_mode == "center" and self.resize[0] == self.resize[1]:
            # Round the longer side down, as torchvision does.
            side = self.resize[0]
            if width <= height:
                return int(side * height / width), side
            return side, int(side * width / height)
        ratios = height / self.resize[0], width / self.resize[1]
        ratio = min(ratios) if self.crop_mode == "center" else max(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _resize(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        target = self._target(height, width)
        if self.interpolation == "bilinear":
            return functional.interpolate(images, target, mode="bilinear", antialias=True)
        # Bicubic overshoots. PIL clips after the horizontal pass and again after the vertical one;
        # a single clamp at the end differs from it by up to 10/255 on photographs. (Pillow 13
        # goes vertically first where the height shrinks more, which matters for squashed portraits
        # only.)
        for step in ((height, target[1]), target):
            images = functional.interpolate(images, step, mode="bicubic", antialias=True)
            images = images.clamp(0, 255)
        return images

    def _crop(self, images: Tensor) -> Tensor:
        (height, width), (image_height, image_width) = self.size, images.shape[-2:]
        down, across = max(0, height - image_height), max(0, width - image_width)
        if down or across:
            fill = (255 * self.mean.float()).round() if self.crop_mode == "border" else 0
            pad = (across // 2, (across + 1) // 2, down // 2, (down + 1) // 2)
            images = functional.pad(images - fill, pad) + fill
        top = round((images.shape[-2] - height) / 2)
        left = round((images.shape[-1] - width) / 2)
        return images[..., top : top + height, left : left + width]


def pair_of_sides(value: Any, what: str) -> tuple[int, int]:
    """Return (height, width) in pixels.

    Args:
        value: A side, or (height, width).
        what: What the error calls it.

    Raises:
        ImprintError: If a side is no whole number from 1 to 2^14.
    """
    sides = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= 2**14 for side in sides):
        raise ImprintError(
            f"{what}={value!r}: expected pixels above 0, at most {2**14}, or (height, width)"
        )
    return sides[0], sides[1]
