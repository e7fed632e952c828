"""Reads several layers of a model: outputs of modules inside it, pooled to one vector per image.

The features of the last layer are made for the task that the model was trained on. Earlier layers
have features that it drops, and cost no further forward pass. `find_layers` chooses the modules.
`ReadLayers` runs a model and puts their outputs and the model's own side by side.
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError, did_you_mean

MOST_LAYERS = 8
MOST_NUMBERS = 8192
# A model is split into its child modules until at least this many of them have children.
FEWEST_COMPOSITES = 4
# A child that holds more than this share of all modules is split, too.
LARGEST_SHARE = 0.8
VIEWS = ("none", "flip")
# Hooks are set on modules that another thread may run, so only one thread reads layers at a time.
_ONE_AT_A_TIME = threading.RLock()

Layout = Literal["vector", "channels_first", "channels_last", "tokens", "sequence_first"]
Shape = tuple[int, ...]


class Pooling(NamedTuple):
    """How the output of a module becomes one vector per image.

    Attributes:
        layout: `vector (B, C)`; `channels_first (B, C, …)` and `channels_last (B, …, C)`, of which
            mean and standard deviation over the positions are put side by side; `tokens (B, N, C)`
            and `sequence_first (N, B, C)`.
        class_tokens: How many tokens at the front are put beside the mean of the patches.
        prefix: How many tokens at the front are not patches, but class and register tokens.
    """

    layout: Layout
    class_tokens: int = 0
    prefix: int = 0

    def __call__(self, output: Any) -> Tensor:
        """Pool the output of a module to float32 `(B, d)`."""
        x = first_tensor(output)
        assert x is not None
        if self.layout == "vector":
            return x.float()
        if self.layout == "channels_first":
            return _mean_and_deviation(x, tuple(range(2, x.ndim)))
        if self.layout == "channels_last":
            return _mean_and_deviation(x, tuple(range(1, x.ndim - 1)))
        if self.layout == "sequence_first":
            x = x.transpose(0, 1)
        single = x[:, : self.class_tokens].flatten(1).float()
        if x.shape[1] <= self.prefix:
            return single
        patches = x[:, self.prefix :].mean(1, dtype=torch.float32)
        return torch.cat([single, patches], 1) if self.class_tokens else patches


class Layer(NamedTuple):
    """A module whose output is read.

    Attributes:
        name: The module's name in the model.
        pooling: How its output becomes one vector per image.
        width: How many numbers that vector has.
        parts: How many pooled vectors of equal width it consists of: the mean and the deviation of
            a feature map, or the class tokens and the mean of the patches.
    """

    name: str
    pooling: Pooling
    width: int
    parts: int = 1


class ReadLayers:
    """Runs a model and returns the embeddings of the requested layers.

    It holds names and numbers only, no module, so it can also read a copy of the model.

    Args:
        asked: "last"; "all"; "auto" (all, or only the last if no other can be used); or names of
            modules, as a list or as one text with commas.
        views: "none", or "flip" for the mean of an image's embedding and its mirror image's.
        name: What errors call the model.

    Attributes:
        layers: The layers beside the last; None if they are only known after the first batch.
        last_width: Width of the last layer, if there are other layers.

    Raises:
        ImprintError: If a setting is unknown.
    """

    def __init__(
        self, asked: str | list[str] = "last", views: str = "none", name: str = "model"
    ) -> None:
        if views not in VIEWS:
            raise ImprintError(f"views {views!r}: expected one of {', '.join(VIEWS)}")
        if isinstance(asked, str) and asked not in ("last", "all", "auto"):
            asked = [part.strip() for part in asked.split(",")]
        if not isinstance(asked, str) and not (asked and all(map(_is_name, asked))):
            raise ImprintError(
                f"layers={asked!r}: expected 'last', 'all', or names of modules such as "
                "['blocks.2', 'blocks.5']"
            )
        self.asked: str | list[str] = asked if isinstance(asked, str) else list(asked)
        self.views, self.name = views, name
        self.layers: list[Layer] | None = [] if asked == "last" else None
        self.last_width: int | None = None

    @property
    def widths(self) -> list[int] | None:
        """The widths of all pooled vectors in their order, the last layer's too.

        None for the last layer alone.
        """
        if not self.layers or self.last_width is None:
            return None
        # Return the parts of layers, so that `join` treats each part like a layer. Otherwise the
        # last layer, which is a mean, would count more than the means of other layers.
        parts = [layer.width // layer.parts for layer in self.layers for _ in range(layer.parts)]
        return [*parts, self.last_width]

    def find(self, model: nn.Module, batch: Tensor) -> None:
        """Choose the layers, once.

        Args:
            model: In eval mode.
            batch: An input of the model with one image.

        Raises:
            ImprintError: If a name is unknown, a module does not run or its output cannot be
                pooled, or no layer can be taken.
        """
        if self.layers is not None:
            return
        if batch.ndim < 3 and self.asked == "auto":
            # The batch holds embeddings already, so there are no layers to read.
            self.layers = []
            return
        with torch.no_grad():
            found = find_layers(model, batch, self.asked, self.name)
        self.layers, self.last_width = found.layers, found.last_width

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Embed a batch of prepared images.

        Args:
            model: The model.
            batch: Its input, floats, usually `(B, C, H, W)`.

        Returns:
            `(B, d)`; the last layer's numbers are the last columns.

        Raises:
            ImprintError: If the model does not return `(B, d)`, or the batch has no mirror image.
        """
        if self.layers is None:
            self.find(model, batch[:1])
        if self.views == "none":
            return self._read(model, batch)
        if batch.ndim != 4:
            raise ImprintError(
                f"views={self.views!r} needs images (B, C, H, W), not a batch of shape "
                f"{tuple(batch.shape)}: leave out views"
            )
        return (self._read(model, batch) + self._read(model, batch.flip(-1))) / 2

    def _read(self, model: nn.Module, batch: Tensor) -> Tensor:
        if not self.layers:
            return embeddings_of(model(batch), batch, self.name)
        vectors: dict[str, Tensor] = {}
        with hooked(model, {layer.name: _pooled_into(vectors, layer) for layer in self.layers}):
            last = embeddings_of(model(batch), batch, self.name)
        return torch.cat([*(vectors[layer.name] for layer in self.layers), last.float()], 1)


