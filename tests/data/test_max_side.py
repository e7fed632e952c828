"""`max_side`: sizes, what a checkpoint keeps of it, and who reads images as the fit did. And how
many workers a machine gets."""

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintError
from imprint_pl.data import ImageFiles, ImageFolder, Union
from imprint_pl.data.decode import read_image
from imprint_pl.embedding import embed

ORIENTATION = 0x0112


def ramp(width, height, mode="RGB"):
    """A smooth picture, which every way to shrink it keeps."""
    across = np.linspace(0, 255, width)[None].repeat(height, 0)
    down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    pixels = np.stack([across, down, (across + down) / 2], 2).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def written(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return str(path)


@pytest.mark.parametrize(
    ("size", "max_side", "least_side", "expected"),
    [
        ((800, 400), 200, None, (200, 100)),
        ((800, 400), 200, 50, (200, 100)),
        # The shorter side needs 150 pixels.
        ((800, 400), 200, 150, (300, 150)),
        ((400, 800), 200, 150, (150, 300)),
        # Nothing is enlarged, neither for a side that is too large nor for one that is too small.
        ((800, 400), 900, None, (800, 400)),
        ((800, 100), 200, 150, (800, 100)),
        # Where no division is whole, the shorter side is rounded up.
        ((1000, 334), 10, 100, (300, 100)),
    ],
)
@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_the_longer_side_is_shrunk_unless_the_shorter_one_is_needed(
    tmp_path, ending, size, max_side, least_side, expected
):
    path = written(tmp_path / f"it.{ending}", ramp(*size))
    assert tuple(read_image(path, max_side, least_side).shape) == (3, *expected[::-1])


@pytest.mark.parametrize(
    ("longest", "decoded"), [(100, (100, 75)), (101, (200, 150)), (400, (400, 300)), (401, None)]
)
def test_a_jpeg_is_decoded_at_the_smallest_fraction_that_is_large_enough(
    tmp_path, monkeypatch, longest, decoded
):
    path = written(tmp_path / "it.jpg", ramp(800, 600))
    sizes, load = [], Image.Image.convert
    monkeypatch.setattr(
        Image.Image, "convert", lambda image, mode: sizes.append(image.size) or load(image, mode)
    )
    assert max(read_image(path, longest).shape) == longest
    assert sizes == [decoded or (800, 600)]


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1), ("CMYK", 3)])
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_shrunk_jpeg_stands_upright_in_its_colours(tmp_path, mode, channels, turn):
    exif = Image.Exif()
    exif[ORIENTATION] = turn
    path = written(tmp_path / "it.jpg", ramp(800, 400, mode), exif=exif, quality=95)
    whole, small = read_image(path), read_image(path, 100)
    assert small.shape == (channels, *((100, 50) if turn > 4 else (50, 100)))
    shrunk = nn.functional.interpolate(whole[None].float(), small.shape[1:], mode="area")[0]
    assert (small.float() - shrunk).abs().max() < 8


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 4), ("LA", 2), ("L", 1)])
def test_a_png_is_shrunk_with_its_channels(tmp_path, mode, channels):
    path = written(tmp_path / "it.png", ramp(80, 40, mode))
    assert read_image(path, 20).shape == (channels, 10, 20)


def fingerprint(root, max_side, least_side=None):
    data = ImageFolder(str(root), max_side=max_side)
    data.shrink_for(None, least_side)
    return data.sized(data.load().train).fingerprint()


def test_only_what_changes_the_pixels_is_in_the_fingerprint(photos):
    plain = fingerprint(photos, None)
    data = ImageFolder(str(photos))
    assert data.load().train.fingerprint() == plain
    # Without a `max_side` nothing is shrunk, and a cache of today is found whatever the backbone.
    assert fingerprint(photos, None, 16) == plain
    shrunk = {fingerprint(photos, *sides) for sides in [(64, None), (64, 16), (64, 32), (65, 16)]}
    assert len(shrunk | {plain}) == 5


