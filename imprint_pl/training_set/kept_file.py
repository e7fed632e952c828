"""A `State` as a safetensors file beside its checkpoint: written whole, and believed only where its
parts fit each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imprint_pl.errors import ImprintError
from imprint_pl.files import damaged, local_path, read_tensors, save_tensors
from imprint_pl.method.selection import checked_bounds
from imprint_pl.numerics.labels import checked_names
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.values import check_classes, checked_seed, is_count, to_json_value
from imprint_pl.training_set.kept import State

FORMAT = "imprint_pl state 1"
# Of a state, what is neither a tensor nor sums.
PLAIN = ("settings", "seed", "class_names", "embedding_dim", "sources", "temperature")
PLAIN += ("threshold", "accept", "weibull", "calibrated", "capped")
# What files of earlier versions leave out.
EARLIER = {"calibrated": True, "capped": True}


def state_path(checkpoint: str | Path) -> Path:
    """The state's file beside a checkpoint: `imprinted.ckpt` → `imprinted.state.safetensors`."""
    return Path(local_path(checkpoint)).with_suffix(".state.safetensors")


def write_state(state: State, path: str | Path) -> Path:
    """Writes a safetensors file, which appears whole or not at all."""
    tensors = {"x": state.x, "y": state.y, "classifier": state.classifier}
    if state.moments is not None:
        tensors |= {name: getattr(state.moments, name) for name in ("counts", "sums", "gram")}
    tensors = {n: t.contiguous().clone() for n, t in tensors.items() if t is not None}
    plain = {name: getattr(state, name) for name in PLAIN}
    text = json.dumps(plain, default=to_json_value)
    return save_tensors(path, tensors, {"format": FORMAT, "state": text})


def read_state(path: str | Path) -> State:
    """Reads what `write_state` wrote.

    Raises:
        ImprintError: no such file, or not one of these.
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
        _check(state)
    return state


def _state_of(plain: dict[str, Any], tensors: dict[str, Tensor]) -> State:
    moments, plain = None, EARLIER | plain
    if "counts" in tensors:
        moments = Moments(tensors["counts"], tensors["sums"], tensors.get("gram"))
    plain["sources"] = tuple(plain["sources"])
    plain["weibull"] = plain["weibull"] and checked_bounds(plain["weibull"])
    rest = {name: tensors.get(name) for name in ("x", "y", "classifier")}
    return State(**plain, **rest, moments=moments)


def _check(state: State) -> None:
    """Raises where the parts of a file do not fit each other."""
    names, d = checked_names(state.class_names), state.embedding_dim
    check_classes(len(names))
    checked_seed(state.seed)
    fits = len(set(names)) == len(names) and is_count(d)
    fits &= all(isinstance(source, str) for source in state.sources)
    fits &= isinstance(state.calibrated, bool) and isinstance(state.capped, bool)
    if state.x is not None:
        n = len(state.x)
        fits &= state.x.is_floating_point() and tuple(state.x.shape) == (n, d)
        fits &= state.y.dtype == torch.int64 and tuple(state.y.shape) == (n,)
        fits &= bool(((state.y >= 0) & (state.y < len(names))).all())
        fits &= len(state.sources) in (0, n)
    else:
        counts, sums, gram = state.moments.counts, state.moments.sums, state.moments.gram
        features = sums.shape[1]
        fits &= tuple(counts.shape) == (len(names),) == tuple(sums.shape[:1])
        fits &= gram is None or tuple(gram.shape) == (features, features)
        fits &= all(t is None or t.dtype == torch.float64 for t in (counts, sums, gram))
        fits &= bool((counts >= 0).all())
    given = (state.x, state.classifier) if state.moments is None else (state.moments.sums, None)
    fits &= all(t is None or bool(t.isfinite().all()) for t in given)
    if not fits:
        raise ValueError("parts of different sizes")
    # The recipe by its names; raises for one that is not ours.
    _ = state.parts
