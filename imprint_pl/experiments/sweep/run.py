"""Runs a sweep, a grid of recipes and tasks, on one machine, or on several by Dask.

Embeddings are made once and read from the cache. Configurations that share work run together, see
`work.py`. A sweep may be killed at any moment and continues where it stopped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from filelock import FileLock, Timeout
from joblib import Parallel, delayed, parallel_config
from tqdm import tqdm

from imprint_pl.errors import ImprintError, needs
from imprint_pl.experiments import CHUNK_BYTES
from imprint_pl.experiments.results import USUAL, Results
from imprint_pl.experiments.sweep.embeddings import Embeddings, load_embeddings, load_splits
from imprint_pl.experiments.sweep.grid import Configuration, Source, Sweep, Task, names_of
from imprint_pl.experiments.sweep.plan import cost, units
from imprint_pl.experiments.sweep.work import Collapse, Done, Work
from imprint_pl.files import damaged, digest, local_path, write_whole

SAVE_SECONDS = 30.0
# Multiplications per second and core for the estimate of `cost`, measured on two cores of 2024.
SPEED = 5e10


def sweep(
    plan: Sweep,
    results_dir: str | Path = "results",
    cache_dir: str | Path = "cache",
    *,
    n_jobs: int = 1,
    dask: str | None = None,
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = True,
    keep_labels: bool = False,
) -> pd.DataFrame:
    """Runs the configurations of a sweep that are not done yet.

    Args:
        plan: the result of `read_sweep` or `checked_sweep`.
        results_dir: `results.parquet` and `results.csv` are written into its folder `plan.name`.
        cache_dir: the embedding cache.
        n_jobs: processes. One uses all cores by threads; several use one each, share the embeddings
            as a memory map, and hold their own chunks.
        dask: address of a Dask scheduler, whose workers then do the work; "local" starts a cluster
            of two on this machine.
        chunk_bytes: memory besides the embeddings, see `Work`.
        progress: a bar on stderr with the time that is left.
        keep_labels: keep the labels of each row's test samples beside the results, for
            `Results.labels`.

    Returns:
        All rows of the results, under `imprint_pl.experiments.results.COLUMNS`.

    Raises:
        ImprintError: data or backbones that cannot be loaded; another process on the same results;
            rows of the same names that were made of other data.
    """
    folder = Path(local_path(results_dir)) / plan.name
    with _alone_in(folder), _where(n_jobs, dask):
        results = Results(folder)
        ids: dict[int, list[str]] = {}
        loaded: dict[str, DataFacts] = {}
        failed: list[str] = []
        for task in plan.tasks:
            made_of = digest({"classes": task.classes})
            _check_same(folder, f"task {task.name}", made_of, results.has(task=task.name))
        # Embed several layers first: the last layer alone can then be read from their cache.
        for place in sorted(range(len(plan.sources)), key=lambda i: not plan.sources[i].wide):
            source = plan.sources[place]
            facts = _facts(source, loaded)
            backbone, data = names_of(source)
            wide: dict[str, str | None] = dict.fromkeys(USUAL) | source.wide
            of_names = results.has(backbone=backbone, data=data, **wide)
            name = "".join(f", {n} {v}" for n, v in source.wide.items())
            _check_same(folder, f"{backbone} on {data}{name}", facts.made_of, of_names)
            configurations = plan.configurations(source, facts.class_names, facts.num_train)
            ids[place] = [c.id for c in configurations]
            todo = {c.id for c in configurations} - results.ids
            if todo:
                tasks = list(dict.fromkeys(c.task for c in configurations))
                embeddings = load_embeddings(source, tasks, cache_dir)
                configurations = _on_layers(configurations, embeddings)
                shared = Shared(
                    digest({"ids": [c.id for c in configurations], "time": time.time_ns()}),
                    embeddings,
                    chunk_bytes,
                    keep_labels,
                )
                jobs = None if dask else n_jobs
                failed += _run(shared, configurations, todo, results, jobs, progress)
        order = [i for place in range(len(plan.sources)) for i in ids[place]]
        _check_some(plan, len(order))
        results.save(order)
        if failed:
            raise ImprintError(
                f"{len(failed)} kinds of configurations failed, the others are in {folder}; the "
                f"first: {failed[0]}"
            )
        return results.table(order)


def _on_layers(configurations: list[Configuration], embeddings: Embeddings) -> list[Configuration]:
    """Return the configurations with the layer widths of the embeddings."""
    widths = embeddings.layer_widths or [embeddings.train_x.shape[1]]
    variants = {id(c.variant): c.variant for c in configurations}
    on = {
        place: variant.on(widths)
        for place, variant in variants.items()
        if embeddings.layer_widths or variant.parts.layer_widths
    }
    return [replace(c, variant=on.get(id(c.variant), c.variant)) for c in configurations]


class Shared(NamedTuple):
    """The data that all processes work on; `token` identifies them."""

    token: str
    embeddings: Embeddings
    chunk_bytes: int
    keep_labels: bool


class UnitDone(NamedTuple):
    """The results of the unit with this number."""

    number: int
    done: Done


def _run(
    shared: Shared,
    configurations: list[Configuration],
    todo: set[str],
    results: Results,
    jobs: int | None,
    progress: bool,
) -> list[str]:
    """Runs the configurations whose ids are in `todo`, and returns what failed."""
    pending = [unit for unit in units(configurations) if any(c.id in todo for c in unit)]
    tasks = list(dict.fromkeys(c.task for unit in pending for c in unit))
    collapse = dict(
        zip(
            tasks,
            Parallel(n_jobs=jobs, mmap_mode="c")(delayed(_collapse)(shared, t) for t in tasks),
            strict=True,
        )
    )
    train, test = shared.embeddings.train_x, shared.embeddings.test_x
    costs = [cost(unit, len(train), len(test), train.shape[1]) for unit in pending]
    # Run the expensive units first, so that no process is still busy with one at the end.
    ranked = sorted(zip(pending, costs, strict=True), key=lambda pair: -pair[1])
    failed: list[str] = []
    finished, last = 0, time.perf_counter()
    bar = tqdm(
        total=sum(costs),
        desc=f"{configurations[0].backbone}, {configurations[0].data}",
        bar_format="{desc}: {percentage:3.0f}% |{bar}| [{elapsed}<{remaining}{postfix}]",
        disable=not progress,
        postfix=f"0/{len(todo)} configurations",
    )
    with bar:
        found = Parallel(n_jobs=jobs, mmap_mode="c", return_as="generator_unordered", batch_size=1)(
            delayed(_unit)(shared, i, unit, {c.id for c in unit} & todo)
            for i, (unit, _) in enumerate(ranked)
        )
        for number, done in found:
            unit, unit_cost = ranked[number]
            by_id = {c.id: collapse[c.task]._asdict() for c in unit}
            rows = [row | by_id[row["id"]] for row in done.rows]
            for id, labels in done.labels.items():
                results.keep_labels(id, labels.predicted.numpy(), labels.true.numpy())
            results.append(rows)
            failed += done.failed
            finished += len(rows)
            bar.set_postfix_str(f"{finished}/{len(todo)} configurations", refresh=False)
            bar.update(unit_cost)
            if time.perf_counter() - last > SAVE_SECONDS:
                results.save()
                last = time.perf_counter()
    return failed


# The work that a process keeps between units, for the latest backbone and data set.
_KEPT: dict[str, Work] = {}


def _work(shared: Shared) -> Work:
    if shared.token not in _KEPT:
        _KEPT.clear()
        _KEPT[shared.token] = Work(shared.embeddings, shared.chunk_bytes)
    return _KEPT[shared.token]


@torch.no_grad()
def _collapse(shared: Shared, task: Task) -> Collapse:
    return _work(shared).collapse(task)


@torch.no_grad()
def _unit(shared: Shared, number: int, unit: list[Configuration], todo: set[str]) -> UnitDone:
    done = _work(shared).run(unit, todo)
    # Do not send labels that nobody needs: in a large sweep they would be a lot of data.
    return UnitDone(number, done if shared.keep_labels else done._replace(labels={}))


class Size(NamedTuple):
    """The size of a sweep: combinations, configurations after pruning, and an estimate of their
    seconds without the embedding."""

    combinations: int
    configurations: int
    seconds: float


def describe(plan: Sweep, n_jobs: int = 1) -> Size:
    """Return the size of a sweep; nothing is embedded or run."""
    kept, seconds = 0, 0.0
    for source in plan.sources:
        module, splits = load_splits(source.data)
        train_set: Any = splits.train
        test_set: Any = splits.test
        train, test = len(train_set.labels), len(test_set.labels)
        dim = train_set.images.shape[1] if module is None else 1280
        configurations = plan.configurations(source, splits.class_names, train)
        kept += len(configurations)
        work = sum(cost(unit, train, test, dim) for unit in units(configurations))
        seconds += work / SPEED / max(n_jobs, torch.get_num_threads())
    _check_some(plan, kept)
    return Size(plan.full * len(plan.sources), kept, seconds)


def _check_some(plan: Sweep, kept: int) -> None:
    if not kept:
        raise ImprintError(
            f"{plan.name}: the rules of the paper (k at most the shots, m at most the proxies, "
            "NORM_pre l2 with NORM_inf l2) leave out every combination: change the grid, or give "
            "prune: false"
        )


class Facts(NamedTuple):
    """Facts about a source; `made_of` is a hash of its content."""

    class_names: list[str]
    num_train: int
    made_of: str


class DataFacts(NamedTuple):
    """Facts about a data set: `splits` has the fingerprints and labels of train and test."""

    class_names: list[str]
    num_train: int
    splits: list[Any]


def _facts(source: Source, loaded: dict[str, DataFacts]) -> Facts:
    """Return the facts about a source; `loaded` keeps those about data sets, which several sources
    share."""
    key = digest(source.data)
    if key not in loaded:
        loaded[key] = _data_facts(source)
    names, num_train, splits = loaded[key]
    made_of = {"backbone": source.backbone, "class_names": names, "splits": splits}
    return Facts(names, num_train, digest(made_of))


def _data_facts(source: Source) -> DataFacts:
    _, splits = load_splits(source.data)
    both: list[Any] = [splits.train, splits.test]
    if len(both[0].labels) == 0:
        raise ImprintError(f"data {names_of(source)[1]!r} has no training sample")
    of_splits = []
    for split in both:
        parts = [part.fingerprint() for part in getattr(split, "parts", [split])]
        of_splits.append([parts, split.labels.tolist()])
    return DataFacts(splits.class_names, len(both[0].labels), of_splits)


def _check_same(folder: Path, name: str, made_of: str, has_rows: bool) -> None:
    """Raise if the data or the backbone behind a name have changed since rows were written: rows
    are only identified by names."""
    path = folder / "sources.json"
    known = {}
    if path.exists():
        with damaged(path, "what a sweep notes of its data", (ValueError, TypeError)):
            known = dict(json.loads(path.read_text()))
    if has_rows and known.get(name, made_of) != made_of:
        raise ImprintError(
            f"{folder} has rows of {name} from before its classes, its images, its embeddings or "
            "the backbone's settings changed: give the sweep another name, or remove that folder"
        )
    write_whole(path, json.dumps(known | {name: made_of}, indent=2).encode())


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ImprintError(
            f"another sweep is writing into {folder}: wait for it, or give another name"
        ) from None
    except OSError as error:
        raise ImprintError(
            f"cannot write into {folder} ({error}): give a --results_dir where you may write"
        ) from error
    try:
        yield
    finally:
        lock.release()
        _KEPT.clear()


def _search_in(path: list[str]) -> None:
    """Set in a worker the folders in which Python looks for modules."""
    sys.path[:] = path


@contextmanager
def _where(n_jobs: int, dask: str | None) -> Iterator[None]:
    if dask is None:
        # Use one thread per process: threads of several processes on the same cores would wait for
        # each other.
        inner = {"inner_max_num_threads": 1} if n_jobs not in (None, 1) else {}
        # joblib reuses the workers of an earlier sweep unless their initializer differs. This one
        # lets workers find users' own parts where this process finds them now.
        start = {"initializer": _search_in, "initargs": (list(sys.path),)}
        with parallel_config(backend="loky", **start, **inner):
            yield
        return
    with needs("dask", "--dask"):
        from distributed import Client, LocalCluster
    if dask == "local":
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        with cluster, Client(cluster), parallel_config(backend="dask"):
            yield
        return
    with Client(dask), parallel_config(backend="dask"):
        yield
