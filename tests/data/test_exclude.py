"""`ImageFolder(exclude=…)`: files that are not read, by name or from a CSV."""

import os

import pytest
from PIL import Image

from imprint_pl.data import ImageFolder
from imprint_pl.data.exclude import read_names, write_names
from imprint_pl.errors import ImprintError

ODD = ["a, b.png", '"quoted".png', "line\nbreak.png", os.fsdecode(b"caf\xe9.png"), "#5.png"]


@pytest.fixture
def root(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("L", (9, 9), 50 * i + label).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def names(data):
    data.setup()
    paths = data.train_dataset.paths + data.test_dataset.paths
    return {os.path.relpath(path, data.root) for path in paths}


def test_files_are_left_out_by_their_names_below_the_root_or_whole_paths(root, tmp_path):
    every = names(ImageFolder(str(root)))
    assert len(every) == 12
    left = names(ImageFolder(str(root), exclude=["cat/1.png", str(root / "dog" / "2.png")]))
    assert every - left == {"cat/1.png", "dog/2.png"}
    path = write_names(tmp_path / "fix.csv", [("./cat//1.png", "why")])
    assert every - names(ImageFolder(str(root), exclude=str(path))) == {"cat/1.png"}


@pytest.mark.parametrize("name", ODD)
def test_any_file_name_survives_the_csv(root, tmp_path, name):
    Image.new("L", (9, 9)).save(root / "cat" / name, "PNG")
    path = write_names(tmp_path / "fix.csv", [(f"cat/{name}", "it")])
    assert read_names(str(path)) == [f"cat/{name}"]
    assert f"cat/{name}" not in names(ImageFolder(str(root), exclude=str(path)))


def test_the_fingerprint_of_a_split_changes_with_what_is_left_out(root):
    whole, part = ImageFolder(str(root)), ImageFolder(str(root), exclude=["cat/1.png", "dog/1.png"])
    whole.setup()
    part.setup()
    prints = [data.load().train.fingerprint() for data in (whole, part)]
    assert prints[0] != prints[1]


def test_a_wrong_name_list_or_class_ends_in_an_error_with_its_name(root, tmp_path):
    with pytest.raises(ImprintError, match=r"'cat/11.png'.*did you mean 'cat/1.png'"):
        names(ImageFolder(str(root), exclude=["cat/11.png"]))
    with pytest.raises(ImprintError, match="leaves no image of the class folder"):
        names(ImageFolder(str(root), exclude=[f"cat/{i}.png" for i in range(6)]))
    with pytest.raises(ImprintError, match="cannot be read"):
        names(ImageFolder(str(root), exclude=str(tmp_path / "none.csv")))
    (tmp_path / "other.csv").write_text("name\ncat/1.png\n")
    with pytest.raises(ImprintError, match="no column 'file'"):
        names(ImageFolder(str(root), exclude=str(tmp_path / "other.csv")))
