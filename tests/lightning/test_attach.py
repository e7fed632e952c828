"""attach, detach, extend: hand-made points, classifiers of torchvision, timm, transformers."""

import copy
import random

import numpy as np
import pytest
import timm
import torch
import torchvision
from lightning.pytorch import LightningDataModule, LightningModule
from projects import Plain, digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from trainers import quiet_trainer

from imprint_pl import (
    ImprintCallback,
    ImprintedClassifier,
    ImprintedHead,
    ImprintError,
    attach,
    detach,
    extend,
    imprint,
)
from imprint_pl.lightning.extending import ExtendedLayer

POINTS = torch.tensor([[3.0, 4.0], [4.0, 3.0], [-3.0, 4.0], [-4.0, 3.0], [0.0, -2.0], [0.1, -2.0]])
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def net():
    return nn.Sequential(nn.Identity(), nn.Linear(2, 7))


class PointsData(LightningDataModule):
    class_names = ("right", "left", "down")

    def setup(self, stage):
        self.data = TensorDataset(POINTS, LABELS)

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4, shuffle=True, drop_last=True)


@pytest.mark.parametrize(
    "data",
    [
        (POINTS, LABELS),
        (POINTS.numpy(), LABELS.numpy()),
        DataLoader(TensorDataset(POINTS, LABELS), 4, shuffle=True, drop_last=True),
        [(POINTS[:3], LABELS[:3], "more"), {"x": POINTS[3:], "target": LABELS[3:]}],
        PointsData(),
    ],
    ids=["tensors", "arrays", "loader", "batches", "datamodule"],
)
def test_the_head_is_that_of_imprint_on_what_went_into_the_layer(data):
    module = net()
    head = attach(module, "1", data=data, recipe="qi")
    assert module[1] is head
    expected = imprint(POINTS, LABELS, "qi")
    torch.testing.assert_close(head.proxies, expected.proxies)
    torch.testing.assert_close(module(POINTS), expected(POINTS))
    assert head.name_of(1) == ("left" if isinstance(data, PointsData) else "1")


class Named(TensorDataset):
    """A data set with names, as those of torchvision have them."""

    def __init__(self, classes, **more):
        super().__init__(POINTS, LABELS)
        self.classes = classes
        self.__dict__ |= more


NAMED = ["right", "left", "down"]


def named_by_attach(loader):
    return attach(net(), "1", data=loader, recipe="qi")


def named_by_a_datamodule(loader):
    class Data(LightningDataModule):
        def train_dataloader(self):
            return loader

    return attach(net(), "1", data=Data(), recipe="qi")


def named_by_the_classifier(loader):
    model = ImprintedClassifier(None, "qi")
    quiet_trainer().fit(model, loader)
    return model.head


def named_by_sums(loader):
    model = ImprintedClassifier(None, "ls")
    quiet_trainer().fit(model, loader)
    return model.head


def named_by_the_callback(loader):
    class Project(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    callback = ImprintCallback("net.1", "qi", num_classes=3)
    quiet_trainer(callbacks=[callback]).fit(Project(), loader)
    return callback.head


@pytest.mark.parametrize(
    "fitted",
    [
        named_by_attach,
        named_by_a_datamodule,
        named_by_the_classifier,
        named_by_sums,
        named_by_the_callback,
    ],
)
def test_the_names_in_a_data_set_are_those_of_the_head(fitted):
    assert fitted(DataLoader(Named(NAMED), 4)).class_names == NAMED
    # A subset has the labels of the whole.
    part = torch.utils.data.Subset(Named(NAMED), [0, 2, 4])
    assert fitted(DataLoader(part, 4)).class_names == NAMED


@pytest.mark.parametrize(
    ("dataset", "names"),
    [
        (Named(("right", "left", "down")), NAMED),
        # ImageNet of torchvision has synonyms.
        (Named([("cock", "rooster"), ("hen",), ("cat",)]), ["cock, rooster", "hen", "cat"]),
        # Names of classes without a sample: nobody knows whether label 2 is the third of them.
        (Named(["right", "left", "up", "down"]), []),
        (Named(NAMED, target_transform=lambda label: 2 - label), []),
        (Named([0, 1, 2]), []),
        (Named("abc"), []),
        (Named([]), []),
        (TensorDataset(POINTS, LABELS), []),
    ],
)
def test_names_in_a_data_set_that_do_not_fit_are_left(dataset, names):
    assert named_by_attach(DataLoader(dataset, 4)).class_names == names


def test_the_names_of_a_datamodule_come_before_those_of_its_data_set():
    class Data(PointsData):
        def setup(self, stage):
            self.data = Named(["a", "b", "c"])

    assert attach(net(), "1", data=Data(), recipe="qi").class_names == NAMED


def test_detach_gives_the_first_layer_back_bitwise_after_any_number_of_attaches():
    module = net()
    layer, before = module[1], copy.deepcopy(module.state_dict())
    attach(module, "1")
    attach(module, "1", data=(POINTS, LABELS), recipe="qi")
    attach(module, "1", data=(POINTS, LABELS), recipe="robust", k=1, num_classes=3)
    assert len(module[1].proxies) == 3
    assert detach(module, "1") is layer is module[1]
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ImprintError, match="'1' of Sequential is a Linear that nothing was"):
        detach(module, "1")


