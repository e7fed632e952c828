"""Gathers the inputs of a layer of any module, in data order, and finds and replaces layers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torchmetrics import Metric, MetricCollection

from imprint_pl.data.batch_hooks import batch_hooks, in_training
from imprint_pl.data.facts import names_of_dataset
from imprint_pl.data.lightning_packages import both, callbacks_of, overrides
from imprint_pl.embedding.batches import Unpack, run_batches
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.method.head import ImprintedHead
from imprint_pl.training_set.store import RowStore

# Batch size for data that are given as two tensors.
BATCH = 256


def averaged_copies(
    module: nn.Module, layer: str, holders: Iterable[Any]
) -> list[tuple[nn.Module, str]]:
    """Finds averaged copies of the module, or of a part of it that has the layer.

    torch's and timm's tools for averages among `holders` keep such copies. They are averaged with
    the module tensor by tensor, in order, so a head would silently be averaged with a layer unless
    the copies get the head, too.

    Returns:
        Each copy, with the layer's name in it.
    """
    timm = sys.modules.get("timm.utils.model_ema")
    kinds = (AveragedModel,) + ((timm.ModelEma, timm.ModelEmaV2, timm.ModelEmaV3) if timm else ())
    tools = {id(holder): holder for holder in holders if isinstance(holder, kinds)}
    parts, found = layer.split("."), []
    for tool in tools.values():
        averaged = tool.ema if hasattr(tool, "ema") else tool.module
        for depth in range(len(parts)):
            path, name = ".".join(parts[:depth]), ".".join(parts[depth:])
            original = module.get_submodule(path)
            if type(averaged) is type(original) and _shapes(averaged) == _shapes(original):
                found.append((averaged, name))
                break
    return found


def values_of_callbacks(trainer: Trainer) -> list[Any]:
    """Returns the attributes of a Trainer's callbacks, among which may be averaged copies."""
    return [value for callback in callbacks_of(trainer) for value in vars(callback).values()]


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def put_module(module: nn.Module, layer: str, new: nn.Module) -> None:
    """Replaces a layer by another module, under each of the layer's names."""
    old = layer_of(module, layer)
    names = [name for name, part in module.named_modules(remove_duplicate=False) if part is old]
    for name in names:
        module.set_submodule(name, new)
        _show(module, name)


def layer_of(module: nn.Module, layer: str) -> nn.Module:
    """Returns the layer of a dotted name.

    Raises:
        ImprintError: there is no such layer; the message has similar names.
    """
    parts = dict(module.named_modules(remove_duplicate=False))
    if not layer or layer not in parts:
        names = list(_replaceable(parts))
        linear = [name for name in names if isinstance(parts[name], nn.Linear | ImprintedHead)]
        last = "".join(f"; the last one is {name!r}" for name in (linear or names)[-1:])
        raise ImprintError(
            f"{type(module).__name__} has no layer {layer!r}{did_you_mean(layer, names) or last}"
        )
    _show(module, layer)
    return module.get_submodule(layer)


