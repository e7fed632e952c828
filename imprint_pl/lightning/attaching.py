"""attach and detach: replace a layer of any module by an imprinted head.

The input of the named layer is the embedding. Nothing else in the module changes: its steps, losses
and metrics stay the same. `callback.py` does this inside a Trainer.
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

# The default recipe of attach, extend and ImprintCallback.
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
    """Replaces a layer by an imprinted head; the input of the layer is the embedding.

    With `data` the head is imprinted at once: one pass in eval mode, without gradients, on the
    module's device. Batches go through the hooks that a Trainer would call
    (`on_after_batch_transfer` and the like): the DataModule's, or else the module's. Without data,
    the head is empty and must be filled by `load_state_dict`, an `ImprintCallback`, or another
    `attach` with data. Attaching again imprints again; `detach` restores the original layer. An
    optimizer, or an averaged copy (EMA) outside the module, that was made before still has the old
    layer and must be made again.

    Args:
        module: any `nn.Module` or LightningModule. If it has no `forward`, the inputs go to the
            first module on the path to the layer that has one.
        layer: dotted name, as in `module.named_modules()`: "fc", "net.classifier.1". Its input
            must be `(B, d)`.
        num_classes: C; the DataModule's, or the largest label + 1 by default.
        data: a loader, a LightningDataModule (its training data), or `(x, y)`: inputs `(N, …)` of
            the module and their labels.
        recipe, overrides: as for `imprint`.
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

    Its weights are bitwise the same as when it was replaced. If the module was built again since,
    the layer is the one it was built with, since a checkpoint holds only the head.

    Args:
        module: the module that was given to `attach`.
        layer: the layer's name, as for `attach`.

    Returns:
        The original layer.

    Raises:
        ImprintError: there is no such layer, or nothing was attached there.
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
    """Replaces a layer by a head, also in averaged copies (EMA) of the module.

    The head keeps a reference to the layer. Averaged copies are looked for among the module's parts
    and `holders`, and get copies of the head.
    """
    old = layer_of(module, layer)
    copies = averaged_copies(module, layer, [*module.modules(), *holders])
    # Do not register the layer as a submodule, so that optimizers and checkpoints do not see it.
    head.__dict__["replaced"] = getattr(old, "replaced", old)
    put_module(module, layer, head.to(_device(old, module)).train(old.training))
    for averaged, name in copies:
        trained = any(p.requires_grad for p in averaged.get_submodule(name).parameters())
        put_head(averaged, name, copy.deepcopy(head))
        if not trained:
            averaged.get_submodule(name).requires_grad_(False)


def refuse_layers(overrides: Collection[str]) -> None:
    """Raises an `ImprintError` if keywords of backbones are given beside those of a recipe."""
    for name in ("layers", "views"):
        if name in overrides:
            raise ImprintError(
                f"{name}= is a keyword of ImprintedClassifier and load_backbone: here the input of "
                "the layer that you name is the embedding; leave it out"
            )


def check_recipe(recipe: str, overrides: Mapping[str, Any]) -> None:
    """Checks a recipe and its keywords, before data are read.

    Raises:
        ImprintError: as for `imprint_pl.method.recipes.resolve`, or for a keyword of backbones.
    """
    refuse_layers(overrides)
    import_parts(overrides)
    own = signature(imprint).parameters
    resolve(recipe, **{name: value for name, value in overrides.items() if name not in own})


def class_settings(data: Any) -> dict[str, Any]:
    """Returns `num_classes` and `class_names`, if the data provide them."""
    facts = DataFacts(data)
    return {"num_classes": facts.num_classes, "class_names": facts.class_names}
