"""Writes and reads a `State` as a safetensors file beside its checkpoint. Files appear only when
they are complete, and are read only if their parts fit each other.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.files import damaged, local_path, read_tensors, save_tensors
from imprint_pl.method.familiarity import MOST_BYTES
from imprint_pl.method.pipeline import kept_gram
from imprint_pl.method.selection import checked_bounds
from imprint_pl.numerics.labels import checked_names
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.values import check_classes, checked_seed, is_count, to_json_value
from imprint_pl.training_set.kept import KeptRows, KeptSums, State

FORMAT = "imprint_pl state 1"
SUMS = ("counts", "sums", "gram")
TENSORS = ("x", "y", "classifier", "moments")
# The plain fields of each kind; files of earlier versions have those of both.
PLAIN: dict[type[State], set[str]] = {
    kind: {field.name for field in fields(kind)} - set(TENSORS) for kind in (KeptRows, KeptSums)
}
# Values of fields that are missing in files of earlier versions.
EARLIER = {"calibrated": True, "capped": True, "coverage": None, "most_bytes": MOST_BYTES}


def state_path(checkpoint: str | Path) -> Path:
    """Returns a checkpoint's state file: `imprinted.ckpt` → `imprinted.state.safetensors`."""
    return Path(local_path(checkpoint)).with_suffix(".state.safetensors")


def write_state(state: State, path: str | Path) -> Path:
    """Writes a safetensors file, which appears only when it is complete; returns its path."""
    holder = state.moments if isinstance(state, KeptSums) else state
    tensors = {name: getattr(holder, name, None) for name in ("x", "y", *SUMS)}
    tensors["classifier"] = state.classifier
    plain = {name: getattr(state, name) for name in PLAIN[type(state)]}
    return save_tensors(
        path,
        {name: t.contiguous().clone() for name, t in tensors.items() if t is not None},
        {"format": FORMAT, "state": json.dumps(plain, default=to_json_value, sort_keys=True)},
    )


def read_state(path: str | Path) -> State:
    """Reads a file of `write_state`.

    Raises:
        ImprintError: there is no such file, or it is not a state.
    """
    if not Path(path).is_file():
        raise ImprintError(
            f"{path}: there is no such file. Nothing was kept of the training set: fit with "
            'keep="embeddings" (suffices for every step) or keep="moments"'
        )
    with damaged(path, "a state file"):
        tensors, metadata = read_tensors(path)
        if metadata.get("format") != FORMAT:
            raise ValueError("not a state")
        state = _state_of(json.loads(metadata["state"]), tensors)
        # This raises for an unknown recipe.
        _ = state.parts
    return state


def _state_of(plain: dict[str, Any], tensors: dict[str, Tensor]) -> State:
    """Builds a state from the contents of a file; raises if its parts do not fit each other."""
    plain = EARLIER | plain
    if unknown := plain.keys() - set.union(*PLAIN.values()):
        raise ValueError(f"unknown fields: {', '.join(sorted(unknown))}")
    kind = KeptRows if "x" in tensors else KeptSums
    given = {name: plain[name] for name in PLAIN[kind]}
    given["classifier"] = tensors.get("classifier")
    state: KeptRows | KeptSums
    if kind is KeptRows:
        given["sources"] = tuple(given["sources"])
        given["weibull"] = given["weibull"] and checked_bounds(given["weibull"])
        state = KeptRows(x=tensors["x"], y=tensors["y"], **given)
    else:
        sums = Moments(tensors["counts"], tensors["sums"], tensors.get("gram"))
        state = KeptSums(moments=sums, **given)
    names = checked_names(state.class_names)
    check_classes(len(names))
    checked_seed(state.seed)
    fits = [
        len(set(names)) == len(names),
        is_count(state.embedding_dim),
        isinstance(state.capped, bool),
        state.classifier is None or bool(state.classifier.isfinite().all()),
        _rows_fit(state) if isinstance(state, KeptRows) else _sums_fit(state),
    ]
    if not all(fits):
        raise ValueError("parts of different sizes")
    return state


def _rows_fit(state: KeptRows) -> bool:
    x, y, samples = state.x, state.y, len(state.x)
    return (
        x.is_floating_point()
        and tuple(x.shape) == (samples, state.embedding_dim)
        and bool(x.isfinite().all())
        and y.dtype == torch.int64
        and tuple(y.shape) == (samples,)
        and bool(((y >= 0) & (y < len(state.class_names))).all())
        and len(state.sources) in (0, samples)
        and all(isinstance(source, str) for source in state.sources)
        and is_count(state.most_bytes)
    )


def _sums_fit(state: KeptSums) -> bool:
    counts, sums, gram = state.moments.counts, state.moments.sums, state.moments.gram
    classes, features = len(state.class_names), sums.shape[1]
    shape = {"none": None, "diagonal": (features,), "pooled": (features, features)}
    return (
        tuple(counts.shape) == (classes,) == tuple(sums.shape[:1])
        and (None if gram is None else tuple(gram.shape)) == shape[kept_gram(state.parts)]
        and all(t is None or t.dtype == torch.float64 for t in (counts, sums, gram))
        and bool((counts >= 0).all() and sums.isfinite().all())
        and isinstance(state.calibrated, bool)
    )
