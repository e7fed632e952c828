"""Layers and views of a backbone: which modules are taken, how they are pooled, what stays."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional

from imprint_pl.data import ArrayDataset, Digits, EmbeddingDataModule, Splits
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.embedding.layers import Layer, Pooling, _evenly
from imprint_pl.errors import ImprintError

LITE0 = ["bn1", *(f"blocks.{i}" for i in range(7))]
LITE0_WIDTHS = [32, 16, 24, 40, 80, 112, 192, 320, 1280]


@pytest.fixture(scope="module")
def photographs():
    from sklearn.datasets import load_sample_images

    images = torch.stack([torch.from_numpy(i.copy()) for i in load_sample_images().images])
    return images.permute(0, 3, 1, 2)[:, :, :200, :300]


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("efficientnet_lite0", image_size=96, layers="all")


class Stage(nn.Module):
    """A module with one linear layer over the channels, whose output is what `shape_of` makes."""

    def __init__(self, width, make):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, 1))
        self.make = make

    def forward(self, x):
        return self.make(x)


class Model(nn.Module):
    """Runs a stage on the image, and returns the mean of each channel of the image."""

    def __init__(self, stage, **parameters):
        super().__init__()
        self.stage = stage
        for name, parameter in parameters.items():
            self.register_parameter(name, nn.Parameter(parameter))

    def forward(self, x):
        self.stage(x)
        return x.mean((2, 3))


class SmallNet(nn.Module):
    def __init__(self, widths=(4, 5, 6)):
        super().__init__()
        torch.manual_seed(0)
        before = [3, *widths[:-1]]
        pairs = zip(before, widths, strict=True)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in pairs
            )
        )
        self.fc = nn.Linear(widths[-1], 2)

    def forward(self, x):
        return self.fc(self.stages(x).mean((2, 3)))


def read(model, batch, layers=("stage",), **options):
    backbone = load_backbone(model, layers=list(layers), **options)
    wide = backbone(batch)
    last = backbone.layer_widths[-1]
    assert torch.equal(wide[:, -last:], load_backbone(model)(batch))
    return wide[:, :-last]


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


IMAGES = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
MEANS = IMAGES.mean((2, 3))


# Pooling ---------------------------------------------------------------------------------------


def test_channels_first_are_averaged_over_positions():
    torch.testing.assert_close(read(Model(Stage(3, lambda x: x)), IMAGES), MEANS)


def test_channels_last_are_averaged_over_positions():
    stage = Stage(3, lambda x: x.permute(0, 2, 3, 1))
    torch.testing.assert_close(read(Model(stage), IMAGES), MEANS)


def test_the_parameters_tell_where_channels_are_when_the_shape_fits_both():
    # 2 x 3 positions of 2 or 3 channels: proportions alone fit (2, 3) in two places.
    batch = torch.rand(2, 2, 2, 2)
    wide = torch.cat([batch, batch], 3)  # 2 x 4
    first = Stage(2, lambda x: x[:, :, :, :2])
    last = Stage(5, lambda x: torch.rand(len(x), 4, 4, 5) * 0 + 7)
    torch.testing.assert_close(read(Model(first), wide), batch.mean((2, 3)))
    assert torch.equal(read(Model(last), wide), torch.full((2, 5), 7.0))


@pytest.mark.parametrize("last", [True, False])
def test_where_nothing_else_tells_the_layout_is_that_of_most_modules(last):
    def turned(x):
        return x.permute(0, 2, 3, 1) if last else x

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.clear = Stage(3, lambda x: turned(x))
            self.cube = Stage(4, lambda x: torch.arange(4.0).view(4, 1, 1).expand(len(x), 4, 4, 4))

        def forward(self, x):
            self.clear(x)
            self.cube(x)
            return x.mean((2, 3))

    square = IMAGES[..., :4]
    cube = read(Two(), square, ["cube"])
    # The numbers are those of axis 1.
    expected = torch.full((2, 4), 1.5) if last else torch.arange(4.0).expand(2, 4)
    assert torch.equal(cube, expected)


def tokens_of(x, front=0):
    """The positions of the image behind so many tokens of its own: 10, 20, …"""
    patches = x.flatten(2).transpose(1, 2)
    own = 10.0 * torch.arange(1, front + 1).view(1, -1, 1).expand(len(x), -1, x.shape[1])
    return torch.cat([own, patches], 1)


@pytest.mark.parametrize("name", ["cls_token", "class_token"])
def test_the_class_token_stands_beside_the_mean_of_the_patches(name):
    model = Model(Stage(3, lambda x: tokens_of(x, 1)), **{name: torch.zeros(1, 1, 3)})
    expected = torch.cat([torch.full((2, 3), 10.0), MEANS], 1)
    torch.testing.assert_close(read(model, IMAGES), expected)


def test_tokens_without_a_class_token_are_averaged():
    torch.testing.assert_close(read(Model(Stage(3, tokens_of)), IMAGES), MEANS)


def test_register_tokens_are_in_no_mean():
    registers = {"cls_token": torch.zeros(1, 1, 3), "register_tokens": torch.zeros(1, 4, 3)}
    model = Model(Stage(3, lambda x: tokens_of(x, 5)), **registers)
    expected = torch.cat([torch.full((2, 3), 10.0), MEANS], 1)
    torch.testing.assert_close(read(model, IMAGES), expected)


def test_timm_s_own_count_of_tokens_holds():
    model = Model(Stage(3, lambda x: tokens_of(x, 4)))
    model.num_prefix_tokens, model.num_reg_tokens = 4, 2
    expected = torch.cat([torch.full((2, 3), 10.0), torch.full((2, 3), 20.0), MEANS], 1)
    torch.testing.assert_close(read(model, IMAGES), expected)


def test_a_stage_before_the_class_token_has_patches_only_and_one_behind_may_have_no_patch():
    token = {"cls_token": torch.zeros(1, 1, 3)}
    torch.testing.assert_close(read(Model(Stage(3, tokens_of), **token), IMAGES), MEANS)
    alone = Model(Stage(3, lambda x: tokens_of(x, 1)[:, :1]), **token)
    assert torch.equal(read(alone, IMAGES), torch.full((2, 3), 10.0))


def test_sequences_may_come_first():
    model = Model(
        Stage(3, lambda x: tokens_of(x, 1).transpose(0, 1)), cls_token=torch.zeros(1, 1, 3)
    )
    expected = torch.cat([torch.full((2, 3), 10.0), MEANS], 1)
    torch.testing.assert_close(read(model, IMAGES), expected)


def test_vectors_stay_and_of_a_tuple_the_first_tensor_is_taken():
    torch.testing.assert_close(
        read(Model(Stage(3, lambda x: x.amax((2, 3)))), IMAGES), IMAGES.amax((2, 3))
    )
    torch.testing.assert_close(read(Model(Stage(3, lambda x: (None, [x], 1))), IMAGES), MEANS)
    torch.testing.assert_close(read(Model(Stage(3, lambda x: {"a": x})), IMAGES), MEANS)


def test_halves_are_averaged_in_full_precision():
    x = torch.full((1, 1, 100, 100), 1.0, dtype=torch.bfloat16)
    x[..., :50, :] = 1.0078125
    assert Pooling("channels_first")(x).item() == pytest.approx(1.00390625, abs=1e-6)
    assert Pooling("tokens")(x[0]).dtype == torch.float32


# Which modules ---------------------------------------------------------------------------------


def test_efficientnet_gives_stem_stages_and_the_last_layer_bit_for_bit(lite0, photographs):
    assert (lite0.layers, lite0.layer_widths) == (LITE0, LITE0_WIDTHS)
    assert lite0.embedding_dim == 2096
    wide = lite0(photographs)
    last = load_backbone("efficientnet_lite0", image_size=96)
    assert torch.equal(wide[:, 816:], last(photographs))
    batch = lite0.preprocess(photographs)
    x = lite0.model.bn1(lite0.model.conv_stem(batch))
    torch.testing.assert_close(wide[:, :32], x.mean((2, 3)))
    for block in lite0.model.blocks:
        x = block(x)
    torch.testing.assert_close(wide[:, 496:816], x.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("torchvision/resnet18", ["maxpool", "layer1", "layer2", "layer3"]),
        ("timm/resnet10t", ["conv1", "layer1", "layer2", "layer3"]),
        ("timm/test_vit", ["patch_embed", *(f"blocks.{i}" for i in range(6))]),
    ],
)
def test_stages_are_found_and_what_is_the_last_layer_already_is_not_taken_twice(name, layers):
    assert load_backbone(name, pretrained=False, image_size=64, layers="all").layers == layers


def test_names_are_taken_in_the_order_of_the_forward_pass(photographs, lite0):
    named = [
        load_backbone("efficientnet_lite0", image_size=96, layers=layers)
        for layers in (["blocks.5", "blocks.2"], "blocks.2, blocks.5")
    ]
    for backbone in named:
        assert backbone.layers == ["blocks.2", "blocks.5"]
        assert backbone.layer_widths == [40, 192, 1280]
        columns = lite0(photographs).split(LITE0_WIDTHS, 1)
        assert torch.equal(
            backbone(photographs), torch.cat([columns[3], columns[6], columns[8]], 1)
        )


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["stages.9"], r"no module 'stages.9'; did you mean 'stages"),
        ([], "expected 'last', 'all'"),
        (["stages.0", 3], "expected 'last', 'all'"),
        (["all"], "expected 'last', 'all'"),
        (["stages.0", "unused"], "'unused' of backbone 'SmallNet' does not run"),
        ("", "expected 'last', 'all'"),
    ],
)
def test_names_that_cannot_be_taken_are_refused(layers, message):
    model = SmallNet()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ImprintError, match=message):
        load_backbone(model, layers=layers)(IMAGES)


def test_a_model_without_layers_is_an_error_for_all_and_its_last_layer_for_auto():
    with pytest.raises(ImprintError, match="use layers='last'"):
        load_backbone(nn.Flatten(), layers="all")(IMAGES)
    backbone = load_backbone(nn.Flatten(), layers="auto")
    assert torch.equal(backbone(IMAGES), IMAGES.flatten(1))
    assert (backbone.layers, backbone.layer_widths) == ([], None)
    assert "layers" not in backbone.source()


def test_a_module_of_one_s_own_is_known_at_once_with_preprocessing_else_at_the_first_batch():
    preprocess = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    known = load_backbone(SmallNet(), preprocess=preprocess, layers="all")
    assert known.layers == ["stages.0", "stages.1", "stages.2"]
    assert (known.layer_widths, known.embedding_dim) == ([4, 5, 6, 2], 17)
    later = load_backbone(SmallNet(), layers="all")
    assert (later.layers, later.layer_widths) == ([], None)
    assert later.source()["layers"] == "all"
    assert later(IMAGES).shape == (2, 17)
    assert (later.layers, later.embedding_dim) == (known.layers, 17)
    assert later.source()["layers"] == known.layers


def test_a_plain_chain_of_layers_is_cut_before_each_layer_with_a_matrix():
    chain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(5, 2),
    )  # fmt: skip
    backbone = load_backbone(chain, layers="all")
    backbone(IMAGES)
    assert backbone.layers == ["1", "6"]


def stages_of(*widths):
    return [Layer(str(i), Pooling("vector"), width) for i, width in enumerate(widths)]


def test_at_most_eight_layers_are_kept_evenly_and_the_deepest_always():
    assert [s.name for s in _evenly(stages_of(*[1] * 13), 99)] == [
        "0",
        "2",
        "3",
        "5",
        "7",
        "9",
        "10",
        "12",
    ]
    assert [s.name for s in _evenly(stages_of(*[4] * 12), 12)] == ["0", "5", "11"]
    assert [s.name for s in _evenly(stages_of(4, 4, 4), 4)] == ["2"]
    assert _evenly(stages_of(4, 4, 4), 3) == []
    # One that is much wider than the rest goes first.
    assert [s.name for s in _evenly(stages_of(1, 1, 1, 9), 9)] == ["0", "1", "2"]


def test_a_line_says_what_is_left_out(caplog):
    caplog.set_level("INFO")
    load_backbone("torchvision/mobilenet_v3_small", pretrained=False, image_size=64, layers="all")
    assert "8 of 13 layers beside the last are taken" in caplog.text
    assert "left out: features.1, " in caplog.text


# The forward pass ------------------------------------------------------------------------------


def test_the_forward_pass_runs_once_and_leaves_no_hook_even_when_it_fails():
    model = SmallNet()
    backbone = load_backbone(model, layers="all")
    backbone(IMAGES)
    calls = []
    handle = model.stages[0].register_forward_hook(lambda *_: calls.append(1))
    backbone(IMAGES)
    assert (len(calls), len(hooks_of(model))) == (1, 1)
    handle.remove()
    with pytest.raises(RuntimeError):
        backbone(torch.rand(2, 7, 4, 4))
    assert hooks_of(model) == []


def test_copies_and_pickles_read_their_own_weights():
    backbone = load_backbone(SmallNet(), layers="all")
    before = backbone(IMAGES)
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(twin(IMAGES), before)
        twin.load_state_dict({key: 0 * value for key, value in twin.state_dict().items()})
        assert not twin(IMAGES).any()
        assert torch.equal(backbone(IMAGES), before)


def test_autocast_gives_float32_close_to_the_full_precision():
    plain = load_backbone(SmallNet(), layers="all")(IMAGES)
    low = load_backbone(SmallNet(), layers="all", precision="bf16")(IMAGES)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, plain, rtol=0.05, atol=0.02)


def test_gradients_reach_the_images_through_every_layer():
    images = IMAGES.clone().requires_grad_()
    load_backbone(SmallNet(), layers="all")(images)[:, :4].sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_compiled_model_gives_the_same_layers_with_one_compilation():
    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    backbone = load_backbone(SmallNet(), layers="all")
    expected = [backbone(IMAGES), backbone(2 * IMAGES)]
    torch._dynamo.reset()
    twin = load_backbone(SmallNet(), layers="all")
    twin.model.compile(backend=backend)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(twin(IMAGES), expected[0])
            torch.testing.assert_close(twin(2 * IMAGES), expected[1])
    assert len(graphs) == 1
    torch.testing.assert_close(twin.model(IMAGES), expected[0][:, -2:])


@pytest.mark.slow
def test_compile_true_gives_the_same_layers():
    settings = {"preprocess": {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}, "layers": "all"}
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    expected = load_backbone(SmallNet(), **settings)(images)
    compiled = load_backbone(SmallNet(), compile=True, **settings)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(images), expected)


@pytest.mark.parametrize("views", ["none", "flip"])
def test_layers_and_views_export(views, photographs):
    backbone = load_backbone(
        "efficientnet_lite0", image_size=32, pretrained=False, layers="all", views=views
    )
    dynamic = {"images": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(backbone, (photographs,), dynamic_shapes=dynamic, strict=False)
    more = torch.cat([photographs, photographs[:1]])
    torch.testing.assert_close(exported.module()(more), backbone(more))


# Views -----------------------------------------------------------------------------------------


def test_flip_is_the_mean_of_an_image_and_its_mirror_image_in_every_layer():
    preprocess = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    plain = load_backbone(SmallNet(), preprocess=preprocess, layers="all")
    both = load_backbone(SmallNet(), preprocess=preprocess, layers="all", views="flip")
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    expected = (plain(images) + plain(images.flip(3))) / 2
    torch.testing.assert_close(both(images), expected)
    torch.testing.assert_close(both(images.flip(3)), expected)
    assert not torch.equal(plain(images), expected)


@pytest.mark.parametrize(
    ("settings", "batch", "message"),
    [
        ({"views": "rotate"}, IMAGES, "'rotate': expected one of none, flip"),
        ({"views": "flip"}, torch.rand(2, 6), r"needs images \(B, C, H, W\)"),
        ({"views": "flip"}, torch.rand(2, 3, 6), "leave out views"),
    ],
)
def test_views_that_make_no_sense_are_refused(settings, batch, message):
    with pytest.raises(ImprintError, match=message):
        load_backbone(nn.Flatten(), **settings)(batch)


@pytest.mark.parametrize("settings", [{"views": "flip"}, {"layers": "all"}, {"layers": ["x"]}])
def test_embeddings_have_no_layers_and_no_mirror_image(settings):
    for backbone in (None, "identity"):
        with pytest.raises(ImprintError, match="takes embeddings as they are"):
            load_backbone(backbone, **settings)
    assert load_backbone(None, layers="auto").layer_widths is None


def test_embeddings_still_pass_through_a_named_backbone(lite0):
    wide = torch.rand(3, 2096)
    assert torch.equal(lite0(wide), wide)


def test_a_loaded_backbone_keeps_its_layers_and_refuses_others(lite0):
    assert load_backbone(lite0) is lite0
    assert load_backbone(lite0, layers="all") is lite0
    for settings in ({"layers": "blocks.2"}, {"views": "flip"}):
        with pytest.raises(ImprintError, match="give .* to load_backbone"):
            load_backbone(lite0, **settings)


def test_the_source_names_layers_and_views_only_where_there_are_any(lite0):
    plain = load_backbone("efficientnet_lite0", image_size=96)
    assert lite0.source() == plain.source() | {"layers": LITE0}
    flipped = load_backbone("efficientnet_lite0", image_size=96, views="flip")
    assert flipped.source() == plain.source() | {"views": "flip"}


# The cache -------------------------------------------------------------------------------------


def small(**settings):
    preprocess = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
    return load_backbone(SmallNet(), preprocess=preprocess, **settings)


def cached(folder, data=None, **settings):
    return embed(small(**settings), data or Digits(), folder, name="small")


def test_the_cache_keys_layers_and_views_and_says_their_widths(tmp_path):
    results = [
        cached(tmp_path, **settings)
        for settings in ({}, {"layers": "all"}, {"layers": "stages.1"}, {"views": "flip"})
    ]
    assert [result.use.embedded for result in results] == [1797] * 4
    assert [result.layer_widths for result in results] == [None, [4, 5, 6, 2], [5, 2], None]
    assert [result.arrays()[0].shape[1] for result in results] == [2, 17, 7, 2]
    assert cached(tmp_path, layers="all").use.embedded == 0


def test_the_last_layer_is_read_from_the_files_of_all_bit_for_bit(tmp_path):
    wide = cached(tmp_path / "all", layers="all")
    alone = cached(tmp_path / "last")
    served = cached(tmp_path / "all")
    assert (served.use.embedded, served.use.read) == (0, 1797)
    for split in ("train", "test"):
        assert torch.equal(served.arrays(split)[0], alone.arrays(split)[0])
        assert torch.equal(served.arrays(split)[0], wide.arrays(split)[0][:, -2:])
    assert served.layer_widths is None


def test_rows_that_all_does_not_have_are_embedded_as_last(tmp_path):
    few = cached(tmp_path, Digits(classes="even", shots=5), layers="all")
    assert few.use.embedded < 1797
    rest = cached(tmp_path)
    assert (rest.use.read, rest.use.embedded) == (few.use.embedded, 1797 - few.use.embedded)
    torch.testing.assert_close(rest.arrays()[0], cached(tmp_path / "alone").arrays()[0])
    assert cached(tmp_path).use.embedded == 0


@pytest.mark.parametrize("theirs", [{"views": "flip"}, {"precision": "bf16"}])
def test_all_serves_no_last_of_other_views_or_precision(tmp_path, theirs):
    cached(tmp_path, layers="all", **theirs)
    assert cached(tmp_path).use.embedded == 1797
    cached(tmp_path, layers="all")
    assert cached(tmp_path, **theirs).use.embedded == 0


def test_damaged_files_of_all_serve_nothing(tmp_path):
    cached(tmp_path, layers="all")
    for path in tmp_path.glob("*/part-*"):
        path.write_bytes(path.read_bytes()[:-8] + bytes(8))
    assert cached(tmp_path).use.embedded == 1797
    for path in tmp_path.glob("*/key.json"):
        path.write_text("[]")
    assert cached(tmp_path).use.embedded == 0


def test_embed_takes_layers_and_views_for_a_name_and_a_module(tmp_path):
    class FloatDigits(Digits):
        def load(self):
            splits = super().load()
            x = splits.train.images.float().expand(-1, 3, -1, -1)[:40].contiguous()
            part = ArrayDataset(x, splits.train.labels[:40])
            return Splits(splits.class_names, part, part)

    result = embed(SmallNet(), FloatDigits(), tmp_path, name="small", layers="all", views="flip")
    assert result.layer_widths == [4, 5, 6, 2]
    expected = load_backbone(SmallNet(), layers="all", views="flip")(
        FloatDigits().load().train.images
    )
    torch.testing.assert_close(result.arrays()[0], expected)


def test_the_widths_of_embeddings_of_one_s_own_are_checked(blobs):
    x, y = blobs
    splits = Splits(["a", "b", "c"], ArrayDataset(x, y), ArrayDataset(x[:9], y[:9]))
    d = x.shape[1]
    data = EmbeddingDataModule(splits, layer_widths=[1, d - 1])
    data.setup()
    assert data.layer_widths == [1, d - 1]
    assert EmbeddingDataModule(splits).layer_widths is None
    with pytest.raises(ImprintError, match=f"add up to {d + 1}, but the train .* have {d} columns"):
        EmbeddingDataModule(splits, layer_widths=[2, d - 1]).setup()
    for widths in ([], [0, d], ["a"]):
        with pytest.raises(ImprintError, match="expected how many columns"):
            EmbeddingDataModule(splits, layer_widths=widths)


# Families --------------------------------------------------------------------------------------

TIMM = (
    "cait_xxs24_224 coat_tiny coatnet_pico_rw_224 convit_tiny convnextv2_atto crossvit_tiny_240 "
    "densenet121 deit_tiny_distilled_patch16_224 dla34 edgenext_xx_small efficientformer_l1 "
    "efficientvit_b0 eva02_tiny_patch14_224 fastvit_t8 ghostnet_050 hiera_tiny_224 hrnet_w18_small "
    "inception_v3 lcnet_035 levit_128s mixer_s32_224 mobilenetv4_conv_small_050 mobilevit_xxs "
    "mvitv2_tiny pit_ti_224 poolformer_s12 pvt_v2_b0 regnety_002 repvgg_a0 resnetv2_50 "
    "swin_tiny_patch4_window7_224 twins_pcpvt_small vit_medium_patch16_reg4_gap_256 volo_d1_224 "
    "xcit_nano_12_p16_224"
)
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 maxvit_t mnasnet0_5 "
    "mobilenet_v3_small regnet_y_400mf shufflenet_v2_x0_5 swin_t vit_b_32"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(f"timm/{name}" for name in TIMM.split()),
        *(f"torchvision/{n}" for n in TORCHVISION.split()),
    ],
)
def test_all_layers_of_many_families(name):
    backbone = load_backbone(name, pretrained=False, layers="all")
    assert 2 <= len(backbone.layers) <= 8
    assert backbone.embedding_dim == sum(backbone.layer_widths) <= 8192
    images = torch.randint(
        0, 256, (2, 3, *backbone.preprocess.size), generator=torch.Generator().manual_seed(0)
    ).to(torch.uint8)
    with torch.no_grad():
        wide, last = backbone(images), load_backbone(name, pretrained=False)(images)
    assert wide.shape == (2, backbone.embedding_dim)
    assert torch.equal(wide[:, -last.shape[1] :], last)
    assert functional.pdist(wide).item() > 0