def _replaceable(parts: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yields the names of a module's parts that a head could replace. Metrics, losses, averaged
    copies and heads are left out, with everything inside them."""
    others = (Metric, MetricCollection, AveragedModel, _Loss)
    for name, part in parts.items():
        above = [parts[name[:place]] for place, sign in enumerate(name) if sign == "."]
        inside = any(isinstance(outer, (ImprintedHead, *others)) for outer in above)
        if name and not inside and not isinstance(part, others):
            yield name


def _show(module: nn.Module, layer: str) -> None:
    """Makes `module.<layer>` return a layer that a class attribute hides. If the class has
    `fc = None` and `configure_model` makes the layer, Python would find the `None` first."""
    for part in layer.split("."):
        hidden = cast(nn.Module, module._modules[part])
        if getattr(module, part) is not hidden:
            module.__dict__[part] = hidden
        module = hidden


def configure(module: nn.Module, layer: str) -> None:
    """Calls a LightningModule's `configure_model` if the layer does not exist yet.

    Raises:
        ImprintError: there is no such layer, even then.
    """
    names = {name for name, _ in module.named_modules(remove_duplicate=False)}
    if layer not in names and overrides("configure_model", module):
        cast(LightningModule, module).configure_model()
    layer_of(module, layer)


class Gathered(NamedTuple):
    """The inputs of a layer, in data order.

    Attributes:
        x: `(N, d)` on the CPU.
        y: `(N,)`, the labels.
        names: the class names, if the data set has them.
    """

    x: Tensor
    y: Tensor
    names: list[str] | None


def gather_embeddings(
    module: nn.Module, layer: str, data: Any, unpack: Unpack | None = None, hooks: Any = None
) -> Gathered:
    """Passes data through a module and gathers the inputs of a layer.

    Batches go through the batch hooks of `hooks`, a DataModule (`data` by default), or else through
    those of the module.

    Args:
        module: the module.
        layer: the dotted name of the layer.
        data, unpack: as for `attach`.
        hooks: a DataModule with batch hooks.

    Raises:
        ImprintError: the data or the layer do not fit, or the Trainer has started several
            processes.
    """
    device, store = _device(module), RowStore()
    owner = data if hooks is None else hooks
    with ExitStack() as stack:
        for one in {id(one): one for one in (owner, data)}.values():
            stack.enter_context(in_training(module, one))
        stack.enter_context(at_rest(module, layer))
        trainer, hooked = getattr(module, "_trainer", None), batch_hooks(module, owner)

        def transfer(batch: Any) -> Any:
            if trainer is not None:
                batch = trainer.precision_plugin.convert_input(batch)
            try:
                return hooked(batch, device)
            except (TypeError, LookupError, AttributeError, ValueError) as error:
                if not isinstance(data, tuple):
                    raise
                raise ImprintError(
                    "a batch hook of the DataModule or the module cannot take a batch [inputs, "
                    f"labels] ({type(error).__name__}: {error}): give a loader whose batches it "
                    "knows instead of tensors"
                ) from error

        if trainer is not None:
            stack.enter_context(trainer.precision_plugin.forward_context())
        loader = in_data_order(loader_of(data))
        embed_batches(store, module, layer, loader, unpack, transfer)
    gathered = store.gather()
    if gathered is None:
        raise ImprintError(
            "attach and extend gather the embeddings of all processes in the first one: call them "
            "before the Trainer starts others, or use ImprintCallback"
        )
    return Gathered(*gathered, names_of_dataset(getattr(loader, "dataset", None)))


def embed_batches(
    store: RowStore,
    module: nn.Module,
    layer: str,
    batches: Iterable[Any],
    unpack: Unpack | None = None,
    transfer: Callable[[Any], Any] | None = None,
    go_on: Callable[[int, Tensor], bool] = lambda index, labels: True,
) -> None:
    """Adds the inputs of a layer to a store, batch by batch, while `go_on(index, labels)` is true.

    Raises:
        ImprintError: there is no batch, labels do not fit, or the layer does not run exactly once
            per batch.
    """
    forward, index = _entry(module, layer), -1

    def run(inputs: Any) -> list[Any]:
        with inputs_of(module, layer) as seen:
            forward(inputs)
        return seen

    passes = run_batches(run, batches, transfer=transfer, unpack=unpack)
    for index, (seen, labels) in enumerate(passes):
        store.add(the_embedding(seen, layer, labels), labels)
        if not go_on(index, labels):
            break
    if index < 0:
        raise ImprintError("the training data has no batch: there is nothing to imprint from")


@contextmanager
def inputs_of(module: nn.Module, layer: str) -> Iterator[list[Any]]:
    """Gives a list to which each run of the layer appends its input. Compilation is off meanwhile,
    since compiled code would not call the new hook."""
    seen: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else next(iter(kwargs.values())))

    handle = layer_of(module, layer).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield seen
    finally:
        handle.remove()


def the_embedding(seen: list[Any], layer: str, labels: Tensor) -> Tensor:
    """Checks and returns the only input of a layer in a batch, `(B, d)`."""
    if len(seen) != 1:
        raise ImprintError(
            f"layer {layer!r} ran {len(seen)} times for one batch: name a layer that runs once in "
            "the module's forward"
        )
    shape = tuple(getattr(seen[0], "shape", ()))
    if len(shape) != 2:
        raise ImprintError(
            f"the input of layer {layer!r} has shape {shape}, an embedding has (B, d): name the "
            "layer after pooling, most often the last linear one"
        )
    if shape[0] != len(labels):
        raise ImprintError(
            f"layer {layer!r} got {shape[0]} embeddings for {len(labels)} labels: the layer, or "
            "unpack=, must give one of each a sample"
        )
    return seen[0]


@contextmanager
def at_rest(module: nn.Module, layer: str) -> Iterator[None]:
    """Puts the module into eval mode with its own layer, without gradients. Afterwards restores the
    modes, the head, and the global random state that loaders and augmentations use."""
    modes = [(part, part.training) for part in module.modules()]
    present = layer_of(module, layer)
    original = getattr(present, "replaced", None)
    with isolate_rng(), torch.no_grad():
        try:
            if original is not None:
                put_module(module, layer, original.to(_device(present)))
            module.eval()
            yield
        finally:
            put_module(module, layer, present)
            for part, mode in modes:
                part.training = mode


def loader_of(data: Any) -> Iterable[Any]:
    """Returns the batches of `attach`'s `data`."""
    if isinstance(data, both(LightningDataModule)):
        module = cast(LightningDataModule, data)
        module.prepare_data()
        module.setup("fit")
        return module.train_dataloader()
    if isinstance(data, tuple):
        if len(data) != 2 or len(data[0]) != len(data[1]):
            sizes = [len(part) for part in data]
            raise ImprintError(f"data is a tuple of lengths {sizes}: expected (x, y) of one length")
        return DataLoader(TensorDataset(*map(torch.as_tensor, data)), batch_size=BATCH)
    return data


def in_data_order(loader: Any, ranks: int = 1, rank: int = 0) -> Any:
    """Returns a loader of the same samples in the order of the data set, divided among the ranks.

    Samples are neither shuffled nor dropped. A user's own sampler or batch sampler is kept.
    """
    parts = loader if isinstance(loader, list) else []
    several = any(isinstance(part, DataLoader) for part in parts)
    if several or isinstance(loader, (dict, *both(CombinedLoader))):
        raise ImprintError(
            f"the training data is a {type(loader).__name__} of loaders: give the one to imprint "
            "from as data="
        )
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler: Any = getattr(loader, "sampler", None)
    if not hasattr(sampler, "__len__") or type(batch_sampler) not in (BatchSampler, type(None)):
        return loader
    if isinstance(sampler, RandomSampler | DistributedSampler):
        sampler = SequentialSampler(loader.dataset)
    if ranks > 1:
        sampler = DistributedSamplerWrapper(sampler, num_replicas=ranks, rank=rank, shuffle=False)
    return _with_sampler(loader, sampler)


def in_mixed_order(loader: Any, seed: int = 0) -> Any:
    """Returns a loader that shuffles the samples of another one, with its own generator.

    A user's own sampler or batch sampler is kept; anything but a DataLoader is returned unchanged.
    """
    batch_sampler = getattr(loader, "batch_sampler", None)
    kinds = RandomSampler | DistributedSampler | SequentialSampler
    known = isinstance(getattr(loader, "sampler", None), kinds)
    if not known or type(batch_sampler) is not BatchSampler:
        return loader
    generator = torch.Generator().manual_seed(seed)
    return _with_sampler(loader, RandomSampler(loader.dataset, generator=generator))


def _with_sampler(loader: Any, sampler: Any) -> Any:
    # A DataLoader refuses new samplers in __setattr__, so set them on a copy by its __dict__. A
    # copy also keeps what a subclass does when iterated.
    other = copy.copy(loader)
    other.__dict__.update(
        sampler=sampler,
        # Use a generator of its own, since seeding the workers draws a number from it.
        generator=torch.Generator().manual_seed(0),
        persistent_workers=False,
        _iterator=None,
    )
    if getattr(loader, "batch_sampler", None) is not None:
        other.__dict__["batch_sampler"] = BatchSampler(sampler, loader.batch_size, False)
    return other


def _entry(module: nn.Module, layer: str) -> nn.Module:
    """Returns the module if it has a forward, otherwise the first module on the path to the layer
    that has one."""
    missing = [cls.forward for cls in cast(Any, (nn.Module, *both(LightningModule)))]
    parts = layer.split(".")
    for depth in range(len(parts)):
        part = module.get_submodule(".".join(parts[:depth]))
        if type(part).forward not in missing:
            return part
    raise ImprintError(
        f"{type(module).__name__} has no forward that leads to its layer {layer!r}: define "
        "forward(inputs)"
    )


def _device(*modules: nn.Module) -> torch.device:
    for module in modules:
        for tensor in [*module.parameters(), *module.buffers()]:
            return tensor.device
    return torch.device("cpu")
