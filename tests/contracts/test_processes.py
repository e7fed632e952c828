"""1, 2 and 3 processes: the same proxies, each sample counted once, an error that ends them all."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

# All of them wait for the same runs, which one test process starts.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

# Neither the 431 training images nor the 106 test images divide evenly by 2 and by 3.
SCRIPT = """
import json, sys, torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from imprint_pl import ImprintedClassifier
from imprint_pl.collapse import NC1, VCI
from imprint_pl.data import Digits
from imprint_pl.parts.gen.kmeans import KMeans

devices, folder = int(sys.argv[1]), sys.argv[2]
clustered, of_classes = [], KMeans.of_classes

def counted(self, xs, seed, progress):
    clustered.append(len(xs))
    return of_classes(self, xs, seed, progress)

counted.__name__ = "of_classes"  # pickled by it
KMeans.of_classes = counted
POINTS = {
    "qi": {}, "hosoda": {}, "janson": {}, "ls": {}, "lda": {}, "ridge": {},
    "ranpac": {"projection_dim": 40},
    # Not by sums: embeddings are gathered, all or at most so many of a class.
    "knn": {}, "kernel": {"projection_dim": 40}, "bounded": {"k": 2, "max_per_class": 60},
    # In files: each process has its own, and the first one all rows.
    "kernel_on_disk": {"projection_dim": 40, "memory_budget": 1e-4},
    "kmedoids": {"k": 2}, "random": {"k": 2}, "fps": {"k": 2}, "cov_max": {"k": 2},
    "kls": {"k": 2}, "kridge": {"k": 2},
}

class Points(LightningDataModule):
    # 4,501 embeddings; of class 5 only the second process sees one, and nobody announces it.
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        y = torch.randint(0, 5, (4501,), generator=generator)
        y[1] = 5
        x = torch.randn(4501, 8, generator=generator) + 2 * torch.eye(6, 8)[y]
        data = TensorDataset(x, y)
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = DistributedSampler(data, ranks, rank, shuffle=False) if ranks > 1 else None
        return DataLoader(data, 64, sampler=sampler)

class Listed(Digits):
    # One loader, in a list.
    def val_dataloader(self):
        return [super().val_dataloader()]

def make_trainer():
    return Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, logger=False, enable_progress_bar=False,
        strategy="ddp" if devices > 1 else "auto", enable_checkpointing=False,
    )

for recipe, options in POINTS.items():
    trainer = make_trainer()
    if recipe in ("kls", "kridge"):
        options |= {"recipe": recipe[1:], "gen": recipe}
    elif recipe in ("kmedoids", "random", "fps", "cov_max"):
        options |= {"recipe": "robust", "gen": recipe}
    elif recipe == "bounded":
        options |= {"recipe": "robust"}
    elif recipe == "kernel_on_disk":
        options |= {"recipe": "kernel"}
    model = ImprintedClassifier(torch.nn.Identity(), **({"recipe": recipe} | options))
    trainer.fit(model, Points())
    if trainer.is_global_zero:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(
            {"head": model.head.state_dict(), "metrics": metrics},
            f"{folder}/points-{recipe}-{devices}.pt",
        )

if devices > 1:
    shares = [None] * devices
    torch.distributed.all_gather_object(shares, clustered)
    if torch.distributed.get_rank() == 0:
        torch.save(shares, f"{folder}/shares-{devices}.pt")

for recipe, k in (("qi", None), ("robust", 4), ("whitened", None), ("ridge", None), ("auto", None)):
    model = ImprintedClassifier("efficientnet_lite0", recipe, image_size=32, k=k)
    trainer = make_trainer()
    data = Listed if recipe == "qi" else Digits
    trainer.fit(model, data(classes=[0, 1, 2], batch_size=64))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    state = model.metrics[0]["class_accuracy"]
    counted = (state.tp + state.fn).sum().float()
    metrics["counted"] = float(trainer.strategy.reduce(counted, reduce_op="sum"))
    # NC1 and VCI as metrics, each rank with a part of its own size.
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(100) % 7 % 3
    x = torch.randn(100, 6, generator=generator) + y[:, None]
    start, end = [0, 10, 45, 100][trainer.global_rank :][:2]
    rows = slice(start, 100 if trainer.global_rank == devices - 1 else end)
    for metric in (NC1(3, 6), VCI(3, 6, average="micro")):
        metric.update(x[rows], y[rows])
        metrics[type(metric).__name__] = float(metric.compute())
    if trainer.is_global_zero:
        torch.save(
            {"head": model.head.state_dict(), "metrics": metrics}, f"{folder}/{recipe}-{devices}.pt"
        )
if devices > 1:
    torch.distributed.destroy_process_group()
"""
FAILING = """
import sys
from lightning.pytorch import Trainer
from imprint_pl import ImprintedClassifier, ImprintError
from imprint_pl.data import Digits

class Incomplete(Digits):
    def setup(self, stage=None):
        super().setup(stage)
        self.class_names = ["0", "1", "2", "hat"]

model = ImprintedClassifier("efficientnet_lite0", "qi", image_size=32)
trainer = Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False)
try:
    trainer.fit(model, Incomplete(classes=[0, 1, 2]))
except ImprintError as error:
    print(f"rank {trainer.global_rank}: {error}")
    sys.exit(2)
