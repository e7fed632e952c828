"""Shows what each proxy stands for: its nearest training images and its number of samples.

On a d-in-1 task the gallery shows whether the proxies of a label stand for its original classes;
the purity measures this.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from imprint_pl.data.base import ImageDataModule
from imprint_pl.data.batch_hooks import transfer_of
from imprint_pl.data.lightning_packages import run_folder
from imprint_pl.drawing import height as height_of
from imprint_pl.drawing import style, wrapped
from imprint_pl.embedding.batches import embed_loader
from imprint_pl.errors import ImprintError
from imprint_pl.method.head import ImprintedHead
from imprint_pl.parts.agg.distances import Mahalanobis, distances
from imprint_pl.parts.agg.nearest import NearestProxies

# Most proxies of a class (rows), and most classes, in a picture.
PROXIES_SHOWN = 5
CLASSES_SHOWN = 20


@dataclass(frozen=True)
class Proxy:
    """A proxy and its samples, which are named by their index in the training set.

    Attributes:
        index: its row in `head.proxies`.
        label: its class.
        samples: how many training samples of the class are nearer to it than to the class's others.
        nearest: the index of each of the nearest samples, the nearest first.
        original: the most frequent original class among its samples; `None` if no classes were
            merged, or the proxy has no samples.
        share: the share of `original` among its samples; `None` likewise.
    """

    index: int
    label: int
    samples: int
    nearest: list[int]
    original: int | None = None
    share: float | None = None


@dataclass(frozen=True)
class Gallery:
    """The proxies of a head with their samples.

    Attributes:
        proxies: all proxies, class by class; within a class, the one with the most samples first.
        purity: the share of samples whose original class is the most frequent one of their proxy,
            from 0 to 1; `None` if no classes were merged.
        chance: the purity of one proxy per class, which is the share of samples in the largest
            original class of their label.
    """

    proxies: list[Proxy]
    purity: float | None = None
    chance: float | None = None


def proxy_gallery(
    head: ImprintedHead, x: Tensor, y: Tensor, original: Tensor | None = None, images: int = 8
) -> Gallery:
    """Finds the training samples that each proxy stands for.

    A sample belongs to the proxy of its own class that is nearest for AGG: the one with the largest
    inner product (plus bias) for max and logsumexp, or the smallest distance for mnn. They are
    compared after NORM_inf, as in the head; with several layers, all of them count.

    Args:
        head: filled.
        x: `(N, d)`, the training embeddings as they come from the backbone.
        y: `(N,)`, their labels.
        original: `(N,)`, their classes before any were merged.
        images: how many of the nearest samples to name.

    Raises:
        ImprintError: an empty head, or shapes that do not fit.

    >>> from imprint_pl import imprint
    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    >>> y = torch.tensor([0, 0, 0, 1])
    >>> head = imprint(x, y, "robust", k=2, calibrate=False)
    >>> gallery = proxy_gallery(head, x, y, original=torch.tensor([0, 0, 1, 2]))
    >>> [(proxy.label, proxy.samples) for proxy in gallery.proxies], gallery.purity, gallery.chance
    ([(0, 2), (0, 1), (1, 1)], 1.0, 0.75)
    """
    if head.is_empty:
        raise ImprintError("a gallery of an empty head: imprint it first")
    for name, value in (("y", y), ("original", original)):
        if value is not None and value.shape != x.shape[:1]:
            raise ImprintError(
                f"{name} of shape {tuple(value.shape)} for {len(x)} embeddings: give one a row"
            )
    y, kept = y.cpu(), head.proxy_classes.cpu()
    if original is not None:
        original = original.cpu() if _merges(y, original.cpu()) else None
    proxies, right, largest = [], 0, 0
    for label in range(head.num_classes):
        own = (kept == label).nonzero().flatten()
        places = (y == label).nonzero().flatten()
        if not len(own):
            continue
        found = []
        scores = _scores(head, x[places], own) if len(places) else torch.zeros(0, len(own))
        chosen = scores.argmax(1) if len(places) else torch.zeros(0, dtype=torch.int64)
        for column, index in enumerate(own.tolist()):
            mine = (chosen == column).nonzero().flatten()
            order = scores[mine, column].argsort(descending=True, stable=True)
            nearest = places[mine[order[:images]]].tolist()
            most = share = None
            if original is not None and len(mine):
                counts = torch.bincount(original[places[mine]])
                most = int(counts.argmax())
                right += int(counts[most])
                share = float(counts[most]) / len(mine)
            found.append(Proxy(index, label, len(mine), nearest, most, share))
        if original is not None and len(places):
            largest += int(torch.bincount(original[places]).max())
        proxies += sorted(found, key=lambda proxy: -proxy.samples)
    if original is None:
        return Gallery(proxies)
    return Gallery(proxies, right / len(y), largest / len(y))


def _merges(y: Tensor, original: Tensor) -> bool:
    return len(torch.unique(torch.stack([y, original.to(y)]), dim=1).T) > len(y.unique())


@torch.no_grad()
def _scores(head: ImprintedHead, x: Tensor, own: Tensor) -> Tensor:
    """Returns how near samples `(n, d)` are to proxies `own (p,)`, `(n, p)`; larger is nearer."""
    chunks = []
    distance = _distance(head)
    metric = Mahalanobis(head.proxies.detach()) if distance == "mahalanobis" else None
    for rows in x.split(4096):
        z = head.norm_inf(rows.to(head.proxies))
        if metric is not None:
            near = -metric(z, head.proxies)[:, own]
        elif distance is not None:
            near = -distances(z, head.proxies[own], distance)
        else:
            near = z @ head.proxies[own].T + head.bias[own]
        chunks.append(near.cpu())
    return torch.cat(chunks)


def _distance(head: ImprintedHead) -> str | None:
    return head.agg.distance if isinstance(head.agg, NearestProxies) else None


def draw_gallery(
    gallery: Gallery,
    dataset: Any,
    path: str | Path,
    class_names: list[str],
    original_names: list[str] | None = None,
    classes: int = CLASSES_SHOWN,
    proxies: int = PROXIES_SHOWN,
) -> Path:
    """Writes a PNG with a block for each class and a row for each proxy; the images in a row start
    with the nearest one.

    Args:
        gallery: the result of `proxy_gallery`.
        dataset: the training images; `dataset.__getitems__(places)` gives images and labels.
        path: the PNG.
        class_names: C names.
        original_names: names of the classes before any were merged.
        classes, proxies: most classes, and most proxies of each, to draw; those with the most
            samples are taken. The picture says how many are left out.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(proxy.label for proxy in gallery.proxies))
    blocks = [[p for p in gallery.proxies if p.label == label] for label in labels[:classes]]
    rows = [(proxy, i) for block in blocks for i, proxy in enumerate(block[:proxies])]
    columns = max((len(proxy.nearest) for proxy, _ in rows), default=1) or 1
    side, text = 0.62, 2.5
    width = text + side * columns + 0.1
    with style():
        said = _headline(gallery, classes)
        headline = "\n".join(wrapped(line, width - 0.2, 9) for line in said)
        top = 0.2 + height_of(headline, 9)
        height = top + side * len(rows) + 0.12 * len(blocks) + 0.1
        # Matplotlib allows at most 65,535 pixels in each direction.
        figure = Figure(figsize=(width, height), dpi=min(120, 60000 / height))
        figure.text(0.1 / width, 1 - 0.12 / height, headline, va="top", fontsize=9)
        lower = height - top
        for proxy, place in rows:
            lower -= side + (0.12 if place == 0 else 0)
            middle = (lower + side / 2) / height
            if place == 0:
                block = blocks[labels.index(proxy.label)]
                hidden = len(block) - proxies
                lines = 2 if hidden > 0 else 3
                name = wrapped(class_names[proxy.label], 1.2, 9, most=lines, weight="bold")
                more = f"\n{hidden} more" if hidden > 0 else ""
                figure.text(
                    0.1 / width, middle, name + more, va="center", fontsize=9, weight="bold"
                )
            what = f"{proxy.samples:,} sample{'s' * (proxy.samples != 1)}"
            if proxy.share is not None:
                most_of = f"{100 * proxy.share:.0f} % {_original_of(proxy, original_names)}"
                what += "\n" + wrapped(most_of, 1.05, 8, most=2)
            figure.text((text - 0.1) / width, middle, what, va="center", ha="right", fontsize=8)
            images = dataset.__getitems__(proxy.nearest)[0] if proxy.nearest else []
            for column, image in enumerate(images):
                left = text + side * column
                box = (left / width, lower / height, 0.94 * side / width, 0.94 * side / height)
                axes = figure.add_axes(box)
                axes.axis("off")
                axes.imshow(_pixels(image), cmap="gray", vmin=0, vmax=255)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    return path


