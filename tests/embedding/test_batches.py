"""The one pass over a loader that all others go through."""

import pytest
import torch

from imprint_pl import ImprintError
from imprint_pl.embedding.batches import embed_loader, run_batches, unlabelled

WEIGHTS = torch.eye(2, requires_grad=True)
BATCHES = [
    (torch.ones(2, 2), torch.tensor([0, 1])),
    {"image": torch.zeros(1, 2), "label": torch.tensor([2])},
]


def test_a_pass_makes_no_gradients_and_leaves_those_of_its_caller_alone():
    for embeddings, _ in run_batches(lambda x: x @ WEIGHTS, BATCHES):
        assert not embeddings.requires_grad
        assert torch.is_grad_enabled()


def test_a_pass_reads_a_batch_when_it_is_asked_for_and_not_before():
    read = []

    def loader():
        for batch in BATCHES:
            read.append(batch)
            yield batch

    passed = run_batches(lambda x: x, loader())
    assert not read
    next(passed)
    assert len(read) == 1


def test_a_loader_becomes_its_embeddings_and_labels_in_order():
    x, y = embed_loader(lambda x: 2 * x, BATCHES)
    assert x.tolist() == [[2, 2], [2, 2], [0, 0]]
    assert y.tolist() == [0, 1, 2]
    with pytest.raises(ImprintError, match="no image was given"):
        embed_loader(lambda x: x, [])


def test_a_batch_goes_through_the_hooks_before_it_is_taken_apart():
    def transfer(batch):
        return [batch, torch.zeros(len(batch), dtype=torch.int64)]

    x, y = embed_loader(lambda x: x, [torch.ones(3, 2)], transfer=transfer)
    assert (len(x), y.tolist()) == (3, [0, 0, 0])


def test_images_without_labels_leave_out_the_black_ones_of_files_that_were_skipped():
    images = [torch.full((1, 2, 2), float(i)) for i in range(3)]
    found, labels = unlabelled({"images": images, "skipped": {1: "damaged"}})
    assert [image.max().item() for image in found] == [0, 2]
    assert labels.tolist() == [0, 0]
    assert len(unlabelled(images)[0]) == 3
