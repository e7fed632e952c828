"""The gallery: hand-placed points with exact answers, then real digits, files and the command."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import NAMES, drawn
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, imprint
from imprint_pl.cli import main
from imprint_pl.data import Digits
from imprint_pl.errors import ImprintError
from imprint_pl.gallery import Gallery, ImprintGallery, Proxy, draw_gallery, proxy_gallery
from imprint_pl.method.head import ImprintedHead

# Label 0 has two heaps, of 3 (class 0) and 2 (class 1); label 1 one of 2 (class 2).
X = torch.tensor(
    [[1.0, 0.0], [0.99, 0.05], [0.9, 0.3], [0.0, 1.0], [0.05, 0.99], [-1.0, 0.0], [-0.9, -0.1]]
)
Y = torch.tensor([0, 0, 0, 0, 0, 1, 1])
ORIGINAL = torch.tensor([0, 0, 0, 1, 1, 2, 2])


def head_of(recipe="robust", **keywords):
    return imprint(X, Y, recipe, calibrate=False, **keywords)


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"agg": "mnn", "m": 1, "distance": "euclidean"},
        {"agg": "mnn", "distance": "mahalanobis"},
    ],
)
def test_each_proxy_has_the_samples_of_its_own_heap(keywords):
    gallery = proxy_gallery(head_of(k=2, **keywords), X, Y, ORIGINAL)
    big, small = [proxy for proxy in gallery.proxies if proxy.label == 0]
    assert (big.samples, big.original, big.share) == (3, 0, 1.0)
    assert (small.samples, small.original, small.share) == (2, 1, 1.0)
    assert set(big.nearest) == {0, 1, 2}
    assert gallery.purity == 1
    assert gallery.chance == pytest.approx(5 / 7)


def test_the_nearest_images_come_in_order_and_no_more_than_asked_for():
    gallery = proxy_gallery(head_of("qi"), X, Y, images=2)
    direction = nn.functional.normalize(X)[:5].mean(0)
    order = (nn.functional.normalize(X[:5]) @ direction).argsort(descending=True)
    assert gallery.proxies[0].nearest == order[:2].tolist()
    assert gallery.proxies[0].samples == 5


def test_one_proxy_a_class_is_as_pure_as_chance():
    gallery = proxy_gallery(head_of("qi"), X, Y, ORIGINAL)
    assert gallery.purity == gallery.chance == pytest.approx(5 / 7)


def test_without_merged_classes_there_is_no_purity():
    assert proxy_gallery(head_of(k=2), X, Y, Y + 4).purity is None
    assert proxy_gallery(head_of(k=2), X, Y).purity is None


def test_bad_input_is_named():
    with pytest.raises(ImprintError, match="empty head"):
        proxy_gallery(ImprintedHead(), X, Y)
    with pytest.raises(ImprintError, match=r"original of shape \(3,\) for 7 embeddings"):
        proxy_gallery(head_of(), X, Y, ORIGINAL[:3])


@pytest.mark.parametrize("recipe", ["kernel", "ridge", "whitened", "knn", "lda"])
def test_every_kind_of_head_counts_each_sample_once(recipe, blobs):
    x, y = blobs
    gallery = proxy_gallery(imprint(x, y, recipe, calibrate=False), x, y)
    assert sum(proxy.samples for proxy in gallery.proxies) == len(y)


def test_images_of_any_size_and_mode_are_drawn(tmp_path):
    class Mixed:
        def __getitems__(self, places):
            shapes = [(1, 8, 8), (3, 20, 40), (4, 9, 5)]
            return [torch.full(shapes[p % 3], 40 * p, dtype=torch.uint8) for p in places], None

    gallery = proxy_gallery(head_of(k=2), X, Y, ORIGINAL)
    names = ["$a_{ " * 9, "b"]
    path = draw_gallery(gallery, Mixed(), tmp_path / "new" / "g.png", names, ["x", "y", "z"])
    pixels = np.asarray(Image.open(path).convert("L"))
    # The darkest image and paper are both there; nothing touches the edges.
    assert pixels.min() == 0
    assert all((edge == 255).all() for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


@pytest.mark.parametrize(
    ("classes", "proxies", "images", "merged"),
    [(1, 1, 0, False), (1, 1, 1, True), (2, 7, 8, True), (40, 1, 2, False)],
)
def test_no_text_is_cut_or_overlaps_whatever_the_names_and_numbers(
    tmp_path, monkeypatch, classes, proxies, images, merged
):
    class Grey:
        def __getitems__(self, places):
            return [torch.zeros(1, 9, 9, dtype=torch.uint8) for _ in places], None

    figures = drawn(monkeypatch)
    names = [list(NAMES.values())[c % len(NAMES)] for c in range(classes)]
    found = [
        Proxy(i, i // proxies, 10 ** (i % 8), list(range(images))) for i in range(classes * proxies)
    ]
    gallery = Gallery(found)
    if merged:
        found = [replace(proxy, original=proxy.label, share=1.0) for proxy in found]
        gallery = Gallery(found, purity=1.0, chance=0.5)
    draw_gallery(gallery, Grey(), tmp_path / "g.png", names, names if merged else None)
    ((figure, wrong),) = figures
    assert not wrong
    texts = [text.get_text() for text in figure.texts]
    assert texts[2].split("\n")[0] == "1 sample"
    # Of a name without spaces the beginning is left.
    assert classes == 1 or any(text.startswith("a class name") for text in texts)
    assert classes < 3 or any(text.startswith("WWW") for text in texts)


@pytest.mark.slow
def test_merged_digits_come_apart_at_the_end_of_a_fit(tmp_path, capfd):
    options = ["--config", "configs/d_in_1_digits.yaml", "--model.k", "3", "--data.shots", "90"]
    options += ["--model.image_size", "48", "--trainer.default_root_dir", str(tmp_path)]
    options += ["--gallery", "file"]
    cached = [*options, "--cache_dir", str(tmp_path / "cache")]
    for arguments in (options, cached):
        assert main(["fit", *arguments]) == 0
        output = capfd.readouterr().out
        run = Path(output.splitlines()[-1].removeprefix("run: "))
        summary = json.loads((run / "summary.json").read_text())
        assert summary["purity"] > 0.6
        assert summary["purity_of_one_proxy"] < 0.5
        assert f"gallery: {run / 'gallery.png'}" in output
    with open(run / "gallery.csv") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["samples"]) for row in rows) == 270
    assert {row["class"] for row in rows} == set(output_classes(run))
    # The same images, whether the embeddings came from the cache or not.
    other = run.parent / "version_0"
    assert (run / "gallery.png").read_bytes() == (other / "gallery.png").read_bytes()


def output_classes(run):
    with open(run / "per_class.csv") as file:
        return [row["class"] for row in csv.DictReader(file)]


def test_a_fit_without_it_draws_nothing_and_a_foreign_data_module_is_named(tmp_path):
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[ImprintGallery()])
    model = ImprintedClassifier(backbone=None, recipe="qi")
    with pytest.raises(ImprintError, match=r"NoneType does not have: give a data module"):
        trainer.fit(model, DataLoader(TensorDataset(X, Y)))
    assert not list(tmp_path.glob("gallery*"))


def test_the_callback_works_in_plain_python_and_leaves_the_model_as_it_was(tmp_path):
    callback = ImprintGallery(folder=str(tmp_path))
    trainer = quiet_trainer(callbacks=[callback])

    class Flat(nn.Module):
        def forward(self, x):
            return x.flatten(1).float()

    plain = dict(size=8, mean=[0.0], std=[1.0])
    model = ImprintedClassifier(Flat(), recipe="robust", k=2, preprocess=plain)
    data = Digits(classes=[[0, 1], 7], shots=40)
    trainer.fit(model, data)
    assert callback.path == tmp_path / "gallery.png"
    assert callback.path.is_file()
    assert callback.gallery.chance < 0.85
    assert callback.gallery.purity > callback.gallery.chance
    assert model.head.proxies.requires_grad
