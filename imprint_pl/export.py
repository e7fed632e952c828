"""`export`: writes a classifier as one file that takes uint8 images and returns probabilities and
classes (ONNX, or an exported PyTorch program), and compares the file with the classifier.
"""

from __future__ import annotations

import copy
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from imprint_pl import __version__
from imprint_pl.embedding.backbone import Backbone
from imprint_pl.embedding.matrix_resize import MatrixResize
from imprint_pl.errors import ImprintError, did_you_mean, needs
from imprint_pl.method.head import NONE, ImprintedHead
from imprint_pl.numerics.values import to_json_value

# The head's resize and reductions in float64, and scatter with a maximum, need 18 or later.
OPSET = 20

# Largest allowed difference in probability between the exported file and the model.
TOLERANCE = 1e-4

# How many images are timed, one at a time.
TIMED = 30

# A function from uint8 images `(B, 3, H, W)` to a file's outputs.
Run = Callable[[Tensor], list[Tensor]]


@dataclass
class Check:
    """How an exported file compares with the classifier, on the same images.

    Attributes:
        images: how many images were compared.
        same_class: how many of them got the same class.
        difference: the largest difference in probability.
        megabytes: size of the file.
        backbone_megabytes: size of the backbone alone in the same format.
        milliseconds: median time for one image, in the file's runtime on the CPU.
        backbone_milliseconds: the same for the backbone alone.
    """

    images: int
    same_class: int
    difference: float
    megabytes: float
    backbone_megabytes: float
    milliseconds: float
    backbone_milliseconds: float

    def __str__(self) -> str:
        return (
            f"{self.same_class} of {self.images} images get the same class as before the export, "
            f"probabilities differ by at most {self.difference:.1e}\n"
            f"{self.megabytes:.1f} MB, {self.milliseconds:.1f} ms an image on this CPU; "
            f"the backbone alone {self.backbone_megabytes:.1f} MB, "
            f"{self.backbone_milliseconds:.1f} ms"
        )


class Format(ABC):
    """A format that a classifier is written in.

    Attributes:
        suffix: how the file's name ends; empty where the format is a folder.
    """

    suffix: ClassVar[str]

    @abstractmethod
    def write(self, backbone: Backbone, head: ImprintedHead, path: Path) -> None:
        """Writes the classifier, or its head alone."""

    @abstractmethod
    def load(self, path: Path) -> Run:
        """Loads a written file; it runs on the CPU."""


class HeadFolder(Format):
    """The head alone as safetensors, with a `config.json` that names its backbone."""

    suffix = ""

    def write(self, backbone: Backbone, head: ImprintedHead, path: Path) -> None:
        head.save_pretrained(path, config=head_config(head, backbone))

    def load(self, path: Path) -> Run:
        raise ImprintError(
            f"{path} holds a head, which takes embeddings instead of images: load it with "
            "ImprintedHead.from_pretrained"
        )


class ProgramFile(Format):
    """A file with a traced program. Subclasses say how it is saved and loaded.

    Attributes:
        name: the format's name in messages.
    """

    name: ClassVar[str]

    def write(self, backbone: Backbone, head: ImprintedHead, path: Path) -> None:
        texts = {"imprint_pl": json.dumps(head_config(head, backbone))}
        deployed = Deployed(backbone, head)
        self.write_module(deployed, path, deployed.outputs, texts)

    def write_module(
        self, module: nn.Module, path: Path, outputs: Sequence[str], texts: dict[str, str]
    ) -> None:
        """Traces a module and writes the program; the file appears whole or not at all.

        Args:
            module: takes uint8 images `(B, 3, H, W)`.
            path: the file.
            outputs: names of the module's outputs.
            texts: stored in the file, by name.

        Raises:
            ImprintError: the file cannot be written, a package is missing, or the exporter cannot
                follow the module.
        """
        # Keep the suffix in the temporary name, since the exporters look at it.
        temporary = path.with_name(f"unfinished-{path.name}")
        # Three different sizes above 1: the exporter would take equal sizes for one size, and 1
        # for a constant.
        example = torch.zeros(2, 3, 37, 53, dtype=torch.uint8)
        # Run the module first, so that its own errors are not blamed on the exporter.
        with torch.no_grad():
            module.eval()(example)
        try:
            self._save(_program(module, example), temporary, outputs, texts)
            os.replace(temporary, path)
        except OSError as error:
            raise ImprintError(
                f"cannot write {path} ({error}): give a place on a disk with room, where you may "
                "write"
            ) from error
        # Every error of torch.export and torch.onnx is one, such as UserError of dynamo,
        # GuardOnDataDependentSymNode, OnnxExporterError and SerializeError.
        except RuntimeError as error:
            reason = str(error).strip().splitlines()
            raise ImprintError(
                f"the exporter cannot follow this model into {self.name} ({type(error).__name__}: "
                f"{reason[0] if reason else ''}): try another format, or ship the head alone "
                "(safetensors) with your own backbone"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)

    @abstractmethod
    def _save(
        self, program: ExportedProgram, path: Path, outputs: Sequence[str], texts: dict[str, str]
    ) -> None:
        """Saves a program, with the names of its outputs and texts about it."""


