"""Checkpoints of ImprintedClassifier: reads them without running code, checks that they fit the
head and the backbone, and makes classifiers from them.
"""

from __future__ import annotations

import inspect
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from imprint_pl.embedding.backbone import Backbone
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.files import check_tensor, damaged, local_path
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.recipes import KEYWORDS
from imprint_pl.numerics.values import is_count
from imprint_pl.parts.by_name import check_imported, import_parts, keywords_of_parts

# Prefixes of the names of their tensors.
HEAD, BACKBONE = "head.", "backbone."


def empty(checkpoint: Any = None) -> str:
    """Return the message for a head without proxies, which may come from a checkpoint."""
    if checkpoint:
        return (
            f"{checkpoint} was written before its fit had imprinted the head: give the checkpoint "
            "of a fit that has ended, or go on with trainer.fit(…, ckpt_path=…), which imprints it "
            "from the whole training set"
        )
    return "the head has no proxies yet; fit first, or give ckpt_path"


def load_classifier(
    base: type,
    cls: type,
    source: str | Path | IO[bytes],
    map_location: Any,
    strict: bool | None,
    keywords: dict[str, Any],
) -> Any:
    """Loads the classifier of a checkpoint, see `ImprintedClassifier.load_from_checkpoint`.

    Args:
        base: `ImprintedClassifier`.
        cls: the class to make, `base` or a subclass.
        source, map_location, strict, keywords: the arguments of `load_from_checkpoint`.

    Returns:
        An instance of `cls`.
    """
    where = map_location or (None if torch.cuda.is_available() else "cpu")
    checkpoint = read_checkpoint(source, where)
    import_parts(keywords)
    saved = hyperparameters(checkpoint, keywords)
    known = _keywords(base, cls, saved | keywords)
    for name in keywords:
        if name not in known:
            raise ImprintError(
                f"{cls.__name__} has no argument {name!r}{did_you_mean(name, known)}"
            )
    given = {n: v for n, v in saved.items() if n in known} | keywords
    # OSError is not among them, since it is raised for weights that cannot be fetched.
    errors = (RuntimeError, TypeError, KeyError, IndexError, ValueError)
    with damaged(source, "a checkpoint that `fit` wrote", errors):
        model = _made(base, cls, given, keywords)
        model.on_load_checkpoint(checkpoint)
        keys = model.load_state_dict(checkpoint["state_dict"], strict=False)
    foreign = [*keys.missing_keys, *keys.unexpected_keys]
    if strict and foreign:
        raise ImprintError(
            f"{source}: the checkpoint and {cls.__name__} differ in {foreign[0]!r}: strict=False "
            "passes over it"
        )
    if model.head.is_empty:
        rank_zero_warn(empty(source))
    return model.to(next(iter(checkpoint["state_dict"].values())).device)


def _keywords(base: type, cls: type, given: dict[str, Any]) -> dict[str, None]:
    """Return the keywords of a constructor, in order. They include those that a subclass passes on
    as `**kwargs`, and those of the parts that `given` names."""
    known: dict[str, None] = {}
    for part in cls.__mro__:
        if "__init__" in vars(part):
            parameters = list(inspect.signature(vars(part)["__init__"]).parameters.values())[1:]
            variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            known |= dict.fromkeys(p.name for p in parameters if p.kind not in variable)
            if part is base:
                return known | dict.fromkeys([*KEYWORDS, *keywords_of_parts(given)])
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break
    return known


def _made(base: type, cls: type, given: dict[str, Any], typed: dict[str, Any]) -> Any:
    """Return `cls(**given)`, without keywords that a subclass passes to its base by itself."""
    try:
        return cls(**given)
    except TypeError as error:
        if cls is base:
            raise
        twice = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
        if twice and twice[1] in given and twice[1] not in typed:
            return _made(base, cls, {n: v for n, v in given.items() if n != twice[1]}, typed)
        raise ImprintError(
            f"{cls.__name__} cannot be made from the checkpoint's hyperparameters ({error}): give "
            "what it needs as keywords of load_from_checkpoint"
        ) from error


