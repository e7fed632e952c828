"""A small classifier of coloured squares, written as a fit writes it; tests serve it."""

import io
import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image
from places import ROOT

from imprint_pl import ImprintedClassifier, imprint
from imprint_pl.data.decode import decode_image
from imprint_pl.method.threshold import Limits, set_limits
from imprint_pl.training_set.kept import State

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230)}
SIZE = 32


def picture(colour, seed=0, kind="PNG"):
    """The bytes of an image file: a square of a colour on grey noise."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(24, 64, 2)
    pixels = generator.integers(90, 140, (height, width, 3), dtype=np.uint8)
    pixels[3:-3, 3:-3] = COLOURS[colour]
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def write_checkpoint(
    folder, classes=("red", "green"), n=12, recipe="qi", keep="embeddings", named=True, **limits
):
    """Writes `imprinted.ckpt`, its state and its training images into a folder."""
    model = ImprintedClassifier(
        "efficientnet_lite0", recipe, image_size=SIZE, keep=keep, layers="last", runtime="torch"
    ).eval()
    images, labels, paths = [], [], []
    for label, name in enumerate(classes):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(n):
            content = picture(name, 100 * label + i)
            paths.append(folder / "photos" / name / f"{i}.png")
            paths[-1].write_bytes(content)
            images.append(decode_image(content, name))
            labels.append(label)
    x, y = model.embed(images), torch.tensor(labels)
    head = imprint(x, y, recipe, class_names=list(classes))
    set_limits(head, x, y, Limits(**limits))
    model.head.take(head)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    path = folder / "imprinted.ckpt"
    torch.save(checkpoint, path)
    if keep is not None:
        sources = [str(path) for path in paths] if named else ()
        model.state = State.of(x, y, head, keep, sources=sources, limits=Limits(**limits))
        model.save_state(path)
    return path


def started(checkpoint, *options):
    """A server of its own, and the address of its page."""
    command = [sys.executable, "-m", "imprint_pl", "serve", str(checkpoint), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--runtime", "torch", *options],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    for line in process.stdout:
        if line.startswith("page: "):
            return process, line.removeprefix("page: ").strip()
    raise AssertionError(f"the server ended with {process.wait()}")
