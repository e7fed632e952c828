"""Embeds images once, through a cache: `embed(backbone, datamodule, cache_dir)`.

The cache belongs to a backbone and the images of a data set, not to a task: classes, shots and
labels are chosen afterwards, and only the images that a task needs are embedded.
"""

from __future__ import annotations

import glob
import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from imprint_pl.data.arrays import ArrayDataset
from imprint_pl.data.base import ImageDataModule, Splits
from imprint_pl.data.batch_hooks import BATCH_HOOKS
from imprint_pl.data.embeddings import TASK_OPTIONS, EmbeddingDataModule
from imprint_pl.data.lightning_packages import overrides
from imprint_pl.data.splits import SplitDataset
from imprint_pl.data.union import UnionDataset
from imprint_pl.embedding.backbone import Backbone, load_backbone
from imprint_pl.embedding.batches import run_batches
from imprint_pl.embedding.row_cache import RowCache, WiderRows
from imprint_pl.errors import ImprintError
from imprint_pl.files import digest, local_path
from imprint_pl.numerics.large import joined

# A part is written when it has this many rows, or after this many seconds. At most so much is lost
# if the process is killed.
PART_ROWS = 8192
PART_SECONDS = 10.0


@dataclass
class CacheUse:
    """Statistics of the cache's use for a data set; `seconds` include reading the data set."""

    embedded: int = 0
    read: int = 0
    seconds: float = 0.0
    folders: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        files = [path for folder in self.folders for path in folder.glob("part-*")]
        megabytes = sum(path.stat().st_size for path in files) / 1e6
        rate = f", {self.embedded / self.seconds:,.0f} images a second" if self.embedded else ""
        return (
            f"{self.read:,} embeddings read, {self.embedded:,} images embedded in "
            f"{self.seconds:.1f} s{rate}; {megabytes:,.1f} MB in {self.folders[0].parent}"
        )


class CachedEmbeddings(EmbeddingDataModule):
    """A task on embeddings from the cache; `use` has the statistics of the cache.

    `layer_widths` are those of the backbone: None if it reads only the last layer.
    """

    use: CacheUse


def embed(
    backbone: Backbone | nn.Module | str,
    datamodule: ImageDataModule,
    cache_dir: str | Path,
    *,
    name: str | None = None,
    device: torch.device | str | None = None,
    layers: str | list[str] = "last",
    views: str = "none",
    runtime: str = "auto",
) -> CachedEmbeddings:
    """Embed a task's images, or read the embeddings from the cache if they are in it.

    The cache is keyed by the backbone's name, the hash of its weights, its preprocessing and
    precision, its layers and views, and a fingerprint of the images: for arrays a hash of their
    bytes, for files their names, sizes and times. The last layer alone can also be read from a
    cache of several layers. Missing images are embedded and added, so a killed run continues where
    it stopped, and the tasks of a data set share their embeddings. One process writes at a time;
    others wait for it. Embeddings are float32.

    Args:
        backbone: a backbone of `load_backbone`, or a value for it.
        datamodule: one of `imprint_pl.data`, or a subclass of `ImageDataModule`; its classes,
            shots and other options hold for the result too.
        cache_dir: the folder of all caches; made if it does not exist.
        name: a name for a module of your own. No hash can see its code, so give it another name
            when the code changes.
        device: the device of the backbone; by default a GPU if there is one.
        layers: as for `load_backbone`; a `Backbone` has its own.
        views: as for `load_backbone`; a `Backbone` has its own.
        runtime: as for `load_backbone`; a `Backbone` has its own. "auto" looks at the size of the
            whole data set, not at the images of the task or the missing ones. Each runtime has its
            own files, so that embeddings do not depend on which run filled the cache.

    Returns:
        The task on embeddings, set up; `use` is a `CacheUse`. Its `splits` are whole, so other
        tasks can be made from them; the backbone then embeds the images that they need.

    Raises:
        ImprintError: a module of your own without a name; a data set that cannot be read by
            position; a data module with batch hooks; a folder that cannot be written to.
    """
    start = time.perf_counter()
    if not isinstance(datamodule, ImageDataModule) or type(datamodule).load is ImageDataModule.load:
        raise ImprintError(
            f"the embedding cache needs a data set whose images it can tell apart, not "
            f"{type(datamodule).__name__}: give one of imprint_pl.data, or a subclass of "
            "ImageDataModule that reads yours in load()"
        )
    hooked = [name for name in BATCH_HOOKS if overrides(name, datamodule)]
    if hooked:
        raise ImprintError(
            f"{type(datamodule).__name__}.{hooked[0]} may change batches, which the embedding "
            "cache does not see: do that where load() reads the images, or go without the cache"
        )
    backbone = load_backbone(backbone, layers=layers, views=views, runtime=runtime)
    source = backbone.source()
    # `pretrained` is None for a module of the user's own.
    if source["pretrained"] is None and name is None:
        raise ImprintError(
            f"the backbone {source['name']!r} is a module of your own, whose code no cache can "
            "see: give embed(…, name=…) a name that changes when the code does"
        )
    if device is None and backbone.runtime.is_explicit:
        device = "cpu"
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    autocast = torch.is_autocast_enabled(device.type)
    if datamodule.trainer is None:
        datamodule.prepare_data()
    # The cached rows depend on this backbone's sizes and on the data module's own `max_side`.
    datamodule.shrink_for(None, backbone.least_side)
    splits = datamodule.load()
    if backbone.reader.layers is None:
        _first_image(backbone, datamodule, splits)
    key = {
        "backbone": name or source["name"],
        **{part: source[part] for part in ("sha256", "image_size", "precision", "preprocess")},
        "autocast": str(torch.get_autocast_dtype(device.type)) if autocast else None,
    }
    if backbone.layers:
        key["layers"] = {"names": backbone.layers, "widths": backbone.layer_widths}
    if backbone.views != "none":
        key["views"] = backbone.views
    backbone.expect(sum(len(getattr(dataset, "labels", ())) for dataset in _of(splits)))
    filler = _Filler(backbone, device, datamodule, key, Path(local_path(cache_dir)))
    try:
        embedded = _through_cache(filler, splits)
    except OtherRuntimeError:
        # The reason was given in a warning. Now torch runs, whose embeddings have their own files.
        filler = _Filler(backbone, device, datamodule, key, filler.cache_dir)
        embedded = _through_cache(filler, splits)
    filler.use.seconds = time.perf_counter() - start
    return embedded


