"""ImprintedClassifier: a frozen backbone and an imprinted head as a LightningModule.

The module embeds the training set during one epoch, has the head imprinted after the last batch,
and measures validation and test. `epoch.py`, `metrics.py` and `checkpoint.py` do the work; the
maths is in `imprinting.py` and below.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy

from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.batch import images_of, split_batch
from imprint_pl.data.batch_hooks import datamodule_of
from imprint_pl.data.lightning_packages import callbacks_of
from imprint_pl.embedding.backbone import Backbone, load_backbone
from imprint_pl.errors import ImprintError
from imprint_pl.lightning.checkpoint import (
    empty,
    keep_loadable,
    leave_out_backbone,
    load_classifier,
    put_backbone,
    saved_head,
    saved_max_side,
)
from imprint_pl.lightning.epoch import (
    EpochOptions,
    ImprintEpoch,
    warn_of_absent,
)
from imprint_pl.lightning.following import check_made_with, follow_checkpoint, follow_data
from imprint_pl.lightning.growing import Growing
from imprint_pl.lightning.intended_warnings import IntendedWarnings
from imprint_pl.lightning.layer import averaged_copies, values_of_callbacks
from imprint_pl.lightning.metrics import Measurement, TaskMetrics
from imprint_pl.lightning.trainer import (
    check_saved,
    check_trainer,
    no_head,
    outside_the_trainers_precision,
    samples_to_come,
)
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.recipes import AUTO, Auto, Recipe, RecipeName, resolve
from imprint_pl.method.selection import checked_bounds
from imprint_pl.parts.by_name import import_parts

# A placeholder for the widths of layers, which are only known after the first batch.
UNKNOWN_WIDTHS = [1]


class ImprintedClassifier(Growing, LightningModule):
    """Images to class scores, by a head imprinted in one epoch without a gradient.

    Use it with a plain `Trainer(max_epochs=1)`. Training images are embedded in the order of the
    loader; with the last batch the head is filled, before that epoch's validation. Fitting again
    imprints again; resuming from a finished checkpoint has nothing left to do. An epoch that ends
    early (`max_time`, `should_stop`, a loader that gives less than its `len()`) imprints what it
    has seen, with a warning; resuming from its checkpoint, or from one within an epoch, starts the
    epoch again. A fit without any training batch is an `ImprintError`. "qi", "hosoda", "janson",
    "ls", "lda", "ridge" and "ranpac" keep only sums of the embeddings during the epoch (see
    `EmbeddingSums`): their memory does not grow with the number of images.

    Args:
        backbone: "efficientnet_lite0" (embedded, needs no download), "torchvision/<name>",
            "timm/<name>", or any `nn.Module`; see `load_backbone`.
        recipe: "auto" (compares recipes on held-out embeddings and takes the best), or a name in
            `RECIPES`, such as "kernel" (what auto mostly takes) or "robust" (the paper's best).
        weibull: imprint only the samples whose distance to their class mean lies between these two
            quantiles of a Weibull distribution, such as [0.1, 0.9].
        keep: what to keep of the training set, so that classes can come and go later (`state`):
            "embeddings" (float32; suffices for every step) or "moments" (sums).
        keep_sources: with embeddings, also keep what names the images: their files, or "train 17".
        max_per_class: keep the embeddings of at most so many samples of each class, drawn at random
            as they go by; GEN and NC1 see these. It bounds the memory of recipes that need the
            embeddings; not with `keep`.
        accept: share of training samples to accept, such as 0.95: fits a score of familiarity and
            sets a threshold on it, below which `predict` says "none of these". With
            `keep="embeddings"` both are fitted anew when classes come or go.
        coverage: probability that a prediction set holds the truth, such as 0.95: `predict` then
            lists the classes that may be true. It can be asked for another one without a new fit.
        memory_budget: GiB of memory for the embeddings and what is computed of them; half of what
            is free by default. Above it they go to files without a name in the folder for temporary
            files (`TMPDIR`). Checkpoints do not keep it.
        seed: fixes every random choice.
        image_size: side of the backbone's input in pixels; its own by default.
        pretrained: load the backbone's weights; without them it is random.
        weights: file with the backbone's weights, instead of a download.
        preprocess: for an `nn.Module` that is to read uint8 images: `dict(size=, mean=, std=)`.
        precision: "32", "bf16" or "16": autocast inside the backbone.
        compile: `torch.compile` the backbone.
        layers: which layers of the backbone make the embedding, see `load_backbone`: "last", "all",
            or names of modules. Unset it is "all" for the recipe "auto" on images, and "last" for
            every other recipe, for embeddings, and for a module in which no other can be taken.
        views: "flip" averages the embeddings of an image and of its mirror image: a little more
            accurate, at twice the time.
        runtime: "torch", "onnxruntime", "openvino", or "auto" for what is fast on a CPU; see
            `load_backbone`. Checkpoints do not keep it.
        save_backbone: keep the backbone in checkpoints too.
        parts: `norm_pre, gen, k, norm_post, norm_inf, agg` and more; see `resolve`. A part of your
            own is an instance, or the import path of its class (`gen="my_parts.Trimmed"`), which
            the command line and checkpoints take, too; its keywords stand beside it.

    The data module may have `class_names`, `num_classes`, and `class_counts` `(C,)`, the training
    samples of each class; without the counts sums for NC1 take C times the memory. Data that are
    validated or tested may have the head's classes in another order, or some of them: they are
    found by name.

    Logged: `train/nc1`, `train/temperature`, `train/embed_seconds`, `train/gen_seconds`,
    `train/images_per_second`; `val/…` and `test/…`: `accuracy` (micro),
    `balanced_accuracy` (the mean of the classes'), `macro_f1`, `calibration_error` (expected,
    15 bins), and `accuracy/<class>` up to 20 classes. Of several
    loaders each has its own, `val/accuracy/dataloader_idx_0`, ….

    Attributes:
        max_side: longest side in pixels to which the fit's image files were shrunk; `None` where
            they kept their size. Later images are shrunk in the same way, unless their data module
            has a `max_side` of its own.
        class_accuracy: `(C,)`, that of the last validation or test; `(L, C)` if it had L loaders.
    """

    def __init__(
        self,
        # A str or an nn.Module. With this annotation `fit --help` would list all of PyTorch's
        # modules.
        backbone: Any = "efficientnet_lite0",
        recipe: RecipeName = "auto",
        *,
        weibull: list[float] | None = None,
        keep: str | None = None,
        keep_sources: bool = False,
        max_per_class: int | None = None,
        accept: float | None = None,
        coverage: float | None = None,
        memory_budget: float | None = None,
        seed: int = 0,
        image_size: int | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        preprocess: dict[str, Any] | None = None,
        precision: str | int = "32",
        compile: bool = False,
        layers: str | list[str] | None = None,
        views: str = "none",
        runtime: str = "auto",
        save_backbone: bool = False,
        **parts: Any,
    ) -> None:
        super().__init__()
        # A module among the hyperparameters would break weights_only loading, and paths of this
        # machine do not belong in a checkpoint. The name of a torchvision entry does.
        ignored = [] if isinstance(backbone, str) else ["backbone"]
        if weights is not None and not str(weights).isidentifier():
            ignored.append("weights")
        # Settings of this machine do not belong in a checkpoint either.
        ignored += ["runtime", "memory_budget"]
        self.save_hyperparameters(ignore=ignored)
        self.automatic_optimization = False
        self.strict_loading = False
        self.save_backbone = save_backbone
        self.seed = seed
        self.weibull = None if weibull is None else checked_bounds(weibull)
        self.options = EpochOptions(
            seed,
            self.weibull,
            keep,
            keep_sources,
            accept,
            coverage,
            max_per_class,
            memory_budget,
        )
        import_parts(parts)
        self._recipe, self._keywords = recipe, {**parts}
        parts["layer_widths"] = parts.get("layer_widths") or UNKNOWN_WIDTHS
        # Resolve the recipe before the weights are loaded, which takes long, so that mistakes show
        # at once. jsonargparse also finds the recipe's keywords by this call.
        self.parts = resolve(recipe, **parts)
        if isinstance(backbone, Backbone):
            check_made_with(backbone, layers, views)
            layers = backbone.reader.asked
        # `None` means that the user did not choose layers. Embeddings of several layers, or a
        # checkpoint, then decide.
        self._layers = layers
        self.backbone = load_backbone(
            backbone,
            pretrained=pretrained,
            weights=weights,
            image_size=image_size,
            preprocess=preprocess,
            compile=compile,
            precision=str(precision),
            layers=layers or ("auto" if recipe == AUTO else "last"),
            views=views,
            runtime=runtime,
        )
        # The familiarity may take a quarter of the backbone's size, if the backbone has weights.
        if size := sum(p.nbytes for p in self.backbone.parameters() if not is_lazy(p)):
            self.options = replace(self.options, most_bytes=max(1, size // 4))
        self._finish_recipe(self.backbone.layer_widths)
        self.head = self.parts.empty_head()
        self.max_side: int | None = None
        self.class_accuracy: Tensor | None = None
        # None if there is no head to measure.
        self._evaluation: Measurement | None = None
        self._epoch: ImprintEpoch | None = None
        self._imprinted = self._cut_short = self._validated = self._warned = False
        self.register_state_dict_post_hook(leave_out_backbone)
        self.register_load_state_dict_pre_hook(put_backbone)

    def _finish_recipe(self, layer_widths: list[int] | None) -> Recipe | Auto:
        """Return the recipe for embeddings of these layers, and store the widths in the
        hyperparameters."""
        self.parts = self._resolved(layer_widths)
        widths = self.parts.parameters.get("layer_widths")
        noted = {"layers": self.backbone.layers_in_short}
        noted["layer_widths"] = None if widths == UNKNOWN_WIDTHS else widths
        both: list[Any] = [self._hparams, self._hparams_initial]
        for known in both:
            known.update({n: v for n, v in noted.items() if v is not None or n in known})
        return self.parts

    def _resolved(self, layer_widths: list[int] | None) -> Recipe | Auto:
        """Return the recipe for embeddings of these layers; widths that the user gave win."""
        widths = self._keywords.get("layer_widths") or layer_widths or UNKNOWN_WIDTHS
        return resolve(self._recipe, **(self._keywords | {"layer_widths": widths}))

    @property
    def hparams_initial(self) -> Any:
        """Lightning's initial hyperparameters, for the loggers. These get one dict for module and
        DataModule, in which a name with two values, such as `seed`, becomes `model/seed`."""
        own, data = super().hparams_initial, getattr(self._trainer, "datamodule", None)
        if data is not None and data._log_hyperparams:
            for name, theirs in data.hparams_initial.items():
                # Compare as Lightning does, which would otherwise raise and end the fit.
                if name in own and not name.startswith("_"):
                    value = own[name]
                    if type(value) is not type(theirs) or value != theirs:
                        own[f"model/{name}"] = own.pop(name)
        return own

    @property
    def metrics(self) -> dict[int, TaskMetrics] | None:
        """The metrics of the last validation or test, by the number of the loader; `None` if there
        was no head to measure."""
        return None if self._evaluation is None else self._evaluation.metrics

    @property
    def class_names(self) -> list[str]:
        """The C class names; numbers if the data had no names."""
        return [self.head.name_of(label) for label in range(self.head.num_classes)]

    def forward(self, images: Any) -> Tensor:
        """Compute logits; a softmax gives probabilities.

        Args:
            images: a batch of images, see `Backbone.forward`.

        Returns:
            `(B, C)`.
        """
        return self.head(self.embed(images))

    @torch.no_grad()
    def embed(self, images: Any) -> Tensor:
        """Embed a batch of images.

        Args:
            images: as for `forward`.

        Returns:
            `(B, d)`, float32.
        """
        # Copy, since a view would keep a larger tensor in memory.
        return self.backbone(images).to(torch.float32, copy=True)

    def train(self, mode: bool = True) -> ImprintedClassifier:
        """Sets the mode of all parts but the backbone, which stays in eval mode: in train mode the
        statistics of BatchNorm would change even without gradients."""
        super().train(mode)
        self.backbone.eval()
        return self

    def configure_optimizers(self) -> None:
        """Returns no optimizer, since nothing is trained."""

    def configure_callbacks(self) -> list[Callback]:
        """Adds the callback that hides warnings about a fit without an optimizer."""
        # A Trainer keeps the callbacks of an earlier fit, and reports it if one is added again.
        there = any(isinstance(c, IntendedWarnings) for c in callbacks_of(self.trainer))
        return [] if there else [IntendedWarnings()]

    # The imprint epoch.

    def setup(self, stage: str) -> None:
        if stage == "fit":
            # Check the Trainer before the current head is cleared.
            check_trainer(self.trainer)
            self._epoch, self._imprinted = None, False
            # An empty head is still trainable: DDP refuses a module without trainable parameters.
            self.head.clear()
            # A Trainer that has run its epoch before would run none and leave the head empty.
            self.trainer.fit_loop.epoch_progress.reset()
            data = datamodule_of(self.trainer)
            self.max_side = data.max_side if isinstance(data, ImageDataModule) else None
        self._shrink_images()

    def _shrink_images(self) -> None:
        """Makes the DataModule read images as in the fit; call it before its loaders are made."""
        data = datamodule_of(self.trainer)
        if isinstance(data, ImageDataModule):
            data.shrink_for(self.max_side, self.backbone.least_side)

    def on_fit_start(self) -> None:
        # A gradient scaler (16-mixed) cannot step without gradients.
        plugin: Any = self.trainer.precision_plugin
        if getattr(plugin, "scaler", None) is not None:
            plugin.scaler = None

    def on_train_epoch_start(self) -> None:
        self._start_epoch()

    def _start_epoch(self) -> ImprintEpoch:
        self.head.clear()  # remove the result of an earlier epoch
        self._epoch = ImprintEpoch(self.trainer, self.parts, self.options)
        self.backbone.expect(self._epoch.samples)
        self._warned = self._validated = False
        return self._epoch

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        # If a fit resumes from a checkpoint of the last batch, Lightning starts the next epoch
        # without calling its hook.
        epoch = self._epoch or self._start_epoch()
        images, labels = epoch.split(batch)
        embeddings = self.embed(images)
        if epoch.batches == 0:
            epoch.begin(self._recipe_of_first(images, embeddings, epoch.facts.layer_widths))
        self._take(epoch, embeddings, labels)

    def _recipe_of_first(
        self, images: Any, embeddings: Tensor, told: list[int] | None
    ) -> Recipe | Auto:
        """Returns the recipe for the layers of the first batch.

        Args:
            images: the images of the batch.
            embeddings: `(B, d)`, their embeddings.
            told: the widths of the layers, if the data are embeddings and provide them.
        """
        widths = own = self.backbone.layer_widths
        if isinstance(images, Tensor) and images.ndim == 2:
            # The data are embeddings, which may come from another backbone.
            fits = own is not None and sum(own) == embeddings.shape[1]
            widths = told or (own if fits else None)
            follow_data(self.backbone, widths, self._layers)
        return self._finish_recipe(widths or [embeddings.shape[1]])

    # Do not compile this: if the whole module is compiled, only the backbone gains speed.
    @torch.compiler.disable
    def _take(self, epoch: ImprintEpoch, embeddings: Tensor, labels: Tensor) -> None:
        with outside_the_trainers_precision(self.device):
            epoch.add(embeddings, labels)
            # Imprint before validation and before any callback's on_train_batch_end, in which
            # ModelCheckpoint writes.
            if self.trainer.is_last_batch:
                self._imprint(epoch)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._epoch is None:
            return
        if self.trainer.received_sigterm:
            # Lightning exits with status 0 without any message.
            rank_zero_warn(
                f"SIGTERM ends the fit after {self._epoch.batches} training batches: no head is "
                "imprinted"
            )
        elif self.trainer.fit_loop.epoch_loop.done:
            # A callback has stopped the epoch. Imprint now, since validation comes before the
            # epoch's end.
            self._imprint(self._epoch, cut_short=True)

    def _imprint(self, epoch: ImprintEpoch, cut_short: bool = False) -> None:
        self._epoch = None
        if cut_short:
            epoch.cut_short()
        if self.options.keep is not None:
            self.state = None
        finished = epoch.finish(self.backbone.classifier, self.device)
        if self.options.keep is not None:
            self.state = finished.state
        # Averaging callbacks copied the module when its head was empty, so update the copies, too.
        copies = averaged_copies(self, "head", values_of_callbacks(self.trainer))
        for module, name in [(self, "head"), *copies]:
            cast(ImprintedHead, module.get_submodule(name)).take(finished.head)
        self._imprinted, self._cut_short = True, cut_short
        warn_of_absent(self.head)
        for name, value in finished.logged.items():
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=1)
        # Count a step of Lightning's mock optimizer: otherwise ModelCheckpoint assumes that nothing
        # was trained and saves nothing. Steps only count while the loop of manual optimization
        # runs.
        self.trainer.fit_loop.epoch_loop.manual_optimization.on_run_start()
        cast(LightningOptimizer, self.optimizers()).step()

    def on_train_epoch_end(self) -> None:
        if self._epoch is not None:
            # The last batch did not come, so the head was not imprinted yet.
            self._imprint(self._epoch, cut_short=True)
        if self.trainer.enable_validation and not self._validated:
            # Validate now: Lightning did so before there was a head, or would do so in a later
            # epoch.
            self.trainer.validating = True
            self.trainer.fit_loop.epoch_loop.val_loop.run()
            self.trainer.training = True
        if self.trainer.max_epochs != 1:
            rank_zero_info(
                f"Imprinting takes one epoch, max_epochs={self.trainer.max_epochs} would imprint "
                "the same again: stopping here. Give max_epochs=1."
            )
            self.trainer.should_stop = True

    def on_fit_end(self) -> None:
        if self.head.is_empty:
            raise ImprintError(no_head(self.trainer))
        if not self._imprinted:
            rank_zero_info(
                f"the fit of {self.trainer.ckpt_path} was finished: nothing was left to imprint or "
                "to validate; its head is loaded"
            )
        else:
            check_saved(self.trainer)

    # Validation and test share these hooks.

    def on_validation_epoch_start(self) -> None:
        self._evaluation = None
        if not self.head.is_empty:
            self._evaluation = Measurement(self, self.head)
            if self.trainer.state.fn != "fit":
                self.backbone.expect(samples_to_come(self.trainer))
        elif self.trainer.state.fn != "fit":
            command = "test" if self.trainer.testing else "validate"
            raise ImprintError(f"cannot {command}: {empty(self.trainer.ckpt_path)}")
        elif not self.trainer.sanity_checking and not self._warned:
            self._warned = True
            rank_zero_warn(
                "validation before the end of the imprint epoch is skipped: the head is still "
                "empty (val_check_interval < 1 makes no sense here)"
            )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self._evaluation is not None:
            images, labels = split_batch(batch)
            labels = self.labels_of_head(labels)
            self._evaluation.add(self(images), labels, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._validated = self._evaluation is not None
        if self._evaluation is not None:
            self.class_accuracy = self._evaluation.finish()

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def labels_of_head(self, labels: Tensor) -> Tensor:
        """Turns labels `(B,)` of the measured data into the head's labels, by the classes' names.

        Raises:
            ImprintError: a label that is none of the data's classes.
        """
        return labels if self._evaluation is None else self._evaluation.labels_of_head(labels)

    def on_predict_start(self) -> None:
        if self.head.is_empty:
            raise ImprintError(f"cannot predict: {empty(self.trainer.ckpt_path)}")
        self.backbone.expect(samples_to_come(self.trainer))

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Compute the logits `(B, C)` of a batch with or without labels; NaN for skipped files."""
        logits = self(images_of(batch))
        skipped = batch.get("skipped") if isinstance(batch, dict) else None
        if skipped:
            # Each skipped file was replaced by a black image. Without NaN its class would look like
            # that of the file.
            logits = logits.index_fill(
                0, torch.tensor(list(skipped), device=logits.device), torch.nan
            )
        return logits

    # Checkpoints hold the head, and a description of the backbone.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["backbone"] = self.backbone.source()
        checkpoint["cut_short"] = self._cut_short
        if self.max_side is not None:
            checkpoint["max_side"] = self.max_side
        keep_loadable(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        follow_checkpoint(self.backbone, checkpoint, self._layers)
        self._finish_recipe(dict(checkpoint["hyper_parameters"]).get("layer_widths"))
        # Load into a new head first, since `self.head` may have the parts of another fit.
        saved = saved_head(checkpoint, self.parts.empty_head(), self.backbone)
        self._cut_short = bool(checkpoint.get("cut_short"))
        if self._trainer is None or self._trainer.state.fn != "fit":
            self.max_side = saved_max_side(checkpoint)
            if self._trainer is not None:
                # The Trainer has called `setup` before it read the checkpoint, so do this again.
                self._shrink_images()
        if saved.is_empty or self._cut_short:
            # The checkpoint was saved within the epoch, or when it was stopped, and the embeddings
            # are lost. A fit that resumes starts the epoch again.
            checkpoint.pop("loops", None)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> ImprintedClassifier:
        """Loads the classifier of a checkpoint. Files of strangers are safe: the file is checked,
        no code comes from it, and the result is always of this class.

        Args:
            checkpoint_path: a file, or an open one.
            map_location: the device for its tensors; by default the one that they were saved from,
                or the CPU.
            strict: whether tensors that only the file or only the model has are an error. A file
                without any tensor of the backbone is accepted.
            kwargs: keywords of the constructor that override the file's, such as `backbone`.

        The other arguments are Lightning's; `hparams_file` is refused, `weights_only` always holds.

        Returns:
            The classifier.

        Raises:
            ImprintError: the file is missing, damaged, forged, not a checkpoint, or of another
                backbone; or the constructor does not have a keyword.
        """
        if hparams_file is not None:
            raise ImprintError(f"hparams_file={hparams_file!r}: give hyperparameters as keywords")
        return load_classifier(
            ImprintedClassifier, cls, checkpoint_path, map_location, strict, kwargs
        )
