"""Reads files that may be forged or cut short, and writes files that appear only when complete.

Contents are checked before they are used, and can never name code to run.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from imprint_pl.errors import ImprintError


def digest(key: dict) -> str:
    """Return the sha256 of plain values."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


# Key in the metadata of safetensors files, for the hash of their tensors.
HASH = "sha256"


def local_path(place: str | os.PathLike) -> str:
    """Resolve `~`, an environment variable `$NAME` or `file://` at the start of a path.

    Shells do not resolve them in `--data.root=~/photos`, in quotes or in YAML files. A path that
    exists as it is written is returned unchanged.
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
def damaged(
    path: Any, what: str, errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn errors of reading a file into an `ImprintError` that says it is damaged.

    Parsers raise errors of many kinds for damaged files.

    Args:
        path: The file.
        what: What the file should be.
        errors: The errors to turn; an `ImprintError` stays as it is.
    """
    try:
        yield
    except ImprintError:
        raise
    except errors as error:
        raise ImprintError(f"{path}: damaged, or not {what} ({type(error).__name__})") from error


def write_whole(path: str | Path, content: bytes, durable: bool = False) -> Path:
    """Write a file that appears whole or not at all; an old file stays until then.

    Args:
        path: The file.
        content: Its bytes.
        durable: Wait until the disk has it, so that this also holds for a power failure.

    Raises:
        ImprintError: If it cannot be written there, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.unfinished")
    try:
        temporary.write_bytes(content)
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ImprintError(
            f"cannot write {path} ({error}): give a place on a disk with room, where you may write"
        ) from error
    return path


def sync(path: str | Path) -> None:
    """Wait until the disk has the current content of a file, or the names in a folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Path:
    """Write a safetensors file, whole or not at all, with a hash of its tensors."""
    return write_whole(path, save(tensors, metadata | {HASH: content_hash(tensors)}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file, and check its hash if it has one.

    Raises:
        ValueError, OSError, SafetensorError: If the file is damaged.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if HASH in metadata and metadata[HASH] != content_hash(tensors):
        raise ValueError("the content does not match its hash")
    return tensors, metadata


def content_hash(tensors: dict[str, Tensor]) -> str:
    """Return the sha256 of the tensors' names, types, shapes and values."""
    content = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        content.update(tensor.flatten().view(torch.uint8).numpy().data)
    return content.hexdigest()


def check_tensor(name: str, tensor: Any) -> None:
    """Raise an `ImprintError` unless a value is a plain tensor with all its numbers in memory.

    A view that repeats a few numbers, or a tensor without memory, may claim any size.
    """
    if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not tensor.is_quantized:
        size = tensor.numel() * tensor.element_size()
        if tensor.device.type != "meta" and size <= tensor.untyped_storage().nbytes():
            return
    raise ImprintError(
        f"{name} is no tensor whose numbers are all there: the file is damaged or forged"
    )