class Sizes(nn.Module):
    """Embeds an image as its mean colour; the sizes of what it was given stand in `seen`."""

    def forward(self, images):
        return images.mean((2, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photos of 400 x 200 pixels for each of two classes, a fifth of them held out."""
    root = tmp_path_factory.mktemp("photos")
    for name, colour in (("dark", 40), ("light", 200)):
        for i in range(5):
            picture = Image.new("RGB", (400, 200), (colour + i, colour, colour))
            written(root / name / f"{i}.jpg", picture)
    return root


def classifier(**options):
    settings = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}
    return ImprintedClassifier(Sizes(), "qi", preprocess=settings, **options)


def sizes_of(loader):
    return {tuple(image.shape[1:]) for batch in loader for image in images_in(batch)}


def images_in(batch):
    return batch[0] if isinstance(batch, tuple) else batch


def fitted(photos, folder, **data):
    trainer = quiet_trainer(max_epochs=1, enable_checkpointing=True, default_root_dir=folder)
    model = classifier()
    trainer.fit(model, datamodule=ImageFolder(str(photos), num_workers=0, **data))
    path = folder / "it.ckpt"
    trainer.save_checkpoint(path)
    return path


def predicted_sizes(path, photos, **data):
    """The sizes of the images that `predict` reads with a checkpoint, in two ways to give it."""
    again = ImprintedClassifier.load_from_checkpoint(path, backbone=classifier().backbone)
    found = []
    for model, given in ((again, None), (classifier(), path)):
        files = ImageFiles(str(photos), num_workers=0, **data)
        trainer = quiet_trainer()
        trainer.predict(model, datamodule=files, ckpt_path=given, weights_only=True)
        found.append(sizes_of(trainer.predict_dataloaders))
    assert found[0] == found[1]
    return found[0]


def test_predict_shrinks_as_the_fit_did_unless_told_otherwise(tmp_path, photos):
    path = fitted(photos, tmp_path, max_side=100)
    assert torch.load(path, weights_only=True)["max_side"] == 100
    assert predicted_sizes(path, photos) == {(50, 100)}
    assert predicted_sizes(path, photos, max_side=60) == {(30, 60)}
    # A limit beyond the images' sides reads them whole.
    assert predicted_sizes(path, photos, max_side=100_000) == {(200, 400)}


def test_a_fit_without_max_side_leaves_no_trace_in_the_checkpoint(tmp_path, photos):
    path = fitted(photos, tmp_path)
    assert "max_side" not in torch.load(path, weights_only=True)
    assert predicted_sizes(path, photos) == {(200, 400)}


def test_a_photo_keeps_the_pixels_that_the_backbone_needs(tmp_path, photos):
    path = fitted(photos, tmp_path, max_side=20)
    # Its input has 16 x 16 pixels.
    assert predicted_sizes(path, photos) == {(16, 32)}


def test_a_fit_from_the_cache_keeps_max_side_too(tmp_path, photos):
    data = ImageFolder(str(photos), max_side=20, num_workers=0)
    model = classifier()
    cached = embed(model.backbone, data, tmp_path / "cache", name="sizes")
    assert cached.max_side == 20
    trainer = quiet_trainer(max_epochs=1)
    own = ImprintedClassifier(None, "qi")
    trainer.fit(own, datamodule=cached)
    assert own.max_side == 20
    # The rows are of the images that a fit without the cache would read.
    image = read_image(cached.sample_names("train")[0], 20, 16)
    assert torch.equal(cached.train_dataset.images[0], model.embed([image])[0])


def test_a_fit_again_without_max_side_forgets_it(photos):
    model = classifier()
    for side in (100, None):
        trainer = quiet_trainer(max_epochs=1)
        trainer.fit(model, datamodule=ImageFolder(str(photos), max_side=side, num_workers=0))
        assert model.max_side == side


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "64", [64]])
def test_a_forged_max_side_is_refused(tmp_path, photos, value):
    path = fitted(photos, tmp_path)
    checkpoint = torch.load(path, weights_only=True) | {"max_side": value}
    torch.save(checkpoint, path)
    with pytest.raises(ImprintError, match="max_side="):
        ImprintedClassifier.load_from_checkpoint(path, backbone=classifier().backbone)


def test_sources_of_a_union_keep_their_own_max_side(photos):
    one, other = (ImageFolder(str(photos), max_side=side) for side in (100, 50))
    assert Union([one, other]).max_side is None
    union = Union([ImageFolder(str(photos), max_side=100), one], num_workers=0)
    assert union.max_side == 100
    mixed = Union([ImageFolder(str(photos)), other], num_workers=0)
    mixed.shrink_for(80, 30)
    assert sizes_of(mixed.train_dataloader()) == {(40, 80), (30, 60)}


@pytest.mark.parametrize(
    ("cores", "batch_size", "workers"),
    [
        (1, 1, 1),
        (4, 1, 4),
        # The container's limit, or the affinity, is what joblib says.
        (64, 1, 8),
        # Four batches: a fifth process would have nothing to do.
        (64, 2, 4),
        # A single batch is decoded where it is needed.
        (64, 8, 0),
    ],
)
def test_workers_are_as_many_as_cores_and_batches(photos, monkeypatch, cores, batch_size, workers):
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    data = ImageFolder(str(photos), batch_size=batch_size)
    data.setup()
    assert len(data.train_dataset) == 8
    assert data.train_dataloader().num_workers == workers


def test_workers_of_large_machines_are_bounded_and_a_given_number_holds(photos, monkeypatch):
    monkeypatch.setattr(joblib, "cpu_count", lambda: 256)
    many = ImageFiles([str(photos)] * 1, batch_size=1)
    many.paths = many.paths * 10
    assert many.predict_dataloader().num_workers == 16
    assert ImageFolder(str(photos), num_workers=3).train_dataloader().num_workers == 3
