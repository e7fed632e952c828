"""Turns a name or any `nn.Module` into a frozen embedder of images: the box "FM" of the figure.

A `Backbone` includes its own preprocessing, so data modules return uint8 images of any size,
whatever backbone will read them. It knows nothing of tasks, labels or Lightning.
"""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imprint_pl.embedding.layers import ReadLayers
from imprint_pl.embedding.preprocess import PREPROCESS_KEYS, Preprocess, pair_of_sides
from imprint_pl.embedding.runtime import Runtime, hash_of_weights
from imprint_pl.embedding.sources import EMBEDDED, SOURCES, unknown
from imprint_pl.embedding.weights import load_fitting, read_state_dict
from imprint_pl.errors import ImprintError

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


class Backbone(nn.Module):
    """A frozen model with its own preprocessing, as `load_backbone` returns it.

    Attributes:
        name: The name, or the class of a module.
        model: The model.
        preprocess: Images to the model's input, or None.
        reader: Runs the model and puts the layers side by side.
        runtime: Decides whether torch or another runtime runs the model.
        embedding_dim: d, all layers together, or None where only a first forward pass can tell.
        image_size: Pixels, or (height, width) where they differ; None for embeddings and for
            modules without `preprocess`.
        classifier: Weights `(classes, d)` of the removed classifier, or None where they are not
            known.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        preprocess: Preprocess | None = None,
        *,
        embedding_dim: int | None = None,
        own: bool = False,
        pretrained: bool | None = None,
        weights: str | None = None,
        precision: str = "32",
        classifier: Tensor | None = None,
        layers: str | list[str] = "last",
        views: str = "none",
        runtime: str = "auto",
    ) -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ImprintError(f"precision {precision!r}: expected one of {', '.join(PRECISIONS)}")
        self.model = model.requires_grad_(False)
        self.preprocess = preprocess
        self.name, self.embedding_dim, self.precision = name, embedding_dim, precision
        self.classifier = classifier
        self.pretrained, self.weights, self._own = pretrained, weights, own
        size = preprocess.size if preprocess else None
        self.image_size = size[0] if size and size[0] == size[1] else size
        if not own:
            # Channels last makes convolutions up to 1.5 times faster; transformers stay as fast.
            model.to(memory_format=torch.channels_last)
        self.train()
        self.reader = ReadLayers(layers, views, name)
        self.runtime = Runtime(runtime, name, own, precision, size)
        if preprocess and self.reader.layers is None:
            self._find_layers(preprocess)

    @property
    def layers(self) -> list[str]:
        """Names of the modules that are read beside the last layer, in the order of the forward.

        Empty for the last layer alone, and before the first batch of a module of the user's own
        without `preprocess`.
        """
        return [layer.name for layer in self.reader.layers or ()]

    @property
    def layers_in_short(self) -> str | list[str] | None:
        """The layers as a value for `load_backbone`: "all", "last", or names; None if they are only
        known after the first batch."""
        if self.reader.layers is None:
            return None if self.reader.asked == "auto" else self.reader.asked
        if self.layers and self.reader.asked in ("all", "auto"):
            return "all"
        return self.layers or "last"

    def read(self, layers: str | list[str]) -> None:
        """Read other layers from now on; `layers` is as for `load_backbone`."""
        if self.layer_widths is not None:
            self.embedding_dim = self.layer_widths[-1]
        self.reader = ReadLayers(layers, self.views, self.name)
        if self.preprocess and self.reader.layers is None:
            self._find_layers(self.preprocess)

    @property
    def layer_widths(self) -> list[int] | None:
        """Widths of all layers, the last one's too; None where the last layer is alone.

        A module of the user's own without `preprocess` knows them after its first batch.
        """
        return self.reader.widths

    @property
    def views(self) -> str:
        """The views of an image that are averaged: "none" or "flip"."""
        return self.reader.views

    def expect(self, images: int | None) -> None:
        """Set how many images will come, for `runtime="auto"`; None means unknown."""
        if line := self.runtime.expect(self.model, images):
            # Imported on demand, so that a backbone alone need not wait for Lightning.
            from lightning.pytorch.utilities import rank_zero_info

            rank_zero_info(line)

    def runtime_on(self, device: torch.device) -> str:
        """Return the runtime for the model on a device: "torch", "onnxruntime" or "openvino".

        Raises:
            ImprintError: If the user asked for a runtime that cannot run there.
        """
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        return self.runtime.choose(self.model, device, dtype)

    def _find_layers(self, preprocess: Preprocess) -> None:
        channels = len(preprocess.config["mean"])
        home = next((p.device for p in self.model.parameters()), preprocess.mean.device)
        grey = torch.zeros(1, channels, *preprocess.size, device=home)
        self.reader.find(self.model, self._as_input(grey))
        self.embedding_dim = sum(self.layer_widths or ()) or self.embedding_dim

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode: the BatchNorm statistics of a frozen model must not change."""
        return super().train(False)

    @property
    def least_side(self) -> int | None:
        """Pixels that the shorter side of an image needs; None without preprocessing."""
        return None if self.preprocess is None else self.preprocess.least_side

    def source(self) -> dict[str, Any]:
        """Describe what the embeddings depend on, for checkpoints and caches.

        Returns:
            Plain values without paths. `sha256` is the hash of the model's state dict (names,
            types, shapes, values), computed at each call, since weights may change in place.
        """
        return {
            "name": self.name,
            "pretrained": self.pretrained,
            "weights": self.weights,
            "sha256": hash_of_weights(self.model),
            "image_size": list(size) if isinstance(size := self.image_size, tuple) else size,
            "precision": self.precision,
            "preprocess": self.preprocess.config if self.preprocess else None,
        } | self._wide_source()

    def _wide_source(self) -> dict[str, Any]:
        """Describe layers and views if they are not "last" and "none". Descriptions of the usual
        case stay as they were before these settings existed."""
        wide: dict[str, Any] = {}
        if self.reader.layers is None:
            wide["layers"] = self.reader.asked
        elif self.reader.layers:
            wide["layers"] = self.layers
        if self.views != "none":
            wide["views"] = self.views
        return wide

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        """Embed a batch.

        Args:
            images: uint8 `(B, C, H, W)`, or a list of uint8 `(C, H, W)` of any sizes; or floats,
                preprocessed images `(B, C, H, W)` or embeddings `(B, d)`. A module of the user's
                own gets all floats as they are.

        Returns:
            float32 `(B, d)`.

        Raises:
            ImprintError: If the batch has another shape or type, or the model's output is not
                `(B, d)`.
        """
        batch = self._prepare(images)
        if batch.ndim == 2 and not self._own:
            return batch.float()
        batch = self._as_float(batch)
        embeddings = self.runtime.run(self.model, self.reader, batch)
        if embeddings is None:
            dtype = PRECISIONS[self.precision]
            with torch.autocast(batch.device.type, dtype) if dtype else nullcontext():
                embeddings = self.reader(self.model, self._as_input(batch))
        if self.embedding_dim is None:
            self.embedding_dim = embeddings.shape[1]
        return embeddings.float()

    def _as_float(self, batch: Tensor) -> Tensor:
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        return batch.to(torch.float32 if parameter is None else parameter.dtype)

    def _as_input(self, batch: Tensor) -> Tensor:
        batch = self._as_float(batch)
        return batch if self._own else batch.contiguous(memory_format=torch.channels_last)

    def _prepare(self, images: Tensor | list[Tensor]) -> Tensor:
        if isinstance(images, Tensor):
            if images.is_floating_point() and (self._own or images.ndim in (2, 4)):
                return images
            tensors, ndim = [images], 4
        else:
            tensors, ndim = list(images), 3
        if not tensors:
            raise ImprintError("the batch is an empty list: give at least one image")
        for index, image in enumerate(tensors):
            kind = image.dtype if isinstance(image, Tensor) else type(image)
            if kind != torch.uint8 or image.ndim != ndim or 0 in image.shape[1:]:
                place = "a batch" if ndim == 4 else f"image {index} of a list"
                shape = tuple(getattr(image, "shape", ()))
                raise ImprintError(
                    f"{place} is {kind} of shape {shape}: expected uint8 (B, C, H, W), a list of "
                    "uint8 (C, H, W), float (B, C, H, W) or float (B, d), as tensors"
                )
        if self.preprocess is None:
            raise ImprintError(
                f"backbone {self.name!r} got uint8 images but has no preprocessing: pass "
                "preprocess=dict(size=…, mean=…, std=…), or float batches"
            )
        return self.preprocess(images if isinstance(images, Tensor) else tensors)