def test_a_layer_with_two_names_is_replaced_under_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 5)
            self.net = nn.Sequential(nn.Identity(), self.fc)

        def forward(self, x):
            return self.net(x)

    x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    for layer in ("fc", "net.1"):
        module = Shared()
        linear, head = module.fc, attach(module, layer, data=(x, y), recipe="qi")
        assert module.fc is module.net[1] is head
        assert module(x).shape == (2, 2)
        copied = Shared()
        attach(copied, layer)
        copied.load_state_dict(module.state_dict())
        assert torch.equal(copied(x), module(x))
        attach(module, layer, data=(x, y), recipe="qi")
        assert detach(module, layer) is module.fc is module.net[1] is linear


def test_the_replaced_layer_is_neither_a_parameter_nor_in_the_state_dict():
    module = net()
    attach(module, "1", data=(POINTS, LABELS), recipe="qi")
    assert {name for name, _ in module.named_parameters()} == {"1.proxies", "1.log_scale"}
    assert not any("weight" in name for name in module.state_dict())
    clone = copy.deepcopy(module)
    assert isinstance(detach(clone, "1"), nn.Linear)
    assert isinstance(module[1], ImprintedHead)


def test_an_empty_head_is_filled_by_a_state_dict_and_says_so_until_then():
    module, filled = net(), net()
    attach(filled, "1", data=(POINTS, LABELS), recipe="whitened")
    attach(module, "1")
    with pytest.raises(ImprintError, match="no proxies yet"):
        module(POINTS)
    module.load_state_dict(filled.state_dict(), strict=True)
    assert torch.equal(module(POINTS), filled(POINTS))


def test_statistics_modes_gradients_and_random_states_are_what_they_were():
    module = Plain()
    module.train()
    module.net[0][1].eval()  # a user's frozen BatchNorm
    module.net[0][0].weight.requires_grad_(False)
    x, y = digits()
    generator = torch.Generator().manual_seed(5)
    loader = DataLoader(TensorDataset(x, y), 64, shuffle=True, generator=generator)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)

    class Augmented(list):
        def __iter__(self):
            for batch in loader:
                yield batch[0] + torch.rand(1) + np.random.rand() + random.random(), batch[1]

    def state():
        modes = [p.training for n, p in module.named_modules() if not n.startswith("net.2")]
        gradients = [p.requires_grad for n, p in module.named_parameters() if "net.2" not in n]
        weights = [t.clone() for n, t in module.state_dict().items() if "net.2" not in n]
        return modes, gradients, weights

    before, rng = state(), (random.getstate(), np.random.get_state()[1].copy())
    torch_state = torch.get_rng_state()
    for data in (loader, Augmented()):
        attach(module, "net.2", data=data, recipe="qi")
    after = state()
    assert after[:2] == before[:2]
    assert all(torch.equal(a, b) for a, b in zip(after[2], before[2], strict=True))
    assert random.getstate() == rng[0]
    assert (np.random.get_state()[1] == rng[1]).all()
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_a_shuffled_loader_gives_the_head_of_its_data_set_and_its_own_generator_stays():
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    x, y = digits()
    loader = DataLoader(TensorDataset(x, y), 64, shuffle=True, drop_last=True, generator=generator)
    module = Plain()
    shuffled = attach(module, "net.2", data=loader, recipe="robust", k=3)
    ordered = attach(module, "net.2", data=(x, y), recipe="robust", k=3)
    torch.testing.assert_close(shuffled.proxies, ordered.proxies)
    assert torch.equal(generator.get_state(), before)


