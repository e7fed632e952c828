"""`save_pretrained`, `from_pretrained`, `push_to_hub` of a head: a folder of `model.safetensors`
and `config.json`, here or on the Hugging Face Hub, by huggingface_hub's mixin.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from imprint_pl.errors import ImprintError

FILE = "model.safetensors"


class Pretrained(
    ModelHubMixin,
    library_name="imprint_pl",
    tags=["weight-imprinting", "image-classification"],
):
    """Mixed into `ImprintedHead`, which takes parts and sizes from the file; never a pickle."""

    def _save_pretrained(self, save_directory: Path) -> None:
        # Parts that NORM_pre and NORM_inf share are stored under each name: safetensors wants
        # every tensor to have memory of its own.
        state = {
            name: value.detach().cpu().contiguous().clone()
            for name, value in self.state_dict().items()
        }
        (save_directory / FILE).write_bytes(save(state, {"format": "pt"}))

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
        **keywords,
    ) -> nn.Module:
        if os.path.isdir(model_id):
            path = Path(model_id) / FILE
        else:
            path = hf_hub_download(
                model_id,
                FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                token=token,
                local_files_only=local_files_only,
            )
        head = cls(**keywords)
        try:
            head.load_state_dict(load(Path(path).read_bytes()), strict=strict)
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise ImprintError(
                f"{path}: damaged, or not a head that save_pretrained wrote "
                f"({type(error).__name__})"
            ) from error
        return head.to(torch.device(map_location)).eval()
