"""Image files: decoding, folders, files to predict, and what workers say about damaged files."""

import gc
import os
import pickle
import signal
import time
import warnings

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from trainers import quiet_trainer

from imprint_pl.data import ImageDataModule, ImageFileDataset, ImageFiles, ImageFolder, Union
from imprint_pl.data.decode import read_image
from imprint_pl.data.image_files import ImageFileLoader, pack
from imprint_pl.errors import ImprintError


def save(path, array, mode=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return str(path)


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(path, value):
    """A 2 x 3 picture whose every pixel is `value`, to recognise it by."""
    return save(path, np.full((2, 3), value, dtype=np.uint8))


def values(images):
    return [int(image[0, 0, 0]) for image in images]


# Decoding


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 4), ("LA", 2), ("L", 1)])
def test_eight_bit_pixels_arrive_exactly(tmp_path, mode, channels):
    pixels = noise(5, 7, channels)
    path = save(tmp_path / "image.png", Image.fromarray(pixels, mode=mode))
    image = read_image(path)
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert np.array_equal(image, pixels.reshape(5, 7, channels).transpose(2, 0, 1))


def test_bilevel_images_are_grey_black_and_white(tmp_path):
    bits = np.array([[True, False], [False, True]])
    image = read_image(save(tmp_path / "bits.png", Image.fromarray(bits)))
    assert image.tolist() == [[[255, 0], [0, 255]]]


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_16_bit_grey_is_scaled_to_8_bit(tmp_path, extension):
    pixels = np.array([[0, 128, 129, 257], [32768, 65278, 65534, 65535]], dtype=np.uint16)
    image = read_image(save(tmp_path / f"deep.{extension}", pixels))
    assert image.tolist() == [[[0, 0, 1, 1], [128, 254, 255, 255]]]


def test_palettes_become_colours_with_alpha_where_they_are_transparent(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    opaque = read_image(save(tmp_path / "opaque.png", palette))
    assert opaque.tolist() == [[[255, 0]], [[0, 0]], [[0, 255]]]
    transparent = read_image(save(tmp_path / "transparent.png", palette, transparency=1))
    assert transparent.tolist() == [[[255, 0]], [[0, 0]], [[0, 255]], [[255, 0]]]


def test_cmyk_becomes_rgb(tmp_path):
    path = save(tmp_path / "print.tif", Image.new("CMYK", (2, 2), (0, 255, 255, 0)))
    assert read_image(path)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_upright(tmp_path, orientation):
    upright = noise(3, 5)
    # What a camera held that way stores: the inverse of what the tag asks for.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "photo.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal(read_image(path), upright.transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_max_side_shrinks_the_longer_side_and_never_enlarges(tmp_path, name):
    path = save(tmp_path / name, noise(300, 600))
    assert tuple(read_image(path, max_side=100).shape) == (3, 50, 100)
    assert tuple(read_image(path, max_side=600).shape) == (3, 300, 600)
    assert tuple(read_image(path, max_side=5000).shape) == (3, 300, 600)


def test_max_side_keeps_the_picture(tmp_path):
    gradient = np.tile(np.linspace(0, 255, 400).astype(np.uint8), (200, 1))
    for name in ("gradient.jpg", "gradient.png"):
        small = read_image(save(tmp_path / name, gradient), max_side=40).float()
        expected = torch.linspace(0, 255, 40)
        assert (small[0, 10] - expected).abs().max() < 8
    deep = (gradient.astype(np.uint16) * 257)[:, ::-1].copy()
    small = read_image(save(tmp_path / "deep.png", deep), max_side=40).float()
    assert (small[0, 10] - expected.flip(0)).abs().max() < 8


def truncated(path, array=None):
    """A picture cut in half."""
    save(path, noise(64, 64) if array is None else array)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "bmp", "tif", "webp"])
