"""Reads weights of backbones safely from files, fetches them as their libraries do, and checks that
they fit the model. Errors say what to do.
"""

import re
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError
from imprint_pl.files import local_path

# The files that timm looks for in a repository of the hub, in this order.
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


def read_state_dict(file: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file, without executing code from a pickle.

    Raises:
        ImprintError: If the file is missing, cannot be read safely, or is no state dict.
    """
    path = Path(local_path(file))
    if not path.is_file():
        raise ImprintError(f"weights {str(file)!r}: no such file")
    try:
        state: Any
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ImprintError(
            f"weights {str(file)!r} cannot be read safely; save model.state_dict() with torch.save "
            f"or safetensors ({type(error).__name__}: {str(error).splitlines()[0]})"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ImprintError(f"weights {str(file)!r}: expected a state dict of tensors")
    return dict(state)


def load_fitting(
    model: nn.Module, state: dict[str, Tensor], file: str | Path, head: tuple[str, ...] = ()
) -> Tensor | None:
    """Load a state dict without its classifier.

    Args:
        model: The model to load into.
        state: The state dict.
        file: Its file, for the error.
        head: Names of the classifier's modules.

    Returns:
        The classifier's weights `(classes, d)` where the state dict has them.

    Raises:
        ImprintError: If names or shapes do not fit; the message says which.
    """
    own = model.state_dict()
    classifier = next((state[f"{h}.weight"] for h in head if f"{h}.weight" in state), None)
    state = {k: v for k, v in state.items() if not k.startswith(tuple(f"{h}." for h in head))}
    faults = [f"{key} is missing" for key in own if key not in state]
    # Older files lack this counter, and eval mode does not use it.
    faults = [fault for fault in faults if "num_batches_tracked" not in fault]
    faults += [
        f"{key} is {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and value.shape != own[key].shape
    ]
    faults += [f"{key} is not in the model" for key in state if key not in own]
    if faults:
        raise ImprintError(
            f"weights {str(file)!r} do not fit {type(model).__name__}: {'; '.join(faults[:3])}"
            + (f"; and {len(faults) - 3} more" if len(faults) > 3 else "")
        )
    model.load_state_dict(state, strict=False)
    return classifier


def download(name: str, url: str) -> Path:
    """Return the file of torchvision's weights, fetched where it is not in torch's cache.

    Raises:
        ImprintError: If it cannot be fetched.
    """
    folder = Path(torch.hub.get_dir(), "checkpoints")
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(20)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        expected = re.search(r"-([a-f0-9]+)\.", path.name)
        torch.hub.download_url_to_file(url, str(path), expected and expected.group(1))
    except (OSError, RuntimeError) as error:
        raise not_fetched(name, path.name, folder, error) from error
    finally:
        socket.setdefaulttimeout(timeout)
    return path


def find_timm_weights(name: str, cfg: Any) -> tuple[str, str]:
    """Find the file of a timm model's pretrained weights.

    Args:
        name: The backbone's name, for the error.
        cfg: timm's `PretrainedCfg`.

    Returns:
        The file's name, and its folder in words.

    Raises:
        ImprintError: If there are no weights, or they are not in the cache and the hub cannot be
            reached.
    """
    if not (cfg.hf_hub_id or cfg.url):
        raise ImprintError(f"backbone {name!r} has no pretrained weights: use weights=<file>")
    if not cfg.hf_hub_id:
        return cfg.url.rpartition("/")[2], f"{torch.hub.get_dir()}/checkpoints"
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    repository, _, revision = cfg.hf_hub_id.partition("@")
    files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else HUB_FILES
    folder = f"{constants.HF_HUB_CACHE} (hf download {repository} {files[0]})"
    cached = [try_to_load_from_cache(repository, f, revision=revision or None) for f in files]
    if not any(isinstance(path, str) for path in cached):
        try:
            # Without a network timm would retry for most of a minute.
            get_session().head(constants.ENDPOINT, timeout=10)
        except Exception as error:
            raise not_fetched(name, files[0], folder, error) from error
    return files[0], folder


def not_fetched(name: str, file: str, place: str | Path, error: Exception) -> ImprintError:
    """Return the error for weights that could not be fetched; it says where to put the file."""
    return ImprintError(
        f"backbone {name!r}: its pretrained weights could not be fetched ({error}). Put the file "
        f"{file} into {place}, or give weights=<that file>, or pretrained=False for random weights"
    )
