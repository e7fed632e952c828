"""Files as they come: names, kinds and pixels of all sorts, broken images among good ones, and
outputs that are whole or not there.
"""

import csv
import hashlib
import json
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import nn
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintError, export
from imprint_pl.cli import checkpoint as file_commands
from imprint_pl.cli import main
from imprint_pl.cli.predictions import PredictionWriter
from imprint_pl.data import ImageFiles, ImageFolder, Union
from imprint_pl.data.decode import HEIF_EXTENSIONS, extensions, read_image
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.embedding.preprocess import Preprocess

# As a zip from Windows has them, and as people write them.
NAMES = [b"caf\xe9.png", b"two\nlines.png", 'a, "b" 😀.png'.encode(), b"x" * 240 + b".png"]
needs_bytes_in_names = pytest.mark.skipif(os.name == "nt", reason="names are text there")


def picture(seed, side=24):
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
    return path


def make_folder(root, classes=("cat", "dog"), count=6):
    for c, name in enumerate(classes):
        for i in range(count):
            save(root / name / f"{i}.png", picture(100 * c + i))
    return root


def break_it(path):
    """Cuts a file short within its pixels: its header is whole."""
    path.write_bytes(path.read_bytes()[:200])
    return path


def small_backbone():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return load_backbone(
        nn.Sequential(*layers),
        preprocess=dict(size=16, mean=[0.5] * 3, std=[0.5] * 3),
    )