def test_a_truncated_file_is_named_with_reason_and_cure(tmp_path, extension):
    path = truncated(tmp_path / f"half.{extension}")
    with pytest.raises(ImprintError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read the image {path}: ")
    assert message.endswith("Replace or remove the file.")


def test_no_image_and_no_file_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ImprintError, match=r"cannot read the image .*text\.png: cannot identify"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ImprintError, match=r"cannot read the image .*absent\.png: .*No such file"):
        read_image(tmp_path / "absent.png")


def test_a_decompression_bomb_is_named_and_not_decoded(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", noise(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImprintError, match=r"will not decode the image .*bomb\.png: .*exceeds"):
        read_image(path)


def test_a_damaged_tag_block_does_not_spoil_the_pixels(tmp_path):
    damaged = b"Exif\x00\x00MM\x00*\x00\x00\xff\xff garbage"
    path = save(tmp_path / "tags.jpg", np.full((8, 8), 100, dtype=np.uint8), exif=damaged)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tuple(read_image(path).shape) == (1, 8, 8)


# From the workers


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_arrives_from_a_worker_as_it_was(tmp_path, workers):
    paths = [save(tmp_path / f"{h}.png", noise(h, w, 3, h)) for h, w in ((2, 3), (5, 1))]
    for labels in (torch.tensor([4, 2]), None):
        dataset = ImageFileDataset(paths, labels)
        (batch,) = ImageFileLoader(dataset, 2, num_workers=workers, collate_fn=pack)
        images = batch if labels is None else batch[0]
        assert isinstance(images, list)
        assert all(map(torch.equal, images, map(read_image, paths)))
        assert labels is None or torch.equal(batch[1], labels)


def make_folder(root, **counts):
    """`train=3` puts the classes ant (0, 1, 2) and bee (100, 101, 102) below root/train."""
    for split, count in counts.items():
        for first, name in ((0, "ant"), (100, "bee")):
            for number in range(count):
                flat(root / split / name / f"{number:02}.png", first + number)
    return str(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_any_size_come_in_order(tmp_path, workers):
    sizes = [(3, 5), (7, 2), (4, 4), (1, 9), (6, 6)]
    for number, (height, width) in enumerate(sizes):
        save(tmp_path / "train" / "a" / f"{number}.png", noise(height, width, 3, number))
        flat(tmp_path / "test" / "a" / f"{number}.png", number)
    module = ImageFolder(str(tmp_path), batch_size=2, num_workers=workers)
    for _ in range(2):
        batches = list(module.train_dataloader())
        assert [len(images) for images, _ in batches] == [2, 2, 1]
        everything = [image for images, _ in batches for image in images]
        for number, (height, width) in enumerate(sizes):
            expected = noise(height, width, 3, number).transpose(2, 0, 1)
            assert np.array_equal(everything[number], expected)
    assert all(labels.dtype == torch.int64 for _, labels in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_by_a_plain_message_when_its_turn_comes(tmp_path, workers):
    make_folder(tmp_path, train=5, test=1)
    path = truncated(tmp_path / "train" / "bee" / "03.png")
    module = ImageFolder(str(tmp_path), batch_size=2, num_workers=workers)
    seen = []

    def look():
        for images, _ in module.train_dataloader():
            seen.extend(values(images))

    with pytest.raises(ImprintError) as caught:
        look()
    assert type(caught.value) is ImprintError
    assert str(caught.value).startswith(f"cannot read the image {path}: ")
    assert "worker" not in str(caught.value)
    assert seen == [0, 1, 2, 3, 4, 100, 101, 102]
    del caught
    start = time.perf_counter()
    gc.collect()
    assert time.perf_counter() - start < 4, "the workers were still waited for"


def test_a_damaged_file_ends_lightning_s_loop_with_the_same_message(tmp_path):
    from lightning.pytorch import LightningModule

    class Looker(LightningModule):
        def predict_step(self, batch):
            return values(batch)

    files = [flat(tmp_path / "a.png", 1), flat(tmp_path / "b.png", 2)]
    trainer = quiet_trainer()
    assert trainer.predict(Looker(), ImageFiles(files, batch_size=1, num_workers=2)) == [[1], [2]]
    files.append(truncated(tmp_path / "c.png"))
    with pytest.raises(ImprintError, match=r"^cannot read the image .*c\.png"):
        trainer.predict(Looker(), ImageFiles(files, batch_size=1, num_workers=2))


class Dying(ImageFileDataset):
    def __getitems__(self, indices):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_explained(tmp_path):
    dataset = Dying([flat(tmp_path / "a.png", 1)])
    loader = ImageFileLoader(dataset, num_workers=1, collate_fn=pack)
    with pytest.raises(ImprintError, match=r"decodes images was killed .*lower batch_size"):
        list(loader)


def test_large_batches_do_not_exhaust_the_open_files(tmp_path):
    resource = pytest.importorskip("resource")
    path = flat(tmp_path / "a.png", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 100
    dataset = ImageFileDataset([path] * 600, torch.zeros(600, dtype=torch.int64))
    loader = ImageFileLoader(dataset, batch_size=300, num_workers=2, collate_fn=pack)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 100, hard))
    try:
        batches = list(loader)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(images) for images, _ in batches] == [300, 300]


def test_the_data_set_itself_raises_and_survives_pickling(tmp_path):
    dataset = ImageFileDataset([flat(tmp_path / "a.png", 7), truncated(tmp_path / "b.png")])
    assert values([pickle.loads(pickle.dumps(dataset))[0]]) == [7]
    with pytest.raises(ImprintError, match=r"b\.png"):
        dataset[1]
    with pytest.raises(ImprintError, match=r"b\.png"):
        dataset.__getitems__([0, 1])


# Folders


def numbers_of(dataset):
    return values([read_image(path) for path in dataset.paths])


def test_train_and_test_folders(tmp_path):
    root = make_folder(tmp_path / "insects", train=3, test=2)
    module = ImageFolder(root, num_workers=0)
    module.setup()
    assert numbers_of(module.train_dataset) == [0, 1, 2, 100, 101, 102]
    assert module.train_dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert numbers_of(module.test_dataset) == [0, 1, 100, 101]
    assert module.val_dataset is module.test_dataset
    assert (module.class_names, module.task) == (["ant", "bee"], "insects")
    assert module.sample_names("test") == module.test_dataset.paths
    assert module.sample_names() == module.sample_names("test")


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "test"])
def test_one_split_besides_train_is_validation_and_test(tmp_path, name):
    root = make_folder(tmp_path, train=3, **{name: 2})
    module = ImageFolder(root)
    module.setup()
    assert len(module.train_dataset) == 6
    assert module.val_dataset.paths == module.test_dataset.paths
    assert len(module.test_dataset) == 4
    assert f"{os.sep}{name}{os.sep}" in module.test_dataset.paths[0]


