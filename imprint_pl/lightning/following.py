"""Makes a backbone read the layers of the training data's embeddings, or of a checkpoint. If the
user has chosen layers, they have to agree.
"""

from __future__ import annotations

from typing import Any

from imprint_pl.embedding.backbone import Backbone
from imprint_pl.errors import ImprintError

Layers = str | list[str] | None


def check_made_with(backbone: Backbone, layers: Layers, views: str) -> None:
    """Raises if a `Backbone` is given together with layers or views that differ from its own."""
    own = (backbone.reader.asked, backbone.layers_in_short, None)
    if layers not in own or views not in ("none", backbone.views):
        raise ImprintError(
            f"the backbone was made with layers={backbone.reader.asked!r}, views="
            f"{backbone.views!r}, and layers={layers!r}, views={views!r} are asked for: give them "
            "to load_backbone, where it is made"
        )


def follow_data(backbone: Backbone, widths: list[int] | None, chosen: Layers) -> None:
    """Makes a named backbone read the layers that are in the embeddings of the training data.

    If it has no such layers, it does not change: the embeddings come from another backbone.

    Args:
        backbone: the classifier's backbone.
        widths: the widths of the layers in the data's embeddings; `None` for one layer.
        chosen: the layers that the user chose; `None` if the user did not choose.

    Raises:
        ImprintError: the user chose other layers.
    """
    widths = widths if widths is not None and len(widths) > 1 else None
    # `pretrained` is None for a module of the user's own.
    if backbone.pretrained is None or backbone.layer_widths == widths:
        return
    if chosen is not None:
        raise ImprintError(
            f"layers={chosen!r}, which are {_said(backbone.layer_widths)}, and the embeddings of "
            f"the training data have {_said(widths)}: embed with the same layers, or leave layers "
            "out"
        )
    backbone.read("last" if widths is None else "auto")


def follow_checkpoint(backbone: Backbone, checkpoint: dict[str, Any], chosen: Layers) -> None:
    """Makes a backbone read the layers that a checkpoint was fitted with.

    A checkpoint of an earlier version, which names no layers, was fitted with the last layer alone.

    Args:
        backbone: the classifier's backbone.
        checkpoint: a checkpoint of `fit`.
        chosen: the layers that the user chose; `None` if the user did not choose.

    Raises:
        ImprintError: the user chose other layers.
    """
    source = checkpoint.get("backbone")
    fitted = (source.get("layers") if isinstance(source, dict) else None) or "last"
    names = [fitted] if isinstance(fitted, str) else fitted
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ImprintError(f"the checkpoint has layers={fitted!r:.200}: no names of modules")
    own = backbone.reader.asked if backbone.reader.layers is None else backbone.layers or "last"
    if own == fitted:
        return
    # Accept "all" for named modules, since "all" may mean other modules in another version.
    if chosen is not None and (chosen != "all" or fitted == "last"):
        raise ImprintError(
            f"the checkpoint was fitted with layers={fitted!r}, this model has layers={chosen!r}: "
            "leave layers out"
        )
    backbone.read(fitted)


def _said(widths: list[int] | None) -> str:
    return "the last layer alone" if widths is None else f"{len(widths)} layers, {widths}"
