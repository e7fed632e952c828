"""The data modules of images in memory: their splits, batches, loaders and errors."""

import ast
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from places import SHARED
from sklearn.datasets import load_digits
from torch.utils.data import DistributedSampler
from trainers import quiet_trainer

import imprint_pl.data
from imprint_pl.data import MNIST, ArrayDataset, Digits, FashionMNIST, ImageDataModule, Splits
from imprint_pl.errors import ImprintError

DATA = SHARED / "data"
needs_fashion_mnist = pytest.mark.skipif(
    not (DATA / "FashionMNIST" / "raw" / "train-images-idx3-ubyte").is_file(),
    reason="Fashion-MNIST is not in ../shared/data",
)


class Counting(ImageDataModule):
    """Image i is filled with i; class i % 3."""

    name = "counting"

    def load(self):
        def split(first, last):
            numbers = torch.arange(first, last)
            images = numbers.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
            return ArrayDataset(images, numbers % 3)

        return Splits(["zero", "one", "two"], split(0, 30), split(30, 42))


def gather(loader):
    batches = list(loader)
    return torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])


def test_digits_are_scikit_learn_s_scaled_to_bytes_and_parted_at_1437():
    module = Digits(batch_size=100)
    module.setup()
    images, labels = gather(module.train_dataloader())
    test_images, test_labels = gather(module.test_dataloader())
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (1437, 1, 8, 8))
    assert (labels.dtype, tuple(test_images.shape)) == (torch.int64, (360, 1, 8, 8))
    digits = load_digits()
    everything = torch.cat([images, test_images]).squeeze(1).numpy()
    assert np.array_equal(everything, np.rint(digits.images * 255 / 16).astype(np.uint8))
    assert torch.cat([labels, test_labels]).tolist() == digits.target.tolist()
    assert module.class_names == [str(digit) for digit in range(10)]
    assert (module.num_classes, module.task) == (10, "digits")


def test_train_comes_whole_and_in_order_every_time():
    module = Counting(batch_size=7)
    for _ in range(2):
        images, labels = gather(module.train_dataloader())
        assert images[:, 0, 0, 0].tolist() == list(range(30))
        assert labels.tolist() == [number % 3 for number in range(30)]
    sizes = [len(labels) for _, labels in module.train_dataloader()]
    assert sizes == [7, 7, 7, 7, 2]


def test_validation_and_prediction_are_the_test_split():
    module = Counting()
    for loader in (module.val_dataloader(), module.test_dataloader(), module.predict_dataloader()):
        images, labels = gather(loader)
        assert images[:, 0, 0, 0].tolist() == list(range(30, 42))
        assert labels.tolist() == [number % 3 for number in range(30, 42)]


def test_chosen_classes_are_relabelled_everywhere_and_keep_their_names():
    module = Counting(classes=["two", 0])
    module.setup()
    images, labels = gather(module.train_dataloader())
    expected = [number for number in range(30) if number % 3 != 1]
    assert images[:, 0, 0, 0].tolist() == expected
    assert labels.tolist() == [0 if number % 3 == 2 else 1 for number in expected]
    assert module.test_dataset.labels.tolist() == [1, 0] * 4
    assert (module.class_names, module.num_classes) == (["two", "zero"], 2)
    assert module.task == "counting (classes 2,0)"


def test_one_chosen_class_and_many_have_readable_task_names():
    one = Counting(classes=[1])
    one.setup()
    assert one.task == "counting (class 1)"


def test_shots_leave_validation_and_test_whole():
    module = Counting(shots=2, seed=3)
    module.setup()
    numbers = module.train_dataset.images[:, 0, 0, 0].tolist()
    assert numbers == sorted(numbers)
    assert sorted(number % 3 for number in numbers) == [0, 0, 1, 1, 2, 2]
    assert len(module.val_dataset) == len(module.test_dataset) == 12


def test_val_fraction_holds_out_a_part_of_train_and_leaves_test():
    module = Counting(val_fraction=0.2)
    module.setup()
    held = module.val_dataset.images[:, 0, 0, 0].tolist()
    kept = module.train_dataset.images[:, 0, 0, 0].tolist()
    assert torch.bincount(module.val_dataset.labels).tolist() == [2, 2, 2]
    assert sorted(held + kept) == list(range(30))
    assert (held, kept) == (sorted(held), sorted(kept))
    assert len(module.test_dataset) == 12