def leave_out_backbone(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook of `state_dict` that removes the frozen backbone, which a checkpoint only names."""
    own = f"{prefix}{BACKBONE}"
    for key in [] if module.save_backbone else [key for key in state if key.startswith(own)]:
        del state[key]


def put_backbone(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A hook of `load_state_dict` that adds the current backbone to a state dict without one, so
    that a strict load succeeds and the backbone does not change."""
    own = f"{prefix}{BACKBONE}"
    if not any(key.startswith(own) for key in state):
        state.update(module.backbone.state_dict(prefix=own))


def saved_head(
    checkpoint: dict[str, Any], head: ImprintedHead, backbone: Backbone
) -> ImprintedHead:
    """Loads the head of a checkpoint into `head`, an empty one, and returns it.

    Warns if the checkpoint's backbone reads images in another way than this one.

    Args:
        checkpoint: the result of `read_checkpoint`.
        head: an empty head.
        backbone: the classifier's backbone.

    Raises:
        ImprintError: the checkpoint has no head, or its head is damaged, of another recipe, or
            imprinted on another backbone.
    """
    state = checkpoint["state_dict"]
    _check_keys(state, head)
    if any(key.startswith(BACKBONE) for key in state):
        _check_shapes(state, backbone)
    else:
        _check_source(checkpoint.get("backbone"), backbone)
    own = {name: value for name, value in state.items() if name.startswith(HEAD)}
    head.load_state_dict({name.removeprefix(HEAD): value for name, value in own.items()})
    return head.check()


def with_head(checkpoint: dict[str, Any], head: ImprintedHead) -> bytes:
    """Returns the bytes of a checkpoint file in which the head is replaced.

    Args:
        checkpoint: the result of `read_checkpoint`; it is not changed.
        head: the new head.
    """
    state = checkpoint["state_dict"]
    own = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    new = {f"{HEAD}{name}": value.cpu() for name, value in head.state_dict().items()}
    content = io.BytesIO()
    torch.save(checkpoint | {"state_dict": own | new}, content)
    return content.getvalue()


def saved_max_side(checkpoint: dict[str, Any]) -> int | None:
    """Returns the longest side to which the images of a checkpoint's fit were shrunk, or `None`.

    Raises:
        ImprintError: the value is no whole number above 0.
    """
    side = checkpoint.get("max_side")
    if side is None or is_count(side):
        return side
    raise ImprintError(
        f"the checkpoint has max_side={side!r:.200}, where pixels belong: ImprintedClassifier did "
        "not write it"
    )


def _check_keys(state: Mapping[str, Any], head: ImprintedHead) -> None:
    own = [f"{HEAD}{name}" for name in head.state_dict()]
    missing = [name for name in own if name not in state]
    # A familiarity and prediction sets are optional for heads of every recipe.
    optional = (f"{HEAD}familiar.", f"{HEAD}sets.")
    foreign = [
        name
        for name in state
        if name.startswith(HEAD) and name not in own and not name.startswith(optional)
    ]
    if f"{HEAD}proxies" in state and (missing or (foreign and not head.takes_parts_of_file)):
        raise ImprintError(
            f"the checkpoint's head and this model's differ in {(missing + foreign)[0]!r}: they "
            "are of different recipes; give the recipe of the checkpoint"
        )
    if missing:
        raise ImprintError(
            f"the checkpoint has no {missing[0]!r}: it was not written by ImprintedClassifier"
        )


def _check_shapes(state: Mapping[str, Any], backbone: Backbone) -> None:
    for name, own in backbone.state_dict(prefix=BACKBONE).items():
        there = getattr(state.get(name), "shape", None)
        if there != getattr(own, "shape", None):
            raise ImprintError(
                f"the checkpoint's backbone has {_shape(there)} as {name!r}, this one has "
                f"{_shape(own.shape)}: give a backbone of the same architecture"
            )


def _check_source(saved: Any, backbone: Backbone) -> None:
    source, saved = backbone.source(), saved if isinstance(saved, dict) else {}
    for key in ("name", "sha256"):
        if saved.get(key) != source[key]:
            raise ImprintError(
                f"the checkpoint was imprinted on a backbone with {key}={saved.get(key)!r}, "
                f"this one has {key}={source[key]!r}: give the same backbone and weights "
                "(save_backbone=True keeps them in the checkpoint)"
            )
    for key in ("image_size", "preprocess", "precision", "views"):
        if saved.get(key) != source.get(key):
            rank_zero_warn(
                f"the checkpoint was imprinted with {key}={saved.get(key)!r}, this model has "
                f"{key}={source.get(key)!r}: embeddings may differ"
            )


def _shape(shape: Any) -> str:
    return "nothing" if shape is None else f"a tensor of {tuple(shape)}"


# Plain texts have no brackets: a text with brackets would be parsed as a structure, which can name
# classes to import.
PLAIN_TEXT = re.compile(r"[^{}\[\]\n]*")


def read_checkpoint(source: str | Path | IO[bytes], map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of `ImprintedClassifier`.

    Its checksums are compared, and only tensors and plain values are unpickled.

    Args:
        source: the file, or an open one.
        map_location: the device for its tensors, as for `torch.load`.

    Returns:
        The content of the checkpoint.

    Raises:
        ImprintError: there is no such file, or it is damaged, forged, or not a checkpoint.
    """
    name = "the checkpoint"
    if isinstance(source, str | os.PathLike):
        name = source = local_path(source)
        if os.path.isdir(source):
            raise ImprintError(f"{source} is a folder: give the .ckpt in it that `fit` wrote")
        if not os.path.isfile(source):
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
    """Drops hyperparameters that could not be read again from a checkpoint before it is written.

    These are values that `read_checkpoint` or `hyperparameters` would refuse: a subclass or a
    DataModule of the user's may save any object. There is a warning for each.
    """
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


def hyperparameters(
    checkpoint: dict[str, Any], typed: Collection[str] = frozenset()
) -> dict[str, Any]:
    """Returns the hyperparameters of a checkpoint that are keywords of `ImprintedClassifier`.

    Lightning's own entries, which name a class and its arguments, are left out.

    Args:
        typed: keywords that the user gives instead of the checkpoint's.

    Raises:
        ImprintError: a value is not text, a number, or a list or dict of these; or a user's own
            part has not been imported.
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
    # A path of weights has to be given by the user. Only the name of a torchvision entry may come
    # from the checkpoint.
    if not str(plain.get("weights")).isidentifier():
        plain.pop("weights", None)
    check_imported({name: value for name, value in plain.items() if name not in typed})
    return plain


def _check_archive(source: str | Path | IO[bytes]) -> None:
    """Raises if a file is not a zip file of `torch.save`, or its checksums are wrong."""
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        # Entries must be uncompressed, since a compressed one could unpack to any size.
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