class FoundLayers(NamedTuple):
    """Layers beside the last, and the last one's width."""

    layers: list[Layer]
    last_width: int


@contextmanager
def hooked(model: nn.Module, hooks: dict[str, Callable[..., None]]) -> Iterator[None]:
    """Hook modules of a model by name, for one call of it."""
    handles = []
    with _ONE_AT_A_TIME:
        try:
            for name, hook in hooks.items():
                handles.append(model.get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _pooled_into(vectors: dict[str, Tensor], layer: Layer) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        vectors[layer.name] = layer.pooling(output)

    return keep


def embeddings_of(output: Any, batch: Tensor, name: str) -> Tensor:
    """Return the embeddings `(B, d)` that a model returned for a batch.

    Raises:
        ImprintError: If they are anything else.
    """
    if not isinstance(output, Tensor):
        raise ImprintError(
            f"backbone {name!r} returned a {type(output).__name__}: "
            "wrap it so that it returns one tensor (B, d)"
        )
    if output.ndim == 4 and output.shape[2:] == (1, 1):
        output = output.flatten(1)
    if output.ndim != 2:
        raise ImprintError(
            f"backbone {name!r} returned the shape {tuple(output.shape)} for images "
            f"{tuple(batch.shape)}: expected (B, d); pool or flatten its features first"
        )
    return output


def _mean_and_deviation(x: Tensor, positions: tuple[int, ...]) -> Tensor:
    """Pool feature maps to `(B, 2C)`, float32: mean and standard deviation of each channel over the
    positions.

    Textures differ not only in the means of channels, but also in how much these vary over the
    image. On photographs, drawings and digits the deviations added 0.3 to 2 points of accuracy.
    """
    x = x.float()
    plain = torch.compiler.is_compiling() or torch.compiler.is_exporting() or x.requires_grad
    if x.device.type != "cpu" or plain:
        variance, mean = torch.var_mean(x, positions, correction=0)
        return torch.cat([mean, variance.sqrt()], 1)
    means = x.mean(positions, keepdim=True)
    # Go image by image, so that intermediate results stay in the processor's cache. This takes an
    # eighth of the time of `var_mean`.
    variances = [
        (image - mean).square_().mean(positions)
        for image, mean in zip(x.split(1), means.split(1), strict=True)
    ]
    return torch.cat([means.flatten(1), torch.cat(variances).sqrt()], 1)


def first_tensor(output: Any) -> Tensor | None:
    """Return the output of a module, or the first tensor of a tuple, list or dict."""
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, dict) else output
    if isinstance(output, dict | tuple | list):
        return next((x for x in map(first_tensor, values) if x is not None), None)
    return None


