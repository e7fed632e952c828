"""Layers and views of a backbone in a classifier: its fit, its checkpoint, what goes on from it."""

import copy
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningDataModule
from places import ROOT
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import (
    ImprintCallback,
    ImprintedClassifier,
    ImprintedHead,
    ImprintError,
    attach,
    extend,
    imprint,
)
from imprint_pl.collapse import nc1
from imprint_pl.data import ArrayDataset, ImageDataModule, Splits
from imprint_pl.data.embeddings import EmbeddingDataModule
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.explain import explain
from imprint_pl.export import export, head_config
from imprint_pl.gallery import proxy_gallery

NAME = "timm/test_resnet"
RANDOM = dict(pretrained=False, image_size=32)


class Stages(nn.Module):
    """Images `(B, 3, H, W)` → their three means, from three stages of 3 channels each."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 1) for _ in range(3))
        for i, stage in enumerate((self.first, self.second, self.third), 1):
            stage.weight.data = i * torch.eye(3)[:, :, None, None]
            stage.bias.data.zero_()

    def forward(self, x):
        return self.third(self.second(self.first(x)).relu()).mean((2, 3))


class Photos(ImageDataModule):
    """24 images of three colours, with noise."""

    name = "Photos"

    def load(self):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(36) % 3
        noise = torch.randint(0, 120, (36, 3, 20, 20), generator=generator)
        images = (noise + 100 * torch.eye(3)[labels][:, :, None, None]).clamp(0, 255).byte()
        parts = [ArrayDataset(images[p], labels[p]) for p in (slice(24), slice(24, 36))]
        return Splits(["red", "green", "blue"], *parts)


class Loader(LightningDataModule):
    def __init__(self, x, y):
        super().__init__()
        self.data = TensorDataset(x, y)

    def train_dataloader(self):
        return DataLoader(self.data, 7)


def photos():
    module = Photos(batch_size=7)
    module.setup()
    return module


def floats():
    images, labels = photos().train_dataset.__getitems__(list(range(24)))
    return images.float() / 255, labels


def fitted(data=None, backbone=NAME, **keywords):
    named = RANDOM if backbone == NAME else {}
    model = ImprintedClassifier(backbone, **(named | keywords))
    run = quiet_trainer(limit_val_batches=0)
    run.fit(model, photos() if data is None else data)
    return model.eval(), run


def saved(run, path):
    run.save_checkpoint(path)
    return path


# What is taken where nothing is said.


@pytest.mark.parametrize(
    ("keywords", "layers"),
    [
        ({}, "all"),
        ({"recipe": "qi"}, "last"),
        ({"layers": "last"}, "last"),
        ({"recipe": "qi", "layers": "all"}, "all"),
        ({"layers": "layer1"}, ["layer1"]),
    ],
)
def test_auto_takes_all_layers_and_a_named_recipe_the_last(keywords, layers):
    model = ImprintedClassifier(NAME, **RANDOM, **keywords)
    assert model.hparams["layers"] == model.hparams_initial["layers"] == layers
    assert (model.backbone.layer_widths is None) == (layers == "last")
    assert model.hparams.get("layer_widths") == model.backbone.layer_widths


def test_embeddings_have_one_layer_where_they_do_not_say_otherwise():
    x, y = torch.rand(9, 4), torch.arange(9) % 3
    model, _ = fitted(Loader(x, y), None)
    assert model.hparams["layers"] == "last"
    assert model.head.layer_widths is None
    torch.testing.assert_close(model(x), imprint(x, y)(x))


def test_a_module_of_ones_own_tells_its_layers_with_the_first_batch():
    x, y = floats()
    model, _ = fitted(Loader(x, y), Stages())
    assert model.hparams["layers"] == "all"
    assert model.head.layer_widths == model.backbone.layer_widths == [3] * 7
    wide = model.embed(x)
    assert torch.equal(wide[:, -3:], Stages()(x))
    torch.testing.assert_close(model(x), imprint(wide, y, layer_widths=[3] * 7)(wide))


def test_a_module_without_other_layers_falls_back_to_the_last():
    x, y = floats()
    model, _ = fitted(Loader(x, y), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert model.hparams["layers"] == "last"
    assert model.head.layer_widths is None


def test_a_backbone_that_was_made_before_keeps_its_layers():
    backbone = load_backbone(NAME, **RANDOM, layers="layer2", views="flip")
    model = ImprintedClassifier(backbone)
    assert model.hparams["layers"] == ["layer2"]
    for keywords in ({"layers": "all"}, {"layers": "last"}):
        with pytest.raises(ImprintError, match="give them to load_backbone"):
            ImprintedClassifier(backbone, **keywords)
    with pytest.raises(ImprintError, match="views='flip'"):
        ImprintedClassifier(load_backbone(NAME, **RANDOM), views="flip")


# What the fit makes of them.


@pytest.mark.parametrize("recipe", ["auto", "qi", "ridge", "robust", "ranpac"])
def test_the_head_is_that_of_imprint_with_the_widths(recipe):
    model, run = fitted(recipe=recipe, layers="all")
    images, y = photos().train_dataset.__getitems__(list(range(24)))
    x, widths = model.embed(images), model.backbone.layer_widths
    expected = imprint(x, y, recipe, layer_widths=widths)
    assert model.head.layer_widths == widths
    # Images of other batches differ by rounding.
    own, theirs = model(images).softmax(1), expected(x).softmax(1)
    torch.testing.assert_close(own, theirs, atol=1e-3, rtol=1e-3)
    last = nn.functional.normalize(x[:, -widths[-1] :])
    assert run.callback_metrics["train/nc1"].item() == pytest.approx(nc1(last, y), rel=1e-3)


def test_the_views_of_a_fit_are_the_mean_of_both():
    model, _ = fitted(recipe="qi", views="flip", layers="all")
    plain = load_backbone(NAME, **RANDOM, layers="all")
    images = plain.preprocess(photos().train_dataset.__getitems__([0, 1])[0])
    flipped = (plain(images) + plain(images.flip(-1))) / 2
    torch.testing.assert_close(model.embed(images), flipped, atol=1e-5, rtol=1e-4)
    assert model.hparams["views"] == "flip"


def test_embeddings_of_several_layers_bring_their_widths():
    x, y = torch.rand(24, 5), torch.arange(24) % 3
    splits = Splits(["a", "b", "c"], ArrayDataset(x, y), ArrayDataset(x, y))
    data = EmbeddingDataModule(splits, layer_widths=[3, 2])
    for recipe in ("auto", "qi"):
        model, _ = fitted(data, None, recipe=recipe)
        assert model.head.layer_widths == model.hparams["layer_widths"] == [3, 2]
        torch.testing.assert_close(model(x), imprint(x, y, recipe, layer_widths=[3, 2])(x))


def test_a_fit_from_the_cache_equals_one_without(tmp_path):
    images = photos().train_dataset.__getitems__(list(range(24)))[0]
    direct, _ = fitted(recipe="qi", layers="all")
    data = embed(load_backbone(NAME, **RANDOM, layers="all"), photos(), tmp_path, device="cpu")
    # Its backbone reads the layers that the data have, where the user names none.
    cached, _ = fitted(data, recipe="qi")
    assert cached.hparams["layers"] == "all"
    torch.testing.assert_close(cached(images), direct(images), atol=1e-4, rtol=1e-4)


def test_a_backbone_reads_the_last_layer_where_the_data_are_embeddings_of_it(tmp_path):
    data = embed(load_backbone(NAME, **RANDOM), photos(), tmp_path, device="cpu")
    model, _ = fitted(data)
    assert (model.hparams["layers"], model.backbone.layers) == ("last", [])
    images = photos().test_dataset.__getitems__([0, 1])[0]
    assert model(images).shape == (2, 3)


@pytest.mark.parametrize(("embedded", "asked"), [("last", "all"), ("all", "last")])
def test_other_layers_than_those_of_the_embeddings_are_refused(tmp_path, embedded, asked):
    backbone = load_backbone(NAME, **RANDOM, layers=embedded)
    data = embed(backbone, photos(), tmp_path, device="cpu")
    with pytest.raises(ImprintError, match=f"layers='{asked}'.* embed with the same layers"):
        fitted(data, layers=asked)


# Checkpoints.


@pytest.mark.slow
def test_a_checkpoint_says_and_keeps_what_it_was_fitted_with(tmp_path):
    model, run = fitted(views="flip")
    path = saved(run, tmp_path / "it.ckpt")
    file = torch.load(path, weights_only=True)
    assert file["hyper_parameters"]["layers"] == "all"
    assert file["hyper_parameters"]["layer_widths"] == model.head.layer_widths
    assert file["backbone"]["layers"] == model.backbone.layers
    assert file["backbone"]["views"] == "flip"
    images = photos().test_dataset.__getitems__([0, 1, 2])[0]
    loaded = ImprintedClassifier.load_from_checkpoint(path)
    assert torch.equal(loaded(images), model(images))
    code = (
        "import sys, torch; from imprint_pl import ImprintedClassifier; "
        "sys.path[:0] = ['tests', 'tests/lightning']; "
        "from test_layers_of_classifiers import photos; "
        f"model = ImprintedClassifier.load_from_checkpoint({str(path)!r}); "
        "print(model(photos().test_dataset.__getitems__([0, 1, 2])[0]).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    fresh = torch.tensor(eval(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(fresh, model(images), atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_an_own_module_is_loaded_with_its_layers(tmp_path):
    x, y = floats()
    model, run = fitted(Loader(x, y), Stages(), recipe="qi", layers=["first"])
    path = saved(run, tmp_path / "it.ckpt")
    loaded = ImprintedClassifier.load_from_checkpoint(path, backbone=Stages())
    assert torch.equal(loaded(x), model(x))
    assert loaded.hparams["layers"] == ["first"]


def test_a_checkpoint_without_layers_means_the_last(tmp_path):
    model, run = fitted(recipe="auto", layers="last")
    path = saved(run, tmp_path / "old.ckpt")
    file = torch.load(path, weights_only=True)
    # As an earlier version wrote it.
    del file["hyper_parameters"]["layers"], file["hyper_parameters"]["views"]
    assert "layers" not in file["backbone"]
    torch.save(file, path)
    images = photos().test_dataset.__getitems__([0, 1, 2])[0]
    loaded = ImprintedClassifier.load_from_checkpoint(path)
    assert loaded.backbone.layers == []
    assert torch.equal(loaded(images), model(images))
    # One that was made with the usual layers follows it, too.
    other = ImprintedClassifier(NAME, **RANDOM)
    assert other.backbone.layers
    quiet_trainer().test(other, photos(), ckpt_path=path, verbose=False)
    assert torch.equal(other.eval()(images), model(images))


def test_a_named_recipe_follows_a_checkpoint_of_all_layers(tmp_path):
    model, run = fitted(recipe="qi", layers="all")
    path = saved(run, tmp_path / "it.ckpt")
    other = ImprintedClassifier(NAME, "qi", **RANDOM)
    quiet_trainer().test(other, photos(), ckpt_path=path, verbose=False)
    assert other.backbone.layers == model.backbone.layers


@pytest.mark.parametrize(("fitted_with", "asked"), [("all", "last"), ("last", "all")])
def test_other_layers_than_a_checkpoints_are_refused(tmp_path, fitted_with, asked):
    _, run = fitted(recipe="qi", layers=fitted_with)
    path = saved(run, tmp_path / "it.ckpt")
    with pytest.raises(ImprintError, match=f"this model has layers='{asked}': leave layers out"):
        ImprintedClassifier.load_from_checkpoint(path, layers=asked)


def test_layers_of_a_forged_checkpoint_are_refused(tmp_path):
    _, run = fitted(recipe="qi", layers="all")
    path = saved(run, tmp_path / "it.ckpt")
    good = torch.load(path, weights_only=True)
    for layers in ([1, 2], {"a": 1}, ["no such module"]):
        file = copy.deepcopy(good)
        file["backbone"]["layers"] = layers
        torch.save(file, path)
        with pytest.raises(ImprintError):
            ImprintedClassifier.load_from_checkpoint(path)
    for widths in ([1, 2], "wide", [-1]):
        file = copy.deepcopy(good)
        file["hyper_parameters"]["layer_widths"] = widths
        torch.save(file, path)
        with pytest.raises(ImprintError):
            ImprintedClassifier.load_from_checkpoint(path)


def test_a_second_fit_on_other_data_takes_the_layers_of_these():
    model, _ = fitted(recipe="qi", layers="all")
    assert model.head.layer_widths
    x, y = torch.rand(9, 4), torch.arange(9) % 3
    other = ImprintedClassifier(None, "qi")
    quiet_trainer().fit(other, Loader(x, y))
    wide = Splits(["a", "b", "c"], ArrayDataset(x, y), ArrayDataset(x, y))
    quiet_trainer(limit_val_batches=0).fit(other, EmbeddingDataModule(wide, layer_widths=[1, 3]))
    assert other.head.layer_widths == [1, 3]
    quiet_trainer().fit(other, Loader(x, y))
    assert other.head.layer_widths is None


# What goes on from a fit.


@pytest.mark.parametrize(("keep", "recipe"), [("embeddings", "qi"), ("moments", "ridge")])
def test_classes_come_and_go(tmp_path, keep, recipe):
    model, run = fitted(recipe=recipe, layers="all", keep=keep)
    images = photos().train_dataset.__getitems__([0, 3, 6])[0]
    path = saved(run, tmp_path / "it.ckpt")
    model.save_state(path)
    loaded = ImprintedClassifier.load_from_checkpoint(path)
    loaded.load_state(path)
    loaded.add_class("dark", images // 4)
    assert loaded.class_names == ["red", "green", "blue", "dark"]
    assert (loaded(images // 4).argmax(1) == 3).all()
    loaded.remove_class("dark", images // 4 if keep == "moments" else None)
    torch.testing.assert_close(loaded(images), model(images), atol=1e-3, rtol=1e-3)


def test_a_state_of_other_layers_is_refused_naming_both(tmp_path):
    all_layers, run = fitted(recipe="qi", layers="all", keep="embeddings")
    last, of_last = fitted(recipe="qi", keep="embeddings")
    path = saved(of_last, tmp_path / "it.ckpt")
    saved(run, tmp_path / "all.ckpt")
    all_layers.save_state(path)
    loaded = ImprintedClassifier.load_from_checkpoint(path)
    widths = all_layers.head.layer_widths
    with pytest.raises(ImprintError) as error:
        loaded.load_state(path)
    assert f"keeps embeddings of {sum(widths)} numbers of layers {widths}" in str(error.value)
    assert f"head takes {widths[-1]} numbers:" in str(error.value)
    last.save_state(path)
    loaded.load_state(path)
    assert loaded.state.embedding_dim == widths[-1]


def test_neighbours_are_near_where_the_layers_count_alike():
    # The first layer is a hundred times as large as the second: raw cosines see it alone.
    x = torch.tensor([[100.0, 0, 1, 0], [100, 1, 0, 1], [0, 100, 1, 0], [1, 100, 0, 1]])
    y = torch.tensor([0, 1, 0, 1])
    splits = Splits(["a", "b"], ArrayDataset(x, y), ArrayDataset(x, y))
    data = EmbeddingDataModule(splits, layer_widths=[2, 2])
    keywords = dict(keep="embeddings", keep_sources=True)
    model, _ = fitted(data, None, recipe="qi", **keywords)
    (found,) = explain(model.head, x[:1], model.state, neighbours=4)
    assert found.neighbours[0].cosine == pytest.approx(1)
    # Each layer agrees with one of the two others, and both count alike.
    assert found.neighbours[1].cosine == pytest.approx(found.neighbours[2].cosine, abs=0.05)
    only, _ = fitted(data, None, recipe="qi", norm_pre="last+l2", **keywords)
    (found,) = explain(only.head, x[:1], only.state, neighbours=4)
    assert [n.class_name for n in found.neighbours[:2]] == ["a", "a"]
    assert found.neighbours[1].cosine == pytest.approx(1)


def test_a_gallery_is_of_the_heads_own_features():
    model, _ = fitted(recipe="robust", k=2, layers="all")
    images, y = photos().train_dataset.__getitems__(list(range(24)))
    gallery = proxy_gallery(model.head, model.embed(images), y)
    assert sum(proxy.samples for proxy in gallery.proxies) == 24


def test_a_heads_folder_names_layers_widths_and_views(tmp_path):
    model, _ = fitted(layers="all", views="flip", recipe="qi")
    export(model.backbone, model.head, tmp_path / "head", "safetensors")
    config = head_config(ImprintedHead.from_pretrained(tmp_path / "head"), model.backbone)
    assert config["layer_widths"] == model.backbone.layer_widths
    assert config["backbone"]["layers"] == model.backbone.layers
    assert config["backbone"]["views"] == "flip"
    usual, _ = fitted(recipe="qi")
    config = head_config(usual.head, usual.backbone)
    assert config["layer_widths"] is None
    assert (config["backbone"]["layers"], config["backbone"]["views"]) == ("last", "none")


def test_heads_in_other_projects_keep_to_the_layer_that_is_named():
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    data = (torch.rand(6, 4), torch.arange(6) % 3)
    for keywords in ({"layers": "all"}, {"views": "flip"}):
        for call in (
            lambda k: attach(net, "1", data=data, recipe="qi", **k),
            lambda k: extend(net, "1", {"new": data[0]}, old_data=data, **k),
            lambda k: ImprintCallback("1", **k),
        ):
            with pytest.raises(ImprintError, match="the layer that you name is the embedding"):
                call(keywords)