def test_both_splits_are_used_for_what_they_are(tmp_path):
    module = ImageFolder(make_folder(tmp_path, train=3, val=2, test=1))
    module.setup()
    assert (len(module.val_dataset), len(module.test_dataset)) == (4, 2)
    with pytest.raises(ImprintError, match=r"val_fraction=0.5, but .* has a validation split"):
        ImageFolder(str(tmp_path), val_fraction=0.5).setup()


@pytest.mark.parametrize("layout", ["", "train"])
def test_without_a_test_split_a_fifth_is_held_out_and_said(tmp_path, layout, caplog):
    for first, name in ((0, "ant"), (100, "bee")):
        for number in range(10):
            flat(tmp_path / layout / name / f"{number}.png", first + number)
    splits = []
    for seed in (0, 1):
        module = ImageFolder(str(tmp_path), seed=seed)
        with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
            module.setup()
        train, test = numbers_of(module.train_dataset), numbers_of(module.test_dataset)
        assert torch.bincount(module.test_dataset.labels).tolist() == [2, 2]
        assert sorted(train + test) == [*range(10), *range(100, 110)]
        assert (train, test) == (sorted(train), sorted(test))
        splits.append(test)
    assert splits[0] == splits[1]
    assert "4 of its 20 images are held out" in caplog.text


