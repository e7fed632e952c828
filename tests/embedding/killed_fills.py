"""Fills embedding caches in processes that are killed or compete; run by test_cached.py.

Prints a JSON line with what was seen. Processes are forked, since importing takes seconds, and
nothing is computed before.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from imprint_pl.data import Digits
from imprint_pl.embedding import cached as embedding
from imprint_pl.embedding.backbone import load_backbone

KILLS = 10


class Slow(torch.nn.Module):
    """A fixed linear map that takes its time and tells when it starts."""

    def __init__(self, started):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(64, 5, generator=generator))
        self.started = started

    def forward(self, images):
        if self.started is not None:
            os.write(self.started, b".")
            self.started = None
        time.sleep(0.01)
        return images.flatten(1) @ self.weight


def fill(cache_dir, started=None):
    embedding.PART_ROWS = 1  # a part a batch
    preprocess = {"size": 8, "mean": [0.5], "std": [0.5]}
    backbone = load_backbone(Slow(started), preprocess=preprocess)
    return embedding.embed(backbone, Digits(batch_size=16), cache_dir, name="slow")


def forked(cache_dir):
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            fill(cache_dir, writer)
        finally:
            os._exit(0)
    os.close(writer)
    os.read(reader, 1)  # the first batch, or the end
    os.close(reader)
    return process


def whole_parts(cache_dir):
    return sum(1 for _ in Path(cache_dir).glob("*/part-*"))


def main(folder):
    moments = random.Random(int(sys.argv[2]))
    killed, after_kills = folder / "killed", []
    for _ in range(KILLS):
        process = forked(killed)
        time.sleep(moments.uniform(0, 0.15))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        after_kills.append(whole_parts(killed))
    together = [forked(folder / "together") for _ in range(2)]
    for process in together:
        os.waitpid(process, 0)
    rerun, both, alone = (fill(folder / name) for name in ("killed", "together", "alone"))
    embeddings = [torch.cat([e.arrays("train")[0], e.arrays("test")[0]]) for e in (rerun, both)]
    expected = torch.cat([alone.arrays("train")[0], alone.arrays("test")[0]])
    seen = {
        "after_kills": after_kills,
        "rerun_embedded": rerun.use.embedded,
        "together_embedded": both.use.embedded,
        "alone_embedded": alone.use.embedded,
        "equal": [torch.equal(found, expected) for found in embeddings],
        "parts": [whole_parts(folder / name) for name in ("killed", "together", "alone")],
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
