"""`explain.py`: the proxy that decided, its share, the nearest training images."""

from dataclasses import replace

import pytest
import torch
from pictures import NAMES, drawn

from imprint_pl import ImprintError, imprint
from imprint_pl.explain import Explanation, Neighbour, explain, picture
from imprint_pl.training_set.kept import State

# Two clusters of class 0, one of class 1.
X = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
Y = torch.tensor([0, 0, 0, 0, 1, 1])


def test_max_names_the_proxy_that_decided_alone():
    head = imprint(X, Y, "robust", k=2, class_names=["flat", "up"], calibrate=False)
    right, left = explain(head, torch.tensor([[2.0, 0.0], [-3.0, 0.1]]))
    assert right.class_name == left.class_name == "flat"
    assert right.share == 1
    assert {right.proxy_of, left.proxy_of} == {"1 of 2", "2 of 2"}
    assert head.proxies[right.proxy, 0] > 0.9
    assert head.proxies[left.proxy, 0] < -0.9


def test_votes_are_shared_among_the_nearest():
    head = imprint(X, Y, "knn", m=2, votes="uniform", calibrate=False)
    (found,) = explain(head, X[:1])
    assert found.proxy == 0
    assert found.share == pytest.approx(0.5)


def test_the_nearest_training_images_are_named_and_drawn(tmp_path):
    head = imprint(X, Y, "qi", class_names=["flat", "up"], calibrate=False)
    state = State.of(X, Y, head, "embeddings", sources=[f"train {i}" for i in range(6)])
    (found,) = explain(head, torch.tensor([[0.0, 5.0]]), state, neighbours=2)
    assert [n.source for n in found.neighbours] == ["train 4", "train 5"]
    assert [n.class_name for n in found.neighbours] == ["up", "up"]
    assert found.neighbours[0].cosine == pytest.approx(1, abs=1e-3)
    image = torch.zeros(1, 8, 8, dtype=torch.uint8)
    path = picture(image, found, tmp_path / "why.png", [image, image])
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ImprintError, match="keep_sources"):
        explain(head, X, State.of(X, Y, head, "moments"))


def test_none_of_these_still_says_what_was_nearest():
    head = imprint(X, Y, "qi", class_names=["flat", "up"], calibrate=False)
    head.threshold = 0.99
    (found,) = explain(head, torch.tensor([[-1.0, -1.0]]))
    assert found.class_name == "none of these"
    assert found.nearest_class in ("flat", "up")


def test_of_uniform_votes_the_nearest_proxy_of_the_class_is_named():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=generator), torch.arange(40) % 2
    head = imprint(x, y, "knn", m=15, votes="uniform", distance="euclidean", calibrate=False)
    z = torch.randn(20, 6, generator=generator)
    far = torch.cdist(head.norm_inf(z), head.proxies.detach())
    for found, row in zip(explain(head, z), far, strict=True):
        own = (head.proxy_classes == int(found.nearest_class)).nonzero().flatten()
        assert found.proxy == own[row[own].argmin()]
        assert (1 / found.share) == pytest.approx(round(1 / found.share), abs=1e-6)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_or_overlaps_whatever_the_names_and_neighbours(
    tmp_path, monkeypatch, name, count
):
    figures, name = drawn(monkeypatch), NAMES[name]
    images = [torch.full((3, 60, 80), 90, dtype=torch.uint8)] * 5
    near = (Neighbour("", name, 0.5),) * count
    for nearest in (name, "other " + name):
        found = Explanation(name, nearest, 0, "12 of 20", 0.5, near)
        picture(images[0], found, tmp_path / "why.png", images)
    assert [wrong for _, wrong in figures] == [[], []]
    figure = figures[0][0]
    words = " ".join(text.get_text() for text in figure.texts)
    # All of the name stands there, its dollars, too: where a line breaks a space may be new.
    assert "".join(name.split()) in "".join(words.split())
    assert not any(text.get_parse_math() for text in figure.texts)


@pytest.mark.parametrize("size", [(1, 200), (200, 1), (30, 400), (400, 30), (1, 1)])
def test_images_of_every_shape_are_drawn_whole_below_their_captions(tmp_path, monkeypatch, size):
    figures = drawn(monkeypatch)
    image = torch.full((1, *size), 90, dtype=torch.uint8)
    near = (Neighbour("", "cardboard", 0.5), Neighbour("", "paper", 0.4))
    found = Explanation("none of these", "glass", 0, "1 of 1", 1.0, near)
    square = torch.zeros(3, 9, 9, dtype=torch.uint8)
    picture(image, found, tmp_path / "why.png", [square, square])
    picture(image, replace(found, neighbours=()), tmp_path / "alone.png")
    assert [wrong for _, wrong in figures] == [[], []]
    text = figures[1][0].texts[0].get_text()
    assert " ".join(text.split()) == (
        "none of these nearest: glass, proxy 1 of 1, 100 % of the score"
    )
