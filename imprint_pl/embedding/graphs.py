"""Graphs: the forward pass of a model as an ONNX file, exported once and kept for later processes.

An export takes seconds to a minute. Graphs are kept in one folder, `graph_folder()`, of bounded
size; those that were not used for the longest time are removed first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from imprint_pl.errors import ImprintError, warn
from imprint_pl.files import digest, local_path, write_whole

# Environment variable with the folder of graphs; the default is `graphs` in this package's cache.
VARIABLE = "IMPRINT_PL_GRAPHS"
MOST_BYTES = 4 * 2**30
OPSET = 20
# Packages that build models and export them; a graph depends on their versions.
PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxscript")
SUFFIX = ".graph"
# A file begins with the hash of the rest and of the key, as text.
HASH_LENGTH = 64


def graph_folder() -> Path:
    """Return the folder of kept graphs: $IMPRINT_PL_GRAPHS, or `imprint_pl/graphs` in the cache of
    the user ($XDG_CACHE_HOME, or ~/.cache)."""
    if named := os.environ.get(VARIABLE):
        return Path(local_path(named))
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "imprint_pl" / "graphs"


def versions() -> dict[str, str]:
    """Return the versions of the packages that a graph depends on."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


class KeptGraphs:
    """A folder of graphs by key, which several processes may use at once.

    Args:
        folder: the folder; made when the first graph is written.
        most_bytes: most bytes in the folder; the graph that was written last always stays.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder, self.most_bytes = folder, most_bytes

    def get(self, key: dict[str, Any], export: Callable[[], bytes]) -> bytes:
        """Return the graph of a key; export it if it is missing or damaged.

        If the folder cannot be written to, a warning says so, and the graph is not kept.

        Args:
            key: plain values that name what the graph computes.
            export: makes the graph; its errors are not caught.
        """
        if (content := self._read(key)) is not None:
            return content
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / "lock")
            lock.acquire()
        except OSError as error:
            _not_kept(self.folder, error)
            return export()
        try:
            # Look again, since another process may have exported it meanwhile.
            content = self._read(key)
            if content is None:
                content = export()
                try:
                    write_whole(self._path(key), _hash(key, content) + content)
                    self._remove_oldest(self._path(key))
                except (ImprintError, OSError) as error:
                    _not_kept(self.folder, error)
        finally:
            lock.release()
        return content

    def has(self, key: dict[str, Any]) -> bool:
        """Return whether there is a file for a key; it may be damaged."""
        return self._path(key).is_file()

    def remove(self, key: dict[str, Any]) -> None:
        """Remove the graph of a key, because its results are wrong."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{digest(key)[:32]}{SUFFIX}"

    def _read(self, key: dict[str, Any]) -> bytes | None:
        path = self._path(key)
        try:
            whole = path.read_bytes()
        except OSError:
            return None
        head, content = whole[:HASH_LENGTH], whole[HASH_LENGTH:]
        if head != _hash(key, content):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # The time of its last use.
        return content

    def _remove_oldest(self, newest: Path) -> None:
        # Count unfinished files of killed processes, too; no process writes one now, since this
        # process has the lock.
        files = [path for path in self.folder.glob(f"*{SUFFIX}*") if path != newest]
        used = newest.stat().st_size
        for path in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
            used += path.stat().st_size
            if used > self.most_bytes or path.suffix != SUFFIX:
                path.unlink(missing_ok=True)


def export_graph(module: nn.Module, example: Tensor) -> bytes:
    """Export a module as an ONNX graph, weights and all.

    Args:
        module: in eval mode; float32 `(B, …)` to float32 `(B, d)`.
        example: an input with at least two rows. The number of rows stays open.
    """
    with torch.no_grad(), _quiet():
        program = torch.export.export(
            module, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
        )
        exported = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["embeddings"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert exported is not None  # only the old exporter, without dynamo, returns None
    return exported.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's warnings, which are about its internals and do not help users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.fx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _hash(key: dict[str, Any], content: bytes) -> bytes:
    return hashlib.sha256(digest(key).encode() + content).hexdigest().encode()


def _not_kept(folder: Path, error: Exception) -> None:
    warn(
        f"the exported graph cannot be kept in {folder} ({error}), and is exported again at each "
        f"start: let {VARIABLE} name a folder where you may write"
    )
