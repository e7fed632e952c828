"""What ImprintedClassifier asks of data and of checkpoints: that they fit its head and backbone."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from imprint_pl.backbone import Backbone
from imprint_pl.errors import ImprintError, near
from imprint_pl.head import ImprintedHead
from imprint_pl.labels import composed, place_of
from imprint_pl.twins import both

TASK = "give the data and classes of the checkpoint's task"


def empty(checkpoint: Any = None) -> str:
    """What to do about a head without proxies, that of a checkpoint where one was given."""
    if checkpoint:
        return (
            f"{checkpoint} was written before its fit had imprinted the head: give the checkpoint "
            "of a fit that has ended, or go on with trainer.fit(…, ckpt_path=…), which imprints it "
            "from the whole training set"
        )
    return "the head has no proxies yet; fit first, or give ckpt_path"


def check_saved(trainer: Trainer) -> None:
    """Warns, at the end of a fit, of a ModelCheckpoint whose moment never came."""
    for callback in trainer.checkpoint_callbacks:
        meant = isinstance(callback, both(ModelCheckpoint)) and callback.save_top_k != 0
        if meant and not (callback.best_model_path or callback.last_model_path):
            rank_zero_warn(
                "a ModelCheckpoint has saved nothing: imprinting is one epoch and one step, at its "
                "end; leave out every_n_train_steps, train_time_interval and every_n_epochs"
            )


def places_of(names: list[str], head: ImprintedHead) -> Tensor | None:
    """The head's label of each of the data's classes `(C,)`, found by name; `None` where label c of
    the data is label c of the head, and where either has no names.

    Raises:
        ImprintError: a class that the head does not have, or names that do not tell classes apart.
    """
    known = head.class_names
    if not names or not known or list(map(composed, names)) == list(map(composed, known)):
        return None
    places = [place_of(name, known) for name in names]
    if None in places:
        name = names[places.index(None)]
        raise ImprintError(
            f"the head was imprinted for the classes {_shown(known)}, the data has "
            f"{_shown(names)}, and {name!r} is none of the head's{near(name, known)}: {TASK}"
        )
    if len(set(places)) < len(names) or len(set(map(composed, known))) < len(known):
        raise ImprintError(
            f"the head was imprinted for the classes {_shown(known)}, the data has "
            f"{_shown(names)}, and some names stand for two classes: {TASK}"
        )
    return torch.tensor(places)


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raises an `ImprintError` for a label `(B,)` that is none of the head's."""
    outside = (labels < 0) | (labels >= num_classes)
    if outside.any():
        raise ImprintError(
            f"label {int(labels[outside][0])} is out of range for a head of {num_classes} "
            f"classes (0..{num_classes - 1}): {TASK}"
        )


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


def _shown(names: list[str]) -> str:
    more = ", …" if len(names) > 6 else ""
    return f"[{', '.join(names[:6])}{more}] ({len(names)})"