def test_the_held_out_images_of_a_class_do_not_depend_on_the_classes_chosen(tmp_path):
    root = make_folder(tmp_path, train=10)
    everything, bees = ImageFolder(root), ImageFolder(root, classes=["bee"], val_fraction=0.25)
    everything.setup()
    bees.setup()
    assert set(bees.test_dataset.paths) < set(everything.test_dataset.paths)
    assert [len(bees.train_dataset), len(bees.val_dataset), len(bees.test_dataset)] == [6, 2, 2]
    assert not set(bees.val_dataset.paths) & set(bees.train_dataset.paths)
    assert bees.class_names == ["bee"]


def test_a_link_that_leads_back_up_counts_nothing_twice(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        flat(tmp_path / name / "0.png", 0)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "other").symlink_to(tmp_path / "a")
    found = [str(path)[len(str(tmp_path)) :] for path in ImageFiles(str(tmp_path / "a")).paths]
    assert found == ["/a/0.png", "/a/other/0.png"]


def test_nested_folders_count_and_hidden_and_other_files_do_not(tmp_path):
    root = make_folder(tmp_path, train=1, test=1)
    flat(tmp_path / "train" / "ant" / "deep" / "er" / "x.PNG", 50)
    flat(tmp_path / "train" / "ant" / ".hidden.png", 51)
    flat(tmp_path / "train" / "ant" / ".cache" / "x.png", 52)
    flat(tmp_path / "train" / ".trash" / "x.png", 53)
    flat(tmp_path / "train" / "stray.png", 54)
    (tmp_path / "train" / "ant" / "notes.txt").write_text("no image")
    module = ImageFolder(root)
    module.setup()
    assert sorted(numbers_of(module.train_dataset)) == [0, 50, 100]
    assert module.class_names == ["ant", "bee"]


def test_an_empty_class_is_named_with_the_cure(tmp_path):
    root = make_folder(tmp_path, train=1, test=1)
    (tmp_path / "train" / "cow").mkdir()
    with pytest.raises(ImprintError, match=r"train.cow holds no image: add images .* or remove"):
        ImageFolder(root).setup()


def test_a_class_that_train_does_not_have_is_an_error(tmp_path):
    root = make_folder(tmp_path, train=1, test=1)
    flat(tmp_path / "test" / "bees" / "0.png", 1)
    with pytest.raises(ImprintError, match=r"test.bees has no counterpart .*did you mean 'bee'"):
        ImageFolder(root).setup()


def test_a_class_without_test_images_is_evaluated_on_the_others_with_a_warning(tmp_path):
    root = make_folder(tmp_path, train=1, test=1)
    flat(tmp_path / "train" / "cow" / "0.png", 1)
    module = ImageFolder(root)
    with pytest.warns(UserWarning, match="no folder for cow"):
        module.setup()
    assert module.class_names == ["ant", "bee", "cow"]
    assert module.test_dataset.labels.tolist() == [0, 1]


def folder_of(root, *names):
    """Three images in each folder."""
    for name in names:
        for number in range(3):
            flat(root / name / f"{number}.png", number)
    return str(root)


def classes_of(root, **options):
    module = ImageFolder(root, num_workers=0, **options)
    module.setup()
    return module.class_names