def trainer(**options):
    return quiet_trainer(**options)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A checkpoint with its state, made by `fit` of photos of which some are broken."""
    folder = tmp_path_factory.mktemp("fitted")
    photos = make_folder(folder / "photos")
    break_it(photos / "cat" / "1.png")
    break_it(photos / "dog" / "4.png")
    save(photos / "cat" / "7.png", picture(7)).rename(
        os.fsdecode(os.fsencode(photos / "cat") + b"/caf\xe9.png")
    )
    arguments = ["fit", "--on_error", "skip", "--data", "ImageFolder", "--data.root", str(photos)]
    arguments += ["--data.num_workers", "0", "--model.recipe", "qi", "--model.image_size", "32"]
    arguments += ["--model.keep", "embeddings", "--model.keep_sources", "true"]
    with pytest.warns(UserWarning, match="2 of 13 images"):
        assert main([*arguments, "--trainer.default_root_dir", str(folder)]) == 0
    return next(folder.rglob("imprinted.ckpt"))


def predict(checkpoint, images, output, *more):
    arguments = ["predict", "--ckpt_path", str(checkpoint), "--images", *map(str, images)]
    return main([*arguments, "--output", str(output), "--data.num_workers", "0", *more])


def rows_of(path):
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


# Pixels


@pytest.mark.parametrize("kind", [np.int32, np.float32])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 100, 255], [0, 100, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 1500, 3000], [0, 128, 255]),
        ([-100, 0, 100], [0, 128, 255]),
        ([0, 2**30, 2**31 - 1], [0, 128, 255]),
        ([7, 7, 7], [7, 7, 7]),
    ],
)
def test_32_bit_grey_is_not_black_whatever_its_range(tmp_path, kind, values, expected):
    path = save(tmp_path / "deep.tif", np.array([values]).astype(kind))
    assert read_image(path).tolist() == [[expected]]


def test_floats_from_0_to_1_are_multiplied_and_what_is_no_number_is_black(tmp_path):
    values = np.array([[0, 0.5, 1, np.nan, np.inf]], dtype=np.float32)
    assert read_image(save(tmp_path / "f.tif", values)).tolist() == [[[0, 128, 255, 0, 255]]]
    nothing = save(tmp_path / "nan.tif", np.full((1, 2), np.nan, dtype=np.float32))
    with pytest.raises(ImprintError, match=r"nan\.tif: none of its values is a finite number"):
        read_image(nothing)


def write_tiff(path, pixels, bits, width, sample_format):
    """Grey, one strip, as instruments write it; Pillow writes no such file."""
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8), (277, 1)]
    entries += [(278, 1), (279, len(pixels)), (339, sample_format)]
    pixels += b"\0" * (len(pixels) % 2)
    content = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    content += struct.pack("<H", len(entries))
    content += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    path.write_bytes(content + bytes(4))
    return path


def test_the_range_of_a_tiff_s_type_is_known_by_its_tags(tmp_path):
    unsigned = np.array([0, 2**31, 2**32 - 1], dtype="<u4").tobytes()
    path = write_tiff(tmp_path / "u.tif", unsigned, 32, 3, 1)
    assert read_image(path).tolist() == [[[0, 128, 255]]]
    # 4095, 0, 2048, 0 in 12 bits each.
    path = write_tiff(tmp_path / "12.tif", bytes([255, 240, 0, 128, 0, 0]), 12, 4, 1)
    assert read_image(path).tolist() == [[[255, 0, 128, 0]]]
    (tmp_path / "16.pgm").write_bytes(b"P5 3 1 4095\n" + struct.pack(">3H", 0, 2048, 4095))
    assert read_image(tmp_path / "16.pgm").tolist() == [[[0, 128, 255]]]


def test_colours_are_right_in_every_way_to_store_them(tmp_path):
    colours = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 30]], dtype=np.uint8)
    image = Image.fromarray(colours[None].repeat(16, 0).repeat(16, 1))
    lab = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    exact = dict(quality=100, subsampling=0)
    for name, stored, options in (
        ("lab.tif", lab, {}),
        ("ycbcr.tif", image.convert("YCbCr"), {}),
        ("cmyk.tif", image.convert("CMYK"), {}),
        ("cmyk.jpg", image.convert("CMYK"), exact),
        ("rgb.jpg", image, exact),
        ("a_png_called.jpg", image, dict(format="PNG")),
        ("rgba.webp", image.convert("RGBA"), dict(lossless=True)),
    ):
        read = read_image(save(tmp_path / name, stored, **options))[:3, 8, 8::16].T
        assert (read.int() - torch.from_numpy(colours).int()).abs().max() <= 6, name


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tif"])
def test_of_several_frames_the_first_is_read(tmp_path, ending):
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    path = save(tmp_path / f"film.{ending}", red, save_all=True, append_images=[blue])
    assert (read_image(path)[:3, 4, 4] > 128).tolist() == [True, False, False]


@pytest.mark.parametrize("shape", [(1, 199), (1, 200), (300, 2), (7, 1001)])
def test_of_a_strip_the_middle_is_resized_to_the_same_pixels(monkeypatch, shape):
    preprocess = Preprocess(32, [0] * 3, [1] * 3, crop_pct=0.875)
    generator = torch.Generator().manual_seed(0)
    strip = torch.randint(0, 256, (1, 3, *shape), generator=generator).to(torch.uint8)
    middle = preprocess(strip)
    monkeypatch.setattr("imprint_pl.embedding.preprocess.STRIP", 1000)
    assert torch.allclose(middle, preprocess(strip), atol=1e-4)


# Kinds


def heic(path):
    path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")


@pytest.mark.skipif(".heic" in extensions(), reason="pillow-heif is installed here")
def test_files_that_are_left_out_are_counted_by_folder_and_kind(tmp_path):
    root = make_folder(tmp_path / "photos")
    for i in range(45):
        heic(root / "cat" / f"IMG_{i}.HEIC")
    heic(root / "dog" / "without_ending")
    (root / "dog" / "film.mov").touch()
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "labels.txt", "0.json", "README"):
        (root / "dog" / name).write_text("no image")
    said = (
        r"47 files in .*cat \(45\), .*dog \(2\) are left out: 46 \.heic, 1 \.mov are not read "
        r"here; HEIC needs pillow-heif: pip install"
    )
    module = ImageFolder(str(root), num_workers=0)
    with pytest.warns(UserWarning, match=said):
        module.setup()
    assert module.class_counts.tolist() == [5, 5]
    with pytest.warns(UserWarning, match=r"45 files in .*cat are left out: 45 \.heic are not read"):
        files = ImageFiles(str(root / "cat"), on_error="skip")
    assert len(files.paths) == 6
    with pytest.warns(UserWarning, match=r"left out: 1 \.mov is not read here$"):
        ImageFiles(str(root / "dog" / "[0f]*"))
    with pytest.raises(ImprintError, match=r"matches no image file .*45 \.heic .*pillow-heif"):
        ImageFiles(str(root / "cat" / "*.HEIC"))
    with pytest.raises(
        ImprintError, match=r"IMG_0\.HEIC: it is an HEIC or HEIF file, which pillow"
    ):
        read_image(root / "cat" / "IMG_0.HEIC")
    for path in (root / "cat").glob("*.png"):
        path.unlink()
    with pytest.raises(ImprintError, match=r"class folder .*cat holds no image .*45 \.heic"):
        ImageFolder(str(root)).setup()


def test_heic_is_read_where_pillow_heif_is_installed(tmp_path):
    pytest.importorskip("pillow_heif")
    assert set(HEIF_EXTENSIONS) < set(extensions())
    pixels = np.full((16, 32, 3), 200, dtype=np.uint8)
    pixels[:, :16] = [255, 0, 0]
    path = save(tmp_path / "photo.HEIC", pixels, quality=100)
    image = read_image(path)
    assert image.shape == (3, 16, 32)
    assert (image[:, 8, 4].int() - torch.tensor([255, 0, 0])).abs().max() < 10
    assert ImageFiles(str(tmp_path)).paths == [str(path)]


def test_names_without_an_ending_are_known_by_their_content(tmp_path, recwarn):
    root = make_folder(tmp_path / "photos")
    save(root / "cat" / "IMG_1234", picture(9), format="JPEG")
    (root / "cat" / "LICENSE").write_text("P5 is no image")
    module = ImageFolder(str(root), num_workers=0)
    module.setup()
    assert module.class_counts.tolist() == [6, 5]
    assert not [w for w in recwarn if "left out" in str(w.message)]


def test_images_beside_the_class_folders_are_counted(tmp_path, caplog):
    root = make_folder(tmp_path / "photos")
    save(root / "stray.png", picture(1))
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        ImageFolder(str(root)).setup()
    assert "1 image in" in caplog.text
    assert "beside the class folders, is left out" in caplog.text


# Names


@needs_bytes_in_names
def test_every_name_goes_through_fit_cache_and_predict_and_comes_back(fitted, tmp_path, capfd):
    photos = os.fsencode(tmp_path / "photos")
    for folder in (b"chat", b"ch\xe9vre"):
        os.makedirs(photos + b"/" + folder)
        for i, name in enumerate(NAMES):
            path = os.fsdecode(photos + b"/" + folder + b"/" + name)
            Image.fromarray(picture(i + 10 * len(folder))).save(path)
    module = ImageFolder(os.fsdecode(photos), num_workers=0)
    embedded = embed("efficientnet_lite0", module, tmp_path / "cache")
    assert embedded.class_names == ["chat", r"ch\xe9vre"]
    assert all(os.path.isfile(path) for path in embedded.sample_names("train"))
    output = os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9.csv")
    # A folder, and one file by its own name.
    given = [os.fsdecode(photos + b"/chat"), os.fsdecode(photos + b"/ch\xe9vre/" + NAMES[0])]
    assert predict(fitted, given, output, "--on_error", "skip") == 0
    files = [row["file"] for row in rows_of(output)]
    assert len(files) == 5
    assert all(map(os.path.isfile, files))
    for suffix in (".json", ".jsonl"):
        written = tmp_path / f"it{suffix}"
        assert predict(fitted, [given[0]], written, "--explain", str(tmp_path / "why")) == 0
        text = written.read_text(encoding="utf-8")
        lines = json.loads(text) if suffix == ".json" else map(json.loads, text.splitlines())
        assert [row["file"] for row in lines] == files[:4]
    records = json.loads((tmp_path / "why" / "explanations.json").read_text())
    assert [record["file"] for record in records] == files[:4]
    assert r"out\xe9.csv" in capfd.readouterr().out


@needs_bytes_in_names
def test_a_message_is_one_line_whatever_the_name(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n\x1b[31m.png")
    with pytest.raises(ImprintError, match=r"caf\\xe9\\n\\x1b\[31m\.png: ") as caught:
        read_image(path)
    assert str(caught.value).isprintable()


def test_the_fingerprint_of_names_in_utf_8_is_that_of_earlier_caches(tmp_path):
    for name in ("a.png", "é.png"):
        os.utime(save(tmp_path / name, np.zeros((2, 2), dtype=np.uint8)), (1e9, 1e9))
    files = ImageFiles(str(tmp_path))
    files.setup()
    size = [os.stat(path).st_size for path in files.paths]
    text = f"files Nonea.png\0{size[0]}\0{10**18}\né.png\0{size[1]}\0{10**18}\n"
    assert files.predict_dataset.fingerprint() == hashlib.sha256(text.encode()).hexdigest()


# Broken images among good ones


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fit_that_skips_is_the_fit_of_the_folder_without_the_broken(tmp_path, workers):
    root = make_folder(tmp_path / "photos")
    broken = [break_it(root / name) for name in ("cat/0.png", "cat/3.png", "dog/5.png")]
    (root / "dog" / "empty.jpg").touch()
    broken.append(root / "dog" / "empty.jpg")
    heads, sources = [], []
    for on_error in ("skip", "fail"):
        if on_error == "fail":
            for path in broken:
                path.unlink()
        module = ImageFolder(str(root), num_workers=workers, batch_size=2, on_error=on_error)
        if on_error == "skip":
            with pytest.warns(
                UserWarning, match=r"4 of 13 images below .*cat.0\.png, .*empty\.jpg"
            ):
                module.setup()
            assert list(module.unreadable) == [str(path) for path in broken]
            assert "truncated" in module.unreadable[str(broken[0])]
        model = ImprintedClassifier(small_backbone(), "qi", keep="embeddings", keep_sources=True)
        trainer().fit(model, module)
        heads.append(model.head.state_dict())
        sources.append((model.state.sources, model.state.counts.tolist(), module.class_counts))
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert sources[0][:2] == sources[1][:2]
    assert torch.equal(sources[0][2], sources[1][2])


def test_without_skip_the_error_says_how_to_skip(tmp_path):
    root = make_folder(tmp_path / "photos")
    for path in (root / "cat").iterdir():
        break_it(path)
    for workers in (0, 1):
        loader = ImageFolder(str(root), num_workers=workers).train_dataloader()
        with pytest.raises(ImprintError, match=r"truncated.*on_error=\"skip\" \(--on_error skip\)"):
            list(loader)
    with (
        pytest.warns(UserWarning, match="6 of 12 images"),
        pytest.raises(ImprintError, match=r"no image of the class folder .*cat can be read"),
    ):
        ImageFolder(str(root), num_workers=0, on_error="skip").setup()
    with pytest.raises(ImprintError, match="on_error='ignore': give 'fail' or 'skip'"):
        ImageFolder(str(root), on_error="ignore")


def test_shots_are_drawn_among_the_readable_and_a_union_knows_what_was_left_out(tmp_path):
    root = make_folder(tmp_path / "photos", count=10)
    for i in range(6):
        break_it(root / "cat" / f"{i}.png")
    make_folder(tmp_path / "others")
    module = ImageFolder(str(root), num_workers=0, shots=3, on_error="skip")
    with pytest.warns(UserWarning, match="6 of 20 images"):
        module.setup()
    assert len(next(iter(module.train_dataloader()))[0]) == 6
    sources = [
        ImageFolder(str(root), num_workers=0, on_error="skip"),
        ImageFolder(str(tmp_path / "others"), num_workers=0),
    ]
    united = Union(sources, num_workers=0)
    with pytest.warns(UserWarning, match="6 of 20 images"):
        united.setup()
    assert len(united.unreadable) == 6
    assert united.class_counts.tolist() == [3 + 5, 8 + 5]


def test_a_cache_is_filled_with_what_can_be_read(tmp_path):
    root = make_folder(tmp_path / "photos")
    break_it(root / "cat" / "2.png")
    module = ImageFolder(str(root), num_workers=0, on_error="skip")
    with pytest.warns(UserWarning, match="1 of 12 images"):
        embedded = embed(small_backbone(), module, tmp_path / "cache", name="small")
    x, y = embedded.arrays("train")
    names = embedded.sample_names("train")
    assert list(embedded.unreadable) == [str(root / "cat" / "2.png")]
    assert len(names) == len(x) == len(y) == 9
    alone = small_backbone()([read_image(names[-1])])
    assert torch.allclose(alone[0], x[-1], atol=1e-5)


def test_the_command_names_all_that_it_skipped_in_the_run_s_folder(fitted):
    run = fitted.parent.parent
    rows = rows_of(run / "skipped.csv")
    assert [row["file"][-9:] for row in rows] == ["cat/1.png", "dog/4.png"]
    assert json.loads((run / "summary.json").read_text())["skipped_images"] == 2
    assert "on_error: skip" in (run / "config.yaml").read_text()


def test_add_class_skips_and_adds_no_black_image(fitted, tmp_path, capfd):
    photos = make_folder(tmp_path / "photos", ["fox"]) / "fox"
    break_it(photos / "3.png")
    words = ["add-class", str(fitted), "--name", "fox", "--images", str(photos)]
    words += ["--output", str(tmp_path / "grown.ckpt")]
    assert main(words) == 2
    assert "3.png" in capfd.readouterr().err
    assert main([*words, "--on_error", "skip"]) == 0
    out = capfd.readouterr().out
    assert "fox (5)" in out
    assert "3.png" in out
    model = ImprintedClassifier.load_from_checkpoint(fitted)
    model.load_state(fitted)
    model.add_class(
        "fox", ImageFiles(str(photos), num_workers=0, on_error="skip").predict_dataloader()
    )
    assert model.state.counts.tolist()[-1] == 5


def test_in_python_a_skipped_file_has_no_logits(tmp_path):
    root = make_folder(tmp_path / "photos")
    model = ImprintedClassifier(small_backbone(), "qi")
    trainer().fit(model, ImageFolder(str(root), num_workers=0))
    break_it(root / "cat" / "1.png")
    files = ImageFiles(str(root / "cat"), num_workers=0, on_error="skip")
    (logits,) = trainer().predict(model, files)
    assert logits.isnan().all(1).tolist() == [i == 1 for i in range(6)]


@pytest.mark.slow
def test_two_processes_skip_the_same_files_as_one(fitted, tmp_path):
    photos = fitted.parents[3] / "photos"
    arguments = [sys.executable, "-m", "imprint_pl", "fit", "--on_error", "skip"]
    arguments += ["--data", "ImageFolder", "--data.root", str(photos), "--data.num_workers", "0"]
    arguments += ["--model.recipe", "qi", "--model.image_size", "32", "--data.batch_size", "2"]
    arguments += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run([*arguments, "--trainer.accelerator", "cpu"], cwd=tmp_path, check=True)
    heads = [
        ImprintedClassifier.load_from_checkpoint(path).head
        for path in (fitted, next(tmp_path.rglob("imprinted.ckpt")))
    ]
    assert torch.allclose(heads[0].proxies, heads[1].proxies, atol=1e-3)
    assert len(rows_of(next(tmp_path.rglob("skipped.csv")))) == 2


def test_on_error_without_image_files_is_one_sentence(capfd):
    assert main(["fit", "--data", "Digits", "--on_error", "skip"]) == 2
    assert "--on_error is for image files" in capfd.readouterr().err


# Outputs


def test_where_nothing_can_be_read_the_header_is_written_and_said(fitted, tmp_path, capfd):
    (tmp_path / "empty.jpg").touch()
    output = tmp_path / "new" / "it.csv"
    more = ["--on_error", "skip", "--top", "2"]
    assert predict(fitted, [tmp_path / "empty.jpg"], output, *more) == 0
    header = "file,label,class,score,probability,class_2,probability_2"
    assert output.read_text().splitlines() == [header]
    assert "none of the images can be read" in capfd.readouterr().err
    assert predict(fitted, [tmp_path / "empty.jpg"], tmp_path / "it.json", *more) == 0
    assert json.loads((tmp_path / "it.json").read_text()) == []


def test_a_failed_prediction_leaves_the_old_output_and_nothing_else(fitted, tmp_path):
    photos = make_folder(tmp_path / "photos")
    break_it(photos / "dog" / "5.png")
    output = tmp_path / "out" / "it.csv"
    assert predict(fitted, [photos / "cat"], output) == 0
    before = output.read_bytes()
    assert output.stat().st_mode & 0o777 == (photos / "cat" / "0.png").stat().st_mode & 0o777
    for name in ("it.csv", "other.json"):
        assert predict(fitted, [photos], output.with_name(name), "--data.batch_size", "2") == 2
    assert [path.name for path in output.parent.iterdir()] == ["it.csv"]
    assert output.read_bytes() == before


def test_who_stops_a_prediction_keeps_the_old_output(tmp_path):
    class Stopped(ImprintedClassifier):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise KeyboardInterrupt
            return super().predict_step(batch, batch_idx)

    root = make_folder(tmp_path / "photos")
    module = ImageFolder(str(root), num_workers=0, batch_size=1)
    model = Stopped(small_backbone(), "qi")
    trainer().fit(model, module)
    (tmp_path / "it.csv").write_text("old")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        trainer(callbacks=[PredictionWriter(str(tmp_path / "it.csv"))]).predict(model, module)
    assert (tmp_path / "it.csv").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.csv", "photos"]


def test_an_output_that_cannot_be_written_is_one_sentence(fitted, tmp_path, capfd):
    photo = save(tmp_path / "a.png", picture(1))
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").touch()
    for output in (tmp_path / "folder.csv", tmp_path / "file" / "it.csv"):
        assert predict(fitted, [photo], output) == 2
        (line,) = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error: ")]
        assert str(output) in line


def test_a_link_stays_a_link_to_the_new_predictions(fitted, tmp_path):
    photo = save(tmp_path / "a.png", picture(1))
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    assert predict(fitted, [photo], tmp_path / "link.csv") == 0
    assert (tmp_path / "link.csv").is_symlink()
    assert rows_of(tmp_path / "real.csv")[0]["file"] == str(photo)


@pytest.mark.parametrize("format", ["onnx", pytest.param("torch_export", marks=pytest.mark.slow)])
def test_an_export_that_was_not_compared_never_gets_its_name(
    fitted, tmp_path, capfd, monkeypatch, format
):
    output = tmp_path / "out" / f"it{export.FORMATS[format].suffix}"
    words = ["export", str(fitted), "--format", format, "--output", str(output), "--images"]
    broken = break_it(save(tmp_path / "b.png", picture(1)))
    for images in (tmp_path / "typo.jpg", broken):
        assert main([*words, str(images)]) == 2
        assert images.name in capfd.readouterr().err
        assert not output.parent.exists()
    if format == "onnx":
        return  # its export takes seconds, and goes the same way
    monkeypatch.setattr(file_commands, "load_classifier", lambda path: Fake())
    photo = save(tmp_path / "a.png", picture(2))
    assert main([*words, str(photo)]) == 0
    before = output.read_bytes()
    monkeypatch.setattr(export, "TOLERANCE", -1)
    assert main([*words, str(photo)]) == 2
    assert "does not agree with the classifier" in capfd.readouterr().err
    assert output.read_bytes() == before
    assert [path.name for path in output.parent.iterdir()] == [output.name]


class Fake:
    """A classifier that is exported in no time."""

    def __init__(self):
        from imprint_pl import imprint

        self.backbone = small_backbone()
        images = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1) for i in range(4)])
        self.head = imprint(self.backbone(images).detach(), torch.tensor([0, 1, 0, 1]), "qi")