def load_backbone(
    backbone: str | nn.Module | None,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    image_size: int | None = None,
    preprocess: dict[str, Any] | None = None,
    compile: bool = False,
    precision: str = "32",
    layers: str | list[str] = "last",
    views: str = "none",
    runtime: str = "auto",
) -> Backbone:
    """Load a frozen embedder.

    Args:
        backbone: "efficientnet_lite0" or "efficientnet_lite2", whose weights are installed with
            this package; "efficientnet_lite1", whose weights are a package of their own;
            "torchvision/<name>"; "timm/<name>" or "timm/<name>.<tag>"; any `nn.Module`, which is
            frozen and put into eval mode in place; None or "identity" where batches are embeddings
            already.
        pretrained: False gives random weights, the same at every call.
        weights: A state dict (.pth, .safetensors) that fits the model, with or without the
            classifier; for torchvision also an entry such as "IMAGENET1K_V1" (default: its
            `DEFAULT`).
        image_size: Pixels, instead of the model's own; its resize-to-crop ratio is kept.
        preprocess: Keywords of `Preprocess`, so that a module of your own can read uint8 images.
        compile: Whether to compile the model with `torch.compile`.
        precision: "32", or "bf16" or "16" for autocast around the model. Embeddings are always
            float32.
        layers: "last"; "all": stages of the model, pooled, and the last layer, side by side;
            "auto": the same, or the last layer where no other can be taken; or names of modules,
            such as `["blocks.2", "blocks.5"]` or "blocks.2,blocks.5". `Backbone.layers` says which
            were taken.
        views: "flip" averages the embeddings of an image and its mirror image, at twice the time.
        runtime: "torch"; "onnxruntime" or "openvino", faster on CPUs (extras `onnx`, `openvino`);
            "auto": ONNX Runtime for models that gain much and where 1,000 images of 224 pixels, or
            more smaller ones, are to come (`Backbone.expect`), else torch. Embeddings differ by
            rounding. A GPU, `compile` and a precision other than "32" mean torch.

    Raises:
        ImprintError: If the name is unknown, weights are missing or do not fit, or a setting has
            no effect.

    Returns:
        The backbone, in eval mode.
    """
    if isinstance(backbone, Backbone):
        for what, value, own in (
            ("layers", layers, (backbone.reader.asked, backbone.layers)),
            ("views", views, (backbone.views,)),
        ):
            if value not in ("last" if what == "layers" else "none", *own):
                raise ImprintError(
                    f"{what}={value!r}, but this backbone is loaded with {what}={own[0]!r}: give "
                    f"{what} to load_backbone"
                )
        return backbone
    full_name = backbone if isinstance(backbone, str) and backbone != "identity" else None
    if full_name is not None and preprocess is not None:
        raise ImprintError(f"backbone {backbone!r} has its own preprocessing: drop preprocess=")
    if full_name is None and image_size is not None:
        raise ImprintError(f"image_size={image_size} needs a named backbone: use preprocess=")
    if image_size is not None:
        pair_of_sides(image_size, "image_size")
    prefix, _, name = (full_name or "").rpartition("/")
    is_entry = prefix == "torchvision" and str(weights).isidentifier()
    entry, file = (weights, None) if is_entry else (None, weights)
    if file and not pretrained:
        raise ImprintError(f"weights={str(file)!r} and pretrained=False: give one of the two")
    if full_name is None:
        result = _own(backbone, preprocess, file, precision, layers, views, runtime)
    else:
        if prefix not in SOURCES or not (prefix or name in EMBEDDED):
            raise unknown(full_name)
        # Models draw random weights even if these are overwritten. The global generator must not
        # change.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            source = SOURCES[prefix](name, image_size, pretrained, file, entry)
        result = Backbone(
            source.model,
            full_name,
            Preprocess(**source.preprocess),
            embedding_dim=source.embedding_dim,
            pretrained=pretrained,
            weights=Path(file).name if file else source.entry,
            precision=precision,
            classifier=source.classifier,
            layers=layers,
            views=views,
            runtime=runtime,
        )
    if compile:
        if result.runtime.is_explicit:
            raise ImprintError(
                f"runtime={runtime!r} and compile=True, which compiles for torch: give one of them"
            )
        # Module.compile works in place, so the keys of the state dict stay the same.
        result.model.compile()
    return result