def _of(splits: Splits) -> list[Any]:
    return [one for one in (splits.train, splits.test, splits.val) if one is not None]


def _through_cache(filler: _Filler, splits: Splits) -> CachedEmbeddings:
    datamodule = filler.datamodule
    cached = {id(dataset): filler.cached(datamodule.sized(dataset)) for dataset in _of(splits)}
    embedded = CachedEmbeddings(
        Splits(
            splits.class_names,
            cached[id(splits.train)],
            cached[id(splits.test)],
            None if splits.val is None else cached[id(splits.val)],
            splits.original_class_names,
        ),
        name=datamodule.name,
        layer_widths=filler.backbone.layer_widths,
        batch_size=datamodule.batch_size,
        seed=datamodule.seed,
        **{option: getattr(datamodule, option) for option in TASK_OPTIONS},
    )
    embedded.max_side = datamodule.max_side
    embedded.use = filler.use
    embedded.unreadable = datamodule.unreadable
    embedded.setup()
    return embedded


def _first_image(backbone: Backbone, datamodule: ImageDataModule, splits: Splits) -> None:
    """Show a backbone one image, so that it knows its layers."""
    home = next((tensor.device for tensor in backbone.state_dict().values()), torch.device("cpu"))
    image = splits.train.select(torch.tensor([0]), splits.train.labels[:1])

    def embed_one(images: Tensor | list[Tensor]) -> Tensor:
        return backbone(move_data_to_device(images, home))

    list(run_batches(embed_one, datamodule.loader(image)))


class CachedDataset(SplitDataset):
    """The embeddings of a split, which are read or computed when `select` needs them.

    Args:
        source: the split's images, a data set as in `Splits`. The sources of a union have their own
            caches.
        parts: the cache of the split, or those of a union's sources.
        filler: embeds what is missing.
    """

    def __init__(self, source: Any, parts: list[RowCache], filler: _Filler) -> None:
        self.source, self.labels = source, source.labels
        if hasattr(source, "original_labels"):
            self.original_labels = source.original_labels
        self._parts, self._filler = parts, filler

    def select(self, positions: Tensor, labels: Tensor) -> ArrayDataset:
        """Return the embeddings at `positions` `(M,)`, ascending, with new labels `(M,)`."""
        if isinstance(self.source, UnionDataset):
            caches = {id(part): c for part, c in zip(self.source.parts, self._parts, strict=True)}
            wanted = [
                (caches[id(part)], part, own) for part, _, own in self.source.split(positions)
            ]
        else:
            wanted = [(self._parts[0], self.source, positions)]
        rows = [self._filler.rows(*one) for one in wanted]
        selected = ArrayDataset(joined(rows), labels)
        paths = getattr(self.source, "paths", None)
        if paths is not None:
            selected.paths = [paths[position] for position in positions.tolist()]
        return selected


class OtherRuntimeError(ImprintError):
    """The backbone cannot run in the runtime that a cache was opened for."""


