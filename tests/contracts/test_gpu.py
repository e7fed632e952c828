"""What runs on a GPU, on a pretended one: nothing mixes devices, nothing makes the GPU wait in the
imprint epoch, and the results are those of the CPU. `make gpu-check` compares a real one.
"""

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_gpu import OnGpu, pretend_gpu
from projects import Plain, digits
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintCallback, ImprintedClassifier, attach, detach, extend, imprint
from imprint_pl.collapse import NC1, nc1, vci
from imprint_pl.data import Digits
from imprint_pl.embedding import embed
from imprint_pl.embedding.backbone import load_backbone
from imprint_pl.explain import explain
from imprint_pl.export import export
from imprint_pl.gallery import ImprintGallery
from imprint_pl.lightning.metrics import TaskMetrics
from imprint_pl.lightning.outsiders import Outsiders
from imprint_pl.method.recipes import RECIPES
from imprint_pl.numerics.kmeans import kmeans

GPU = torch.device("cuda:0")
GENERATOR = torch.Generator().manual_seed(0)
Y = torch.arange(600) % 5
CENTRES = torch.randn(5, 24, generator=GENERATOR)
X = (CENTRES[Y] + torch.randn(600, 24, generator=GENERATOR)).relu()
NEW = (CENTRES[Y[:99]] + torch.randn(99, 24, generator=GENERATOR)).relu()
IMAGES = torch.randint(0, 256, (7, 3, 30, 40), dtype=torch.uint8, generator=GENERATOR)


class PretendedAccelerator(CPUAccelerator):
    def setup_device(self, device):
        pass

    def get_device_stats(self, device):
        return {}


def make_trainer(folder, device, **options):
    if device == GPU:
        accelerator = PretendedAccelerator()
        options["accelerator"] = "auto"  # the strategy's
        options["strategy"] = SingleDeviceStrategy(device=GPU, accelerator=accelerator)
    return quiet_trainer(default_root_dir=folder, **options)


def on_both(work):
    """`work(device)` on the CPU and on the pretended GPU: numbers, or tensors on the CPU."""
    with pretend_gpu():
        gpu = work(GPU)
    torch.testing.assert_close(gpu, work(torch.device("cpu")), rtol=1e-5, atol=1e-5)
    return gpu


def numbers(trainer):
    timed = ("train/embed_seconds", "train/gen_seconds", "train/images_per_second")
    metrics = trainer.callback_metrics.items()
    return {name: float(value) for name, value in metrics if name not in timed}


# The pretended GPU itself.


def test_the_pretended_gpu_refuses_what_a_gpu_refuses():
    with pretend_gpu():
        x = torch.ones(3, 2, device=GPU)
        assert isinstance(x, OnGpu)
        assert x.device == GPU
        assert (x + torch.tensor(1.0)).cpu().sum() == 12
        for mixes in (lambda: x + torch.ones(2), lambda: torch.ones(3, 3) @ x, lambda: x.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                mixes()
        assert torch.equal(x[torch.tensor([0, 2])].cpu(), torch.ones(2, 2))
        with pytest.raises(RuntimeError, match="at least two devices"):
            torch.ones(3, 2)[torch.tensor([0], device=GPU)]
        x[1:].add_(1)
        assert x.cpu().tolist() == [[1, 1], [2, 2], [2, 2]]


def test_the_pretended_gpu_counts_when_the_processor_waits():
    with pretend_gpu() as waits:
        x = torch.ones(3, device=GPU)
        x.add_(1).sum().to(torch.float64)
        x.to("cpu", non_blocking=True)
        assert waits.count == 0
        for i, waiting in enumerate(
            (x.sum().item, x.cpu, x.tolist, lambda: x[x > 0], lambda: bool(x.any())), 1
        ):
            waiting()
            assert waits.count == i
        waits.strict = True
        with pytest.raises(AssertionError, match="makes the processor wait"):
            x.max().item()


# The maths.


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        *((recipe, {}) for recipe in [*RECIPES, "auto"]),
        *(("robust", {"gen": gen, "k": 3}) for gen in ("kmedoids", "random", "fps", "cov_max")),
        ("robust", {"gen": "kmeans", "k": 3, "agg": "mnn", "m": 4}),
        ("ls", {"gen": "kls", "k": 3}),
        ("ridge", {"gen": "kridge", "k": 3}),
        ("ridge", {"lam": "holdout"}),
        ("robust", {"engine": "exact", "k": 3}),
        ("robust", {"norm_post": "quantile", "agg": "logsumexp"}),
        ("robust", {"weibull": (0.1, 0.9), "shots": 50}),
        *(
            ("knn", {"distance": distance, "votes": votes})
            for distance, votes in (
                ("cosine", "uniform"),
                ("manhattan", "softmax"),
                ("chebyshev", "weighted_by_distance"),
                ("mahalanobis", "uniform"),
            )
        ),
        ("qi", {"norm_pre": ["power", "centre", "l2"], "norm_inf": "same"}),
    ],
)
def test_imprint_on_a_gpu_gives_the_head_of_the_cpu_and_leaves_it_there(recipe, options):
    def work(device):
        head = imprint(X.to(device), Y.to(device), recipe, **options)
        logits = head(NEW.to(device))
        assert {logits.device, head.proxies.device, head.proxy_classes.device} == {device}
        return logits.cpu()

    on_both(work)