class TorchExport(ProgramFile):
    """A program of `torch.export`, a .pt2 file."""

    name, suffix = "torch_export", ".pt2"

    def load(self, path: Path) -> Run:
        module = torch.export.load(path).module()

        def run(images: Tensor) -> list[Tensor]:
            with torch.no_grad():
                outputs = module(images)
            return list(outputs) if isinstance(outputs, tuple | list) else [outputs]

        return run

    def _save(
        self, program: ExportedProgram, path: Path, outputs: Sequence[str], texts: dict[str, str]
    ) -> None:
        extra = {f"{name}.json": text for name, text in texts.items()}
        torch.export.save(program, path, extra_files=extra)


class Onnx(ProgramFile):
    """An ONNX model with its weights in the same file."""

    name, suffix = "onnx", ".onnx"

    def load(self, path: Path) -> Run:
        with needs("onnx", "format onnx"):
            import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(out) for out in session.run(None, {name: images.numpy()})]

        return run

    def _save(
        self, program: ExportedProgram, path: Path, outputs: Sequence[str], texts: dict[str, str]
    ) -> None:
        # Import these before the conversion, so that a missing package is reported at once.
        with needs("onnx", "format onnx", "or choose the format torch_export"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        model = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=outputs,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert model is not None  # only the old exporter, without dynamo, returns None
        model.model.metadata_props.update(texts)
        model.save(str(path), external_data=False)


FORMATS: dict[str, Format] = {
    "onnx": Onnx(),
    "torch_export": TorchExport(),
    "safetensors": HeadFolder(),
}


def export(
    backbone: Backbone,
    head: ImprintedHead,
    path: str | Path,
    format: str = "onnx",
) -> Path:
    """Writes the classifier as a file, or its head as a folder.

    The file has the input `images`, uint8 `(B, 3, H, W)`, and the outputs `probabilities`,
    `(B, C)` float32, and `classes`, `(B,)` int64, where −1 is "none of these"; with `accept` also
    `familiarity`, `(B,)` float32, and with `coverage` also `sets`, `(B, C)` bool. The class
    names are in its metadata, as JSON under "imprint_pl" (in a PyTorch program: the extra file
    "imprint_pl.json").

    Args:
        backbone: the classifier's backbone.
        head: the classifier's head.
        path: the file; for "safetensors" the folder.
        format: "onnx" or "torch_export": a file that takes any number of images of any size;
            "safetensors": the head alone, see `ImprintedHead.save_pretrained`.

    Returns:
        The path.

    Raises:
        ImprintError: the format is unknown, a package is missing, the exporter cannot follow the
            model, the backbone has no preprocessing, or the head is empty.
    """
    path = Path(path)
    written = _format(format)
    path.parent.mkdir(parents=True, exist_ok=True)
    written.write(backbone, head, path)
    return path


def load(path: str | Path, format: str) -> Run:
    """Returns a function from uint8 images `(B, 3, H, W)` to the file's outputs, on the CPU.

    Use it for your own files only: `torch.export.load` unpickles the content of a .pt2 file.

    Args:
        path: the file.
        format: "onnx" or "torch_export".

    Raises:
        ImprintError: the format is unknown, or holds no backbone.
    """
    return _format(format).load(Path(path))


def check(
    path: str | Path,
    format: str,
    backbone: Backbone,
    head: ImprintedHead,
    images: Sequence[Tensor],
    folder: str | Path,
) -> Check:
    """Compares an exported file with the classifier.

    The classifier runs as it does in Python: with its own preprocessing, in float32.

    Args:
        path: the file.
        format: "onnx" or "torch_export".
        backbone: the classifier's backbone.
        head: the classifier's head.
        images: uint8 `(3, H, W)` of any sizes, at least one.
        folder: the backbone alone is written there, measured and removed.

    Returns:
        The comparison, with sizes and times.

    Raises:
        ImprintError: a class differs, or a probability by more than 1e-4.
    """
    path, written = Path(path), _format(format)
    run = written.load(path)
    assert isinstance(written, ProgramFile)  # the other format does not load
    same, difference, strange = 0, 0.0, 0.0
    for batch in _batches(images):
        probabilities, classes, *others = run(batch)
        with torch.no_grad():
            embeddings = backbone(batch).float()
            scores = head.scores(embeddings)
            expected = torch.softmax(scores * head.log_scale.exp(), 1).cpu()
            known = None if head.familiar.is_empty else head.familiarity(embeddings, scores)
            expected_classes = head.decide(scores, known)
            agrees = classes == expected_classes.cpu()
            if not head.sets.is_empty:
                sets = head.prediction_sets(embeddings).cpu()
                # Rounding may move a class that is close to its bound into the set or out of it.
                near = (expected.log() - head.bounds().cpu()).abs() < TOLERANCE
                agrees &= ((others[-1] == sets) | near).all(1)
            same += int(agrees.sum())
        difference = max(difference, (probabilities - expected).abs().max().item())
        if known is not None:
            apart = (others[0] - known.cpu()).abs() / known.cpu().abs().clamp(min=1)
            strange = max(strange, apart.max().item())
    alone = Path(folder) / f"backbone{written.suffix}"
    written.write_module(Embedder(backbone), alone, ("embeddings",), {})
    times, times_alone = _seconds(run, images), _seconds(written.load(alone), images)
    result = Check(
        images=len(images),
        same_class=same,
        difference=difference,
        megabytes=path.stat().st_size / 1e6,
        backbone_megabytes=alone.stat().st_size / 1e6,
        milliseconds=1e3 * float(np.median(times)),
        backbone_milliseconds=1e3 * float(np.median(times_alone)),
    )
    alone.unlink()
    # Compare the classes, too: near the border between two classes, a difference in probability
    # below the tolerance can change the class.
    if same < len(images) or not max(difference, strange) <= TOLERANCE:
        familiarity = f", the familiarity by {strange:.1e}" if not head.familiar.is_empty else ""
        raise ImprintError(
            f"{path.name} does not agree with the classifier: {result.same_class} of "
            f"{len(images)} images get the same class, probabilities differ by up to "
            f"{difference:.1e}{familiarity} (allowed: {TOLERANCE:.0e}); do not use it, and export "
            "in another format"
        )
    return result


def head_config(head: ImprintedHead, backbone: Backbone | None = None) -> dict[str, Any]:
    """Returns what `config.json` says about a head: its classes, its recipe and its backbone.

    `layer_widths` is `None` where the head takes one layer.
    """
    config = {
        "library": f"imprint_pl {__version__}",
        "class_names": [head.name_of(label) for label in range(head.num_classes)],
        "embedding_dim": head.embedding_dim,
        "layer_widths": head.layer_widths,
        "recipe": head.settings,
        "threshold": head.threshold,
        "coverage": head.coverage,
    }
    config = json.loads(json.dumps(config, default=to_json_value))
    if backbone is None:
        return config
    # Always name layers and views, since users of the head have to embed in the same way.
    read = {"layers": backbone.layers or "last", "views": backbone.views}
    return config | {"backbone": backbone.source() | read}


def _format(name: str) -> Format:
    """Returns the format of a name, or raises an `ImprintError` that names all formats."""
    if name not in FORMATS:
        raise ImprintError(
            f"unknown format {name!r}{did_you_mean(name, FORMATS)}: give one of "
            f"{', '.join(FORMATS)}"
        )
    return FORMATS[name]


def _program(module: nn.Module, example: Tensor) -> ExportedProgram:
    """Traces a module; the number of images and their height and width stay open."""
    dim = torch.export.Dim
    shapes = ({0: dim.DYNAMIC, 2: dim.DYNAMIC, 3: dim.DYNAMIC},)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=shapes)


