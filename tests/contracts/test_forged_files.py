"""What the package loads is tensors and JSON: a pickle that would run a command does not."""

import os

import pytest
import torch
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintedHead, ImprintError, imprint
from imprint_pl.cli import main
from imprint_pl.cli.checkpoint import load_classifier
from imprint_pl.data import Digits
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.training_set.kept_file import read_state, state_path


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def forged(tmp_path):
    """A checkpoint like that of `fit`, with a pickle in it; unpickled, it creates `executed`."""
    head = imprint(torch.eye(3), torch.arange(3), "qi")
    state = {f"head.{name}": value for name, value in head.state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"recipe": "qi"}, "epoch": 1}
    content |= {"pytorch-lightning_version": "2.6.0", "more": Attack(tmp_path / "executed")}
    torch.save(content, tmp_path / "forged.ckpt")
    return tmp_path / "forged.ckpt"


def test_the_forged_file_would_run_if_it_were_unpickled(forged):
    torch.load(forged, weights_only=False)
    assert (forged.parent / "executed").exists()


LOADERS = {
    "commands on files": load_classifier,
    "predict": lambda path: main(["predict", "--data", "Digits", "--ckpt_path", str(path)]),
    "add-class": lambda path: main(
        ["add-class", str(path), "--name", "new", "--images", str(path.parent)]
    ),
    "export": lambda path: main(["export", str(path)]),
    "load_from_checkpoint": ImprintedClassifier.load_from_checkpoint,
    "load_from_checkpoint of a URL": lambda path: ImprintedClassifier.load_from_checkpoint(
        path.as_uri().replace("file:", "http:")
    ),
    "a Trainer": lambda path: quiet_trainer().test(
        ImprintedClassifier(recipe="qi", image_size=32), Digits(), ckpt_path=path
    ),
    "weights of a backbone": lambda path: load_backbone("efficientnet_lite0", weights=path),
    "a state": read_state,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_pickle_in_a_checkpoint_does_not_run(forged, loader, monkeypatch):
    def from_disk(url, **keywords):
        return torch.load(forged, **keywords)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", from_disk)
    try:
        status = LOADERS[loader](forged)
    except Exception:
        status = 2
    assert status == 2
    assert not (forged.parent / "executed").exists()


def test_a_pickle_in_the_place_of_a_head_or_a_state_does_not_run(forged):
    folder = forged.parent / "head"
    imprint(torch.eye(3), torch.arange(3), "qi").save_pretrained(folder)
    for name in ("pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(forged.read_bytes())
    # A folder with pickles beside the tensors is read, and the pickles are not.
    assert ImprintedHead.from_pretrained(folder).num_classes == 3
    (folder / "model.safetensors").write_bytes(forged.read_bytes())
    with pytest.raises(ImprintError, match="damaged, or not a head"):
        ImprintedHead.from_pretrained(folder)
    os.replace(folder / "pytorch_model.bin", state_path(forged))
    with pytest.raises(ImprintError, match="damaged, or not a state file"):
        read_state(state_path(forged))
    assert not (forged.parent / "executed").exists()