def test_collapse_measures_and_k_means_on_a_gpu_are_those_of_the_cpu():
    def work(device):
        x, y = X.to(device), Y.to(device)
        metric = NC1(num_classes=5, embedding_dim=24).to(device)
        metric.update(x, y)
        centroids = kmeans(x, 4)
        assert centroids.device == device
        return [float(nc1(x, y)), float(vci(x, y)), float(metric.compute()), centroids.cpu()]

    on_both(work)


def test_metrics_wait_for_the_gpu_once_in_2048_samples():
    logits, labels = torch.randn(4000, 5, generator=GENERATOR), torch.arange(4000) % 5
    with pretend_gpu() as waits:
        metrics = TaskMetrics(5).to(GPU)
        batches = list(zip(logits.to(GPU).split(100), labels.to(GPU).split(100), strict=True))
        waits.count, waits.strict = 0, True
        for batch in batches[:20]:
            metrics.add(*batch, None)
        waits.strict = False
        for batch in batches[20:]:
            metrics.add(*batch, None)
        values = {name: value.cpu() for name, value in metrics.compute().items()}
    metrics = TaskMetrics(5)
    metrics.add(logits[:9], labels[:9].roll(1), None)
    metrics.reset()
    metrics.add(logits, labels, None)
    torch.testing.assert_close(values, dict(metrics.compute()))


# The backbone.


@pytest.mark.parametrize("name", ["efficientnet_lite0", "timm/resnet10t"])
@pytest.mark.parametrize("images", [IMAGES, [*IMAGES[:3], *IMAGES[3:, :1, :20]]])
def test_uint8_images_become_embeddings_on_the_gpu_without_waiting(name, images):
    backbone = load_backbone(name, image_size=32, pretrained=False)
    with torch.no_grad():
        on_cpu = backbone(images)
        with pretend_gpu() as waits:
            backbone.to(GPU)
            moved = images.to(GPU) if images is IMAGES else [image.to(GPU) for image in images]
            waits.strict = True
            embeddings = backbone(moved)
            waits.strict = False
            torch.testing.assert_close(embeddings.cpu(), on_cpu, rtol=1e-5, atol=1e-5)


def test_the_embedding_cache_is_filled_on_a_gpu_with_the_embeddings_of_the_cpu(tmp_path):
    def work(device):
        backbone = load_backbone("efficientnet_lite0", image_size=32)
        cached = embed(backbone, Digits(classes=[0, 1]), tmp_path / device.type, device=device)
        return next(iter(cached.train_dataloader()))[0]

    on_both(work)


# Lightning.


class Points(LightningDataModule):
    """9,000 embeddings in batches of 50: more than wait on a GPU."""

    def train_dataloader(self):
        y = torch.arange(9000) % 5
        generator = torch.Generator().manual_seed(0)
        x = CENTRES[y] + torch.randn(9000, 24, generator=generator)
        return DataLoader(TensorDataset(x, y), 50)


