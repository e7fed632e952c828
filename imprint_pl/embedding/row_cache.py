"""The files of the embedding cache: rows of numbers on disk that are added in parts.

A cache is a folder of immutable parts. Each part is a safetensors file that appears only when it is
complete. A process may therefore be killed at any moment, and several may write: the next one finds
complete parts and adds the missing rows. This file knows nothing of backbones and images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.files import digest
from imprint_pl.numerics.large import empty_rows

FORMAT = "imprint_pl embeddings 1"


class Found(NamedTuple):
    """The result of `RowCache.read`.

    Attributes:
        rows: `(M, d)` float32; None if no part has any of them.
        found: `(M,)` bool, which rows were found; the values of the others are arbitrary.
        faults: the reason for each part that cannot be used.
    """

    rows: Tensor | None
    found: Tensor
    faults: dict[Path, str]


class WiderRows(NamedTuple):
    """A cache of longer rows, and how many of their last columns to use."""

    cache: RowCache
    columns: int


class RowCache:
    """Float32 rows by position in one folder.

    Rows are stored in float32, as they were embedded. Half precision would halve the files, but
    proxies and distances would then differ from those of a fit without the cache.

    Args:
        folder: the folder; made when the first rows are written.
        key: plain values that say what the rows are; a part with another key is not used.
        wider: caches whose rows end with the rows of this one; `read` also looks there.
    """

    def __init__(self, folder: Path, key: dict[str, Any], wider: Sequence[WiderRows] = ()) -> None:
        self.folder = folder
        self.key = key
        self.wider = tuple(wider)
        self._digest = digest(key)

    def read(self, positions: Tensor) -> Found:
        """Looks up the rows at `positions (M,)`, int64."""
        # Copy with NumPy. torch splits copies of this size among all its threads, which wait for
        # each other on a busy machine (60,000 rows of 1,280 numbers: 7.9 s instead of 0.6 s).
        wanted, found = positions.numpy(), np.zeros(len(positions), dtype=bool)
        rows: np.ndarray | None = None
        faults: dict[Path, str] = {}
        for path in self._parts():
            if found.all():
                break
            try:
                part = self._read_part(path, wanted[~found])
            except FileNotFoundError:
                continue  # another process has just removed a damaged part
            except (OSError, SafetensorError, ValueError) as error:
                faults[path] = " ".join(str(error).split()) or type(error).__name__
                continue
            if part is None:
                continue
            held, embeddings = part
            if rows is None:
                rows = empty_rows(len(wanted), embeddings.shape[1]).numpy()
            if embeddings.shape[1] != rows.shape[1]:
                faults[path] = f"it has {embeddings.shape[1]} numbers a row, not {rows.shape[1]}"
                continue
            # The positions of a part are ascending.
            index = np.searchsorted(held, wanted).clip(max=len(held) - 1)
            hit = held[index] == wanted
            rows[hit] = embeddings[index[hit]]
            found |= hit
        for cache, columns in self.wider:
            if found.all():
                break
            # Ignore damaged parts here; they are removed when that cache is filled.
            there = cache.read(positions[~torch.from_numpy(found)])
            if there.rows is None or (rows is not None and columns != rows.shape[1]):
                continue
            if rows is None:
                rows = empty_rows(len(wanted), columns).numpy()
            hits = there.found.numpy()
            places = (~found).nonzero()[0][hits]
            rows[places] = there.rows.numpy()[hits, -columns:]
            found[places] = True
        read = None if rows is None else torch.from_numpy(rows)
        return Found(read, torch.from_numpy(found), faults)

    def _read_part(self, path: Path, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Reads the positions `(n,)` and rows `(n, d)` of a part; None if it has none of `wanted`.

        Raises:
            OSError, SafetensorError, ValueError: the part is damaged, or of another cache.
        """
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("key") != self._digest:
                raise ValueError("it was not written for this cache")
            held = file.get_tensor("positions")
            if held.ndim != 1 or held.dtype != np.int64 or not (np.diff(held) > 0).all():
                raise ValueError("its positions do not ascend")
            if not np.isin(wanted, held).any():
                return None
            embeddings = file.get_tensor("embeddings")
        if embeddings.dtype != np.float32 or embeddings.shape[:-1] != held.shape:
            raise ValueError("it does not hold a row of float32 for each position")
        if _content_hash(held, embeddings) != metadata.get("sha256"):
            raise ValueError("its content does not match its hash")
        return held, embeddings

    def remove(self, path: Path) -> None:
        """Removes a part that `read` found unusable; only under the `lock`."""
        path.unlink(missing_ok=True)

    def write(self, positions: Tensor, rows: Tensor) -> None:
        """Adds a part; only under the `lock`.

        Args:
            positions: `(n,)` int64, ascending.
            rows: `(n, d)` float32.

        Raises:
            ImprintError: the folder cannot be written to.
        """
        numbers = [int(path.stem.removeprefix("part-")) for path in self._parts()]
        path = self.folder / f"part-{max(numbers, default=-1) + 1:05d}.safetensors"
        # A fixed name, so that the file of a killed process is overwritten.
        temporary = self.folder / "unfinished"
        content = {"positions": positions.numpy(), "embeddings": rows.numpy()}
        metadata = {
            "format": FORMAT,
            "key": self._digest,
            "sha256": _content_hash(**content),
        }
        try:
            if not (self.folder / "key.json").exists():
                temporary.write_text(json.dumps(self.key, indent=2) + "\n")
                os.replace(temporary, self.folder / "key.json")
            # safetensors' own writer would make the file readable for its owner only.
            temporary.write_bytes(save(content, metadata))
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            raise _not_writable(self.folder, error) from error

    @contextmanager
    def lock(self, waiting: Callable[[], Any]) -> Iterator[None]:
        """Lets one process write at a time; the operating system frees the lock of a killed one.

        Args:
            waiting: called without arguments if another process holds the lock.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
            try:
                lock.acquire(timeout=0.1)
            except Timeout:
                waiting()
                lock.acquire()
        except OSError as error:
            raise _not_writable(self.folder, error) from error
        try:
            yield
        finally:
            lock.release()

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"part-{5 * '[0-9]'}.safetensors"))


def _content_hash(positions: np.ndarray, embeddings: np.ndarray) -> str:
    content = hashlib.sha256(f"{embeddings.dtype} {embeddings.shape}".encode())
    for array in (positions, embeddings):
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def _not_writable(folder: Path, error: Exception) -> ImprintError:
    reason = " ".join(str(error).split())
    return ImprintError(
        f"cannot write embeddings into {folder} ({reason}): give a --cache_dir on a disk with "
        "room, where you may write"
    )
