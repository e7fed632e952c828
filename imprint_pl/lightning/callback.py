"""ImprintCallback: an imprinted head inside somebody else's Lightning project.

One pass over the training data, then the head fills in for a layer of the user's module, to be
fine-tuned, compared or saved. `attaching.py` has the parts that need no Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score

from imprint_pl.data.batch import split_batch
from imprint_pl.data.batch_hooks import datamodule_of, in_training, transfer_of
from imprint_pl.data.facts import names_of_dataset
from imprint_pl.data.lightning_packages import averaging_callbacks, both, callbacks_of, overrides
from imprint_pl.data.loaders import loader_at, sampler_length
from imprint_pl.errors import ImprintError, did_you_mean, warn
from imprint_pl.lightning.attaching import (
    RECIPE,
    check_recipe,
    class_settings,
    detach,
    put_head,
)
from imprint_pl.lightning.fine_tuning import (
    BACKBONE_LR,
    advice,
    batch_norms,
    compare_statistics,
    freeze,
    frozen,
    limited,
)
from imprint_pl.lightning.layer import (
    Unpack,
    at_rest,
    configure,
    embed_batches,
    in_data_order,
    in_mixed_order,
    inputs_of,
    layer_of,
    loader_of,
    the_embedding,
    values_of_callbacks,
)
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.imprinting import imprint
from imprint_pl.ranks import Result, on_rank_zero
from imprint_pl.training_set.store import RowStore, on_gpu

# What the callback says of the head, for each value of `when`.
PLACE = {
    "fit_start": "layer {layer!r} is now an imprinted head, which is fine-tuned",
    "validation": "an imprinted head is measured beside layer {layer!r} in each validation",
    "train_end": "layer {layer!r} is now an imprinted head",
}
WHEN = tuple(PLACE)


class Imprinted(NamedTuple):
    """A head, and the number of samples that it was imprinted from."""

    head: ImprintedHead
    samples: int


class ImprintCallback(Callback):
    """Imprints a head for a layer of the user's module, from the training data of the Trainer.

    The pass runs in eval mode, without gradients, with the Trainer's precision, devices and batch
    hooks, over each training sample once, in data order. `limit_train_batches` and `fast_dev_run`
    shorten it, too, but not before every class has had a sample.

    Args:
        layer: dotted name of the layer, as in `module.named_modules()`; its input `(B, d)` is the
            embedding.
        recipe: as for `imprint`.
        when: "fit_start": the head takes the layer's place before the optimizer is built, and is
            fine-tuned with the rest of the module (Qi et al. 2018); its `proxies` and `log_scale`
            are parameters. "validation": the module is trained and validated as it is; for each
            validation a head is imprinted from the embeddings of that moment and measured on the
            same samples: `imprinted/accuracy`, `imprinted/balanced_accuracy` and
            `imprinted/macro_f1`. "train_end": after training
            the head takes the layer's place, and `imprinted.ckpt` is written beside the other
            checkpoints (none where checkpointing is off).
        data: imprint from this instead of the training data: a loader, a LightningDataModule, or
            `(x, y)`.
        unpack: batch → (inputs, labels), for batches that are neither tuples `(x, y, …)` nor dicts
            with `image`, `images`, `x`, `pixel_values` or `input`, and `label`, `labels`, `y`,
            `target` or `targets`.
        freeze_batch_norm: with "fit_start": batch-norm layers are in eval mode during this fit.
            Their running statistics stay as they are and are used in training, too, so that
            training starts with the embeddings that the head was made for. Their weights are
            trained. Without it they use the statistics of each batch, as ever, and a warning says
            so where that costs the head more than 5 points of accuracy on training samples.
        backbone_lr: with "fit_start": the largest learning rate of the layers before the head.
            If the optimizer's is larger, only the head is trained with it. The other layers take
            the part of each step that `backbone_lr` would have given them; during a step they are
            in memory twice. By default all layers are trained with the optimizer's rate.
        overrides: as for `imprint`; `num_classes` is by default the DataModule's, or that of the
            `nn.Linear` that is replaced.

    A line says which recipe was imprinted from how many samples and classes, and which share of the
    held-out samples is right. The loggers get it, too, as `imprint/recipe` (a hyperparameter),
    `imprint/samples`, `imprint/classes` and `imprint/held_out_accuracy`.

    A checkpoint with a head loads through this callback (`trainer.test(module, ckpt_path=…)`) or
    after `attach(module, layer)`, strictly. Fitting again imprints again; a fit that resumes from
    `ckpt_path` imprints, too, and then takes the head of the checkpoint.

    Attributes:
        head: the head imprinted last, or `None`.
        checkpoint_path: the file that "train_end" wrote, or `None`.

    Raises:
        ImprintError: no such layer; nothing to imprint from; a head that cannot be fine-tuned; a
            strategy that shards the module.
    """

    def __init__(
        self,
        layer: str,
        recipe: str = RECIPE,
        when: str = "fit_start",
        data: Any = None,
        unpack: Unpack | None = None,
        freeze_batch_norm: bool = False,
        backbone_lr: float | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        check_recipe(recipe, overrides)
        if when not in WHEN:
            raise ImprintError(
                f"unknown when={when!r}{did_you_mean(when, WHEN)} (known: {', '.join(WHEN)})"
            )
        own = {"freeze_batch_norm": freeze_batch_norm, "backbone_lr": backbone_lr}
        for name, value in own.items():
            if value not in (False, None) and when != "fit_start":
                raise ImprintError(
                    f"{name} is not used with when={when!r}, where your layer is trained: leave it "
                    'out, or take when="fit_start"'
                )
        if backbone_lr is not None and not backbone_lr > 0:
            raise ImprintError(
                f"backbone_lr={backbone_lr:g} is out of range: give a number above 0. To train the "
                "head alone, set requires_grad to False in the other layers"
            )
        self.layer = layer
        self.recipe = recipe
        self.freeze_batch_norm = freeze_batch_norm
        self.backbone_lr = backbone_lr
        self.when = when
        self.data = data
        self.unpack = unpack
        self.overrides = overrides
        self.head: ImprintedHead | None = None
        self.checkpoint_path: str | None = None
        # What a run has put into the module, and what a validation batch has; undone when they end.
        self._undo, self._watch = ExitStack(), ExitStack()
        self._validated: dict[int, RowStore] = {}
        # The last one made, until the loggers have it, and whether a line has told of one.
        self._made: Imprinted | None = None
        self._told = False
        self._norms: Sequence[nn.Module] = ()

    # Set-up and undo.

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        sharded = both(FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)
        if isinstance(trainer.strategy, sharded):
            raise ImprintError(
                f"{type(trainer.strategy).__name__} shards the module, which ImprintCallback does "
                "not support: use one device or DDP"
            )
        as_in_the_file = partial(_as_in_the_file, self.layer)
        self._undo.callback(pl_module.register_load_state_dict_pre_hook(as_in_the_file).remove)
        self._told, self._norms = False, ()
        if stage == "fit":
            self._undo.enter_context(
                _once_set_up(pl_module, partial(self._prepare_fit, trainer, pl_module))
            )

    def _prepare_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if overrides("configure_model", pl_module):
            self._configure_model(trainer, pl_module)
        configure(pl_module, self.layer)
        if self.data is None and trainer.limit_train_batches == 0:
            raise ImprintError(
                "limit_train_batches=0 leaves no training data to imprint from: give data=, or "
                "leave some batches"
            )
        order = callbacks_of(trainer)
        averaging = averaging_callbacks(trainer)
        if self.when == "train_end" and any(order.index(self) < order.index(c) for c in averaging):
            raise ImprintError(
                "a callback that averages weights ends after ImprintCallback and would write over "
                "its head: give ImprintCallback after it in the Trainer's callbacks"
            )
        if self.when == "fit_start":
            # Lightning converts and moves the module, too, but later: the pass has to come before
            # the optimizer is built, which must find the head's parameters.
            converting = both(HalfPrecision, DoublePrecision)
            if isinstance(trainer.precision_plugin, converting):
                trainer.precision_plugin.convert_module(pl_module)
            pl_module.to(trainer.strategy.root_device)
            self._replace(trainer, pl_module)

    def _configure_model(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Calls `configure_model` as the Trainer does, but before the head takes the place of a
        layer that is made there. Later calls in this run do nothing."""
        with (
            trainer.strategy.tensor_init_context(),
            trainer.strategy.model_sharded_context(),
            trainer.precision_plugin.module_init_context(),
        ):
            pl_module.configure_model()
        pl_module.__dict__["configure_model"] = _configured
        self._undo.callback(pl_module.__dict__.pop, "configure_model", None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._watch.close()
        self._undo.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._watch.close()
        self._undo.close()

    # At the start and at the end of training.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when != "fit_start" or self._made is None or self.head is None:
            return
        norms = batch_norms(pl_module) if self.freeze_batch_norm else []
        self._norms = norms
        more = f"; {len(norms)} batch-norm layers are frozen" if norms else ""
        if self.backbone_lr is None:
            more += advice(trainer.optimizers, pl_module, self.head)
        else:
            limit = limited(trainer.optimizers, self.head, self.backbone_lr)
            self._undo.enter_context(limit)
            more += f"; the layers before it are trained with at most lr={self.backbone_lr:g}"
        self._tell(self._made, more)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        # For each batch: a hook of the user's may have put the module into training mode.
        freeze(self._norms)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: Lightning has looked for layers in eval mode now, and would warn of these.
        self._undo.enter_context(frozen(self._norms))
        # And the loggers have the user's hyperparameters, to which these are added.
        self._log(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when != "train_end":
            return
        self._replace(trainer, pl_module)
        self._log(trainer)
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if folder:
            self.checkpoint_path = str(Path(folder) / "imprinted.ckpt")
            # Without the optimizer's state: it belongs to the layer that is gone.
            trainer.save_checkpoint(self.checkpoint_path, weights_only=True)

    # Beside the user's validation.

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated, self._is_due = {}, True

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any
    ) -> None:
        if not self._is_on(trainer):
            return
        if self._is_due:
            # Not before: callbacks put averaged weights in place when the epoch starts, and the
            # head is to be made with the weights that are validated.
            self.head = self._imprint(trainer, pl_module).to(pl_module.device)
            self._log(trainer)
            self._is_due = False
        self._seen = self._watch.enter_context(inputs_of(pl_module, self.layer))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._is_on(trainer):
            self._watch.close()
            labels = (self.unpack or split_batch)(batch)[1]
            if dataloader_idx not in self._validated:
                loader = loader_at(dataloader_idx, trainer.val_dataloaders)
                self._validated[dataloader_idx] = RowStore(sampler_length(loader))
            embeddings = the_embedding(self._seen, self.layer, labels)
            self._validated[dataloader_idx].add(embeddings, labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.head is None or not self._is_on(trainer):
            return
        for index, store in self._validated.items():
            measured = _of_all_rows(store, partial(_measure, self.head))
            suffix = f"/dataloader_idx_{index}" if len(self._validated) > 1 else ""
            for name, value in measured.items():
                # The suffix is Lightning's own, which it would add in a step alone.
                pl_module.log(f"imprinted/{name}{suffix}", value, add_dataloader_idx=False)

    def _is_on(self, trainer: Trainer) -> bool:
        return self.when == "validation" and not trainer.sanity_checking

    # The pass.

    def _replace(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.head = self._imprint(trainer, pl_module)
        if self.when == "fit_start" and not self.freeze_batch_norm:
            self._warn_of_batch_statistics(trainer, pl_module, self.head)
        holders = [*vars(pl_module).values(), *values_of_callbacks(trainer)]
        put_head(pl_module, self.layer, self.head, holders)
        for callback in averaging_callbacks(trainer):
            # The callback's copy of the module, made before, has the layer.
            callback.setup(trainer, pl_module, "fit")

    def _imprint(self, trainer: Trainer, pl_module: LightningModule) -> ImprintedHead:
        original = layer_of(pl_module, self.layer)
        original = getattr(original, "replaced", original)
        data = datamodule_of(trainer) if self.data is None else self.data
        settings = class_settings(data)
        if settings["num_classes"] is None:
            settings["num_classes"] = getattr(original, "out_features", None)
        settings |= self.overrides
        with (
            in_training(pl_module, data, trainer),
            at_rest(pl_module, self.layer),
            trainer.precision_plugin.forward_context(),
        ):
            given = self._loader(trainer)
            loader = in_data_order(given, trainer.world_size, trainer.global_rank)
            store = RowStore(sampler_length(loader))
            embed_batches(
                store,
                pl_module,
                self.layer,
                loader,
                self.unpack,
                transfer_of(trainer, pl_module, data),
                self._limit(trainer, loader, settings["num_classes"]),
            )

        names = names_of_dataset(getattr(given, "dataset", None))

        def make(x: Tensor, y: Tensor) -> Imprinted:
            x, y = on_gpu(x, y, trainer.strategy.root_device)
            head = imprint(x, y, self.recipe, **settings).name_classes(names)
            if self.when == "fit_start" and not _is_trainable(head, x[:2]):
                raise ImprintError(
                    f"the head of recipe {self.recipe!r} ({len(head.proxies)} proxies, "
                    f"agg={head.agg.name!r}) cannot be fine-tuned: no gradient reaches its "
                    'proxies; choose another recipe, or when="train_end"'
                )
            return Imprinted(head.cpu(), len(x))

        self._made = _of_all_rows(store, make)
        if self.when != "fit_start":
            self._tell(self._made)
        # Like the head of `attach`, it takes its parts from the checkpoint that it loads.
        head = ImprintedHead()
        head.take(self._made.head)
        return head

    def _tell(self, made: Imprinted, more: str = "") -> None:
        """Says in a line what was imprinted, and more; beside validations, the first time alone."""
        if self._told:
            return
        self._told = True
        head, chosen = made.head, made.head.settings.get("chosen_by") == "auto"
        recipe = f"recipe {head.settings['recipe']}" + (", which auto chose," if chosen else "")
        accuracy = head.held_out_accuracy
        known = (
            "" if accuracy is None else f"; {100 * accuracy:.1f} % of held-out samples are right"
        )
        rank_zero_info(
            f"{PLACE[self.when].format(layer=self.layer)}: {recipe} from {made.samples} samples of "
            f"{head.num_classes} classes{known}{more}"
        )

    def _log(self, trainer: Trainer) -> None:
        """Gives the loggers what was imprinted, once, as `imprint/…`."""
        made, self._made = self._made, None
        if made is None:
            return
        values: dict[str, float] = {
            "imprint/samples": made.samples,
            "imprint/classes": made.head.num_classes,
        }
        if made.head.held_out_accuracy is not None:
            values["imprint/held_out_accuracy"] = made.head.held_out_accuracy
        for logger in trainer.loggers:
            logger.log_hyperparams({"imprint/recipe": made.head.settings["recipe"]})
            logger.log_metrics(values, step=trainer.global_step)

    def _warn_of_batch_statistics(
        self, trainer: Trainer, pl_module: LightningModule, head: ImprintedHead
    ) -> None:
        data = datamodule_of(trainer) if self.data is None else self.data
        with in_training(pl_module, data, trainer), trainer.precision_plugin.forward_context():
            accuracy = compare_statistics(
                pl_module,
                self.layer,
                head,
                lambda: in_mixed_order(self._loader(trainer)),
                self.unpack,
                transfer_of(trainer, pl_module, data),
            )
        if accuracy is not None and accuracy.differ and trainer.is_global_zero:
            warn(
                f"the head in the place of {self.layer!r} is right on {100 * accuracy.running:.0f} "
                f"% of the training samples, but on {100 * accuracy.batch:.0f} % where batch norm "
                "uses the statistics of each batch, as it does in training: fine-tuning starts "
                "from there and may end below the head. "
                f"ImprintCallback(freeze_batch_norm=True, backbone_lr={BACKBONE_LR:g}) keeps the "
                "running statistics and takes small steps"
            )

    def _loader(self, trainer: Trainer) -> Any:
        if self.data is not None:
            return loader_of(self.data)
        source = trainer.fit_loop._data_source
        if source.instance is None or not source.is_defined():
            raise ImprintError("the Trainer has no training data to imprint from: give data=")
        return source.dataloader()

    def _limit(
        self, trainer: Trainer, loader: Any, num_classes: int | None
    ) -> Callable[[int, Tensor], bool]:
        """Whether the pass goes on after a batch."""
        limit = trainer.limit_train_batches
        if self.data is not None or (limit == 1.0 and isinstance(limit, float)):
            return lambda index, labels: True
        batches = limit if isinstance(limit, int) else int(limit * len(loader))
        seen = torch.zeros(num_classes or 1)

        def go_on(index: int, labels: Tensor) -> bool:
            known = labels[(labels >= 0) & (labels < len(seen))].cpu()
            seen[known] = 1
            if index + 1 < batches:
                return True
            everywhere = trainer.strategy.reduce(seen.to(labels.device), reduce_op="sum")
            return bool((everywhere == 0).any())

        return go_on


@contextmanager
def _once_set_up(pl_module: LightningModule, action: Callable[[], None]) -> Iterator[None]:
    """Runs `action` when the module's own `setup` is done, once, unless the context ends before.

    Data sets and layers that are made in `setup` exist by then, and there is no hook of a callback
    between it and the optimizer.
    """
    own = pl_module.setup

    def setup(stage: str) -> None:
        # Removed already where another callback's is around this one.
        pl_module.__dict__.pop("setup", None)
        own(stage)
        action()

    pl_module.__dict__["setup"] = setup
    try:
        yield
    finally:
        if pl_module.__dict__.get("setup") is setup:
            del pl_module.__dict__["setup"]


def _configured() -> None:
    """Stands in for a `configure_model` that has been called."""


def _as_in_the_file(
    layer: str, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """A hook of `load_state_dict`: whatever a checkpoint has in the layer's place, head or layer,
    the module has, too, when it is loaded.

    It does not know the callback: whoever copies the module and its hooks need not copy data.
    """
    has_head = f"{prefix}{layer}.proxies" in state_dict
    is_head = hasattr(layer_of(module, layer), "replaced")
    if has_head and not is_head:
        put_head(module, layer, ImprintedHead())
    elif is_head and not has_head:
        detach(module, layer)


def _of_all_rows(store: RowStore, function: Callable[[Tensor, Tensor], Result]) -> Result:
    """`function(x, y)` of the rows of all ranks, run by rank 0, on every rank."""
    rows = store.gather()

    def of_rows() -> Result:
        assert rows is not None  # Rank 0 has them.
        return function(*rows)

    return on_rank_zero(of_rows)


def _is_trainable(head: ImprintedHead, embeddings: Tensor) -> bool:
    if not head.proxies.requires_grad:
        return False
    with torch.enable_grad():
        scores = head(embeddings).sum()
    (gradient,) = torch.autograd.grad(scores, head.proxies, allow_unused=True)
    return gradient is not None


def _measure(head: ImprintedHead, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    C = head.num_classes
    outside = (y < 0) | (y >= C)
    if outside.any():
        raise ImprintError(
            f"label {int(y[outside][0])} of the validation data is out of range for a head of {C} "
            f"classes (0..{C - 1}): give num_classes=, or training data with every class"
        )
    device = head.proxies.device
    C = max(C, 2)  # torchmetrics takes no fewer
    labels = torch.cat([head(rows.to(device)).argmax(1) for rows in x.split(4096)]).cpu()
    return {
        "accuracy": multiclass_accuracy(labels, y, C, average="micro"),
        "balanced_accuracy": multiclass_accuracy(labels, y, C, average=None)[y.unique()].mean(),
        "macro_f1": multiclass_f1_score(labels, y, C, average="macro"),
    }
