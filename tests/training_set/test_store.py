import pytest
import torch

from imprint_pl import ImprintError
from imprint_pl.data.batch import images_of, split_batch
from imprint_pl.lightning.metrics import TaskMetrics
from imprint_pl.training_set.store import RowStore

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


def test_batches_come_back_in_order_and_the_store_is_empty_after():
    store = RowStore()
    store.add(X[:4], Y[:4])
    store.add(X[4:].half(), Y[4:].int())
    x, y = store.gather()
    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert len(store.gather()[1]) == 0


def test_of_a_part_of_something_larger_the_part_alone_is_kept():
    tokens = torch.randn(4, 197, 8)
    store = RowStore()
    store.add(tokens[:, 0], Y[:4])
    (kept,) = store._embeddings
    assert kept.untyped_storage().nbytes() == 4 * 8 * 4


def test_a_loader_may_fill_the_same_tensors_anew():
    x, y, store, metrics = torch.empty(3, 2), Y[:3].clone(), RowStore(), TaskMetrics(6)
    for start in (0, 3):
        x.copy_(X[start : start + 3])
        y.copy_(Y[start : start + 3])
        store.add(x, y)
        metrics.add(torch.eye(6)[y], y, None)
    for got, expected in zip(store.gather(), (X, Y), strict=True):
        assert torch.equal(got, expected)
    assert metrics.compute()["accuracy"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_batch_and_sample(value):
    store = RowStore()
    store.add(X, Y)
    bad = X.clone()
    bad[3, 1] = value
    with pytest.raises(ImprintError, match="batch 1: 1 of 6 embeddings .* sample 3"):
        store.add(bad, Y)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, "more"),
        {"image": X, "label": Y},
        {"pixel_values": X, "labels": Y, "id": 3},
        {"x": X, "target": Y},
    ],
)
def test_the_usual_batches_are_split(batch):
    images, labels = split_batch(batch)
    assert torch.equal(images, X)
    assert torch.equal(labels, Y)


def test_two_single_images_are_not_taken_for_images_and_labels():
    pair = [torch.zeros(3, 4, 4), torch.zeros(3, 5, 4)]
    assert images_of(pair) is pair
    assert images_of((pair, torch.tensor([0, 1]))) is pair
    assert images_of(pair[:1]) == pair[:1]


def test_a_batch_without_labels_may_be_wrapped_as_tensor_dataset_does():
    for x in (X, torch.zeros(2, 3, 4, 4)):
        assert images_of([x]) is x
        assert images_of((x,)) is x
        with pytest.raises(ImprintError, match="has no labels"):
            split_batch([x])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (X, "a batch of Tensor has no labels"),
        ({"photo": X}, r"keys \['photo'\] has no images: give one of image, images"),
        ({"image": X}, "has no labels"),
        ((X, Y.float()), "torch.float32 for 6 images"),
        ((X, Y[:2]), r"labels of shape \(2,\)"),
        ((X, torch.zeros(6, 10, dtype=torch.int64)), r"labels of shape \(6, 10\)"),
    ],
)
def test_a_batch_of_another_shape_is_refused_with_a_cure(batch, message):
    with pytest.raises(ImprintError, match=message):
        split_batch(batch)