def _headline(gallery: Gallery, classes: int) -> list[str]:
    labels = len({proxy.label for proxy in gallery.proxies})
    lines = ["The training images nearest to each proxy"]
    if labels > classes:
        lines.append(f"the first {classes} of {labels} classes; the CSV has all")
    if gallery.purity is not None and gallery.chance is not None:
        lines.append(
            f"purity {100 * gallery.purity:.1f} %; one proxy a class: {100 * gallery.chance:.1f} %"
        )
    return lines


def _original_of(proxy: Proxy, names: list[str] | None) -> str | int | None:
    """Returns the name of a proxy's most frequent original class, or its number without names."""
    return names[proxy.original] if names and proxy.original is not None else proxy.original


def _pixels(image: Tensor) -> np.ndarray:
    image = image.to(torch.uint8)
    return image[0].numpy() if image.shape[0] < 3 else image[:3].permute(1, 2, 0).numpy()


def rows_of(
    gallery: Gallery, class_names: list[str], original_names: list[str] | None = None
) -> list[dict[str, Any]]:
    """Returns a row for each proxy: `proxy, class, samples, nearest`, and, if classes were merged,
    `original, share`."""
    rows = []
    for proxy in gallery.proxies:
        row: dict[str, Any] = {
            "proxy": proxy.index,
            "class": class_names[proxy.label],
            "samples": proxy.samples,
            "nearest": " ".join(map(str, proxy.nearest)),
        }
        if gallery.purity is not None:
            share = None if proxy.share is None else round(proxy.share, 4)
            row |= {"original": _original_of(proxy, original_names), "share": share}
        rows.append(row)
    return rows