def find_layers(
    model: nn.Module, batch: Tensor, asked: str | list[str], name: str = "model"
) -> FoundLayers:
    """Choose the modules of a model whose outputs are read.

    A module can be used if it runs in the forward pass and its output can be pooled. "all" starts
    with the model's children. While fewer than four of them have children themselves, the one with
    the most parameters is replaced by its children; so is one that contains nearly all modules.
    Consecutive modules without children, such as a convolution with its norm and activation, count
    as one stage. At most eight stages with at most 8,192 numbers are kept, evenly spread and with
    the deepest one. A stage whose numbers are those of the last layer is left out.

    Args:
        model: In eval mode.
        batch: An input of the model with one image.
        asked: "all", "auto" or names.
        name: What errors call the model.

    Raises:
        ImprintError: As for `ReadLayers.find`.
    """
    ran = _Ran(model, batch, name)
    if not isinstance(asked, str):
        return FoundLayers([ran.layer(one) for one in _checked(asked, ran)], ran.last_width)
    stages = [ran.layer(stage) for stage in _stages(ran)]
    if stages and _repeats_last(ran, stages[-1], batch):
        stages.pop()
    kept = _evenly(stages, MOST_NUMBERS - ran.last_width)
    if not kept and asked == "all":
        raise ImprintError(
            f"backbone {name!r} has no layer beside the last that can be taken (at most "
            f"{MOST_NUMBERS:,} numbers in all): use layers='last', or name modules of it"
        )
    left_out = [stage.name for stage in stages if stage not in kept]
    if not kept:
        _say(f"backbone {name!r} has no layer beside the last that can be taken: the last is alone")
    elif left_out:
        _say(
            f"backbone {name!r}: {len(kept)} of {len(stages)} layers beside the last are taken (at "
            f"most {MOST_LAYERS}, and {MOST_NUMBERS:,} numbers); left out: {', '.join(left_out)}"
        )
    return FoundLayers(kept, ran.last_width)


