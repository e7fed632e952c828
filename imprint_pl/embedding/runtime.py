"""Runs the forward pass of a backbone in ONNX Runtime or OpenVINO if that is faster on a CPU.

torch runs one operation after the other. The other runtimes read the whole forward pass as a graph,
fuse a convolution with its batch norm and its activation, and have faster depthwise convolutions.
`Runtime` decides by a fixed rule instead of measured times: its choice depends only on the model,
the number of images and the installed packages, so results are reproducible.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprint_pl.embedding.graphs import OPSET, KeptGraphs, export_graph, graph_folder, versions
from imprint_pl.embedding.layers import ReadLayers
from imprint_pl.errors import ImprintError, did_you_mean, install, needs, warn

RUNTIMES = ("auto", "torch", "onnxruntime", "openvino")
# For each runtime: the extra that installs it, and the packages that it needs.
EXTRAS = {
    "onnxruntime": ("onnx", ("onnx", "onnxscript", "onnxruntime")),
    "openvino": ("openvino", ("onnx", "onnxscript", "openvino")),
}
# The runtime that `auto` uses instead of torch.
FASTER = "onnxruntime"
# From this many pixels on (1,000 images of 224 x 224), an export saves time even in its first run:
# it takes about 6 s for models that gain, and each such image saves about 10 ms.
ENOUGH_PIXELS = 1000 * 224 * 224
# Models become at least 1.5 times faster (see the table in docs/guides/devices.md) if at least this
# share of their convolutions is depthwise and has batch norms that can be folded into them.
LEAST_DEPTHWISE = 0.1
# Largest allowed difference from torch, as a share of the largest number of a layer.
TOLERANCE = 1e-4
# How many images of the first batch are compared.
COMPARED = 8

# A function from float32 images `(B, C, H, W)` to embeddings `(B, d)`.
Run = Callable[[Tensor], Tensor]


class Forward(nn.Module):
    """The module to export: prepared images `(B, C, H, W)` to float32 embeddings `(B, d)`.

    Args:
        model: the backbone's model.
        reader: reads its layers.
    """

    def __init__(self, model: nn.Module, reader: ReadLayers) -> None:
        super().__init__()
        self.model, self.reader = model, reader
        self.eval()

    def forward(self, batch: Tensor) -> Tensor:
        return self.reader(self.model, batch).float()


class _Started(NamedTuple):
    """A graph that is ready to run (None if torch runs), and the state for which this is valid."""

    run: Run | None
    stamp: tuple[Any, ...]


class Runtime:
    """Decides what runs a backbone's forward pass, and runs it.

    Copies and pickles do not include a running session; they start a new one.

    Args:
        asked: one of `RUNTIMES`.
        name: what messages call the backbone.
        own: whether the model is a module of the user's own. `auto` runs it in torch, and its graph
            is not kept, since no hash can see its code.
        precision: as for `load_backbone`.
        size: height and width of the model's input, where they are known.

    Attributes:
        images: how many images will come; None if unknown.

    Raises:
        ImprintError: an unknown runtime, one that is not installed, or a precision other than 32.
    """

    def __init__(
        self, asked: str, name: str, own: bool, precision: str, size: tuple[int, int] | None
    ) -> None:
        if asked not in RUNTIMES:
            raise ImprintError(
                f"runtime {asked!r}{did_you_mean(asked, RUNTIMES)}: expected one of "
                f"{', '.join(RUNTIMES)}"
            )
        self.asked, self.name, self.own, self.precision = asked, name, own, precision
        self.pixels = size[0] * size[1] if size else 0
        self.images: int | None = None
        self._started: _Started | None = None
        self._wanted = "torch"
        self._said = self._failed = False
        if self.is_explicit:
            if precision != "32":
                raise self._clash(f"precision={precision!r}")
            with needs(EXTRAS[asked][0], f"runtime={asked!r}", "or give runtime='torch'"):
                for package in EXTRAS[asked][1]:
                    importlib.import_module(package)

    @property
    def is_explicit(self) -> bool:
        """Whether the user asked for a runtime other than torch."""
        return self.asked not in ("auto", "torch")

    @property
    def running(self) -> str:
        """The runtime that has run the last batch of images; "torch" before the first."""
        return "torch" if self._started is None or self._started.run is None else self._wanted

    def expect(self, model: nn.Module, images: int | None) -> str | None:
        """Set how many images will come, for `auto`.

        Returns:
            A line for the user if an extra that is not installed would help; only once.
        """
        self.images = images
        if self._said or not self._gains(model) or _is_installed(FASTER):
            return None
        self._said = True
        return (
            f"the backbone {self.name!r} would embed {images:,} images at least 1.5 times as fast "
            f"with ONNX Runtime: {install(EXTRAS[FASTER][0])}"
        )

    def choose(self, model: nn.Module, device: torch.device, dtype: torch.dtype) -> str:
        """Return the runtime for a batch on a device: "torch", "onnxruntime" or "openvino".

        Raises:
            ImprintError: the user asked for a runtime that cannot run there.
        """
        fault = None
        if device.type != "cpu":
            fault = f"a backbone on {device.type}"
        elif torch.is_autocast_enabled("cpu"):
            fault = "autocast, a Trainer's precision"
        elif dtype != torch.float32:
            fault = f"weights in {str(dtype).removeprefix('torch.')}"
        elif getattr(model, "_compiled_call_impl", None) is not None:
            fault = "compile=True"
        if self.is_explicit:
            if fault:
                raise self._clash(fault)
            return "torch" if self._failed else self.asked
        if fault or self._failed or not self._gains(model):
            return "torch"
        return FASTER if _is_installed(FASTER) else "torch"

    def run(self, model: nn.Module, reader: ReadLayers, batch: Tensor) -> Tensor | None:
        """Embed a batch of prepared images; return None if torch has to do it.

        Args:
            model: the backbone's model, in eval mode.
            reader: reads its layers.
            batch: `(B, C, H, W)`.

        Returns:
            float32 `(B, d)`, or None.
        """
        wants_gradient = torch.is_grad_enabled() and batch.requires_grad
        if torch.compiler.is_compiling() or wants_gradient or not len(batch):
            return None
        self._wanted = self.choose(model, batch.device, batch.dtype)
        if self._wanted == "torch":
            self._started = None
            return None
        if reader.layers is None:
            reader.find(model, batch[:1])
        stamp = self._stamp(model, batch)
        if self._started is None or self._started.stamp != stamp:
            self._started = _Started(self._start(model, reader, batch), stamp)
        return None if self._started.run is None else self._started.run(batch)

    def _gains(self, model: nn.Module) -> bool:
        enough = self.images is not None and self.images * self.pixels >= ENOUGH_PIXELS
        plain = self.asked == "auto" and not self.own and self.precision == "32"
        return plain and enough and gains(model)

    def _clash(self, fault: str) -> ImprintError:
        return ImprintError(
            f"runtime={self.asked!r} runs in float32 on a CPU and cannot be had with {fault}: give "
            "runtime='auto', or leave that out"
        )

    def _stamp(self, model: nn.Module, batch: Tensor) -> tuple[Any, ...]:
        """Return the state for which a running graph is valid: weights, shape, threads, and the
        process, since threads do not survive a fork."""
        tensors = [*model.parameters(), *model.buffers()]
        weights = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        return (os.getpid(), torch.get_num_threads(), self._wanted, tuple(batch.shape[1:]), weights)

    def _start(self, model: nn.Module, reader: ReadLayers, batch: Tensor) -> Run | None:
        """Load the graph and compare it with torch; if either fails, warn and return None."""
        forward, some = Forward(model, reader), batch[:COMPARED].contiguous()
        with torch.no_grad():
            expected = forward(some)
        kept = None if self.own else KeptGraphs(graph_folder())
        key = {} if self.own else self._key(model, reader, batch)

        def export() -> bytes:
            # The exporter would make a batch size of 1 a constant.
            return export_graph(forward, some if len(some) > 1 else torch.cat([some, some]))

        for is_last in (kept is None or not kept.has(key), True):
            try:
                graph = export() if kept is None else kept.get(key, export)
                run = OPENERS[self._wanted](graph, torch.get_num_threads())
                fault = difference(run(some), expected, reader.widths)
            # The exporter and the runtimes raise errors of many kinds; torch embeds in any case.
            except Exception as error:
                text = str(error).strip() or type(error).__name__
                fault = f"{type(error).__name__}: {text.splitlines()[0][:200]}"
            if fault is None:
                return run
            if kept is not None:
                kept.remove(key)
            if is_last:
                break
        self._failed = True
        warn(f"the backbone {self.name!r} runs in torch, not in {self._wanted}: {fault}")
        return None

    def _key(self, model: nn.Module, reader: ReadLayers, batch: Tensor) -> dict[str, Any]:
        from imprint_pl import __version__

        return {
            "format": f"imprint_pl graph 1, {__version__}",
            "model": hashlib.sha256(repr(model).encode()).hexdigest(),
            "weights": hash_of_weights(model),
            "layers": [[layer.name, list(layer.pooling)] for layer in reader.layers or ()],
            "views": reader.views,
            "shape": list(batch.shape[1:]),
            "opset": OPSET,
            "versions": versions(),
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_started": None}


def gains(model: nn.Module) -> bool:
    """Return whether a model is at least 1.5 times faster in other runtimes.

    Such models have depthwise convolutions with batch norms, as EfficientNet, MobileNet, MNASNet
    and ShuffleNet do.
    """
    layers = list(model.modules())
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    depthwise = [c for c in convolutions if c.groups == c.in_channels > 1]
    norms = any(isinstance(layer, nn.BatchNorm2d) for layer in layers)
    return norms and len(depthwise) >= LEAST_DEPTHWISE * len(convolutions) > 0


def hash_of_weights(model: nn.Module) -> str:
    """Return the sha256 of a model's state dict: names, types, shapes and values."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        value = value.detach().cpu().contiguous().reshape(-1)
        digest.update(value.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def difference(found: Tensor, expected: Tensor, widths: list[int] | None) -> str | None:
    """Return a text that says how embeddings `(B, d)` differ from those of torch, layer by layer;
    None if they agree."""
    if found.shape != expected.shape:
        return f"its embeddings have the shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    for ours, theirs in zip(
        found.split(widths or found.shape[1], 1),
        expected.split(widths or expected.shape[1], 1),
        strict=True,
    ):
        largest, apart = theirs.abs().max().item(), (ours - theirs).abs().max().item()
        # With `not … <=`, NaN counts as a difference.
        if not apart <= TOLERANCE * largest:
            return (
                f"its embeddings differ by {apart:.1e}, where the largest number is {largest:.1e}"
            )
    return None


def _open_onnxruntime(graph: bytes, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin while waiting would take the cores of the loader's workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(batch: Tensor) -> Tensor:
        array = batch.detach().contiguous().numpy()
        return torch.from_numpy(session.run(None, {"images": array})[0])

    return run


def _open_openvino(graph: bytes, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # By default OpenVINO uses bfloat16 on processors that have it.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(graph), "CPU", settings)

    def run(batch: Tensor) -> Tensor:
        return torch.from_numpy(compiled([batch.detach().contiguous().numpy()])[0].copy())

    return run


OPENERS: dict[str, Callable[[bytes, int], Run]] = {
    "onnxruntime": _open_onnxruntime,
    "openvino": _open_openvino,
}


def _is_installed(runtime: str) -> bool:
    return all(importlib.util.find_spec(package) for package in EXTRAS[runtime][1])
