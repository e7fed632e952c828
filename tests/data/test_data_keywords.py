"""The keywords of the data modules: declared in the base, known to every subclass."""

import inspect

import pytest
from jsonargparse import ArgumentParser

from imprint_pl.cli.fit_parser import DATA
from imprint_pl.data import (
    CSV,
    CombiDigits,
    Digits,
    EmbeddingDataModule,
    HuggingFace,
    ImageDataModule,
    ImageFiles,
    ImageFolder,
    ImageNet,
    Union,
)

TASK = {
    "classes": [[2, 0], 1],
    "d": 3,
    "num_labels": 2,
    "task_seed": 4,
    "shots": 5,
    "max_images": 90,
    "val_fraction": 0.25,
    "batch_size": 6,
    "num_workers": 7,
    "seed": 8,
}


def options_of(data):
    """A command line's options for a data module: defaults and help texts by name."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(data)
    return {
        action.dest: (action.default, action.help)
        for action in parser._actions
        if action.dest not in ("help", "config")
    }


@pytest.mark.parametrize("data", [d for d in DATA.values() if d is not ImageFiles])
def test_a_command_line_knows_every_keyword_of_a_task_with_its_help(data):
    options = options_of(data)
    assert set(TASK) <= set(options)
    assert [name for name, (_, text) in options.items() if len(text or "") < 10] == []
    base = inspect.signature(ImageDataModule).parameters
    own = {"batch_size"} if issubclass(data, ImageFolder) else set()
    for name in set(TASK) - own:
        assert options[name][0] == base[name].default


def test_a_command_line_does_not_offer_keywords_that_a_data_set_cannot_use():
    assert not {"download"} & set(options_of(ImageFolder))
    assert not {"download", "test_fraction"} & set(options_of(ImageNet))
    assert not {"download", "root"} & set(options_of(Union))
    assert not {"download"} & set(options_of(CSV))
    assert not {"download", "exclude"} & set(options_of(HuggingFace))
    assert not {"sources"} & set(options_of(CombiDigits))


@pytest.mark.parametrize(
    "make",
    [
        Digits,
        CombiDigits,
        ImageNet,
        lambda **task: ImageFolder("photos", **task),
        lambda **task: Union([Digits()], **task),
    ],
)
def test_python_takes_every_keyword_of_a_task(make):
    data = make(**TASK)
    assert {name: getattr(data, name) for name in TASK} == TASK


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImageFolder("photos", shot=3),
        lambda: ImageNet(shot=3),
        lambda: Union([Digits()], shot=3),
        lambda: EmbeddingDataModule(None, shot=3),
    ],
)
def test_a_misspelt_keyword_is_refused_by_its_name(make):
    with pytest.raises(TypeError, match="'shot'"):
        make()


@pytest.mark.parametrize(
    ("make", "keyword"),
    [
        (lambda: ImageFolder("photos", download=True), "download"),
        (lambda: ImageNet(test_fraction=0.5), "test_fraction"),
        (lambda: Union([Digits()], root="data"), "root"),
        (lambda: EmbeddingDataModule(None, num_workers=2), "num_workers"),
    ],
)
def test_a_keyword_that_a_data_set_cannot_use_is_refused_by_its_name(make, keyword):
    with pytest.raises(TypeError, match=f"'{keyword}'"):
        make()


def test_a_subclass_that_passes_keywords_on_is_known_to_the_command_line():
    class Mine(ImageDataModule):
        """Mine.

        Args:
            colour: Whether the images are read in colour.
        """

        def __init__(self, colour: bool = True, **task) -> None:
            super().__init__(**task)
            self.colour = colour

    assert options_of(Mine) == options_of(ImageDataModule) | {
        "colour": (True, "Whether the images are read in colour.")
    }
    assert Mine(colour=False, shots=3).shots == 3
