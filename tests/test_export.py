"""`export.py`, `pretrained.py`: files that do what the classifier does."""

import json
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import nn

from imprint_pl import ImprintedHead, ImprintError, imprint
from imprint_pl.data import Digits
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.embedding.matrix_resize import MatrixResize
from imprint_pl.embedding.preprocess import Preprocess
from imprint_pl.export import check, export, head_config, load
from imprint_pl.method.threshold import Limits, set_limits, set_threshold


@pytest.fixture(scope="module")
def digits():
    """A backbone, 500 embeddings with labels, and 200 real images: digits and parts of photos."""
    backbone = load_backbone("efficientnet_lite0", image_size=32)
    data = Digits()
    data.setup()
    images, y = data.train_dataset.__getitems__(list(range(500)))
    with torch.no_grad():
        x = backbone(images)
    shown, _ = data.test_dataset.__getitems__(list(range(180)))
    photos = [torch.from_numpy(p.copy()).permute(2, 0, 1) for p in load_sample_images().images]
    parts = [photo[:, 20 * i : 20 * i + 60 + i] for photo in photos for i in range(10)]
    grey = [image.expand(3, -1, -1).contiguous() for image in shown]
    return backbone, x, y, [*grey, *(part.contiguous() for part in parts)]


@pytest.fixture(scope="module")
def small(digits):
    """As `digits`, with a backbone that takes no time: one layer of convolution."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 24, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    preprocess = dict(size=24, resize=28, mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic")
    backbone = load_backbone(nn.Sequential(*layers), preprocess=preprocess)
    with torch.no_grad():
        x = backbone(digits[3])
    return backbone, x, torch.arange(len(x)) % 10, digits[3]


@pytest.mark.parametrize(
    ("model", "format", "recipe", "keywords"),
    [
        pytest.param("digits", "onnx", "robust", {}, marks=pytest.mark.slow),
        pytest.param("digits", "torch_export", "robust", {}, marks=pytest.mark.slow),
        pytest.param("digits", "onnx", "kernel", {}, marks=pytest.mark.slow),
        pytest.param("small", "onnx", "kernel", {}, marks=pytest.mark.slow),
        pytest.param("small", "onnx", "janson", {}, marks=pytest.mark.slow),
        ("small", "onnx", "knn", {"distance": "mahalanobis"}),
        pytest.param(
            "small", "torch_export", "knn", {"distance": "manhattan"}, marks=pytest.mark.slow
        ),
    ],
)
def test_an_exported_file_agrees_with_the_classifier_on_200_real_images(
    model, format, recipe, keywords, request, tmp_path
):
    backbone, x, y, images = request.getfixturevalue(model)
    head = imprint(x, y, recipe, class_names=list("abcdefghij"), **keywords)
    path = export(backbone, head, tmp_path / "it.file", format)
    result = check(path, format, backbone, head, images, tmp_path)
    assert result.images == result.same_class == 200
    # The rounding of a deep backbone's float32, and of a head's.
    assert result.difference <= (1e-4 if model == "digits" else 1e-5)
    assert 0 < result.backbone_megabytes <= result.megabytes
    assert [p.name for p in tmp_path.iterdir()] == ["it.file"]


def test_an_onnx_file_takes_batches_says_none_and_names_its_classes(small, tmp_path):
    import onnx

    backbone, x, y, images = small
    head = imprint(x, y, "qi", class_names=list("abcdefghij"))
    scores = head.scores(backbone(torch.stack(images[:9])))
    head.threshold = scores.amax(1).median().item()
    path = export(backbone, head, tmp_path / "it.onnx")
    probabilities, classes = load(path, "onnx")(torch.stack(images[:9]))
    assert torch.equal(classes, head.decide(scores))
    assert (classes == -1).sum() == 4
    assert torch.allclose(probabilities.sum(1), torch.ones(9))
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(stored["imprint_pl"])["class_names"] == list("abcdefghij")


def test_a_file_of_another_head_is_refused(small, tmp_path):
    backbone, x, y, images = small
    path = export(backbone, imprint(x, (y + 1) % 10, "qi"), tmp_path / "it.pt2", "torch_export")
    with pytest.raises(ImprintError, match="does not agree with the classifier"):
        check(path, "torch_export", backbone, imprint(x, y, "qi"), images[:5], tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        dict(size=24),
        dict(size=24, resize=32, interpolation="bicubic"),
        dict(size=(24, 32), crop_pct=0.9),
        dict(size=24, resize=16),
        dict(size=24, crop_mode="border", crop_pct=0.9),
    ],
)
def test_resizing_by_matrices_is_what_preprocess_does(settings):
    preprocess = Preprocess(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25], **settings)
    generator = torch.Generator().manual_seed(0)
    for height, width in ((8, 8), (37, 53), (101, 20), (24, 24)):
        images = torch.randint(0, 256, (2, 3, height, width), generator=generator)
        images = images.to(torch.uint8)
        assert torch.allclose(MatrixResize(preprocess)(images), preprocess(images), atol=1e-4)


def test_what_cannot_be_exported_is_named(digits, tmp_path):
    backbone, x, y, _ = digits
    head = imprint(x, y, "qi")
    with pytest.raises(ImprintError, match="'onx'; did you mean 'onnx'"):
        export(backbone, head, tmp_path / "it", "onx")
    with pytest.raises(ImprintError, match="no proxies yet"):
        export(backbone, ImprintedHead(), tmp_path / "it")
    with pytest.raises(ImprintError, match="no preprocessing to ship"):
        export(load_backbone(torch.nn.Flatten()), head, tmp_path / "it")


@pytest.mark.parametrize("recipe", ["robust", "kernel", "ranpac"])
def test_a_head_saved_as_safetensors_is_the_same_in_a_fresh_process(digits, tmp_path, recipe):
    backbone, x, y, _ = digits
    head = imprint(x, y, recipe, class_names=list("abcdefghij"))
    head.threshold = 0.5
    head.save_pretrained(tmp_path / "head", config=head_config(head, backbone))
    assert not list(tmp_path.rglob("*.bin"))
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    assert config["backbone"]["name"] == "efficientnet_lite0"
    assert config["recipe"]["recipe"] == recipe
    torch.save(x[:20], tmp_path / "x.pt")
    code = (
        "import torch; from imprint_pl import ImprintedHead\n"
        "head = ImprintedHead.from_pretrained('head')\n"
        "assert head.class_names[0] == 'a' and head.threshold == 0.5\n"
        "torch.save(head(torch.load('x.pt')).detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), head(x[:20]))


def test_a_damaged_head_is_refused(digits, tmp_path):
    _, x, y, _ = digits
    imprint(x, y, "qi").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ImprintError, match="damaged, or not a head"):
        ImprintedHead.from_pretrained(tmp_path)


class Branches(nn.Module):
    """Looks at its numbers to choose its path, which no exporter can follow."""

    def forward(self, images):
        return images.mean((2, 3)) if images.mean() > 0 else images.amax((2, 3))


class Faulty(nn.Module):
    def forward(self, images):
        return images.flatten(1).no_such_method()


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_a_model_that_the_exporter_cannot_follow_is_one_sentence_and_a_fault_stays_itself(
    format, tmp_path
):
    preprocess = dict(size=8, mean=[0.5] * 3, std=[0.5] * 3)
    head = imprint(torch.eye(3), torch.arange(3), "qi")
    with pytest.raises(ImprintError, match="the exporter cannot follow this model into " + format):
        export(load_backbone(Branches(), preprocess=preprocess), head, tmp_path / "it", format)
    with pytest.raises(AttributeError, match="no_such_method"):
        export(load_backbone(Faulty(), preprocess=preprocess), head, tmp_path / "it", format)
    assert not list(tmp_path.iterdir())


def test_a_head_alone_is_not_loaded_as_a_program(tmp_path):
    with pytest.raises(ImprintError, match="takes embeddings instead of images"):
        load(tmp_path, "safetensors")


@pytest.mark.parametrize(
    ("model", "format"),
    [
        ("small", "onnx"),
        ("small", "torch_export"),
        pytest.param("digits", "onnx", marks=pytest.mark.slow),
    ],
)
def test_the_familiarity_is_exported_and_agrees(model, format, request, tmp_path):
    backbone, x, y, images = request.getfixturevalue(model)
    head = set_threshold(imprint(x, y, "kernel"), x, y, 0.9)
    path = export(backbone, head, tmp_path / "it.file", format)
    assert check(path, format, backbone, head, images, tmp_path).same_class == 200
    _, classes, familiarity = load(path, format)(images[0][None].repeat(2, 1, 1, 1))
    embeddings = backbone(images[0][None])
    expected = head.familiarity(embeddings)
    torch.testing.assert_close(familiarity, expected.repeat(2), atol=1e-4, rtol=1e-4)
    assert torch.equal(classes, head.label(embeddings).repeat(2))
    head.familiar.scale[0] += 1
    assert head.sets.is_empty
    with pytest.raises(ImprintError, match="the familiarity by"):
        check(path, format, backbone, head, images[:5], tmp_path)


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.slow
def test_limits_of_several_layers_are_exported_and_agree_on_strange_images(small, format, tmp_path):
    _, _, y, images = small
    layers = nn.Conv2d(3, 24, 5, 3), nn.ReLU(), nn.Conv2d(24, 32, 3, 2), nn.AdaptiveAvgPool2d(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*layers, nn.Flatten())
    preprocess = dict(size=24, mean=[0.5] * 3, std=[0.5] * 3)
    backbone = load_backbone(model, preprocess=preprocess, layers=["1"])
    with torch.no_grad():
        x = backbone(images)
    head = imprint(x, y, "kernel", norm_pre="join+nystrom", layer_widths=backbone.layer_widths)
    set_limits(head, x, y, Limits(0.95, 0.9))
    path = export(backbone, head, tmp_path / "it.file", format)
    noise = torch.randint(0, 256, (4, 3, 40, 30), generator=torch.Generator().manual_seed(1))
    strange = [*noise.byte(), torch.zeros(3, 9, 9).byte(), torch.full((3, 50, 9), 255).byte()]
    strange = [image.contiguous() for image in strange]
    assert check(path, format, backbone, head, [*images, *strange], tmp_path).same_class == 206
    for image in strange:
        _, classes, familiarity, sets = load(path, format)(image[None])
        assert classes.tolist() == [-1]
        assert familiarity < head.threshold
        assert not sets.any()


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
@pytest.mark.parametrize("accept", [None, 0.8])
@pytest.mark.slow
def test_prediction_sets_are_exported_and_agree(small, format, accept, tmp_path):
    backbone, x, y, images = small
    head = set_limits(imprint(x, y, "ridge"), x, y, Limits(accept, 0.9))
    path = export(backbone, head, tmp_path / "it.file", format)
    assert check(path, format, backbone, head, images, tmp_path).same_class == 200
    _, classes, *others = load(path, format)(torch.stack(images[:9]))
    embeddings = backbone(torch.stack(images[:9]))
    assert len(others) == (1 if accept is None else 2)
    assert torch.equal(others[-1], head.prediction_sets(embeddings))
    assert not others[-1][classes == -1].any()
    head.sets.log_probabilities -= 3
    with pytest.raises(ImprintError, match="does not agree"):
        check(path, format, backbone, head, images[:50], tmp_path)