class _Ran:
    """The modules that run in a forward pass of one image, in the order in which they finish.

    Attributes:
        shapes: The shape of each module's output, by name; None where it cannot be pooled.
    """

    def __init__(self, model: nn.Module, batch: Tensor, name: str) -> None:
        self.model, self.name = model, name
        self.modules = {key: module for key, module in model.named_modules() if key}
        self.shapes: dict[str, Shape | None] = {}

        def watch(key: str) -> Callable[..., None]:
            def note(module: nn.Module, inputs: Any, output: Any) -> None:
                self.shapes.pop(key, None)
                self.shapes[key] = _shape(output)

            return note

        with hooked(model, {key: watch(key) for key in self.modules}):
            # Call `forward` directly: model(batch) would compile a compiled model with these hooks.
            output = model.forward(batch)
        self.last_width = embeddings_of(output, batch, name).shape[1]
        self.image: Shape | None = tuple(batch.shape[2:]) if batch.ndim == 4 else None
        self.class_tokens, self.prefix = _prefix(model)
        votes = [self._layout(key, shape) for key, shape in self.shapes.items() if shape]
        self._usual: Layout = (
            "channels_last"
            if votes.count("channels_last") > votes.count("channels_first")
            else "channels_first"
        )

    def share(self, key: str) -> float:
        """Return the share of all running modules that are inside a module."""
        return sum(name.startswith(f"{key}.") for name in self.shapes) / len(self.shapes)

    def layer(self, key: str) -> Layer:
        """Describe how a module's output is pooled."""
        shape = self.shapes[key]
        assert shape is not None
        layout = self._layout(key, shape) or self._usual
        if layout == "vector":
            return Layer(key, Pooling(layout), shape[1])
        if layout in ("channels_first", "channels_last"):
            channels = shape[1] if layout == "channels_first" else shape[-1]
            return Layer(key, Pooling(layout), 2 * channels, 2)
        tokens = shape[0] if layout == "sequence_first" else shape[1]
        if not self._with_prefix(tokens):
            return Layer(key, Pooling(layout), shape[2])
        vectors = self.class_tokens + (tokens > self.prefix)
        return Layer(
            key, Pooling(layout, self.class_tokens, self.prefix), vectors * shape[2], vectors
        )

    def _layout(self, key: str, shape: Shape) -> Layout | None:
        """Return where the channels are; None if it cannot be known."""
        if len(shape) == 2:
            return "vector"
        widths = {p.shape[0] for p in self.modules[key].parameters() if p.ndim}
        first, last = shape[1] in widths, shape[-1] in widths
        if len(shape) == 3:
            if shape[0] != 1:
                return "sequence_first"
            return "channels_first" if first and not last else "tokens"
        # Compare the proportions: the sides of a feature map have those of the image.
        fits_first, fits_last = self._is_grid(shape[2:]), self._is_grid(shape[1:3])
        if fits_first != fits_last:
            return "channels_first" if fits_first else "channels_last"
        if first != last:
            return "channels_first" if first else "channels_last"
        return None

    def _is_grid(self, sides: Shape) -> bool:
        if self.image is None:
            return False
        return sides[0] * self.image[1] == sides[1] * self.image[0]

    def _with_prefix(self, tokens: int) -> bool:
        """Return whether `tokens` tokens include class and register tokens."""
        if self.prefix == 0 or tokens <= self.prefix:
            return self.prefix > 0
        with_it, without = self._fills_grid(tokens - self.prefix), self._fills_grid(tokens)
        return with_it or not without

    def _fills_grid(self, tokens: int) -> bool:
        if self.image is None:
            return False
        height = round(math.sqrt(tokens * self.image[0] / self.image[1]))
        return height > 0 and tokens % height == 0 and self._is_grid((height, tokens // height))


def _shape(output: Any) -> Shape | None:
    x = first_tensor(output)
    if x is None or not x.is_floating_point() or not 2 <= x.ndim <= 4 or 0 in x.shape:
        return None
    if x.shape[0] != 1 and (x.ndim != 3 or x.shape[1] != 1):
        return None
    return tuple(x.shape)


def _prefix(model: nn.Module) -> tuple[int, int]:
    """Return how many class tokens a model has, and how many class and register tokens."""
    for module in model.modules():
        prefix = getattr(module, "num_prefix_tokens", None)
        if isinstance(prefix, int):
            return prefix - int(getattr(module, "num_reg_tokens", 0) or 0), prefix
    class_tokens = registers = 0
    for key, parameter in model.named_parameters():
        count = parameter.shape[-2] if parameter.ndim > 1 else 1
        leaf = key.rpartition(".")[2]
        if leaf in ("cls_token", "class_token", "class_embedding", "dist_token"):
            class_tokens += count
        elif leaf in ("reg_token", "register_tokens", "registers", "register_token"):
            registers += count
    return class_tokens, class_tokens + registers


def _stages(ran: _Ran) -> list[str]:
    """Divide a model into its stages, in the order of the forward pass."""
    parts = _parts(ran, "")
    while True:
        composites = [key for key in parts if _is_composite(ran, key)]
        if len(composites) >= FEWEST_COMPOSITES:
            # A module that contains nearly all others is not a stage.
            composites = [key for key in composites if ran.share(key) > LARGEST_SHARE]
        few = len(_grouped(ran, parts)) < FEWEST_COMPOSITES
        # Do not open the blocks of a small model, since their parts are not stages.
        opened = [
            key
            for key in composites
            if few or sum(_is_composite(ran, part) for part in _parts(ran, key)) > 1
        ]
        if not opened:
            break
        largest = max(opened, key=lambda key: _size(ran.modules[key]))
        place = parts.index(largest)
        parts[place : place + 1] = _parts(ran, largest)
    return _grouped(ran, parts)


def _parts(ran: _Ran, key: str) -> list[str]:
    """List the children that run; a container that does not run is replaced by its children."""
    parts: list[str] = []
    for child, _ in (ran.modules[key] if key else ran.model).named_children():
        name = f"{key}.{child}" if key else child
        if name in ran.shapes:
            parts.append(name)
        elif name in ran.modules:
            parts += _parts(ran, name)
    order = {name: place for place, name in enumerate(ran.shapes)}
    return sorted(parts, key=order.__getitem__)


def _is_composite(ran: _Ran, key: str) -> bool:
    return any(_size(ran.modules[part]) for part in _parts(ran, key))


def _grouped(ran: _Ran, parts: list[str]) -> list[str]:
    """Name one module for each stage: a composite, or the last one of a group of leaves.

    A group begins with a convolution or linear layer; norms, activations and poolings after it
    belong to it.
    """
    stages: list[str] = []
    grouping = False
    for key in parts:
        if _is_composite(ran, key):
            grouping = False
        elif any(p.ndim > 1 for p in ran.modules[key].parameters()):
            grouping = True
        elif not grouping or isinstance(ran.modules[key], (nn.Dropout, nn.Identity)):
            continue
        elif ran.shapes[key] is not None:
            stages.pop()
        if ran.shapes[key] is not None:
            stages.append(key)
    return stages


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _repeats_last(ran: _Ran, stage: Layer, batch: Tensor) -> bool:
    """Return whether a stage has the same numbers as the last layer, as just before pooling.

    Comparing numbers is not enough, since blocks with random weights may do nothing.
    """
    names = list(ran.shapes)
    after = names[names.index(stage.name) + 1 :]
    above = [key for key in after if stage.name.startswith(f"{key}.")]
    if stage.width != ran.last_width or any(
        _size(ran.modules[key]) for key in after if key not in above
    ):
        return False
    vectors: dict[str, Tensor] = {}
    with hooked(ran.model, {stage.name: _pooled_into(vectors, stage)}):
        last = embeddings_of(ran.model.forward(batch), batch, ran.name).float()
    return torch.allclose(vectors[stage.name], last, 1e-3, 1e-3 * last.abs().max().item())


def _evenly(stages: list[Layer], room: int) -> list[Layer]:
    """Choose evenly spread stages, with the deepest one, that fit into `room` numbers."""
    last = len(stages) - 1
    most = min(MOST_LAYERS, len(stages))
    kept: list[Layer] = []
    for count in range(most, 0, -1):
        kept = [stages[last - round(i * last / max(count - 1, 1))] for i in reversed(range(count))]
        if sum(layer.width for layer in kept) <= room:
            break
    else:
        kept = []
    widest = max((layer.width for layer in stages), default=0)
    others = [layer for layer in stages if layer.width < widest]
    if len(kept) < most / 2 and widest > room / 2 and len(others) > len(stages) / 2:
        # Leave out very wide stages, such as the first linear layer of a VGG, which would leave no
        # room for others.
        return _evenly(others, room)
    return kept


def _checked(names: list[str], ran: _Ran) -> list[str]:
    """Return names in the order of the forward pass, each once."""
    for name in names:
        if name not in ran.modules:
            hint = did_you_mean(name, ran.modules)
            raise ImprintError(f"layers: backbone {ran.name!r} has no module {name!r}{hint}")
        if ran.shapes.get(name) is None:
            fault = "gives no tensor that can be pooled" if name in ran.shapes else "does not run"
            raise ImprintError(
                f"layers: the module {name!r} of backbone {ran.name!r} {fault}: name another one"
            )
    return [name for name in ran.shapes if name in names]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", "last", "all", "auto")


def _say(line: str) -> None:
    # Imported on demand, so that a backbone alone need not wait for Lightning.
    from lightning.pytorch.utilities import rank_zero_info

    rank_zero_info(line)