def test_a_sampler_of_the_users_own_is_kept():
    sampler = WeightedRandomSampler([1.0, 0, 1, 0, 1, 0], 30)
    loader = DataLoader(TensorDataset(POINTS, LABELS), 4, sampler=sampler)
    head = attach(net(), "1", data=loader, recipe="qi")
    torch.testing.assert_close(head.proxies.detach(), functional.normalize(POINTS[::2]))


IMAGES = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FOUR = torch.arange(12) % 4


@pytest.mark.parametrize(
    ("make", "layer", "dim"),
    [
        (lambda: torchvision.models.resnet18(), "fc", 512),
        (lambda: torchvision.models.mobilenet_v3_small(), "classifier.3", 1024),
        (
            lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 24, 48),
            "heads.head",
            24,
        ),
        (lambda: timm.create_model("resnet10t"), "fc", 512),
        (
            lambda: timm.create_model(
                "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2
            ),
            "head",
            24,
        ),
    ],
    ids=["resnet18", "mobilenet_v3_small", "vit", "timm_resnet", "timm_vit"],
)
def test_image_classifiers(make, layer, dim):
    torch.manual_seed(0)
    module = make()
    head = attach(module, layer, data=(IMAGES, FOUR), recipe="knn", m=1)
    assert head.embedding_dim == dim
    assert (module.eval()(IMAGES).argmax(1) == FOUR).all()
    module.train()
    detach(module, layer)
    assert module(IMAGES).shape == (12, 1000)


def test_a_transformers_classifier_keeps_its_output():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    module = transformers.ViTForImageClassification(config)
    attach(module, "classifier", data=(IMAGES, FOUR), recipe="knn", m=1)
    output = module.eval()(pixel_values=IMAGES, labels=FOUR)
    assert (output.logits.argmax(1) == FOUR).all()
    assert output.loss.isfinite()


class NoForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Identity(), nn.Linear(2, 3)


class Twice(NoForward):
    def forward(self, x):
        return self.fc(self.body(x)) + self.fc(x)


class Keyword(NoForward):
    def forward(self, x):
        return self.fc(input=self.body(x))


class Never(NoForward):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "layer", "message"),
    [
        (Twice(), "fcc", "Twice has no layer 'fcc'; did you mean 'fc'"),
        (Twice(), "", "Twice has no layer ''"),
        (Twice(), "fc", "layer 'fc' ran 2 times for one batch"),
        (Never(), "fc", "layer 'fc' ran 0 times for one batch"),
        (NoForward(), "fc", "NoForward has no forward that leads to its layer 'fc'"),
    ],
)
def test_a_layer_that_is_no_embedding_layer_is_an_error(module, layer, message):
    with pytest.raises(ImprintError, match=message):
        attach(module, layer, data=(POINTS, LABELS))
    assert isinstance(module.fc, nn.Linear)
    assert module.training


def test_a_layer_may_be_called_by_keyword():
    assert attach(Keyword(), "fc", data=(POINTS, LABELS), recipe="qi").num_classes == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "has no batch"),
        ((POINTS, LABELS[:4]), r"tuple of lengths \[6, 4\]"),
        ({"a": 1}, "dict of loaders: give the one"),
        ([DataLoader(TensorDataset(POINTS, LABELS))] * 2, "list of loaders"),
        ([POINTS], "has no labels"),
        ((POINTS, LABELS + 1), "class 0 has no training sample"),
    ],
)
def test_data_that_does_not_fit_is_an_error_and_leaves_the_layer(data, message):
    module = net()
    with pytest.raises(ImprintError, match=message):
        attach(module, "1", data=data)
    assert isinstance(module[1], nn.Linear)


# extend


