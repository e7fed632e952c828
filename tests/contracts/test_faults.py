"""Kills, full disks, images that cannot be read, loaders that raise: nothing half-written is read
as whole, what was there before stays, and every process ends with an error. Killed fills of caches
are in test_cached.py, killed sweeps in test_sweep.py.
"""

import json
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintedHead, ImprintError, imprint
from imprint_pl.__main__ import main
from imprint_pl.embedding.row_cache import RowCache
from imprint_pl.experiments.results import COLUMNS, Results
from imprint_pl.files import read_tensors, save_tensors, write_whole
from imprint_pl.training_set.kept import State
from imprint_pl.training_set.kept_file import read_state, write_state

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_after_a_kill_at_any_moment_every_file_that_is_there_is_whole(tmp_path):
    command = [sys.executable, str(TESTS / "killed_files.py"), str(tmp_path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert set(counts) == {
        *("a.ckpt", "a.state.safetensors", "head/model.safetensors"),
        *("summary.json", "report.html", "half.pt2"),
    }
    assert min(counts.values()) >= 2


@contextmanager
def full_disk(size):
    """No file grows beyond so many bytes: writing raises an OSError halfway, as on a disk that is
    full (EFBIG, not ENOSPC, which asks for a mount). It ends within the test, as pytest's
    own log may be longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


X = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
Y = torch.arange(400) % 4


def test_a_full_disk_leaves_the_old_file_and_no_part_of_a_new_one(tmp_path):
    path = save_tensors(tmp_path / "a.safetensors", {"x": X}, {})
    message = r"cannot write .*a.safetensors .*disk with room"
    with full_disk(4096), pytest.raises(ImprintError, match=message):
        save_tensors(path, {"x": X + 1}, {})
    assert torch.equal(read_tensors(path)[0]["x"], X)
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_full_disk_under_heads_states_caches_and_results_is_named(tmp_path):
    head = imprint(X, Y, "knn")
    head.save_pretrained(tmp_path / "head")
    state = State.of(X, Y, head, "embeddings")
    write_state(state, tmp_path / "a.state.safetensors")
    cache = RowCache(tmp_path / "cache", {"backbone": "x"})
    with cache.lock(lambda: None):
        cache.write(torch.arange(10), X[:10])
    results = Results(tmp_path / "results")
    row = dict.fromkeys(COLUMNS) | {"id": "1", "backbone": "b" * 3000}
    results.append([row])
    with full_disk(4096):
        with pytest.raises(ImprintError, match="cannot write .*model.safetensors"):
            imprint(X + 1, Y, "knn").save_pretrained(tmp_path / "head")
        with pytest.raises(ImprintError, match="cannot write .*a.state.safetensors"):
            write_state(state, tmp_path / "a.state.safetensors")
        with cache.lock(lambda: None), pytest.raises(ImprintError, match="--cache_dir on a disk"):
            cache.write(torch.arange(10, 400), X[10:])
        with pytest.raises(ImprintError, match="cannot write results"):
            results.append([row | {"id": "2"}])
    assert torch.equal(ImprintedHead.from_pretrained(tmp_path / "head")(X), head(X))
    assert torch.equal(read_state(tmp_path / "a.state.safetensors").x, state.x)
    rows, found, faults = cache.read(torch.arange(400))
    assert torch.equal(rows[:10], X[:10])
    assert found.sum() == 10
    assert not faults
    # The row that was cut short does not count.
    assert Results(tmp_path / "results").ids == {"1"}


def test_a_full_disk_under_fit_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--data", "Digits", "--data.shots", "20", "--model.backbone", "identity"]
    command[5:] = ["--model.recipe", "knn", "--model.image_size", "32", "--trainer.logger", "false"]
    with full_disk(20_000):
        assert main(command) == 2
    assert "error: the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_write_whole_names_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(ImprintError, match="cannot write .*nowhere"):
        write_whole(tmp_path / "nowhere" / "a", b"")


class Raises(Dataset):
    """Embeddings of which one cannot be had."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 40:
            raise OSError("the disk of sample 40 is gone")
        return X[index], int(Y[index])


class Loader(LightningDataModule):
    def __init__(self, workers):
        super().__init__()
        self.workers = workers

    def train_dataloader(self):
        return DataLoader(Raises(), 8, num_workers=self.workers)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("recipe", ["qi", "robust"])
@pytest.mark.slow
def test_a_loader_that_raises_ends_the_fit_with_its_own_error(recipe, workers, tmp_path):
    model = ImprintedClassifier(torch.nn.Identity(), recipe)
    trainer = quiet_trainer(default_root_dir=tmp_path, enable_checkpointing=True)
    with pytest.raises(OSError, match="the disk of sample 40 is gone"):
        trainer.fit(model, Loader(workers))
    assert model.head.is_empty
    assert not list(tmp_path.rglob("*.ckpt"))


SCRIPT = """
import os, signal, sys, torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from imprint_pl import ImprintedClassifier

class Points(LightningDataModule):
    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        data = TensorDataset(x, torch.arange(64) % 2)
        rank = self.trainer.global_rank
        sampler = DistributedSampler(data, 2, rank, shuffle=False)
        def collate(samples):
            if rank == int(sys.argv[1]) and self.seen == 2:
                if sys.argv[3] == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError("a loader failed")
            self.seen += 1
            return torch.stack([s[0] for s in samples]), torch.stack([s[1] for s in samples])
        self.seen = 0
        return DataLoader(data, 8, sampler=sampler, collate_fn=collate)

trainer = Trainer(
    max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
    enable_progress_bar=False, enable_checkpointing=False,
)
trainer.fit(ImprintedClassifier(torch.nn.Identity(), sys.argv[2]), Points())
print("no error")
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("recipe", ["qi", "robust"])
@pytest.mark.parametrize("fault", ["raises", "killed"])
def test_a_loader_that_raises_or_is_killed_on_one_of_two_processes_ends_both(
    fault, rank, recipe, tmp_path
):
    (tmp_path / "fit.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "fit.py"), str(rank), recipe, fault]
    # Both write to the pipes: what `communicate` waits for is the end of the last of them.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False
    )
    assert done.returncode != 0
    assert "no error" not in done.stdout
    if fault == "raises":
        assert "a loader failed" in done.stderr