def _batches(images: Sequence[Tensor]) -> list[Tensor]:
    """Stacks images of equal size into batches of at most 32."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        groups.setdefault(image.shape, []).append(image)
    return [batch for group in groups.values() for batch in torch.stack(group).split(32)]


def _seconds(run: Run, images: Sequence[Tensor]) -> list[float]:
    """Times the first `TIMED` images one at a time, after one untimed call to warm up."""
    run(images[0][None])
    seconds = []
    for image in images[:TIMED]:
        start = time.perf_counter()
        run(image[None])
        seconds.append(time.perf_counter() - start)
    return seconds


class Deployed(nn.Module):
    """uint8 `(B, 3, H, W)` → probabilities `(B, C)` float32 and classes `(B,)` int64.

    The class is −1, "none of these", if the head has a threshold that is not reached. A head that
    was fitted with `accept` also returns the familiarity `(B,)` float32, and one that was fitted
    with `coverage` also returns the prediction sets `(B, C)` bool for this coverage.

    Args:
        backbone: has its own preprocessing. Its model is copied and runs in float32.
        head: a filled head; it is copied.

    Attributes:
        outputs: the names of the tensors that `forward` returns.
        bounds: `(C,)`, the bounds of the prediction sets; only if the head has sets.

    Raises:
        ImprintError: the backbone does not read uint8 images, or the head is empty.
    """

    bounds: Tensor

    def __init__(self, backbone: Backbone, head: ImprintedHead) -> None:
        super().__init__()
        if head.is_empty:
            raise ImprintError("the head has no proxies yet: there is nothing to export")
        self.embed = Embedder(backbone)
        self.head = copy.deepcopy(head).cpu().requires_grad_(False)
        self.outputs = ["probabilities", "classes"]
        if not self.head.familiar.is_empty:
            self.outputs.append("familiarity")
        if not self.head.sets.is_empty:
            self.outputs.append("sets")
            self.register_buffer("bounds", self.head.bounds())
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        embeddings = self.embed(images)
        scores = self.head.scores(embeddings)
        probabilities = torch.softmax(scores * self.head.log_scale.exp(), 1)
        known = None
        if not self.head.familiar.is_empty:
            known = self.head.familiarity(embeddings, scores)
        classes = self.head.decide(scores, known)
        results = [probabilities, classes] + ([] if known is None else [known])
        if not self.head.sets.is_empty:
            sets = self.head.sets_of(scores * self.head.log_scale.exp(), self.bounds)
            results.append(sets & (classes != NONE)[:, None])
        return tuple(results)


class Embedder(nn.Module):
    """The backbone alone: uint8 `(B, 3, H, W)` → embeddings `(B, d)` float32.

    Raises:
        ImprintError: the backbone does not read uint8 images.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if backbone.preprocess is None:
            raise ImprintError(
                f"backbone {backbone.name!r} has no preprocessing to ship: make it with "
                "preprocess=dict(size=…, mean=…, std=…)"
            )
        self.resize = MatrixResize(backbone.preprocess)
        self.reader = backbone.reader
        model = copy.deepcopy(backbone.model).cpu()
        self.model = model.to(memory_format=torch.contiguous_format).float().eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.reader(self.model, self.resize(images))