@dataclass
class _Filler:
    backbone: Backbone
    device: torch.device
    datamodule: ImageDataModule
    key: dict[str, Any]
    cache_dir: Path
    use: CacheUse = field(default_factory=CacheUse)

    def __post_init__(self) -> None:
        self.runtime = self.backbone.runtime_on(self.device)
        if self.runtime != "torch":
            self.key = {**self.key, "runtime": self.runtime}

    def cached(self, dataset: Dataset) -> CachedDataset:
        parts = dataset.parts if isinstance(dataset, UnionDataset) else [dataset]
        return CachedDataset(dataset, [self._cache(part) for part in parts], self)

    def _cache(self, dataset: Any) -> RowCache:
        if not hasattr(dataset, "fingerprint"):
            raise ImprintError(
                f"{type(dataset).__name__} of {self.datamodule.name!r} has no fingerprint(), which "
                "the embedding cache needs: a text that changes when its images do"
            )
        key = {**self.key, "images": dataset.fingerprint()}
        readable = re.sub(r"[^\w.-]+", "-", key["backbone"])
        wider = [] if "layers" in key else self._wider(readable, key)
        cache = RowCache(self.cache_dir / f"{readable}-{digest(key)[:16]}", key, wider)
        self.use.folders.append(cache.folder)
        return cache

    def _wider(self, readable: str, key: dict[str, Any]) -> list[WiderRows]:
        """Return the caches of several layers for the same images, whose last layer can be used."""
        wider = []
        for path in sorted(self.cache_dir.glob(f"{glob.escape(readable)}-*/key.json")):
            try:
                theirs = json.loads(path.read_text())
                columns = int(theirs["layers"]["widths"][-1])
            except (OSError, ValueError, KeyError, TypeError, IndexError):
                continue  # it has one layer, or is damaged
            # Compare hashes of the JSON, since a tuple is read back from a file as a list.
            if digest({part: theirs[part] for part in theirs if part != "layers"}) == digest(key):
                wider.append(WiderRows(RowCache(path.parent, theirs), columns))
        return wider

    def rows(self, cache: RowCache, dataset: Any, positions: Tensor) -> Tensor:
        """Return the embeddings of the samples at `positions`, ascending."""
        if len(positions) == 0:
            return torch.empty(0, self.backbone.embedding_dim or 0)
        read = filled = cache.read(positions)
        if not read.found.all():
            with cache.lock(lambda: rank_zero_info(_WAITING.format(cache.folder))):
                # Read again, since another process may have filled the cache meanwhile.
                read = filled = cache.read(positions)
                for path, fault in read.faults.items():
                    cache.remove(path)
                    rank_zero_warn(
                        f"embedding cache: removed {path} ({fault}); its images are embedded again"
                    )
                missing = positions[~read.found]
                if len(missing):
                    self.use.embedded += len(missing)
                    self._fill(cache, dataset, missing)
            if len(missing):
                filled = cache.read(positions)
        if filled.rows is None or not filled.found.all():
            reason = "; ".join(filled.faults.values()) or "rows are missing"
            raise ImprintError(
                f"the cache {cache.folder} does not keep what is written to it ({reason}): "
                "give another --cache_dir"
            )
        self.use.read += int(read.found.sum())
        return filled.rows

    def _fill(self, cache: RowCache, dataset: Any, missing: Tensor) -> None:
        home = next((tensor.device for tensor in self.backbone.state_dict().values()), None)
        images = dataset.select(missing, dataset.labels[missing])
        self.backbone.to(self.device)
        done = waiting = 0
        batches, last = [], time.perf_counter()
        with tqdm(
            total=len(missing), desc="embedding", delay=2, leave=False, disable=None
        ) as progress:
            for embeddings, _ in run_batches(self._embed, self.datamodule.loader(images)):
                # Keep the embeddings on the GPU until they are written: reading them would wait.
                batches.append(embeddings)
                waiting += len(embeddings)
                progress.update(len(embeddings))
                due = waiting >= PART_ROWS or time.perf_counter() - last >= PART_SECONDS
                if due or done + waiting == len(missing):
                    rows, positions = torch.cat(batches).cpu(), missing[done : done + waiting]
                    self._check(rows, dataset, positions)
                    cache.write(positions, rows)
                    done, waiting = done + waiting, 0
                    batches, last = [], time.perf_counter()
        if home is not None:
            self.backbone.to(home)

    def _embed(self, images: Tensor | list[Tensor]) -> Tensor:
        images = move_data_to_device(images, self.device)
        # Copy the embeddings: a view, such as the first of all tokens, would keep the whole output
        # in memory.
        embeddings = self.backbone(images).to(torch.float32, copy=True)
        if self.backbone.runtime.running != self.runtime:
            raise OtherRuntimeError(
                f"{self.backbone.name} does not run in {self.runtime}, for which the cache was "
                "opened: open it again, or give runtime='torch'"
            )
        return embeddings

    def _check(self, rows: Tensor, dataset: Any, positions: Tensor) -> None:
        finite = rows.isfinite().all(1)
        if not finite.all():
            position = int(positions[int((~finite).nonzero()[0])])
            paths = getattr(dataset, "paths", None)
            sample = paths[position] if paths else f"image {position} of {self.datamodule.name!r}"
            raise ImprintError(
                f"the embedding of {sample} has NaN or infinite values: look at that image, or at "
                "the backbone's weights and precision"
            )


_WAITING = "embedding cache: another process fills {}; waiting for it"
