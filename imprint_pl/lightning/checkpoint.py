"""A checkpoint of ImprintedClassifier: read without running code, and compared with the head and
the backbone that it is to be loaded into.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from imprint_pl.embedding.backbone import Backbone
from imprint_pl.errors import ImprintError
from imprint_pl.files import check_tensor, damaged, local_path
from imprint_pl.method.head import ImprintedHead


def check_checkpoint(checkpoint: dict[str, Any], head: ImprintedHead, backbone: Backbone) -> None:
    """Raises an `ImprintError` where a checkpoint has no head, or one imprinted on another backbone
    than this; warns where only its preprocessing is another."""
    state = checkpoint["state_dict"]
    own = {f"head.{name}": None for name in head.state_dict()}
    missing = [name for name in own if name not in state]
    foreign = [name for name in state if name.startswith("head.") and name not in own]
    if "head.proxies" in state and (missing or (foreign and not head.takes_parts_of_file)):
        raise ImprintError(
            f"the checkpoint's head and this model's differ in {(missing + foreign)[0]!r}: they "
            "are of different recipes; give the recipe of the checkpoint"
        )
    if missing:
        raise ImprintError(
            f"the checkpoint has no {missing[0]!r}: it was not written by ImprintedClassifier"
        )
    if any(key.startswith("backbone.") for key in state):
        for name, own in backbone.state_dict(prefix="backbone.").items():
            there = getattr(state.get(name), "shape", None)
            if there != getattr(own, "shape", None):
                raise ImprintError(
                    f"the checkpoint's backbone has {_shape(there)} as {name!r}, this one has "
                    f"{_shape(own.shape)}: give a backbone of the same architecture"
                )
        return
    source, saved = backbone.source(), checkpoint.get("backbone")
    saved = saved if isinstance(saved, dict) else {}
    for key in ("name", "sha256"):
        if saved.get(key) != source[key]:
            raise ImprintError(
                f"the checkpoint was imprinted on a backbone with {key}={saved.get(key)!r}, "
                f"this one has {key}={source[key]!r}: give the same backbone and weights "
                "(save_backbone=True keeps them in the checkpoint)"
            )
    for key in ("image_size", "preprocess", "precision"):
        if saved.get(key) != source[key]:
            rank_zero_warn(
                f"the checkpoint was imprinted with {key}={saved.get(key)!r}, this model has "
                f"{key}={source[key]!r}: embeddings may differ"
            )


def _shape(shape: Any) -> str:
    return "nothing" if shape is None else f"a tensor of {tuple(shape)}"


# What a name or a number needs; a text with brackets would be read as structure, and structure can
# name classes.
PLAIN_TEXT = re.compile(r"[^{}\[\]\n]*")


def read_checkpoint(source: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint of `ImprintedClassifier`: its checksums are compared, and nothing but tensors
    and plain values is unpickled.

    Raises:
        ImprintError: no such file, damaged, forged, or no checkpoint.
    """
    is_path = isinstance(source, str | os.PathLike)
    source = local_path(source) if is_path else source
    name = source if is_path else "the checkpoint"
    if is_path and not os.path.isfile(source):
        if os.path.isdir(source):
            raise ImprintError(f"{source} is a folder: give the .ckpt in it that `fit` wrote")
        raise ImprintError(f"{source}: there is no such file")
    with damaged(name, "a checkpoint that `fit` wrote"):
        _check_archive(source)
        checkpoint = _without_code(source, name, map_location)
        state, settings = checkpoint["state_dict"], checkpoint["hyper_parameters"]
        if not all(isinstance(part, Mapping) for part in (state, settings)):
            raise ValueError("no state dict")
    for key, tensor in state.items():
        if not str(key).endswith("_extra_state") or isinstance(tensor, Tensor):
            check_tensor(f"{name}: {key}", tensor)
    return checkpoint


def _without_code(source: str | Path | IO[bytes], name: Any, map_location: Any) -> dict[str, Any]:
    try:
        return torch.load(source, weights_only=True, map_location=map_location)
    except pickle.UnpicklingError as error:
        if not (found := re.search(r"GLOBAL (\S+) was not an allowed global", str(error))):
            raise
        raise ImprintError(
            f"{name}: damaged, or not a checkpoint that `fit` wrote: it holds a {found[1]}, which "
            "takes code to make; keep plain values in the state of DataModules and callbacks"
        ) from error


def keep_loadable(checkpoint: dict[str, Any]) -> None:
    """Drops from a checkpoint that is to be written the hyperparameters that `read_checkpoint`, or
    `hyperparameters`, would refuse: a subclass or a DataModule of the user's may save any object.
    Warns of each."""
    for key, loads in (
        ("hyper_parameters", _is_plain),
        ("datamodule_hyper_parameters", _loads_without_code),
    ):
        kept = checkpoint.get(key)
        if not isinstance(kept, dict):
            continue
        for name, value in list(kept.items()):
            if not str(name).startswith("_") and not loads(value):
                del kept[name]
                warnings.warn(
                    f"the hyperparameter {name!r} is no plain value ({type(value).__name__}) and "
                    "is left out of the checkpoint: give it as a keyword of load_from_checkpoint",
                    stacklevel=2,
                )


def _loads_without_code(value: Any) -> bool:
    content = io.BytesIO()
    try:
        torch.save(value, content)
        content.seek(0)
        torch.load(content, weights_only=True)
    except Exception:  # Whatever pickling stumbles over.
        return False
    return True


def hyperparameters(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Those of a checkpoint that are keywords of `ImprintedClassifier`.

    Lightning's own entries, which name a class and what makes it, are left out.

    Raises:
        ImprintError: a value that is more than text, numbers, and lists or dicts of these.
    """
    plain = {}
    for name, value in dict(checkpoint["hyper_parameters"]).items():
        if str(name).startswith("_"):
            continue
        if not _is_plain(value):
            raise ImprintError(
                f"the checkpoint has {name}={value!r:.200}, where a plain value belongs: "
                "ImprintedClassifier did not write it"
            )
        plain[name] = value
    if not isinstance(plain.get("backbone", ""), str):
        raise ImprintError(f"the checkpoint has backbone={plain['backbone']!r:.200}: no name")
    # Files are given by whoever loads; the name of a torchvision entry may come along.
    if not str(plain.get("weights")).isidentifier():
        plain.pop("weights", None)
    return plain


def _check_archive(source: str | Path | IO[bytes]) -> None:
    """Raises for what is no zip file as `torch.save` writes it, or whose checksums are wrong."""
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        # Stored as they are: a packed entry could unpack to any size.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("packed entries")
        if archive.testzip() is not None:
            raise ValueError("wrong checksum")
    if hasattr(source, "seek"):
        source.seek(0)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if depth > 4:
        return False
    if isinstance(value, str):
        return PLAIN_TEXT.fullmatch(value) is not None
    if isinstance(value, Mapping):
        return all(
            isinstance(name, str)
            and name.isidentifier()
            and name not in ("class_path", "init_args")
            and _is_plain(part, depth + 1)
            for name, part in value.items()
        )
    if isinstance(value, list | tuple):
        return all(_is_plain(part, depth + 1) for part in value)
    return value is None or type(value) in (bool, int, float)
