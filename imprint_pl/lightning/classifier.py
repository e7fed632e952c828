"""ImprintedClassifier: a frozen backbone and an imprinted head as a LightningModule.

A thin shell: it embeds the training set during one epoch, has the head imprinted after the last
batch, and measures. The maths is in `imprinting.py` and below.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from imprint_pl.data.batch import images_of, split_batch
from imprint_pl.data.lightning_packages import both
from imprint_pl.data.loaders import loader_at, sampler_length
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.files import damaged
from imprint_pl.lightning.checkpoint import (
    check_checkpoint,
    hyperparameters,
    keep_loadable,
    read_checkpoint,
)
from imprint_pl.lightning.epoch import (
    ImprintEpoch,
    check_saved,
    empty,
    no_head,
    outside_the_trainers_precision,
)
from imprint_pl.lightning.growing import Growing
from imprint_pl.lightning.intended_warnings import IntendedWarnings
from imprint_pl.lightning.layer import averaged_copies
from imprint_pl.lightning.metrics import TaskMetrics, check_labels, places_of
from imprint_pl.method.recipes import resolve
from imprint_pl.method.selection import checked_bounds
from imprint_pl.numerics.labels import names_of
from imprint_pl.training_set.kept import KEEP

# Above this, a value a class would drown a logger; `class_accuracy` and the run folder have them.
LOGGED_CLASSES = 20


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
        recipe: "auto" (compares recipes on held-out embeddings and takes the best), "kernel" (what
            auto mostly takes), "robust" (the paper's best: k-means, 20 proxies a class), "qi" (the
            class mean), "hosoda", "janson", "ls" (least squares), "knn" (nearest neighbours),
            "whitened", "ridge", "lda" or "ranpac".
        norm_pre: normalisation before GEN: "none", "l2", "power", "centre", "whiten",
            "random_projection", "nystrom", or a list of them. The recipe's where not given, as are
            all the parts below.
        gen: generator of the proxies: "mean", "kmeans", "kmedoids", "random", "fps", "cov_max",
            "all", "ls", "kls", "ridge", "kridge" or "lda".
        k: proxies a class.
        norm_post: normalisation of the proxies: "none", "l2" or "quantile".
        norm_inf: normalisation of embeddings at inference; "same" is NORM_pre with what it learned.
        agg: from proxies to class scores: "max", "mnn" (m nearest proxies) or "logsumexp".
        m: of mnn: how many proxies vote.
        distance: of mnn: "euclidean", "cosine", "manhattan", "chebyshev" or "mahalanobis".
        votes: of mnn: "uniform", "weighted_by_distance" or "softmax".
        temperature: of softmax votes and logsumexp.
        lam: λ of "ls", "kls", "ridge" and "kridge"; for ridge also "gcv" (generalised
            cross-validation) or "holdout".
        intercept: of ridge: whether there is one.
        shrinkage: of "whiten" and "lda": from 0 to 1, towards round classes, or "oas" (chosen from
            the embeddings).
        prior: of "lda": "empirical" or "uniform".
        projection_dim: features of "random_projection" and "nystrom".
        width: of "nystrom": of the kernel, in median distances.
        engine: of k-means: "auto", "faiss", "torch" or "exact".
        as_published: do quantile and mnn as the paper's code does, faults included.
        weibull: imprint only the samples whose distance to their class mean lies between these two
            quantiles of a Weibull distribution, such as [0.1, 0.9].
        keep: what to keep of the training set, so that classes can come and go later (`state`):
            "embeddings" (float32; suffices for every step) or "moments" (sums).
        keep_sources: with embeddings, also keep what names the images: their files, or "train 17".
        max_per_class: keep the embeddings of at most so many samples of each class, drawn at random
            as they go by; GEN and NC1 see these. It bounds the memory of recipes that need the
            embeddings; not with `keep`.
        accept: share of training samples to accept, such as 0.95: sets a threshold, below which
            `predict` says "none of these".
        seed: fixes every random choice.
        image_size: side of the backbone's input in pixels; its own by default.
        pretrained: load the backbone's weights; without them it is random.
        weights: file with the backbone's weights, instead of a download.
        preprocess: for an `nn.Module` that is to read uint8 images: `dict(size=, mean=, std=)`.
        precision: "32", "bf16" or "16": autocast inside the backbone.
        compile: `torch.compile` the backbone.
        save_backbone: keep the backbone in checkpoints too.

    The data module may have `class_names`, `num_classes`, and `class_counts` `(C,)`, the training
    samples of each class; without the counts sums for NC1 take C times the memory. Data that are
    validated or tested may have the head's classes in another order, or some of them: they are
    found by name.

    Logged: `train/nc1`, `train/temperature`, `train/embed_seconds`, `train/gen_seconds`,
    `train/images_per_second`; `val/…` and `test/…`: `accuracy` (micro), `macro_f1`,
    `calibration_error` (expected, 15 bins), and `accuracy/<class>` up to 20 classes. Of several
    loaders each has its own, `val/accuracy/dataloader_idx_0`, ….

    Attributes:
        class_accuracy: `(C,)`, of the last validation or test; `(L, C)` where it had L loaders.
    """

    def __init__(
        self,
        # A str or an nn.Module; so annotated, `fit --help` would list every module of PyTorch.
        backbone: Any = "efficientnet_lite0",
        recipe: str = "auto",
        norm_pre: str | list[str] | None = None,
        gen: str | None = None,
        k: int | None = None,
        norm_post: str | None = None,
        norm_inf: str | list[str] | None = None,
        agg: str | None = None,
        m: int | None = None,
        distance: str | None = None,
        votes: str | None = None,
        temperature: float | None = None,
        lam: float | str | None = None,
        intercept: bool | None = None,
        shrinkage: float | str | None = None,
        prior: str | None = None,
        projection_dim: int | None = None,
        width: float | None = None,
        engine: str | None = None,
        as_published: bool | None = None,
        weibull: list[float] | None = None,
        keep: str | None = None,
        keep_sources: bool = False,
        max_per_class: int | None = None,
        accept: float | None = None,
        seed: int = 0,
        image_size: int | None = None,
        pretrained: bool = True,
        weights: str | None = None,
        preprocess: dict[str, Any] | None = None,
        precision: str | int = "32",
        compile: bool = False,
        save_backbone: bool = False,
    ) -> None:
        super().__init__()
        # A module among the hyperparameters would break weights_only loading; nor does a path of
        # this machine belong into a checkpoint. The name of a torchvision entry does.
        ignored = [] if isinstance(backbone, str) else ["backbone"]
        if weights is not None and not str(weights).isidentifier():
            ignored.append("weights")
        self.save_hyperparameters(ignore=ignored)
        self.automatic_optimization = False
        self.strict_loading = False
        self.save_backbone = save_backbone
        self.seed = seed
        self.weibull = None if weibull is None else checked_bounds(weibull)
        self.keep, self.keep_sources, self.accept = keep, keep_sources, accept
        if keep is not None and keep not in KEEP:
            raise ImprintError(
                f"keep={keep!r}{did_you_mean(keep, KEEP)}: give one of {', '.join(KEEP)}"
            )
        self.max_per_class = max_per_class
        if max_per_class is not None and max_per_class < 1:
            raise ImprintError(f"max_per_class={max_per_class}: give a number from 1 on")
        if max_per_class is not None and keep is not None:
            raise ImprintError(
                f"max_per_class={max_per_class} drops samples that keep={keep!r} has to keep: give "
                "one of them"
            )
        if accept is not None and not 0 < accept <= 1:
            raise ImprintError(f"accept={accept}: give a share above 0 and at most 1, such as 0.95")
        self.parts = resolve(
            recipe,
            norm_pre=norm_pre,
            gen=gen,
            k=k,
            norm_post=norm_post,
            norm_inf=norm_inf,
            agg=agg,
            m=m,
            distance=distance,
            votes=votes,
            temperature=temperature,
            lam=lam,
            intercept=intercept,
            shrinkage=shrinkage,
            prior=prior,
            projection_dim=projection_dim,
            width=width,
            engine=engine,
            as_published=as_published,
        )
        self.backbone = load_backbone(
            backbone,
            pretrained=pretrained,
            weights=weights,
            image_size=image_size,
            preprocess=preprocess,
            compile=compile,
            precision=str(precision),
        )
        self.head = self.parts.empty_head()
        # Those of each loader, by its number; None where there is no head to measure.
        self.metrics: dict[int, TaskMetrics] | None = None
        self.class_accuracy: Tensor | None = None
        # For each class of the data that are measured the head's label, where they differ.
        self._places: Tensor | None = None
        self._epoch: ImprintEpoch | None = None
        self._imprinted = self._cut_short = self._validated = self._warned = False

    @property
    def hparams_initial(self) -> Any:
        """As Lightning has it, for the loggers. They get one dict of module and DataModule: a name
        of both with two values, such as `seed`, is `model/seed` there."""
        own, data = super().hparams_initial, getattr(self._trainer, "datamodule", None)
        if data is not None and data._log_hyperparams:
            for name, theirs in data.hparams_initial.items():
                # Compared as Lightning does, which ends the fit otherwise.
                if name in own and not name.startswith("_"):
                    value = own[name]
                    if type(value) is not type(theirs) or value != theirs:
                        own[f"model/{name}"] = own.pop(name)
        return own

    @property
    def class_names(self) -> list[str]:
        """The C class names; numbers where the data had no names."""
        return [self.head.name_of(label) for label in range(self.head.num_classes)]

    def forward(self, images: Any) -> Tensor:
        """A batch of images (see `Backbone.forward`) → logits `(B, C)`; a softmax gives
        probabilities."""
        return self.head(self.embed(images))

    @torch.no_grad()
    def embed(self, images: Any) -> Tensor:
        """A batch of images → embeddings `(B, d)`, float32."""
        # A copy, not a part of something larger that it would keep in memory.
        return self.backbone(images).to(torch.float32, copy=True)

    def train(self, mode: bool = True) -> ImprintedClassifier:
        """The backbone stays in eval mode: frozen is not eval, BatchNorm would drift."""
        super().train(mode)
        self.backbone.eval()
        return self

    def configure_optimizers(self) -> None:
        """None: nothing is trained."""

    def configure_callbacks(self) -> list[Callback]:
        """Hides the warnings that a fit without an optimizer would draw, while it lasts."""
        # A Trainer keeps what an earlier fit has brought, and says so where it comes again.
        there = any(isinstance(c, IntendedWarnings) for c in self.trainer.callbacks)
        return [] if there else [IntendedWarnings()]

    # The imprint epoch.

    def setup(self, stage: str) -> None:
        if stage == "fit":
            if 0 in (self.trainer.limit_train_batches, self.trainer.max_epochs):
                # Before the head that is there is lost.
                raise ImprintError(no_head(self.trainer))
            self._epoch, self._imprinted = None, False
            for callback in self.trainer.callbacks:
                if isinstance(callback, both(StochasticWeightAveraging)):
                    raise ImprintError(
                        "StochasticWeightAveraging needs an optimizer, and imprinting has none: "
                        "leave it out of the Trainer's callbacks"
                    )
            # Empty and trainable: DDP refuses a module without a parameter to train.
            self.head.clear()
            # A Trainer that has done its epoch before would do none, and leave the head empty.
            self.trainer.fit_loop.epoch_progress.reset()

    def on_fit_start(self) -> None:
        # A gradient scaler (16-mixed) cannot step without gradients.
        if getattr(self.trainer.precision_plugin, "scaler", None) is not None:
            self.trainer.precision_plugin.scaler = None

    def on_train_epoch_start(self) -> None:
        self.head.clear()  # a second epoch
        self._epoch = ImprintEpoch(
            self.trainer,
            self.parts,
            self.seed,
            self.weibull,
            keep=self.keep,
            keep_sources=self.keep_sources,
            accept=self.accept,
            max_per_class=self.max_per_class,
        )
        self._warned = self._validated = False

    @torch.no_grad()
    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self._epoch is None:
            # Resumed from a checkpoint of a last batch, Lightning starts the next epoch unsaid.
            self.on_train_epoch_start()
        images, labels = self._epoch.split(batch)
        self._take(self.embed(images), labels)

    # Of a module that is compiled whole, the backbone is what gains.
    @torch.compiler.disable
    def _take(self, embeddings: Tensor, labels: Tensor) -> None:
        with outside_the_trainers_precision(self.device):
            self._epoch.add(embeddings, labels)
            # Before any callback's on_train_batch_end, where ModelCheckpoint writes, and before
            # validation.
            if self.trainer.is_last_batch:
                self._imprint()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._epoch is None:
            return
        if self.trainer.received_sigterm:
            # Lightning exits with status 0, and would say nothing.
            rank_zero_warn(
                f"SIGTERM ends the fit after {self._epoch.batches} training batches: no head is "
                "imprinted"
            )
        elif self.trainer.fit_loop.epoch_loop.done:
            # A callback has stopped the epoch: validation, too, comes before its end.
            self._imprint(cut_short=True)

    def _imprint(self, cut_short: bool = False) -> None:
        epoch, self._epoch = self._epoch, None
        if cut_short:
            epoch.cut_short()
        result = epoch.finish(self.backbone.classifier, self.device)
        if self.keep is not None:
            self.state = epoch.state
        result = self.trainer.strategy.broadcast(result)
        if isinstance(result, Exception):
            raise result
        state, logged = result
        # What averages weights has a copy of the module, made before, with an empty head.
        kept = [value for callback in self.trainer.callbacks for value in vars(callback).values()]
        copies = averaged_copies(self, "head", kept)
        for head in (self.head, *(copied.get_submodule(name) for copied, name in copies)):
            head.load_state_dict(state)
        self._imprinted, self._cut_short = True, cut_short
        absent = set(range(self.head.num_classes)) - set(self.head.proxy_classes.tolist())
        if absent:
            names = [self.head.name_of(label) for label in sorted(absent)]
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            rank_zero_warn(
                f"{len(names)} of {self.head.num_classes} classes had no sample in this shortened "
                f"epoch and are never predicted: {', '.join(names[:10])}{more}"
            )
        for name, value in logged.items():
            self.log(f"train/{name}", value, on_step=False, on_epoch=True, batch_size=1)
        # Without a step of Lightning's mock optimizer, ModelCheckpoint believes that nothing was
        # trained and saves nothing. Steps count while the loop of manual optimization runs.
        self.trainer.fit_loop.epoch_loop.manual_optimization.on_run_start()
        self.optimizers().step()

    def on_train_epoch_end(self) -> None:
        if self._epoch is not None:
            # The last batch, for which the head has waited, did not come.
            self._imprint(cut_short=True)
        if self.trainer.enable_validation and not self._validated:
            # Lightning did so before there was a head, or leaves it to a later epoch.
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
        elif not self.trainer.fast_dev_run:
            check_saved(self.trainer)

    # Validation and test.

    def on_validation_epoch_start(self) -> None:
        self._start_metrics("validate")

    def on_test_epoch_start(self) -> None:
        self._start_metrics("test")

    def _start_metrics(self, command: str) -> None:
        self.metrics, self._class_accuracies = None, {}
        if not self.head.is_empty:
            self._places = places_of(names_of(self.trainer.datamodule), self.head)
            self.metrics = {}
        elif self.trainer.state.fn != "fit":
            raise ImprintError(f"cannot {command}: {empty(self.trainer.ckpt_path)}")
        elif not self.trainer.sanity_checking and not self._warned:
            self._warned = True
            rank_zero_warn(
                "validation before the end of the imprint epoch is skipped: the head is still "
                "empty (val_check_interval < 1 makes no sense here)"
            )

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure("val", batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._measure("test", batch, batch_idx, dataloader_idx)

    def _measure(self, stage: str, batch: Any, batch_idx: int, number: int) -> None:
        if self.metrics is None:
            return
        if number not in self.metrics:
            self.metrics[number] = TaskMetrics(self.head.num_classes).to(self.device)
        loader = loader_at(number, getattr(self.trainer, f"{stage}_dataloaders"))
        images, labels = split_batch(batch)
        labels = self.labels_of_head(labels)
        self.metrics[number].add(self(images), labels, sampler_length(loader))
        batches = getattr(self.trainer, f"num_{stage}_batches")
        if len(batches) > 1 and batch_idx + 1 == batches[number]:
            # Lightning returns, for each loader, what was logged in a step of it.
            self._log_metrics(stage, number, "")

    def labels_of_head(self, labels: Tensor) -> Tensor:
        """The head's labels `(B,)` for those of the data that are measured, by the classes' names.

        Raises:
            ImprintError: a label that is none of the data's classes.
        """
        if self._places is None:
            return labels
        check_labels(labels, len(self._places))
        return self._places.to(labels.device)[labels]

    def on_validation_epoch_end(self) -> None:
        self._validated = self.metrics is not None
        self._finish_metrics("val")

    def on_test_epoch_end(self) -> None:
        self._finish_metrics("test")

    def _finish_metrics(self, stage: str) -> None:
        if self.metrics is None:
            return
        loaders = len(getattr(self.trainer, f"num_{stage}_batches"))
        for number in sorted(self.metrics.keys() - self._class_accuracies.keys()):
            # The only loader, or one whose last batch nobody could tell beforehand.
            self._log_metrics(stage, number, f"/dataloader_idx_{number}" if loaders > 1 else "")
        rows = self._class_accuracies
        missing = torch.full((self.head.num_classes,), torch.nan)
        together = torch.stack([rows.get(number, missing) for number in range(loaders)])
        self.class_accuracy = together if loaders > 1 else together[0]

    def _log_metrics(self, stage: str, number: int, suffix: str) -> None:
        """Logs what a loader gave. In a step of it Lightning adds the suffix itself."""
        values = self.metrics[number].compute()
        accuracies = values.pop("class_accuracy")
        self._class_accuracies[number] = accuracies.cpu()
        options = dict(on_step=False, on_epoch=True, batch_size=1, sync_dist=True)
        options["add_dataloader_idx"] = not suffix
        for name, value in values.items():
            shown = name in ("accuracy", "macro_f1")
            self.log(f"{stage}/{name}{suffix}", value, prog_bar=shown, **options)
        if self.head.num_classes <= LOGGED_CLASSES:
            for name, value in zip(self.class_names, accuracies, strict=True):
                if not value.isnan():  # a class without samples
                    self.log(f"{stage}/accuracy/{name}{suffix}", value, **options)

    def on_predict_start(self) -> None:
        if self.head.is_empty:
            raise ImprintError(f"cannot predict: {empty(self.trainer.ckpt_path)}")

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Images with or without labels → logits `(B, C)`; NaN for files that were skipped."""
        logits = self(images_of(batch))
        skipped = batch.get("skipped") if isinstance(batch, dict) else None
        if skipped:
            # A black image stands in for each: its class would pass for that of the file.
            logits = logits.index_fill(
                0, torch.tensor(list(skipped), device=logits.device), torch.nan
            )
        return logits

    # Checkpoints: the head, and what names the backbone.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **kwargs)
        if not self.save_backbone:
            prefix = kwargs.get("prefix", "") + "backbone."
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
        return state

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # A state dict without the backbone is whole: the one that is there stays, and a strict
        # load misses nothing.
        own = f"{prefix}backbone."
        if not any(key.startswith(own) for key in state_dict):
            state_dict.update(self.backbone.state_dict(prefix=own))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["backbone"] = self.backbone.source()
        checkpoint["cut_short"] = self._cut_short
        keep_loadable(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Not `self.head`, which may have the parts of another fit.
        trial = self.parts.empty_head()
        check_checkpoint(checkpoint, trial, self.backbone)
        head = {
            name.removeprefix("head."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("head.")
        }
        trial.load_state_dict(head)
        trial.check()
        self._cut_short = bool(checkpoint.get("cut_short"))
        if trial.is_empty or self._cut_short:
            # Saved within the epoch, or where it was stopped, and the embeddings are gone: a fit
            # that resumes does it again from its start.
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
        """The classifier of a checkpoint that `fit` wrote, or a stranger: the file is checked, no
        code comes from it, and its class is this one.

        Args:
            checkpoint_path: a file, or an open one.
            map_location: where its tensors go; where they were, or to the CPU.
            strict: whether tensors that only the file or only the model has are an error. Those of
                the backbone are not, where the file has none of them.
            kwargs: keywords of the constructor that beat the file's, such as `backbone`.

        The other arguments are Lightning's; `hparams_file` is refused, `weights_only` always holds.

        Raises:
            ImprintError: no such file, damaged, forged, no checkpoint, or of another backbone; a
                keyword that the constructor does not have.
        """
        if hparams_file is not None:
            raise ImprintError(f"hparams_file={hparams_file!r}: give hyperparameters as keywords")
        where = map_location or (None if torch.cuda.is_available() else "cpu")
        checkpoint = read_checkpoint(checkpoint_path, where)
        known = _keywords(cls)
        for name in kwargs:
            if name not in known:
                raise ImprintError(
                    f"{cls.__name__} has no argument {name!r}{did_you_mean(name, known)}"
                )
        given = {n: v for n, v in hyperparameters(checkpoint).items() if n in known} | kwargs
        # Not an OSError: of weights that cannot be fetched.
        errors = (RuntimeError, TypeError, KeyError, IndexError, ValueError)
        with damaged(checkpoint_path, "a checkpoint that `fit` wrote", errors):
            model = _made(cls, given, kwargs)
            model.on_load_checkpoint(checkpoint)
            keys = model.load_state_dict(checkpoint["state_dict"], strict=False)
        foreign = [*keys.missing_keys, *keys.unexpected_keys]
        if strict and foreign:
            raise ImprintError(
                f"{checkpoint_path}: the checkpoint and {cls.__name__} differ in {foreign[0]!r}: "
                "strict=False passes over it"
            )
        if model.head.is_empty:
            rank_zero_warn(empty(checkpoint_path))
        return model.to(next(iter(checkpoint["state_dict"].values())).device)


def _keywords(cls: type) -> dict[str, None]:
    """What a constructor takes, that of a subclass with `**kwargs` included, in order."""
    known: dict[str, None] = {}
    for part in cls.__mro__:
        if "__init__" in vars(part):
            parameters = list(inspect.signature(part.__init__).parameters.values())[1:]
            variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            known |= dict.fromkeys(p.name for p in parameters if p.kind not in variable)
            if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
                break
    return known


def _made(cls: type, given: dict[str, Any], typed: dict[str, Any]) -> ImprintedClassifier:
    """`cls(**given)`, without what a subclass gives to ImprintedClassifier itself."""
    try:
        return cls(**given)
    except TypeError as error:
        if cls is ImprintedClassifier:
            raise
        twice = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
        if twice and twice[1] in given and twice[1] not in typed:
            return _made(cls, {n: v for n, v in given.items() if n != twice[1]}, typed)
        raise ImprintError(
            f"{cls.__name__} cannot be made from the checkpoint's hyperparameters ({error}): give "
            "what it needs as keywords of load_from_checkpoint"
        ) from error
