"""extend: adds classes to a trained classifier without changing its old classes.

With samples of the old classes, an imprinted head separates new classes from old ones. Without
them, the new rows of the layer are computed from the new samples and their old logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

from imprint_pl.data.lightning_packages import both
from imprint_pl.embedding.batches import Unpack, unlabelled
from imprint_pl.errors import ImprintError
from imprint_pl.lightning.attaching import RECIPE, refuse_layers
from imprint_pl.lightning.layer import configure, gather_embeddings, layer_of, put_module
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint
from imprint_pl.numerics.labels import check_composition, names_of, place_of
from imprint_pl.numerics.moments import Moments

# Constants for new rows without old samples, chosen on embeddings of digits and Fashion-MNIST: the
# shrinkage of the covariance, which must also suit the old classes; the spread of a new logit
# within its class, divided by that of the old logits; and the share of a class's samples on which
# its logit wins.
SHRINKAGE = 0.5
SPREAD = 0.5
WON = 0.85


class ExtendedLayer(nn.Module):
    """A trained layer beside a head of all classes: `(B, d)` → logits `(B, C_old + C_new)`.

    The old logits are those of the trained layer. The logit of a new class is the largest old logit
    plus the difference between the head's score of this class and its best score of an old class.
    The head therefore decides whether a sample belongs to a new class, and to which one; the
    trained layer decides among the old classes.

    Args:
        old: the trained layer, `(B, d)` → `(B, C_old)`.
        head: a head of all classes, the old ones first; empty if a state dict will fill it.
    """

    def __init__(self, old: nn.Linear, head: ImprintedHead | None = None) -> None:
        super().__init__()
        self.old = old
        self.head = ImprintedHead() if head is None else head

    def forward(self, embeddings: Tensor) -> Tensor:
        old, scores = self.old(embeddings), self.head(embeddings)
        before, new = scores.tensor_split([old.shape[1]], 1)
        margin = (new - before.amax(1, keepdim=True)).to(old.dtype)
        return torch.cat([old, old.amax(1, keepdim=True) + margin], 1)


def extend(
    module: nn.Module,
    layer: str,
    new_classes: Mapping[str, Any],
    *,
    old_data: Any = None,
    recipe: str = RECIPE,
    unpack: Unpack | None = None,
    **overrides: Any,
) -> nn.Module:
    """Adds classes to a trained `nn.Linear`; the logits of the old classes stay the same.

    Label C_old + i is the i-th name of `new_classes`. With `old_data` the layer becomes an
    `ExtendedLayer`, which is about as accurate as imprinting all classes at once. Give as many
    samples of an old class as of a new one, since classes with more samples win in doubtful cases.
    Without `old_data` it stays an `nn.Linear` with more rows, which can only estimate where the old
    classes are: on ten-class tasks the harmonic mean of old-class and new-class accuracy was 11
    points lower on average, similar to class means (`qi`) of all classes.

    Args:
        module: any trained `nn.Module` or LightningModule.
        layer: dotted name of an `nn.Linear` with at least two classes; its input is the embedding.
        new_classes: name → samples of that class: inputs `(N, …)`, or a loader, whose labels are
            ignored; images of skipped files are left out. They go through the same batch hooks as
            `old_data`: those of its DataModule, or else the module's, as in a Trainer.
        old_data: samples of the old classes with labels 0..C_old−1: a loader, a
            LightningDataModule, or `(x, y)`.
        recipe, overrides: as for `imprint`, for the head; only with `old_data`.
        unpack: a function from a batch of `old_data` to (inputs, labels).

    Returns:
        The new layer, `(B, d)` → `(B, C_old + C_new)`. To load its state dict, build it from a
        layer of the old sizes: `ExtendedLayer(linear)`, or an `nn.Linear` with more outputs.

    Raises:
        ImprintError: the layer is of another kind, there is no new class or no sample of one, or
            keywords of the head are given without `old_data`.

    >>> net = nn.Sequential(nn.Linear(2, 2))
    >>> extend(net, "0", {"zebra": torch.tensor([[3.0, -3.0], [3.1, -2.9]])})
    Linear(in_features=2, out_features=3, bias=True)
    """
    refuse_layers(overrides)
    configure(module, layer)
    old = layer_of(module, layer)
    if not isinstance(old, nn.Linear) or old.out_features < 2:
        raise ImprintError(
            f"layer {layer!r} of {type(module).__name__} is {old}: extend takes an nn.Linear with "
            "at least 2 classes; attach imprints all classes in the place of any layer"
        )
    if not new_classes:
        raise ImprintError("new_classes is empty: give {name: samples}")
    if old_data is None and (overrides or recipe != RECIPE):
        raise ImprintError("recipe and its keywords are used with old_data alone: give that, too")
    check_composition(list(map(str, new_classes)))
    for name in new_classes:
        if place_of(name, names_of(old_data)) is not None:
            raise ImprintError(f"class {name!r} is one of old_data's: give a new one another name")
    parts, size = list[Tensor](), old.out_features
    hooks = old_data if isinstance(old_data, both(LightningDataModule)) else None
    for name, samples in new_classes.items():
        # Turn a tensor into a pair with labels, as batch hooks expect.
        given = unlabelled(samples) if isinstance(samples, Tensor) else samples
        x = torch.empty(0, 0)
        if given is samples or len(samples):
            x = gather_embeddings(module, layer, given, unlabelled, hooks).x
        if not len(x):
            raise ImprintError(f"class {name!r} has no sample: add some, or leave it out")
        parts.append(x)
    x = torch.cat(parts)
    y = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    if old_data is None:
        new: nn.Module = _with_rows(old, *_new_rows(old, x, y))
    else:
        old_x, old_y, _ = gather_embeddings(module, layer, old_data, unpack)
        if len(old_y) and int(old_y.max()) >= size:
            raise ImprintError(
                f"label {int(old_y.max())} in old_data: layer {layer!r} has the classes "
                f"0..{size - 1}"
            )
        names = [*map(str, range(size)), *new_classes]
        all_x, all_y = torch.cat([old_x, x]), torch.cat([old_y, y + size])
        head = imprint(all_x, all_y, recipe, class_names=names, **overrides)
        new = ExtendedLayer(old, head.to(old.weight.device))
    put_module(module, layer, new.train(old.training))
    return new


def _new_rows(old: nn.Linear, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Computes weights `(C_new, d)` and bias of new classes from their embeddings and the old rows.

    This is linear discriminant analysis in which one point replaces the old classes: among the
    points where all old logits are equal, the one nearest (Mahalanobis) to the mean of the new
    classes. The bias makes a new logit the largest on `WON` of its class's samples.
    """
    x = x.double()
    W = old.weight.detach().double().cpu()
    b = W.new_zeros(len(W)) if old.bias is None else old.bias.detach().double().cpu()
    C, d = int(y.max()) + 1, x.shape[1]
    moments = Moments.of(x, y, C)
    within = moments.within("micro")
    spread = within.trace() / d
    eye = torch.eye(d, dtype=W.dtype)
    within = (1 - SHRINKAGE) * within + SHRINKAGE * spread * eye if spread > 1e-12 else eye
    centred, offsets = W - W.mean(0), b - b.mean()
    middle = moments.means.mean(0)
    among = centred @ within @ centred.T
    excess = torch.linalg.pinv(among, hermitian=True, rtol=1e-6) @ (centred @ middle + offsets)
    background = middle - within @ centred.T @ excess
    rows = torch.linalg.solve(within, (moments.means - background).T).T
    logits = x @ W.T + b
    own = (x @ rows.T)[torch.arange(len(x)), y]
    own_spread = (own - (moments.means @ rows.T).diagonal()[y]).square().mean().sqrt()
    old_spread = (logits - logits.mean(1, keepdim=True)).std(0, correction=0).mean()
    if own_spread > 0 and old_spread > 0:
        scale = SPREAD * old_spread / own_spread
    else:  # one sample per class, so there is no spread
        scale = centred.norm(dim=1).mean() / rows.norm(dim=1).mean().clamp_min(1e-12)
    rows, own = rows * scale, own * scale
    lead = logits.amax(1) - own
    bias = torch.stack([lead[y == c].quantile(WON) for c in range(C)])
    return rows, bias


def _with_rows(old: nn.Linear, rows: Tensor, bias: Tensor) -> nn.Linear:
    options = {"device": old.weight.device, "dtype": old.weight.dtype}
    size = old.out_features
    new = nn.utils.skip_init(nn.Linear, old.in_features, size + len(rows), **options)
    with torch.no_grad():
        new.weight[:size], new.weight[size:] = old.weight, rows
        new.bias[:size], new.bias[size:] = 0 if old.bias is None else old.bias, bias
    new.weight.requires_grad_(old.weight.requires_grad)
    new.bias.requires_grad_(old.weight.requires_grad)
    return new
