"""`export`: one file that takes uint8 images and gives probabilities and classes, as an ONNX model
or an exported PyTorch program, compared with the classifier that it was made of.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from imprint_pl import __version__
from imprint_pl.embedding.backbone import Backbone
from imprint_pl.embedding.matrix_resize import MatrixResize
from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.method.head import ImprintedHead
from imprint_pl.numerics.values import to_json_value

FORMATS = {"onnx": ".onnx", "torch_export": ".pt2", "safetensors": ""}

# Resize and reductions in float64 and scatter with a maximum ask for 18.
OPSET = 20

# Of the probabilities, between the file and the classifier.
TOLERANCE = 1e-4

# Images whose time is taken, one by one.
TIMED = 30


@dataclass
class Check:
    """An exported file beside the classifier that it was made of, on the same images.

    Attributes:
        images: how many were compared.
        same_class: how many got the same class.
        difference: the largest difference of a probability.
        megabytes, backbone_megabytes: size of the file, and of the backbone alone in its format.
        milliseconds, backbone_milliseconds: median for one image, in the file's runtime on the CPU,
            and of the backbone alone there.
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


def export(
    backbone: Backbone,
    head: ImprintedHead,
    path: str | Path,
    format: str = "onnx",
) -> Path:
    """Writes the classifier as a file, or its head as a folder.

    Args:
        backbone, head: of the classifier.
        path: the file; for "safetensors" the folder.
        format: "onnx" or "torch_export": images in, probabilities and classes out, of any number
            and size; "safetensors": the head alone, see `ImprintedHead.save_pretrained`.

    In the file: input `images`, uint8 `(B, 3, H, W)`; outputs `probabilities` `(B, C)` float32 and
    `classes` `(B,)` int64, −1 for "none of these". The class names are in the metadata, JSON under
    "imprint_pl" (of a PyTorch program: the extra file "imprint_pl.json").

    Raises:
        ImprintError: an unknown format, a package that is missing, a model that the exporter
            cannot follow, a backbone without preprocessing, an empty head.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ImprintError(
            f"unknown format {format!r}{did_you_mean(format, FORMATS)}: {_formats()}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    if format == "safetensors":
        head.save_pretrained(path, config=head_config(head, backbone))
        return path
    module = Deployed(backbone, head)
    _write(module, path, format, ["probabilities", "classes"], _description(backbone, head))
    return path


def check(
    path: str | Path,
    format: str,
    backbone: Backbone,
    head: ImprintedHead,
    images: Sequence[Tensor],
    folder: str | Path,
) -> Check:
    """Compares an exported file with the classifier, on uint8 images `(3, H, W)` of any sizes.

    The classifier is asked as it is in Python: with its own preprocessing and in float32.

    Args:
        path, format, backbone, head: as for `export`.
        images: at least one.
        folder: where the backbone alone is written, to be measured and removed.

    Raises:
        ImprintError: a class differs, or a probability by more than 1e-4.
    """
    run = load(path, format)
    same, difference = 0, 0.0
    for batch in _batches(images):
        probabilities, classes = run(batch)
        with torch.no_grad():
            scores = head.scores(backbone(batch).float())
            expected = torch.softmax(scores * head.log_scale.exp(), 1).cpu()
            same += int((classes == head.decide(scores).cpu()).sum())
        difference = max(difference, (probabilities - expected).abs().max().item())
    alone = Path(folder) / f"backbone{FORMATS[format]}"
    _write(Embedder(backbone), alone, format, ["embeddings"], {})
    times, times_alone = _seconds(run, images), _seconds(load(alone, format), images)
    result = Check(
        images=len(images),
        same_class=same,
        difference=difference,
        megabytes=Path(path).stat().st_size / 1e6,
        backbone_megabytes=alone.stat().st_size / 1e6,
        milliseconds=1e3 * float(np.median(times)),
        backbone_milliseconds=1e3 * float(np.median(times_alone)),
    )
    alone.unlink()
    # One that lies on the border between two classes may fall to either side.
    if same < len(images) or not difference <= TOLERANCE:
        raise ImprintError(
            f"{Path(path).name} does not agree with the classifier: {result.same_class} of "
            f"{len(images)} images get the same class, probabilities differ by up to "
            f"{difference:.1e} (allowed: {TOLERANCE:.0e}); do not use it, and export in another "
            "format"
        )
    return result


def _batches(images: Sequence[Tensor]) -> list[Tensor]:
    """Images of one size together, at most 32."""
    groups: dict[torch.Size, list[Tensor]] = {}
    for image in images:
        groups.setdefault(image.shape, []).append(image)
    return [batch for group in groups.values() for batch in torch.stack(group).split(32)]


def _seconds(run: Callable[[Tensor], list[Tensor]], images: Sequence[Tensor]) -> list[float]:
    """Of each of the first `TIMED` images alone, after one to warm up."""
    run(images[0][None])
    seconds = []
    for image in images[:TIMED]:
        start = time.perf_counter()
        run(image[None])
        seconds.append(time.perf_counter() - start)
    return seconds


def load(path: str | Path, format: str) -> Callable[[Tensor], list[Tensor]]:
    """A function from uint8 images `(B, 3, H, W)` to the file's outputs, run on the CPU.

    Only for files of your own: `torch.export.load` unpickles what lies in a .pt2 file.
    """
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name

        def run(images: Tensor) -> list[Tensor]:
            return [torch.from_numpy(out) for out in session.run(None, {name: images.numpy()})]

        return run
    module = torch.export.load(path).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            outputs = module(images)
        return list(outputs) if isinstance(outputs, tuple | list) else [outputs]

    return run


def head_config(head: ImprintedHead, backbone: Backbone | None = None) -> dict[str, Any]:
    """What `config.json` says of a head: its classes and recipe, and the backbone it is for."""
    config = {
        "library": f"imprint_pl {__version__}",
        "class_names": [head.name_of(label) for label in range(head.num_classes)],
        "embedding_dim": head.embedding_dim,
        "recipe": head.settings,
        "threshold": head.threshold,
    }
    config = json.loads(json.dumps(config, default=to_json_value))
    return config | ({"backbone": backbone.source()} if backbone is not None else {})


def _description(backbone: Backbone, head: ImprintedHead) -> dict[str, str]:
    return {"imprint_pl": json.dumps(head_config(head, backbone))}


def _write(
    module: torch.nn.Module, path: Path, format: str, outputs: list[str], description: dict
) -> None:
    # Whole or not at all; the exporters look at the suffix.
    temporary = path.with_name(f"unfinished-{path.name}")
    try:
        program = _program(module)
        if format == "torch_export":
            extra = {f"{name}.json": text for name, text in description.items()}
            torch.export.save(program, temporary, extra_files=extra)
        else:
            _write_onnx(program, temporary, outputs, description)
        os.replace(temporary, path)
    except ImprintError:
        raise
    except OSError as error:
        raise ImprintError(
            f"cannot write {path} ({error}): give a place on a disk with room, where you may write"
        ) from error
    except ImportError as error:
        raise ImprintError(
            f"format onnx needs a package that is missing ({error.name}): "
            "pip install 'imprint-pl[export]'"
        ) from error
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ImprintError(
            f"the exporter cannot follow this model into {format} ({type(error).__name__}: "
            f"{reason[0] if reason else ''}): try another format, or ship the head alone "
            "(safetensors) with your own backbone"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _program(module: torch.nn.Module) -> torch.export.ExportedProgram:
    # Of three different sizes above 1, so that none is taken for another or for a constant.
    example = torch.zeros(2, 3, 37, 53, dtype=torch.uint8)
    dim = torch.export.Dim
    shapes = ({0: dim.DYNAMIC, 2: dim.DYNAMIC, 3: dim.DYNAMIC},)
    with torch.no_grad():
        module(example)
        return torch.export.export(module.eval(), (example,), dynamic_shapes=shapes)


def _write_onnx(program, path: Path, outputs: list[str], description: dict[str, str]) -> None:
    import onnxruntime  # noqa: F401, here, so that a missing one is named before the work
    import onnxscript  # noqa: F401

    model = torch.onnx.export(
        program,
        input_names=["images"],
        output_names=outputs,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    model.model.metadata_props.update(description)
    model.save(str(path), external_data=False)


def _formats() -> str:
    return f"give one of {', '.join(FORMATS)}"


class Deployed(nn.Module):
    """uint8 `(B, 3, H, W)` → probabilities `(B, C)` float32 and classes `(B,)` int64.

    A class is −1, "none of these", where the head has a threshold and no score reaches it.

    Args:
        backbone: with its own preprocessing; its model is copied. It runs in float32.
        head: filled; copied.

    Raises:
        ImprintError: the backbone does not read uint8 images, or the head is empty.
    """

    def __init__(self, backbone: Backbone, head: ImprintedHead) -> None:
        super().__init__()
        if backbone.preprocess is None:
            raise ImprintError(
                f"backbone {backbone.name!r} has no preprocessing to ship: make it with "
                "preprocess=dict(size=…, mean=…, std=…)"
            )
        if head.is_empty:
            raise ImprintError("the head has no proxies yet: there is nothing to export")
        self.embed = Embedder(backbone)
        self.head = copy.deepcopy(head).cpu().requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head.scores(self.embed(images))
        probabilities = torch.softmax(scores * self.head.log_scale.exp(), 1)
        return probabilities, self.head.decide(scores)


class Embedder(nn.Module):
    """The backbone alone: uint8 `(B, 3, H, W)` → embeddings `(B, d)` float32."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.resize = MatrixResize(backbone.preprocess)
        model = copy.deepcopy(backbone.model).cpu()
        self.model = model.to(memory_format=torch.contiguous_format).float().eval()

    def forward(self, images: Tensor) -> Tensor:
        embeddings = self.model(self.resize(images))
        return embeddings.flatten(1) if embeddings.ndim == 4 else embeddings
