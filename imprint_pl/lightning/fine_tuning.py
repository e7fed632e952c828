"""What may cost an imprinted head its start when it is fine-tuned: batch norm, which trains with
other statistics than those that the head was made with, and a large learning rate. `callback.py`
warns of both, and keeps them from doing harm where it is asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from imprint_pl.embedding.batches import Unpack, run_batches
from imprint_pl.lightning.layer import _entry, at_rest, inputs_of, the_embedding
from imprint_pl.method.head import ImprintedHead

# Training samples on which both kinds of statistics are compared.
COMPARED = 256
# A loss of accuracy above this is worth a warning: chance and the noise of batches explain less.
LOST = 0.05
# A learning rate of the layers before the head with which every head start survived that we
# measured, see the guide "Your Lightning project".
BACKBONE_LR = 1e-5


class Statistics(NamedTuple):
    """The accuracy of a head, a fraction, on the same training samples: where batch norm uses its
    running statistics, as in validation, and those of a batch, as in training."""

    running: float
    batch: float

    @property
    def differ(self) -> bool:
        return self.running - self.batch > LOST


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The batch-norm layers of a module that are in training mode, and have running statistics for
    validation."""
    return [
        part
        for part in module.modules()
        if isinstance(part, _BatchNorm) and part.training and part.running_mean is not None
    ]


@contextmanager
def frozen(norms: Iterable[nn.Module]) -> Iterator[None]:
    """Batch-norm layers in eval mode, until the context ends."""
    norms = list(norms)
    freeze(norms)
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


def freeze(norms: Iterable[nn.Module]) -> None:
    """Puts batch-norm layers into eval mode: they use their running statistics, which stay."""
    for norm in norms:
        norm.training = False


@contextmanager
def _of_the_batch(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Batch norm by the statistics of the batch, without a change to the running ones."""
    modes = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    try:
        for norm, _, _ in modes:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm, training, track in modes:
            norm.training, norm.track_running_stats = training, track


def compare_statistics(
    module: nn.Module,
    layer: str,
    head: ImprintedHead,
    batches: Callable[[], Iterable[Any]],
    unpack: Unpack | None = None,
    transfer: Callable[[Any], Any] | None = None,
) -> Statistics | None:
    """Measures a head with both kinds of batch statistics, on some training samples.

    Nothing else changes between the two: dropout is off in both. Modes, statistics and the random
    state are afterwards what they were.

    Args:
        module: has its own layer, or a head, in the place of `layer`.
        layer: dotted name.
        head: measured.
        batches: makes a loader, with batches of the size and the mixture of classes that training
            has.
        unpack, transfer: as for `run_batches`.

    Returns:
        `None` where no batch-norm layer trains.
    """
    norms = batch_norms(module)
    if not norms:
        return None
    right, samples = torch.zeros(2), 0
    forward = _entry(module, layer)

    def embeddings(inputs: Any) -> list[Any]:
        with inputs_of(module, layer) as seen:
            forward(inputs)
        return seen

    def both(inputs: Any) -> tuple[list[Any], list[Any]]:
        running = embeddings(inputs)
        if len(running[0]) < 2:  # One sample has no statistics.
            return running, running
        with _of_the_batch(norms):
            return running, embeddings(inputs)

    with at_rest(module, layer):
        for seen, labels in run_batches(both, batches(), transfer=transfer, unpack=unpack):
            for place, of_one in enumerate(seen):
                z = the_embedding(of_one, layer, labels)
                right[place] += (head(z.to(head.proxies)).argmax(1).cpu() == labels.cpu()).sum()
            samples += len(labels)
            if samples >= COMPARED:
                break
    return Statistics(*(right / samples).tolist())


@contextmanager
def limited(optimizers: Iterable[Optimizer], head: nn.Module, largest: float) -> Iterator[None]:
    """All but a head is trained with at most a learning rate, until the context ends.

    Where the optimizer's rate is larger, parameters take only a part of each step: `largest` over
    that rate. For optimizers whose step is proportional to the rate, as SGD's and Adam's is, this
    is the step with the rate `largest`. Groups of the optimizer stay as they are, and schedulers.

    Args:
        optimizers: of the module that has the head.
        head: is trained with the optimizer's own rate.
        largest: greater than 0.
    """
    own = {id(parameter) for parameter in head.parameters()}
    taken: list[tuple[Tensor, Tensor, float]] = []

    def keep(optimizer: Optimizer, *_: Any) -> None:
        taken.clear()  # A step may have failed.
        for group in optimizer.param_groups:
            share = largest / max(float(group["lr"]), largest)
            if share < 1:
                parts = [p for p in group["params"] if id(p) not in own]
                taken.extend((p, p.detach().clone(), share) for p in parts)

    def shorten(*_: Any) -> None:
        for parameter, old, share in taken:
            parameter.detach().copy_(old.lerp_(parameter.detach(), share))
        taken.clear()

    hooks = [
        hook
        for one in optimizers
        for hook in (one.register_step_pre_hook(keep), one.register_step_post_hook(shorten))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def advice(optimizers: Iterable[Optimizer], module: nn.Module, head: nn.Module) -> str:
    """What to do about the learning rate of the layers before the head, where it may cost the head
    its start; an empty text where it is small."""
    own = {id(parameter) for parameter in head.parameters()}
    before = {id(p) for p in module.parameters() if p.requires_grad} - own
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # Schedulers that warm up have set a smaller one already, and keep the larger beside it.
            rate = max(float(group.get(name, 0)) for name in ("lr", "initial_lr", "max_lr"))
            if rate > BACKBONE_LR and any(id(p) in before for p in group["params"]):
                return (
                    f"; the layers before it are trained with lr={rate:g} of "
                    f"{type(optimizer).__name__}, which may cost the head its start: "
                    f"ImprintCallback(backbone_lr={BACKBONE_LR:g}) keeps it"
                )
    return ""