def _own(
    backbone: str | nn.Module | None,
    preprocess: dict[str, Any] | None,
    file: str | None,
    precision: str,
    layers: str | list[str],
    views: str,
    runtime: str,
) -> Backbone:
    if backbone is not None and backbone != "identity" and not isinstance(backbone, nn.Module):
        raise ImprintError(f"backbone {backbone!r}: expected a name, an nn.Module or None")
    model = backbone if isinstance(backbone, nn.Module) else nn.Identity()
    if file:
        load_fitting(model, read_state_dict(file), file)
    prepare = None
    if preprocess is not None:
        unknown = sorted(set(preprocess) - set(PREPROCESS_KEYS))
        missing = [key for key in PREPROCESS_KEYS[:3] if key not in preprocess]
        if unknown or missing:
            raise ImprintError(
                f"preprocess: unknown keys {unknown}, missing keys {missing}; "
                f"it takes {', '.join(PREPROCESS_KEYS)}"
            )
        prepare = Preprocess(**preprocess)
    name = type(model).__name__ if model is backbone else "identity"
    if model is not backbone:
        if layers not in ("last", "auto") or views != "none":
            raise ImprintError(
                f"backbone {backbone!r} takes embeddings as they are, which have no "
                f"layers={layers!r} and views={views!r}: leave out both"
            )
        layers = "last"
    return Backbone(
        model,
        name,
        prepare,
        own=True,
        weights=Path(file).name if file else None,
        precision=precision,
        layers=layers,
        views=views,
        runtime=runtime,
    )