def test_the_seed_decides_the_draw():
    def drawn(seed):
        module = Counting(shots=4, seed=seed)
        module.setup()
        return module.train_dataset.images[:, 0, 0, 0].tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_no_global_generator_is_touched():
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    module = Counting(shots=4, val_fraction=0.2)
    for loader in (module.train_dataloader(), module.val_dataloader(), module.test_dataloader()):
        list(loader)
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shots": 0}, "shots=0"),
        ({"shots": 11}, r"shots=11, but class 0 \('zero'\) has 10 training images"),
        ({"val_fraction": 1.0}, r"val_fraction=1.0 is not in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"val_fraction=-0.1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"classes": ["tow"]}, "did you mean 'two'"),
        ({"classes": [3]}, "unknown class 3"),
    ],
)
def test_wrong_values_are_named(keywords, message):
    with pytest.raises(ImprintError, match=message):
        Counting(**keywords).setup()


def test_a_class_without_training_images_is_named():
    class Lacking(Counting):
        def load(self):
            splits = super().load()
            return Splits([*splits.class_names, "three"], splits.train, splits.test)

    with pytest.raises(ImprintError, match=r"class 3 \('three'\) of 'counting' has no training"):
        Lacking().setup()
    Lacking(classes=[0, 1]).setup()


def test_a_test_split_without_the_chosen_classes_is_named():
    class Lacking(Counting):
        def load(self):
            splits = super().load()
            return Splits(
                splits.class_names,
                splits.train,
                splits.test.select(torch.arange(2), torch.zeros(2, dtype=torch.int64)),
            )

    with pytest.raises(ImprintError, match=r"test split .* no image of the classes \['two'"):
        Lacking(classes=["two"]).setup()


@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_the_shares_of_several_processes_interleave_to_the_data_set_s_order(processes, split):
    shares = []
    for rank in range(processes):
        module = Counting(batch_size=3)
        module.trainer = SimpleNamespace(world_size=processes, global_rank=rank, num_devices=1)
        module.setup()
        loader = getattr(module, f"{split}_dataloader")()
        assert isinstance(loader.sampler, DistributedSampler)
        shares.append(gather(loader)[0][:, 0, 0, 0])
    dataset = getattr(module, f"{split}_dataset")
    together = torch.stack(shares).T.flatten()[: len(dataset)]
    assert torch.equal(together, dataset.images[:, 0, 0, 0])


def test_one_process_needs_no_sampler_of_its_own():
    module = Counting()
    module.trainer = SimpleNamespace(world_size=1, global_rank=0, num_devices=1)
    module.setup()
    assert not isinstance(module.train_dataloader().sampler, DistributedSampler)


def test_arrays_are_served_without_workers_and_have_no_names():
    module = Counting()
    module.setup()
    assert module.train_dataloader().num_workers == 0
    assert module.sample_names("train") is None
    with pytest.raises(ImprintError, match="unknown split 'tset'"):
        module.sample_names("tset")


def test_lightning_runs_every_loop_on_it():
    from lightning.pytorch import LightningModule

    class Looker(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.seen = {"train": [], "val": [], "test": []}

        def training_step(self, batch):
            self.seen["train"] += batch[0][:, 0, 0, 0].tolist()

        def validation_step(self, batch):
            self.seen["val"] += batch[0][:, 0, 0, 0].tolist()

        def test_step(self, batch):
            self.seen["test"] += batch[0][:, 0, 0, 0].tolist()

        def predict_step(self, batch):
            return batch[0][:, 0, 0, 0]

        def configure_optimizers(self):
            return None

    trainer = quiet_trainer(num_sanity_val_steps=0)
    looker, module = Looker(), Counting(batch_size=8)
    trainer.fit(looker, module)
    trainer.test(looker, module, verbose=False)
    predictions = torch.cat(trainer.predict(looker, module))
    assert looker.seen["train"] == list(range(30))
    assert looker.seen["val"] == looker.seen["test"] == predictions.tolist() == list(range(30, 42))


def test_the_command_line_gives_every_keyword():
    parser = ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    arguments = ["--data=imprint_pl.data.Digits", "--data.batch_size=256", "--data.shots=3"]
    config = parser.parse_args([*arguments, "--data.classes=[3, 1]"])
    module = parser.instantiate(config).data
    module.setup()
    assert (module.batch_size, module.class_names) == (256, ["3", "1"])
    assert module.train_dataset.labels.bincount().tolist() == [3, 3]
    named = parser.parse_args([*arguments, "--data.classes=[three, 1]"])
    assert named.data.init_args.classes == ["three", 1]


def test_no_module_imports_a_data_set_library_before_it_is_needed():
    for file in Path(imprint_pl.data.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in getattr(node, "names", [])]
            names.append(getattr(node, "module", None) or "")
            assert not any(name.startswith(("torchvision", "sklearn")) for name in names), file


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root, name="MNIST"):
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 20), ("t10k", 10)):
        arrays[split] = generator.integers(0, 256, (count, 28, 28))
        write_idx(folder / f"{split}-images-idx3-ubyte", arrays[split])
        write_idx(folder / f"{split}-labels-idx1-ubyte", np.arange(count) % 10)
    return arrays


