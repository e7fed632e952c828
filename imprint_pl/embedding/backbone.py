"""A name, or any `nn.Module`, becomes a frozen embedder of images: the box "FM" of the figure.

A `Backbone` carries its own preprocessing, so data modules hand out uint8 images of any size and
never ask which backbone will read them. It knows nothing of tasks, labels or Lightning.
"""

import hashlib
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from imprint_pl.embedding.preprocess import PREPROCESS_KEYS, Preprocess, pair_of_sides
from imprint_pl.embedding.sources import EMBEDDED, SOURCES, unknown
from imprint_pl.embedding.weights import load_fitting, read_state_dict
from imprint_pl.errors import ImprintError

PRECISIONS = {"32": None, "bf16": torch.bfloat16, "16": torch.float16}


class Backbone(nn.Module):
    """A frozen model with its own preprocessing; made by `load_backbone`.

    Attributes: `name`; `embedding_dim` (d, None where only a first forward pass can tell);
    `image_size` (pixels, (height, width) where not square, None for embeddings and for modules
    without `preprocess`); `preprocess` (`Preprocess` or None); `model`; `classifier` (the weights
    `(classes, d)` of the classifier that was removed, or None where they are not known).
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
        classifier: torch.Tensor | None = None,
    ):
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
            # Convolutions run up to 1.5 times faster so, transformers at the same speed.
            model.to(memory_format=torch.channels_last)
        self.train()

    def train(self, mode: bool = True) -> "Backbone":
        """Stays in eval mode: a frozen model's BatchNorm statistics must not move."""
        return super().train(False)

    def source(self) -> dict:
        """What names the embeddings, as plain values without paths: for checkpoints and caches.

        `sha256` is of the model's state dict (names, types, shapes, values), of what it is now:
        weights change in place without a word.
        """
        digest = hashlib.sha256()
        for key, value in sorted(self.model.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            value = value.detach().cpu().contiguous().reshape(-1)
            digest.update(value.view(torch.uint8).numpy().data)
        return {
            "name": self.name,
            "pretrained": self.pretrained,
            "weights": self.weights,
            "sha256": digest.hexdigest(),
            "image_size": list(size) if isinstance(size := self.image_size, tuple) else size,
            "precision": self.precision,
            "preprocess": self.preprocess.config if self.preprocess else None,
        }

    def forward(self, images: Tensor | list[Tensor]) -> Tensor:
        """Embed a batch.

        Args:
            images: uint8 `(B, C, H, W)`, or a list of uint8 `(C, H, W)` of any sizes; or floats,
                `(B, C, H, W)` as already preprocessed or `(B, d)` as already embedded. All floats
                go straight to a module of the user's own.

        Returns:
            float32 `(B, d)`.

        Raises:
            ImprintError: a batch of another shape or type; a model whose output is not `(B, d)`.
        """
        images = self._prepare(images)
        if images.ndim == 2 and not self._own:
            return images.float()
        parameter = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        images = images.to(torch.float32 if parameter is None else parameter.dtype)
        if not self._own:
            images = images.contiguous(memory_format=torch.channels_last)
        dtype = PRECISIONS[self.precision]
        with torch.autocast(images.device.type, dtype) if dtype else nullcontext():
            embeddings = self.model(images)
        if not isinstance(embeddings, Tensor):
            raise ImprintError(
                f"backbone {self.name!r} returned a {type(embeddings).__name__}: "
                "wrap it so that it returns one tensor (B, d)"
            )
        if embeddings.ndim == 4 and embeddings.shape[2:] == (1, 1):
            embeddings = embeddings.flatten(1)
        if embeddings.ndim != 2:
            raise ImprintError(
                f"backbone {self.name!r} returned the shape {tuple(embeddings.shape)} for images "
                f"{tuple(images.shape)}: expected (B, d); pool or flatten its features first"
            )
        if self.embedding_dim is None:
            self.embedding_dim = embeddings.shape[1]
        return embeddings.float()

    def _prepare(self, images: Tensor | list[Tensor]) -> Tensor:
        single = isinstance(images, Tensor)
        tensors, ndim = ([images], 4) if single else (list(images), 3)
        if single and images.is_floating_point() and (self._own or images.ndim in (2, 4)):
            return images
        if not tensors:
            raise ImprintError("the batch is an empty list: give at least one image")
        for index, image in enumerate(tensors):
            kind = image.dtype if isinstance(image, Tensor) else type(image)
            if kind != torch.uint8 or image.ndim != ndim or 0 in image.shape[1:]:
                place = "a batch" if single else f"image {index} of a list"
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
        return self.preprocess(images if single else tensors)


def load_backbone(
    backbone: str | nn.Module | None,
    *,
    pretrained: bool = True,
    weights: str | None = None,
    image_size: int | None = None,
    preprocess: dict | None = None,
    compile: bool = False,
    precision: str = "32",
) -> Backbone:
    """A frozen embedder from a name, a module or None.

    Args:
        backbone: "efficientnet_lite0", "efficientnet_lite2" (their weights are installed with this
            package), lite1 (with its own); "torchvision/<name>"; "timm/<name>", also
            "timm/<name>.<tag>"; any `nn.Module`, which is used as it is, frozen and put into eval
            mode in place; None, or "identity", where batches are embeddings already.
        pretrained: False gives random weights, the same at every call.
        weights: a state dict (.pth, .safetensors) that fits the model, with its classifier or
            without; for torchvision also an entry as "IMAGENET1K_V1" (default: its `DEFAULT`).
        image_size: pixels, instead of the model's own; its resize-to-crop ratio is kept.
        preprocess: keywords of `Preprocess`, with which a module of your own reads uint8 images.
        compile: compile the model with `torch.compile`.
        precision: "32", or "bf16", "16": autocast around the model. Embeddings are float32 always.

    Raises:
        ImprintError: an unknown name, weights that are missing or do not fit, a useless setting.
    """
    if isinstance(backbone, Backbone):
        return backbone
    named = isinstance(backbone, str) and backbone != "identity"
    if named and preprocess is not None:
        raise ImprintError(f"backbone {backbone!r} has its own preprocessing: drop preprocess=")
    if not named and image_size is not None:
        raise ImprintError(f"image_size={image_size} needs a named backbone: use preprocess=")
    if image_size is not None:
        pair_of_sides(image_size, "image_size")
    prefix, _, name = backbone.rpartition("/") if named else ("", "", "")
    is_entry = prefix == "torchvision" and str(weights).isidentifier()
    entry, file = (weights, None) if is_entry else (None, weights)
    if file and not pretrained:
        raise ImprintError(f"weights={str(file)!r} and pretrained=False: give one of the two")
    if named:
        if prefix not in SOURCES or not (prefix or name in EMBEDDED):
            raise unknown(backbone)
        # Random weights that are overwritten or not: neither may move the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            built = SOURCES[prefix](name, image_size, pretrained, file, entry)
        result = Backbone(
            built["model"],
            backbone,
            Preprocess(**built["preprocess"]),
            embedding_dim=built["embedding_dim"],
            pretrained=pretrained,
            weights=Path(file).name if file else built.get("entry"),
            precision=precision,
            classifier=built.get("classifier"),
        )
    else:
        result = _own(backbone, preprocess, file, precision)
    if compile:
        # In place: the keys of the state dict stay the same.
        result.model.compile()
    return result


def _own(backbone, preprocess: dict | None, file, precision: str) -> Backbone:
    if backbone is not None and backbone != "identity" and not isinstance(backbone, nn.Module):
        raise ImprintError(f"backbone {backbone!r}: expected a name, an nn.Module or None")
    model = backbone if isinstance(backbone, nn.Module) else nn.Identity()
    if file:
        load_fitting(model, read_state_dict(file), file)
    if preprocess is not None:
        unknown = sorted(set(preprocess) - set(PREPROCESS_KEYS))
        missing = [key for key in PREPROCESS_KEYS[:3] if key not in preprocess]
        if unknown or missing:
            raise ImprintError(
                f"preprocess: unknown keys {unknown}, missing keys {missing}; "
                f"it takes {', '.join(PREPROCESS_KEYS)}"
            )
        preprocess = Preprocess(**preprocess)
    name = type(model).__name__ if model is backbone else "identity"
    weights = Path(file).name if file else None
    return Backbone(model, name, preprocess, own=True, weights=weights, precision=precision)
