"""Three Lightning projects as users have them, which know nothing of imprinting."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchmetrics import Accuracy, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


def digits():
    file = load_digits()
    images = torch.tensor(file.images, dtype=torch.float32)[:, None] / 16
    return images[:600], torch.tensor(file.target[:600])


def small_net(out=32):
    return nn.Sequential(
        nn.Conv2d(1, out, 3, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    )


class Plain(LightningModule):
    """Loaders are given to the Trainer; the last layer is inside a Sequential."""

    layer = "net.2"

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(small_net(), nn.Dropout(0.1), nn.Linear(128, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self(x).argmax(1) == y).float().mean(), on_epoch=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_acc", (self(x).argmax(1) == y).float().mean(), on_epoch=True)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    @staticmethod
    def data():
        x, y = digits()
        train = DataLoader(TensorDataset(x[:400], y[:400]), 64, shuffle=True, drop_last=True)
        held_out = DataLoader(TensorDataset(x[400:], y[400:]), 64)
        return {"train_dataloaders": train, "val_dataloaders": held_out}


class Elaborate(LightningModule):
    """Dict batches, a dict-returning forward, metric collections, a frozen layer, a scheduler."""

    layer = "model.classifier"

    def __init__(self, num_labels: int = 10, learning_rate: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.ModuleDict({"encoder": small_net(), "classifier": nn.Linear(128, 10)})
        self.model["encoder"][0].requires_grad_(False)
        metrics = MetricCollection(
            {"acc": MulticlassAccuracy(num_labels), "f1": MulticlassF1Score(num_labels)}
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def forward(self, pixel_values):
        hidden = self.model["encoder"](pixel_values)
        return {"hidden": hidden, "logits": self.model["classifier"](hidden)}

    def training_step(self, batch, batch_idx):
        logits = self(batch["pixel_values"])["logits"]
        return {"loss": functional.cross_entropy(logits, batch["labels"]), "logits": logits}

    def validation_step(self, batch, batch_idx):
        output = self(batch["pixel_values"])
        self.val_metrics.update(output["logits"], batch["labels"])
        return output

    def on_validation_epoch_end(self):
        self.log_dict(self.val_metrics.compute())
        self.val_metrics.reset()

    def test_step(self, batch, batch_idx):
        self.test_metrics(self(batch["pixel_values"])["logits"], batch["labels"])
        self.log_dict(self.test_metrics)

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, self.hparams.learning_rate, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @staticmethod
    def data():
        return {"datamodule": DictData()}


class DictDataset(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        # Augmentation that draws from a global generator.
        noise = 0.01 * torch.randn(self.x[i].shape)
        return {"pixel_values": self.x[i] + noise, "labels": self.y[i], "id": str(i)}


class DictData(LightningDataModule):
    class_names = "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"

    def setup(self, stage):
        x, y = digits()
        self.train, self.held_out = DictDataset(x[:400], y[:400]), DictDataset(x[400:], y[400:])

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=50, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.held_out, batch_size=50)

    test_dataloader = val_dataloader


class LitDigits(LightningModule):
    """In the style of Lightning's tutorials: the data is in the module, made in its `setup`; so is
    the model, and there is no forward."""

    layer = "model.fc"

    def __init__(self, batch_size=100):
        super().__init__()
        self.batch_size = batch_size
        self.accuracy = Accuracy(task="multiclass", num_classes=10)
        self.model = TutorialNet()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.nll_loss(functional.log_softmax(self.model(x), dim=1), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy.update(self.model(x).argmax(dim=1), y)
        self.log("val_acc", self.accuracy, prog_bar=True)

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_acc", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def setup(self, stage=None):
        x, y = digits()
        generator = torch.Generator().manual_seed(42)
        self.train_set, self.val_set = random_split(TensorDataset(x, y), [400, 200], generator)

    def train_dataloader(self):
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, batch_size=self.batch_size)

    test_dataloader = val_dataloader

    @staticmethod
    def data():
        return {}


class TutorialNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = small_net()
        self.fc = nn.Linear(128, 10)

    def forward(self, x):
        return self.fc(self.features(x))


PROJECTS = (Plain, Elaborate, LitDigits)