def test_mnist_files_on_disk_are_used_as_they_are(tmp_path, monkeypatch):
    arrays = write_mnist(tmp_path)
    monkeypatch.setattr("imprint_pl.data.arrays.fetch", lambda *_: pytest.fail("no need"))
    module = MNIST(root=str(tmp_path))
    module.setup()
    assert np.array_equal(module.train_dataset.images.squeeze(1), arrays["train"])
    assert np.array_equal(module.test_dataset.images.squeeze(1), arrays["t10k"])
    assert module.train_dataset.images.dtype == torch.uint8
    assert module.test_dataset.labels.tolist() == list(range(10))
    assert module.class_names[3] == "3 - three"


def test_missing_files_are_named_with_their_folder_when_downloading_is_off(tmp_path):
    write_mnist(tmp_path, "FashionMNIST")
    raw = tmp_path / "FashionMNIST" / "raw"
    (raw / "t10k-labels-idx1-ubyte").unlink()
    module = FashionMNIST(root=str(tmp_path), download=False)
    with pytest.raises(ImprintError) as caught:
        module.setup()
    assert str(caught.value).startswith(f"t10k-labels-idx1-ubyte missing in {raw} ")
    assert "download=True" in str(caught.value)


def test_a_failed_download_says_why_and_which_files_go_where(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise RuntimeError("Error downloading\n  nothing resolves")

    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    with pytest.raises(ImprintError, match="the download failed: Error downloading nothing"):
        MNIST(root=str(tmp_path)).prepare_data()
    with pytest.raises(ImprintError, match="train-images-idx3-ubyte, train-labels-idx1-ubyte, "):
        MNIST(root=str(tmp_path)).setup()


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
def test_a_file_cut_short_is_an_error_that_names_the_folder(tmp_path, file):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ImprintError, match=r"files of MNIST in .*raw .*damaged or cut short"):
        MNIST(root=str(tmp_path)).setup()


@needs_fashion_mnist
def test_fashion_mnist_passes_in_well_under_a_second():
    module = FashionMNIST(root=str(DATA), download=False)
    module.setup()
    assert module.class_names[0] == "T-shirt/top"
    assert tuple(module.train_dataset.images.shape) == (60000, 1, 28, 28)
    assert torch.bincount(module.train_dataset.labels).tolist() == [6000] * 10
    assert torch.bincount(module.test_dataset.labels).tolist() == [1000] * 10
    assert module.task == "fashion_mnist"
    passes = []
    for _ in range(3):
        start = time.perf_counter()
        count = sum(len(labels) for _, labels in module.train_dataloader())
        passes.append(time.perf_counter() - start)
        assert count == 60000
    assert min(passes) < 0.5


@needs_fashion_mnist
def test_fashion_mnist_by_name_with_shots_and_validation():
    module = FashionMNIST(
        root=str(DATA), classes=["Bag", "Sneaker"], shots=10, val_fraction=0.1, seed=1
    )
    module.setup()
    assert module.task == "fashion_mnist (classes 8,7)"
    assert torch.bincount(module.train_dataset.labels).tolist() == [10, 10]
    assert torch.bincount(module.val_dataset.labels).tolist() == [600, 600]
    assert torch.bincount(module.test_dataset.labels).tolist() == [1000, 1000]