@pytest.mark.parametrize(
    "names",
    [
        ("car", "ship", "train"),
        ("car", "ship", "train/steam", "train/electric"),
        ("Train", "car"),
        ("car", "training", "ship/a"),
    ],
)
def test_a_class_may_be_called_train(tmp_path, names):
    folder_of(tmp_path, *names)
    assert set(classes_of(str(tmp_path))) == {name.split("/")[0] for name in names}
    module = ImageFolder(str(tmp_path), num_workers=0)
    module.setup()
    assert len(module.train_dataset) + len(module.test_dataset) == 3 * len(names)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("car", "train/steam", "train/electric"),
            r"has train/, with electric/ and steam/ in it, beside car/: if train/ holds the classes"
            r", set root to .*train; if it is a class itself, rename it",
        ),
        (("car/a", "ship/b", "train/a", "train/b"), "beside car/ and ship/: if train/ holds"),
        (("car", "ship", "test"), "has test/ but no train/ beside car/ and ship/"),
        (("car", "ship", "Validation"), "has Validation/ but no train/ beside car/ and ship/"),
        (("car", "ship", "train", "val"), "train/ has images but no class folders"),
        (("train/a", "training/a", "val/a"), "train/ and training/, both of which are taken for"),
        (("train/a", "valid/a", "val/a"), "val/ and valid/, both of which are taken for the val"),
    ],
)
def test_folders_that_may_be_classes_or_splits_are_named(tmp_path, names, message):
    with pytest.raises(ImprintError, match=message):
        classes_of(folder_of(tmp_path, *names))


def test_classes_of_split_folders_may_be_called_like_splits(tmp_path):
    splits = ("train", "val", "test")
    root = folder_of(tmp_path, *(f"{split}/{name}" for split in splits for name in splits))
    assert classes_of(root) == ["test", "train", "val"]


def test_images_beside_the_splits_are_not_read_and_named(tmp_path):
    root = folder_of(tmp_path, "train/a", "train/b", "val/a", "val/b", "extra", "runs/x/version_0")
    with pytest.warns(UserWarning, match="the images of extra/ are not read"):
        assert classes_of(root) == ["a", "b"]


def test_a_run_beside_the_training_images_is_no_class(tmp_path):
    root = folder_of(tmp_path, "train/a", "train/b", "runs/ImageFolder/version_0")
    assert classes_of(root) == ["a", "b"]


@pytest.mark.parametrize("split", [".", "train"])
@pytest.mark.parametrize("inner", [("cat", "dog"), ("train/cat", "val/cat")])
def test_a_folder_around_the_classes_is_named_with_the_classes(tmp_path, split, inner):
    root = folder_of(tmp_path, *(f"{split}/photos/{name}" for name in inner), "__MACOSX/photos/a")
    first, second = (name.split("/")[0] for name in inner)
    message = f"a single class folder, .*photos, with {first}/ and {second}/ in it: set root to .*"
    with pytest.raises(ImprintError, match=message):
        classes_of(root)


