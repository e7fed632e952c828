"""Fixtures that several test files use."""

import logging
import os
import sys

import pytest
import torch
from expected_skips import ExpectedSkips, asked_for
from places import ACCEPTANCE


def pytest_configure(config):
    # Graphs that tests export stay out of the user's cache; later runs find them.
    os.environ["IMPRINT_PL_GRAPHS"] = str(config.cache.mkdir("graphs"))
    if asked_for():
        config.pluginmanager.register(ExpectedSkips(), "expected-skips")


@pytest.fixture(scope="session")
def acceptance():
    """Real embeddings, for which the reference implementation's scores are known."""
    if not ACCEPTANCE.is_file():
        pytest.skip("the acceptance embeddings (../shared/acceptance) are not on this machine")
    from safetensors.torch import load_file

    file = load_file(ACCEPTANCE)
    return {name: t.float() if t.is_floating_point() else t for name, t in file.items()}


@pytest.fixture(autouse=True)
def lightning_speaks():
    """Lightning's log messages go to this test's stderr, at their usual level.

    A handler keeps the stderr of the test in which Lightning was imported, which is closed by now;
    and a command that a test runs may quieten Lightning for its process.
    """
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.stream = sys.stderr
    yield
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.NOTSET)


@pytest.fixture
def blobs():
    """40 points in 3 classes, well apart: embeddings `(40, 5)` and labels."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(40) % 3
    x = torch.randn(40, 5, generator=generator) + 6 * torch.eye(3, 5)[y]
    return x, y