"""


def run(code, folder, *arguments, **kwargs):
    # A script, since the other processes start it again.
    path = folder / "script.py"
    path.write_text(code)
    command = [sys.executable, path, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, timeout=240, text=True, capture_output=True, check=False, **kwargs
    )


class Results(dict):
    """What the script leaves, by file; it runs once for each number of processes asked for."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, name):
        devices = name.rpartition("-")[2]
        finished = run(SCRIPT, self.folder, devices, self.folder)
        assert finished.returncode == 0, finished.stderr[-3000:]
        for path in self.folder.glob(f"*-{devices}.pt"):
            self[path.stem] = torch.load(path, weights_only=True)
        return dict.__getitem__(self, name)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return Results(tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("recipe", ["qi", "robust", "whitened", "ridge", "auto"])
@pytest.mark.parametrize("devices", [2, 3])
def test_more_processes_give_the_proxies_of_one(results, recipe, devices):
    one, more = results[f"{recipe}-1"], results[f"{recipe}-{devices}"]
    # Whitening divides by small standard deviations: rounding of the embeddings grows with it.
    atol = 1e-3 if recipe in ("whitened", "auto") else 1e-5
    torch.testing.assert_close(more["head"], one["head"], rtol=1e-4, atol=atol)
    assert more["metrics"]["train/nc1"] == pytest.approx(one["metrics"]["train/nc1"], rel=1e-5)


@pytest.mark.parametrize("devices", [2, 3])
def test_every_gen_gives_on_more_processes_the_head_of_one_and_its_temperature(results, devices):
    names = [name for name in results if name.startswith("points-") and name.endswith("-1")]
    assert len(names) == 17
    for name in names:
        one, more = results[name], results[f"{name[:-1]}{devices}"]
        assert one["head"]["proxy_classes"].unique().tolist() == [0, 1, 2, 3, 4, 5], name
        assert one["head"]["log_scale"] != 0, name
        torch.testing.assert_close(
            more["head"], one["head"], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: name + text
        )
        nc1 = one["metrics"]["train/nc1"]
        assert more["metrics"]["train/nc1"] == pytest.approx(nc1, rel=1e-6), name


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_embeddings_in_files_give_the_head_of_those_in_memory(results, devices):
    head, expected = (
        results[f"points-{name}"]["head"] for name in (f"kernel_on_disk-{devices}", "kernel-1")
    )
    torch.testing.assert_close(head, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("devices", [2, 3])
def test_each_process_clusters_its_share_of_the_classes(results, devices):
    shares = results[f"shares-{devices}"]
    assert len({len(of_rank) for of_rank in shares}) == 1
    # Six classes each time, but for folds of the temperature that leave fewer.
    assert all(min(of_rank) >= 1 and max(of_rank) == 6 // devices for of_rank in shares)


@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("metric", ["NC1", "VCI"])
def test_collapse_metrics_are_the_same_on_any_number_of_processes(results, metric, devices):
    one, more = results["qi-1"]["metrics"], results[f"qi-{devices}"]["metrics"]
    assert more[metric] == pytest.approx(one[metric], rel=1e-9)


@pytest.mark.parametrize("recipe", ["qi", "robust"])
@pytest.mark.parametrize("devices", [1, 2, 3])
def test_validation_counts_each_sample_once(results, recipe, devices):
    one, more = results[f"{recipe}-1"]["metrics"], results[f"{recipe}-{devices}"]["metrics"]
    assert more["counted"] == 106
    assert more["val/accuracy"] == pytest.approx(one["val/accuracy"])
    assert more["val/macro_f1"] == pytest.approx(one["val/macro_f1"])


def test_an_error_while_imprinting_ends_every_process(tmp_path):
    finished = run(FAILING, tmp_path)
    assert finished.returncode == 2
    assert "class 3 ('hat') has no training sample" in finished.stdout


def test_the_command_line_fits_tests_and_predicts_on_two_processes(tmp_path):
    def command(*arguments, data=("--data", "Digits", "--data.classes", "[0,1,2]")):
        base = [sys.executable, "-m", "imprint_pl", *arguments, *data]
        base += ["--trainer.accelerator", "cpu"]
        base += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
        done = subprocess.run(
            base, cwd=tmp_path, timeout=240, text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "sync_dist" not in done.stderr
        return done.stdout.splitlines()

    last = command("fit", "--model.image_size", "32", "--model.recipe", "robust", "--model.k", "4")[
        -1
    ]
    summary = json.loads((tmp_path / last.removeprefix("run: ") / "summary.json").read_text())
    assert summary["accuracy"] > 0.9
    last = command("test", "--ckpt_path", summary["checkpoint"])[-1]
    tested = json.loads((tmp_path / last.removeprefix("run: ") / "summary.json").read_text())
    assert tested["accuracy"] == pytest.approx(summary["accuracy"])
    last = command("predict", "--ckpt_path", summary["checkpoint"], "--output", "it.csv")[-1]
    assert last == "106 predictions: it.csv"
    rows = (tmp_path / "it.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == [str(i) for i in range(106)]
    # A file that cannot be read is named with its reason, whichever process met it.
    for i in range(4):
        Image.new("L", (8, 8), 60 * i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:50])
    files = ["--images", *(f"{i}.png" for i in range(4)), "--on_error", "skip"]
    shown = command("predict", "--ckpt_path", summary["checkpoint"], *files, data=())
    assert shown[-1].startswith("3 predictions: ")
    place = shown.index("skipped 1 that cannot be read:")
    assert "cannot read the image 1.png: image file is truncated" in shown[place + 1]
