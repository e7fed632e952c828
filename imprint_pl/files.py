"""Files that a stranger may have forged, or a fault cut short: checked before anything is made of
them, and written so that they appear whole or not at all. Nothing in a file names code to run.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from imprint_pl.errors import ImprintError

# In the metadata of safetensors files: a hash of their tensors.
HASH = "sha256"
# What a name or a number needs; a text with brackets would be read as structure, and structure can
# name classes.
PLAIN_TEXT = re.compile(r"[^{}\[\]\n]*")


def local_path(place: str | os.PathLike) -> str:
    """A path as a shell would read it: `~`, `$NAME` of the environment and `file://` at its start
    are resolved; what exists under the very name is that.

    No shell does so for `--data.root=~/photos` or for what stands in a YAML file or in quotes.
    """
    path = os.fspath(place)
    if os.path.exists(path):
        return path
    if path.startswith("file://"):
        return url2pathname(urlsplit(path).path)
    if path.startswith("$"):
        path = os.path.expandvars(path)
    return os.path.expanduser(path)


@contextmanager
def damaged(path: Any, what: str, errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator:
    """Around the reading of foreign bytes, which raises whatever it stumbles over: turns it into an
    `ImprintError` that `path` is damaged, or not `what`. Those of ours pass."""
    try:
        yield
    except ImprintError:
        raise
    except errors as error:
        raise ImprintError(f"{path}: damaged, or not {what} ({type(error).__name__})") from error


def write_whole(path: str | Path, content: bytes) -> Path:
    """Writes a file that appears whole or not at all: what was there stays until then.

    Raises:
        ImprintError: it cannot be written there, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.unfinished")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ImprintError(
            f"cannot write {path} ({error}): give a place on a disk with room, where you may write"
        ) from error
    return path


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """A safetensors file, written whole, with a hash of its tensors."""
    return write_whole(path, save(tensors, metadata | {HASH: content_hash(tensors)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, compared with its hash where it has one.

    Raises:
        ValueError, OSError, SafetensorError: it is damaged.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if HASH in metadata and metadata[HASH] != content_hash(tensors):
        raise ValueError("the content does not match its hash")
    return tensors, metadata


def content_hash(tensors: dict[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and values."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def check_tensor(name: str, tensor: Any) -> None:
    """Raises an `ImprintError` for what is not a plain tensor with all its numbers in memory: views
    that repeat a few numbers, and tensors without any, may claim every size."""
    if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized:
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "meta" and size <= tensor.untyped_storage().nbytes():
            return
    raise ImprintError(
        f"{name} is no tensor whose numbers are all there: the file is damaged or forged"
    )


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