class NoWaiting(Callback):
    """Strict from the first batch of the epoch, but for every 164th, when 8,192 rows wait."""

    def __init__(self, waits):
        self.waits = waits

    def on_train_batch_start(self, trainer, module, batch, index):
        # The head is made in the last step.
        self.waits.strict = not trainer.is_last_batch and (self.waits.strict or index % 164 == 0)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.waits.strict = self.waits.strict and index % 164 != 162


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": "qi"},
        {"recipe": "ridge"},
        {"recipe": "robust", "k": 2},
        {"recipe": "robust", "k": 2, "max_per_class": 60},
    ],
)
def test_an_imprint_epoch_waits_for_the_gpu_once_in_8192_samples(options, tmp_path):
    with pretend_gpu() as waits:
        model = ImprintedClassifier(torch.nn.Identity(), **options)
        trainer = make_trainer(tmp_path, GPU, callbacks=[NoWaiting(waits)])
        trainer.fit(model, Points())
        found = numbers(trainer), model.head(NEW)
    model = ImprintedClassifier(torch.nn.Identity(), **options)
    trainer = make_trainer(tmp_path, "cpu")
    trainer.fit(model, Points())
    torch.testing.assert_close(found, (numbers(trainer), model.head(NEW)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["qi", "robust", "kernel"])
def test_a_fit_from_images_on_a_gpu_measures_what_the_cpu_measures(recipe, tmp_path):
    def work(device):
        model = ImprintedClassifier("efficientnet_lite0", recipe, image_size=32)
        trainer = make_trainer(tmp_path, device)
        trainer.fit(model, Digits(classes=[0, 1, 2]))
        return numbers(trainer)

    assert on_both(work)["val/accuracy"] > 0.95


@pytest.mark.slow
def test_a_classifier_on_a_gpu_grows_explains_predicts_and_is_exported(tmp_path):
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8, generator=GENERATOR)

    def work(device):
        model = ImprintedClassifier(
            "efficientnet_lite0", "robust", k=2, image_size=32, accept=0.9,
            keep="embeddings", keep_sources=True,
        )  # fmt: skip
        data = Digits(classes=[0, 1, 2])
        make_trainer(tmp_path, device).fit(model, data)
        predicted = make_trainer(tmp_path, device).predict(model, data)
        model.to(device).eval()
        logits = [torch.cat(predicted), model(images.to(device)).cpu(), model(images).cpu()]
        model.add_class("new", images.to(device))
        model.add_examples("new", list(images))
        model.remove_class("0")
        logits.append(model(images.to(device)).cpu())
        explained = explain(model.head, model.embed(images.to(device)), model.state)
        export(model.backbone, model.head, tmp_path / "head", "safetensors")
        return logits, [explanation.share for explanation in explained]

    on_both(work)


@pytest.mark.slow
def test_gallery_and_outsiders_work_on_a_gpu(tmp_path):
    def work(device):
        model = ImprintedClassifier("efficientnet_lite0", "robust", k=2, image_size=32, accept=0.9)
        gallery, outsiders = ImprintGallery(), Outsiders(Digits(classes=[7, 8]))
        data = Digits(classes=[0, 1, 2])
        make_trainer(tmp_path, device, callbacks=[gallery]).fit(model, data)
        trainer = make_trainer(tmp_path, device, callbacks=[outsiders])
        trainer.test(model, data, verbose=False)
        return numbers(trainer), [float(row["nearer"]) for row in gallery.rows if "nearer" in row]

    assert "test/outsiders_auroc" in on_both(work)[0]


def test_attach_detach_and_extend_work_on_a_gpu():
    x, y = digits()

    def work(device):
        torch.manual_seed(0)
        net = Plain().to(device).eval()
        attach(net, "net.2", data=(x, y), recipe="robust", k=3)
        logits = [net(x[:9].to(device)).cpu()]
        detach(net, "net.2")
        extend(net, "net.2", {"new": x[400:420]}, old_data=(x[:200], y[:200]))
        logits.append(net(x[:9].to(device)).cpu())
        alone = Plain().to(device).eval()
        extend(alone, "net.2", {"new": x[420:440].to(device)})
        return [*logits, alone(x[:9].to(device)).cpu()]

    on_both(work)


@pytest.mark.parametrize("when", ["fit_start", "validation", "train_end"])
@pytest.mark.slow
def test_the_callback_works_on_a_gpu(when, tmp_path):
    def work(device):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, device, callbacks=[ImprintCallback("net.2", when=when)])
        trainer.fit(Plain(), **Plain.data())
        return numbers(trainer)

    on_both(work)
