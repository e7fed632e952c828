"""`save_pretrained`, `from_pretrained` and `push_to_hub` of a head, by huggingface_hub's mixin.

They write and read a folder of `model.safetensors` and `config.json`, local or on the Hugging Face
Hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from torch import nn

from imprint_pl.files import damaged, local_path, read_tensors, save_tensors

FILE = "model.safetensors"


class Pretrained(
    ModelHubMixin,
    nn.Module,
    library_name="imprint_pl",
    tags=["weight-imprinting", "image-classification"],
):
    """A mixin of `ImprintedHead`, whose parts and sizes come from the file; it reads no pickle."""

    def check(self) -> Self:
        """Return the object itself; a subclass raises if its parts do not fit each other."""
        return self

    def save_pretrained(self, save_directory: str | Path, **keywords: Any) -> str | None:
        """Writes the head into a folder; see `ModelHubMixin.save_pretrained`."""
        return super().save_pretrained(local_path(save_directory), **keywords)

    def _save_pretrained(self, save_directory: Path) -> None:
        # Parts that NORM_pre and NORM_inf share are stored under each name: safetensors wants
        # every tensor to have memory of its own.
        state = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in self.state_dict().items()
        }
        save_tensors(save_directory / FILE, state, {"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **keywords: Any) -> Self:
        """Load a head from a folder or the Hub; see `ModelHubMixin.from_pretrained`.

        Raises:
            ImprintError: the files are damaged, or not those of a head.
        """
        what, place = "a folder that save_pretrained wrote", pretrained_model_name_or_path
        # Errors of the network are not among them, since their messages are clear.
        errors = (ValueError, TypeError, AttributeError, KeyError, RecursionError)
        with damaged(place, what, errors):
            return super().from_pretrained(local_path(place), **keywords)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **keywords: Any,
    ) -> Self:
        path = Path(model_id) / FILE
        if not os.path.isdir(model_id):
            path = Path(
                hf_hub_download(
                    model_id,
                    FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        # The mixin passes on the contents of config.json; use only parts that the caller gave.
        head = cls(**{n: part for n, part in keywords.items() if isinstance(part, nn.Module)})
        with damaged(path, "a head that save_pretrained wrote"):
            head.load_state_dict(read_tensors(path)[0], strict=strict)
            head.check()
        return head.to(torch.device(map_location)).eval()
