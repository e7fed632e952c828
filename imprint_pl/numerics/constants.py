"""Tensors of a module that never change.

They move with the module like buffers, but are not buffers: tools that average models would average
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError
from imprint_pl.files import check_tensor


class Constants(nn.Module):
    """A module with constants, the tensors that `constants` names.

    EMA and SWA (of Lightning, torch and timm) average parameters and buffers. Averages of integers
    are truncated: class 7 becomes class 6. Averages of a tensor with itself collect rounding
    errors, up to a percent at a decay of 0.99999. Constants are therefore neither parameters nor
    buffers. They still move with the module (`.to`), are copied and pickled with it, and are in its
    state dict under their names. Loading a state dict gives them the sizes of the saved tensors.
    """

    constants: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        super()._apply(fn, recurse)
        for name in self.constants:
            setattr(self, name, fn(getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.constants:
            # Copy them: timm's ModelEmaV2 writes averages into the tensors of a state dict.
            destination[prefix + name] = getattr(self, name).clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for name in self.constants:
            key, own = prefix + name, getattr(self, name)
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
                continue
            saved = state_dict[key]
            check_tensor(key, saved)
            if saved.is_floating_point() != own.is_floating_point():
                raise ImprintError(
                    f"{key} is {saved.dtype} instead of {own.dtype}: where state dicts are "
                    "averaged or converted, take what is not floating point from one of them as "
                    "it is"
                )
            with torch.inference_mode(False):
                setattr(self, name, saved.detach().to(own.device, copy=True))
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        # torch expects parameters and buffers only, and reports the constants as unexpected.
        own = {prefix + name for name in self.constants}
        unexpected_keys[:] = [key for key in unexpected_keys if key not in own]


class OptionalConstants(Constants):
    """Constants that are optional: they are empty until they are fitted.

    A state dict holds them only if they are fitted, so files without them are the same as before
    these constants existed. Loading such a state dict empties them.

    Attributes:
        integers: the constants that are int64; the others are floats.
    """

    integers: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        for name in self.constants:
            dtype = torch.int64 if name in self.integers else torch.float32
            setattr(self, name, torch.zeros(0, dtype=dtype))

    def clear(self) -> None:
        """Empties the constants."""
        for name in self.constants:
            setattr(self, name, getattr(self, name).new_zeros(0))

    @property
    def is_empty(self) -> bool:
        """Whether the constants were not fitted."""
        return not getattr(self, self.constants[0]).numel()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if not self.is_empty:
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if any(prefix + name in state_dict for name in self.constants):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        else:
            self.clear()