def test_a_single_class_is_served_and_said_to_be_one(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        assert classes_of(folder_of(tmp_path, "photos")) == ["photos"]
    assert "a single class folder" in caplog.text
    assert "every image will be called 'photos'" in caplog.text
    assert classes_of(folder_of(tmp_path, "dog"), classes=["dog"]) == ["dog"]


def test_folders_of_systems_are_no_classes_and_their_images_do_not_count(tmp_path):
    foreign = ("@eaDir", "__MACOSX", ".ipynb_checkpoints", "lost+found", "$RECYCLE.BIN")
    root = folder_of(tmp_path, "a", "b", *foreign, *(f"a/{name}" for name in foreign))
    module = ImageFolder(root, num_workers=0)
    module.setup()
    assert module.class_names == ["a", "b"]
    assert len(module.train_dataset) + len(module.test_dataset) == 6


def test_names_that_differ_in_their_composition_alone_are_one_class(tmp_path):
    nfc, nfd = "caf\u00e9", "cafe\u0301"
    folder_of(tmp_path, f"train/{nfd}", "train/caff", f"val/{nfc}", "val/caff")
    module = ImageFolder(str(tmp_path), num_workers=0)
    module.setup()
    assert module.class_names == ["caff", nfc]
    assert torch.bincount(module.val_dataset.labels).tolist() == [3, 3]
    assert module.val_dataset.paths[-1].split(os.sep)[-2] == nfc
    folder_of(tmp_path, f"train/{nfc}")
    with pytest.raises(ImprintError, match=r"'caf\\xe9'.*one name, composed in two ways"):
        classes_of(str(tmp_path))


def test_what_is_held_out_does_not_depend_on_how_names_are_composed(tmp_path):
    held = []
    for system, accent in (("mac", "e\u0301"), ("other", "\u00e9")):
        for first, name in ((0, f"caf{accent}"), (100, "caff")):
            for number in range(10):
                flat(tmp_path / system / name / f"{accent}{number}f.png", first + number)
                flat(tmp_path / system / name / f"f{number}.png", first + 50 + number)
        module = ImageFolder(str(tmp_path / system), num_workers=0)
        module.setup()
        held.append(numbers_of(module.test_dataset))
    assert held[0] == held[1]


def test_classes_that_differ_in_case_alone_are_named(tmp_path):
    root = folder_of(tmp_path, "Cat", "cat", "dog")
    with pytest.warns(UserWarning, match="'Cat' and 'cat' differ in case or spaces alone"):
        assert classes_of(root) == ["Cat", "cat", "dog"]
    root = folder_of(tmp_path / "splits", "train/Cat", "train/dog", "val/cat", "val/dog")
    with pytest.raises(ImprintError, match="val.cat has no counterpart .*did you mean 'Cat'"):
        classes_of(root)


def test_links_to_class_folders_are_followed_and_those_to_nothing_named(tmp_path):
    folder_of(tmp_path / "elsewhere", "fox")
    root = folder_of(tmp_path / "root", "ant", "bee")
    (tmp_path / "root" / "fox").symlink_to(tmp_path / "elsewhere" / "fox")
    assert classes_of(root) == ["ant", "bee", "fox"]
    (tmp_path / "root" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="gone is a link that leads nowhere"):
        assert classes_of(root) == ["ant", "bee", "fox"]


def test_a_union_merges_names_in_either_composition_and_names_those_alike(tmp_path):
    one = ImageFolder(folder_of(tmp_path / "one", "cafe\u0301", "dog"), num_workers=0)
    other = ImageFolder(folder_of(tmp_path / "other", "caf\u00e9", "Dog"), num_workers=0)
    both = Union([one, other], num_workers=0)
    with pytest.warns(UserWarning, match="'dog' and 'Dog' differ in case"):
        both.setup()
    assert both.class_names == ["caf\u00e9", "dog", "Dog"]


def test_roots_and_files_are_read_as_a_shell_reads_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "my photos", "ant", "bee")
    url = (tmp_path / "my photos").as_uri()
    spellings = ("~/my photos", "$HOME/my photos/", "${HOME}/my photos", url)
    for root in (*spellings, tmp_path / "my photos"):
        module = ImageFolder(root, num_workers=0)
        module.setup()
        assert (module.class_names, module.name) == (["ant", "bee"], "my photos")
        assert len(ImageFiles(root).paths) == len(ImageFiles([root]).paths) == 6
    assert len(ImageFiles(["~/my photos/*/1.png"]).paths) == 2
    folder_of(tmp_path / "~" / "odd", "ant", "bee")
    assert ImageFolder("~/odd").root == "~/odd"


def test_wrong_roots_are_named_with_the_cure(tmp_path):
    with pytest.raises(ImprintError, match=r"absent does not exist .*train/<class>/"):
        ImageFolder(str(tmp_path / "absent")).setup()
    flat(tmp_path / "bare" / "a.png", 1)
    with pytest.raises(ImprintError, match=r"bare has no class folders: .*ImageFiles"):
        ImageFolder(str(tmp_path / "bare")).setup()
    make_folder(tmp_path / "tests", test=1)
    with pytest.raises(ImprintError, match=r"tests has test/ but no train/"):
        ImageFolder(str(tmp_path / "tests")).setup()


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"test_fraction": 0.0}, "test_fraction=0.0"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
        ({"max_side": 0}, "max_side=0"),
        ({"shots": 0}, "shots=0"),
    ],
)
def test_wrong_values_are_named(tmp_path, keywords, message):
    with pytest.raises(ImprintError, match=message):
        ImageFolder(str(tmp_path), **keywords)