def trained(x, y, epochs=5, bias=True):
    """A linear classifier as a user trains one."""
    torch.manual_seed(0)
    layer = nn.Linear(x.shape[1], int(y.max()) + 1, bias=bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            functional.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
    return nn.Sequential(layer)


def harmonic(scores, y, old_classes):
    right = (scores.argmax(1) == y).float()
    old, new = right[y < old_classes].mean(), right[y >= old_classes].mean()
    return float(2 * old * new / (old + new))


@pytest.fixture(scope="module")
def seven(acceptance):
    """Embeddings of Fashion-MNIST, and a layer trained on the first seven classes."""
    x, y = acceptance["train_embeddings"][:3000], acceptance["train_labels"][:3000]
    test = acceptance["test_embeddings"], acceptance["test_labels"]
    old = y < 7
    return x, y, *test, trained(x[old], y[old])


def test_with_old_data_extending_is_as_good_as_imprinting_all_at_once(seven):
    x, y, test_x, test_y, module = seven
    module, old = copy.deepcopy(module), y < 7
    before = module(test_x)
    new = {name: x[y == c] for c, name in [(7, "sneaker"), (8, "bag"), (9, "boot")]}
    extend(module, "0", new, old_data=(x[old], y[old]), recipe="kernel", projection_dim=500)
    after = module(test_x)
    assert torch.equal(after[:, :7], before)
    all_at_once = attach(
        nn.Sequential(nn.Identity()), "0", data=(x, y), recipe="kernel", projection_dim=500
    )
    assert harmonic(after, test_y, 7) > harmonic(all_at_once(test_x), test_y, 7) - 0.02
    # In a new process: an extended layer of the old sizes takes the file.
    fresh = nn.Sequential(ExtendedLayer(nn.Linear(x.shape[1], 7)))
    fresh.load_state_dict(module.state_dict(), strict=True)
    assert torch.equal(fresh(test_x), after)
    assert fresh[0].head.name_of(9) == "boot"


def test_without_old_data_new_rows_find_their_place(seven):
    x, y, test_x, test_y, module = seven
    module = copy.deepcopy(module)
    weight, bias = module[0].weight.clone(), module[0].bias.clone()
    batches = DataLoader(TensorDataset(x[y == 8], y[y == 8]), 64, shuffle=True)
    layer = extend(module, "0", {"sneaker": x[y == 7], "bag": batches, "boot": x[y == 9]})
    assert type(layer) is nn.Linear
    assert layer.out_features == 10
    assert torch.equal(layer.weight[:7], weight)
    assert torch.equal(layer.bias[:7], bias)
    # Measured 0.80; seven classes alone, which cannot name a new one, have 0.
    assert harmonic(module(test_x), test_y, 7) > 0.75


class Pictures(nn.Module):
    """Takes a list of images `(1, 1, 2)`, as they come from files of any size."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, images):
        return self.fc(torch.stack(images).flatten(1))


def test_images_in_the_place_of_skipped_files_are_no_samples_of_a_new_class():
    torch.manual_seed(0)
    module = Pictures()
    images = list(POINTS[:3].view(-1, 1, 1, 2))
    with_black = {"images": [*images, torch.zeros(1, 1, 2)], "skipped": {3: "damaged"}}
    expected = extend(copy.deepcopy(module), "fc", {"new": [images]}).weight
    torch.testing.assert_close(extend(module, "fc", {"new": [with_black]}).weight, expected)


def test_one_sample_of_a_new_class_is_enough():
    module = trained(POINTS, LABELS, epochs=200, bias=False)
    extend(module, "0", {"up-left": torch.tensor([[-30.0, 30.0]])})
    scores = module(torch.tensor([[-28.0, 31.0]]))
    assert scores.argmax() == 3
    assert (module(POINTS).argmax(1) == LABELS).sum() >= 4


@pytest.mark.parametrize(
    ("layer", "new", "options", "message"),
    [
        ("0", {"a": POINTS}, {}, "is Identity.*extend takes an nn.Linear"),
        ("1", {}, {}, "new_classes is empty"),
        ("1", {"a": POINTS[:0]}, {}, "class 'a' has no sample"),
        ("1", {"a": POINTS}, {"k": 3}, "used with old_data alone"),
        ("1", {"a": POINTS}, {"old_data": (POINTS, LABELS + 6)}, "label 8 in old_data"),
    ],
)
def test_what_extend_cannot_do(layer, new, options, message):
    with pytest.raises(ImprintError, match=message):
        extend(net(), layer, new, **options)
