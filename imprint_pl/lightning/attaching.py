"""attach and detach: an imprinted head in the place of a layer of anybody's module.

The input of the named layer is the embedding. Nothing else of the module changes: its steps, losses
and metrics go on as they were. `callback.py` does the same inside a Trainer.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from inspect import signature
from typing import Any

from torch import nn

from imprint_pl.data.facts import DataFacts
from imprint_pl.errors import ImprintError
from imprint_pl.lightning.layer import (
    Unpack,
    _device,
    averaged_copies,
    configure,
    gather_embeddings,
    layer_of,
    put_module,
)
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint
from imprint_pl.method.recipes import resolve
from imprint_pl.parts.by_name import import_parts

# The recipe of attach, extend and ImprintCallback where none is given.
RECIPE = "auto"


def attach(
    module: nn.Module,
    layer: str,
    *,
    num_classes: int | None = None,
    data: Any = None,
    recipe: str = RECIPE,
    unpack: Unpack | None = None,
    **overrides: Any,
) -> ImprintedHead:
    """Replaces a layer by an imprinted head, whose embedding is what went into that layer.

    With `data` the head is imprinted at once: one pass in eval mode, without gradients, on the
    module's device. Batches go through the hooks that a Trainer would call
    (`on_after_batch_transfer` and its like): the DataModule's, or else the module's. Without data,
    the head is empty and waits for `load_state_dict`, for an `ImprintCallback`, or for another
    `attach` with data. Attaching again imprints again; `detach` gives the first layer back. An
    optimizer, or an averaged copy (EMA) outside of the module, that was made before still holds the
    old layer: make it anew.

    Args:
        module: any `nn.Module` or LightningModule. Where it has no `forward`, the first module on
            the way to the layer that has one gets the inputs.
        layer: dotted name, as in `module.named_modules()`: "fc", "net.classifier.1". Its input
            must be `(B, d)`.
        num_classes: C; the DataModule's, or the largest label + 1 by default.
        data: a loader, a LightningDataModule (its training data), or inputs and labels
            `(x, y)`, x whatever the module takes, `(N, …)`.
        recipe, overrides: as of `imprint`.
        unpack: batch → (inputs, labels `(B,)`), for batches that are neither tuples nor dicts with
            the usual keys.

    Returns:
        The head, `(B, d)` → logits `(B, C)`.

    Raises:
        ImprintError: no such layer (near names are given), a layer whose input is no embedding,
            data that does not fit.

    >>> import torch
    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 5))
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> head = attach(net, "1", data=(x, torch.tensor([0, 0, 1, 1])), recipe="qi")
    >>> net(torch.tensor([[5.0, 1.0], [1.0, 2.0]])).argmax(1)
    tensor([0, 1])
    >>> detach(net, "1")
    Linear(in_features=2, out_features=5, bias=True)
    """
    check_recipe(recipe, overrides)
    configure(module, layer)
    head = ImprintedHead()
    if data is not None:
        x, y, names = gather_embeddings(module, layer, data, unpack)
        settings = class_settings(data) | ({"num_classes": num_classes} if num_classes else {})
        head.take(imprint(x, y, recipe, **(settings | overrides)).name_classes(names))
    put_head(module, layer, head)
    return head


def detach(module: nn.Module, layer: str) -> nn.Module:
    """Puts the layer that `attach` (or an `ImprintCallback`) replaced back, and returns it.

    Its weights are bitwise what they were when it was replaced. A module that was built anew and
    then attached has the layer it was built with: a checkpoint holds the head alone.

    Raises:
        ImprintError: no such layer, or nothing was attached there.
    """
    head = layer_of(module, layer)
    original = getattr(head, "replaced", None)
    if original is None:
        raise ImprintError(
            f"layer {layer!r} of {type(module).__name__} is a {type(head).__name__} that nothing "
            "was attached to: attach(module, layer) comes before detach"
        )
    for averaged, name in averaged_copies(module, layer, list(module.modules())):
        detach(averaged, name)
    if original.training != head.training:
        original.train(head.training)
    original.to(head.proxies.device)
    put_module(module, layer, original)
    return original


def put_head(
    module: nn.Module, layer: str, head: ImprintedHead, holders: Iterable[Any] = ()
) -> None:
    """Puts a head in the place of a layer, which it remembers outside of its parameters, and a copy
    of it into the averaged copies (EMA) among the module's parts and `holders`."""
    old = layer_of(module, layer)
    copies = averaged_copies(module, layer, [*module.modules(), *holders])
    # Not a submodule: neither optimizers nor checkpoints are to see it.
    head.__dict__["replaced"] = getattr(old, "replaced", old)
    put_module(module, layer, head.to(_device(old, module)).train(old.training))
    for averaged, name in copies:
        trained = any(p.requires_grad for p in averaged.get_submodule(name).parameters())
        put_head(averaged, name, copy.deepcopy(head))
        if not trained:
            averaged.get_submodule(name).requires_grad_(False)


def refuse_layers(overrides: Collection[str]) -> None:
    """Raises for keywords of backbones among those of a recipe."""
    for name in ("layers", "views"):
        if name in overrides:
            raise ImprintError(
                f"{name}= is a keyword of ImprintedClassifier and load_backbone: here the input of "
                "the layer that you name is the embedding; leave it out"
            )


def check_recipe(recipe: str, overrides: Mapping[str, Any]) -> None:
    """Raises for a recipe, or a keyword of it, that `imprint` would refuse, before data are read.

    Raises:
        ImprintError: as `imprint_pl.method.recipes.resolve`; a keyword of backbones.
    """
    refuse_layers(overrides)
    import_parts(overrides)
    own = signature(imprint).parameters
    resolve(recipe, **{name: value for name, value in overrides.items() if name not in own})


def class_settings(data: Any) -> dict[str, Any]:
    """`num_classes` and `class_names`, where the data knows them."""
    facts = DataFacts(data)
    return {"num_classes": facts.num_classes, "class_names": facts.class_names}