class ImprintGallery(Callback):
    """Writes `gallery.png` and `gallery.csv` into the run's folder when a fit ends.

    The training images are embedded once more, on rank 0, since the module no longer has their
    embeddings. With an embedding cache they are read from it.

    Args:
        images: a data module of `imprint_pl.data` that the pictures come from; needed if the
            Trainer's own has embeddings. Default: the Trainer's own.
        folder: the folder for the files. Default: the run's folder.

    Attributes:
        gallery: the `Gallery`, after the fit.
        path: the PNG, after the fit.
        rows: the rows of the CSV, after the fit.
    """

    def __init__(self, images: ImageDataModule | None = None, folder: str | None = None) -> None:
        self.images = images
        self.folder = folder
        self.gallery: Gallery | None = None
        self.path: Path | None = None
        self.rows: list[dict[str, Any]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._data_and_images(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        own = run_folder(trainer)
        folder = Path(self.folder) if self.folder else own
        head = cast(ImprintedHead, pl_module.head)
        tried_out = getattr(trainer, "fast_dev_run", False)
        if not trainer.is_global_zero or tried_out or head.is_empty:
            return
        data, images = self._data_and_images(trainer)
        images.setup()
        x, y = _embedded(trainer, pl_module, data)
        names = [head.name_of(label) for label in range(head.num_classes)]
        train: Any = data.train_dataset
        self.gallery = proxy_gallery(head, x, y, train.original_labels)
        originals = data.original_class_names
        self.rows = rows_of(self.gallery, names, originals)
        self.path = draw_gallery(
            self.gallery, images.train_dataset, folder / "gallery.png", names, originals
        )
        with open(folder / "gallery.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)

    def _data_and_images(self, trainer: Trainer) -> tuple[ImageDataModule, ImageDataModule]:
        """Returns the Trainer's data, to be embedded, and the data that the pictures come from."""
        data = getattr(trainer, "datamodule", None)
        images = self.images or data
        for one in (data, images):
            if not isinstance(one, ImageDataModule):
                raise ImprintError(
                    f"the gallery looks up training images by their index, which "
                    f"{type(one).__name__} does not have: give a data module of imprint_pl.data"
                )
        return cast(ImageDataModule, data), cast(ImageDataModule, images)


def _embedded(trainer: Trainer, module: Any, data: ImageDataModule) -> tuple[Tensor, Tensor]:
    """Returns the embeddings `(N, d)` and labels `(N,)` of the training set, in its order."""
    training = module.training
    module.eval()
    # Make a new loader, since under DDP the Trainer's own one gives each rank only a part.
    loader, transfer = data.loader(data.train_dataset), transfer_of(trainer, module, data)
    with trainer.precision_plugin.forward_context():
        x, y = embed_loader(module.embed, loader, transfer=transfer)
    module.train(training)
    return x, y