def test_max_side_reaches_the_workers_and_survives_selection(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / split / name / "0.jpg", noise(40, 80))
    module = ImageFolder(str(tmp_path), max_side=20, classes=["b"], num_workers=1)
    ((images, labels),) = module.train_dataloader()
    assert tuple(images[0].shape) == (3, 10, 20)
    assert labels.tolist() == [0]


def test_workers_decode_by_default_and_no_more_than_there_are_processors(tmp_path):
    module = ImageFolder(make_folder(tmp_path, train=1, test=1), batch_size=1)
    workers = module.train_dataloader().num_workers
    assert 1 <= workers <= max(os.cpu_count(), 1)


def test_decoding_touches_no_global_generator(tmp_path):
    before = torch.random.get_rng_state()
    module = ImageFolder(make_folder(tmp_path, train=4, test=1), shots=2, num_workers=2)
    list(module.train_dataloader())
    assert torch.equal(torch.random.get_rng_state(), before)


# Files to predict


def test_files_folders_and_patterns_come_in_the_order_given(tmp_path):
    z = flat(tmp_path / "z.png", 26)
    for number, name in enumerate(("b/2.png", "b/10.png", "a/1.png", "c.jpg")):
        flat(tmp_path / "photos" / name, number)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    module = ImageFiles([z, str(tmp_path / "photos"), str(tmp_path / "*.png")], num_workers=0)
    names = [os.path.relpath(path, tmp_path) for path in module.paths]
    assert names == ["z.png", *(f"photos/{n}" for n in ("c.jpg", "a/1.png", "b/10.png", "b/2.png"))]
    (batch,) = module.predict_dataloader()
    assert isinstance(batch, list)
    assert values(batch) == [26, 3, 2, 1, 0]
    assert module.sample_names() == module.paths
    deep = ImageFiles(str(tmp_path / "**" / "*.png"))
    assert len(deep.paths) == 4


def test_a_file_whose_name_looks_like_a_pattern_is_itself(tmp_path):
    path = flat(tmp_path / "photo[1].png", 1)
    assert ImageFiles([path]).paths == [path]


def test_files_in_workers_come_in_the_same_order(tmp_path):
    files = [flat(tmp_path / f"{number}.png", number) for number in range(9)]
    loader = ImageFiles(files, batch_size=2, num_workers=2).predict_dataloader()
    assert [value for batch in loader for value in values(batch)] == list(range(9))


def test_what_matches_no_image_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImprintError, match=r"empty' holds no image"):
        ImageFiles([str(tmp_path / "empty")])
    with pytest.raises(ImprintError, match=r"nothing\*\.png' matches no image file"):
        ImageFiles([str(tmp_path / "nothing*.png")])
    with pytest.raises(ImprintError, match=r"paths is empty"):
        ImageFiles([])


def test_files_serve_prediction_only(tmp_path):
    module = ImageFiles([flat(tmp_path / "a.png", 1)])
    with pytest.raises(ImprintError, match=r"no train split: it serves predict only"):
        module.train_dataloader()


def test_the_command_line_gives_folders_and_files(tmp_path):
    root = make_folder(tmp_path, train=2, test=1)
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    arguments = ["--data=imprint_pl.data.ImageFolder", f"--data.root={root}"]
    config = parser.parse_args([*arguments, "--data.classes=[bee]", "--data.max_side=64"])
    module = parser.instantiate(config).data
    assert (module.classes, module.max_side, module.num_workers) == (["bee"], 64, None)
    for given in (f"[{root}]", root):
        config = parser.parse_args(["--data=imprint_pl.data.ImageFiles", f"--data.paths={given}"])
        assert len(parser.instantiate(config).data.paths) == 6
