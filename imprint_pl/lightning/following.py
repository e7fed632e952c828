"""Which layers of its backbone a classifier reads, where the data or a checkpoint say so: what the
user has not chosen follows them, what the user has chosen has to agree.
"""

from __future__ import annotations

from typing import Any

from imprint_pl.embedding.backbone import Backbone
from imprint_pl.errors import ImprintError

Layers = str | list[str] | None


def check_made_with(backbone: Backbone, layers: Layers, views: str) -> None:
    """Raises where a `Backbone` is given together with layers or views that are not its own."""
    own = (backbone.reader.asked, backbone.layers_in_short, None)
    if layers not in own or views not in ("none", backbone.views):
        raise ImprintError(
            f"the backbone was made with layers={backbone.reader.asked!r}, views="
            f"{backbone.views!r}, and layers={layers!r}, views={views!r} are asked for: give them "
            "to load_backbone, where it is made"
        )


def follow_data(backbone: Backbone, widths: list[int] | None, chosen: Layers) -> None:
    """Has a named backbone read the layers that are in the embeddings of the training data.

    Where it has no such layers, it stays as it is: the embeddings are of another backbone.

    Args:
        backbone: the classifier's.
        widths: of the layers in the data's embeddings; `None` where there is one.
        chosen: the layers that the user chose; `None` where the backbone may follow.

    Raises:
        ImprintError: the user chose others.
    """
    widths = widths if widths is not None and len(widths) > 1 else None
    # Only a named backbone says whether it is pretrained.
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
    """Has a backbone read the layers that a checkpoint was fitted with; the last one alone where
    the checkpoint names none, as those of earlier versions.

    Args:
        backbone: the classifier's.
        checkpoint: what `fit` wrote.
        chosen: the layers that the user chose; `None` where the backbone may follow.

    Raises:
        ImprintError: the user chose others.
    """
    source = checkpoint.get("backbone")
    fitted = (source.get("layers") if isinstance(source, dict) else None) or "last"
    names = [fitted] if isinstance(fitted, str) else fitted
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ImprintError(f"the checkpoint has layers={fitted!r:.200}: no names of modules")
    own = backbone.reader.asked if backbone.reader.layers is None else backbone.layers or "last"
    if own == fitted:
        return
    # "all" may be other modules in another version.
    if chosen is not None and (chosen != "all" or fitted == "last"):
        raise ImprintError(
            f"the checkpoint was fitted with layers={fitted!r}, this model has layers={chosen!r}: "
            "leave layers out"
        )
    backbone.read(fitted)


def _said(widths: list[int] | None) -> str:
    return "the last layer alone" if widths is None else f"{len(widths)} layers, {widths}"
