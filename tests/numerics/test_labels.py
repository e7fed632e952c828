"""Labels and class names by value, not by spelling: `labels.py`, and the estimator and states on
it.
"""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from imprint_pl import ImprintedClassifier, ImprintError, ImprintEstimator, extend, imprint
from imprint_pl.cli.wandb_results import WandbResults
from imprint_pl.data.batch import split_batch
from imprint_pl.data.tasks import resolve_classes, resolve_task
from imprint_pl.errors import did_you_mean
from imprint_pl.numerics.labels import names_of, plain_labels, with_label
from imprint_pl.training_set.kept import State

X, Y = load_iris(return_X_y=True)
WORDS = np.array(["a", "b", "c"])
NFC, NFD = "caf\u00e9", "cafe\u0301"


class Points(LightningDataModule):
    """Embeddings `(n, d)` with labels, for training and validation."""

    def __init__(self, x, y, names):
        super().__init__()
        self.data, self.class_names = TensorDataset(x, y), names

    def train_dataloader(self):
        return DataLoader(self.data, batch_size=4)

    val_dataloader = test_dataloader = train_dataloader


def fitted(labels):
    return ImprintEstimator("lda", keep="embeddings").fit(X, labels)


# Labels, what they are, a new one, and one that is there, spelt otherwise, with its place.
KINDS = {
    "Int64": (pd.Series(Y, dtype="Int64"), [0, 1, 2], -1, 1.0, 1),
    "UInt8": (pd.Series(Y, dtype="UInt8"), [0, 1, 2], 300, np.int64(1), 1),
    "Float64": (pd.Series(Y, dtype="Float64"), [0, 1, 2], -1, 1, 1),
    "category": (pd.Series(Y, dtype="category"), [0, 1, 2], 7, np.int8(1), 1),
    "objects": (Y.astype(object), [0, 1, 2], 7.0, True, 1),
    "int8": (Y.astype("int8"), [0, 1, 2], 300, 2, 2),
    "uint64": (Y.astype("uint64"), [0, 1, 2], 7, torch.tensor(1), 1),
    "floats": (Y.astype(float), [0, 1, 2], 3, np.float32(1), 1),
    "texts": (WORDS[Y], ["a", "b", "c"], "a long name", np.str_("b"), 1),
    "string": (pd.Series(WORDS[Y], dtype="string"), ["a", "b", "c"], "a long name", "b", 1),
    "digits": (np.array(["0", "1", "01"])[Y], ["0", "01", "1"], "1.0", "1", 2),
    "accents": (np.array(["a", NFC, "c"])[Y], ["a", "c", NFC], "d", NFD, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_that_came_and_went_leaves_labels_of_any_kind_as_they_were(kind):
    labels, known, new, same, place = KINDS[kind]
    model = fitted(labels)
    before = model.score(X, labels)
    assert before > 0.95
    assert model.classes_.tolist() == known
    with pytest.raises(ImprintError, match="is there already"):
        model.add_class(same, X[:20])
    model.add_class(new, X[:50] + 30)
    assert len(model.classes_) == model.head_.num_classes == 4
    assert (model.predict(X[:50] + 30) == new).all()
    model.remove_class(new)
    assert model.classes_.tolist() == known
    assert model.score(X, labels) == before
    model.add_examples(same, X[:1]).remove_class(same)
    assert model.classes_.tolist() == known[:place] + known[place + 1 :]
    assert model.head_.num_classes == 2


@pytest.mark.parametrize("dtype", ["boolean", bool, object])
def test_truth_values_stay_truth_values(dtype):
    labels = pd.Series(Y == 0, dtype=dtype)
    model = fitted(labels)
    assert model.classes_.tolist() == [False, True]
    assert model.classes_.dtype == bool
    assert model.score(X, labels) == 1
    assert model.remove_class(np.bool_(True)).classes_.tolist() == [False]


@pytest.mark.parametrize(
    ("labels", "label"),
    [
        *((Y, "1"), (Y, b"1"), (Y, 1.5), (Y, float("inf")), (Y, [1])),
        *((WORDS[Y], 1), (np.array(["0", "1", "2"])[Y], 1), (Y == 0, 2), (Y == 0, "True")),
    ],
)
def test_a_label_of_another_type_is_none_that_looks_like_it(labels, label):
    model = fitted(labels)
    known = model.classes_.tolist()
    steps = (model.add_class, model.add_examples, model.remove_class)
    for step, more in zip(steps, ((X[:9],), (X[:9],), ()), strict=True):
        with pytest.raises(ImprintError, match="is of another type than those known so far"):
            step(label, *more)
    assert model.classes_.tolist() == known


@pytest.mark.parametrize("label", [None, float("nan"), np.nan, pd.NA, pd.NaT, np.datetime64("NaT")])
def test_a_missing_label_is_called_that(label):
    with pytest.raises(ImprintError, match="is missing: give one such as 0"):
        fitted(Y).add_class(label, X[:9])
    for labels in ([label, *WORDS[Y][1:].tolist()], [label, *Y.tolist()[1:]]):
        with pytest.raises(ValueError, match="label of sample 0 is missing|Input y contains NaN"):
            fitted(labels)
        with pytest.raises(ValueError, match="label of sample 0 is missing|Input y contains NaN"):
            fitted(pd.Series(labels))


@pytest.mark.parametrize("shape", [list, lambda y: np.array(y, dtype=object), pd.Series])
def test_texts_beside_numbers_do_not_become_one_label(shape):
    labels = shape([["1", 1, "2"][label] for label in Y])
    message = "label '1' of sample 0 is a text, 1 of sample 50 is not"
    with pytest.raises(ImprintError, match=message):
        fitted(labels)
    with pytest.raises(ImprintError, match=message):
        ImprintEstimator("qi").partial_fit(X, labels)


def test_whole_numbers_beyond_those_of_floats_stay_apart():
    labels = pd.Series(Y + 2**53, dtype="Int64")
    assert (fitted(labels).classes_ - 2**53).tolist() == [0, 1, 2]


def test_batches_of_other_types_have_the_same_labels():
    model = ImprintEstimator("lda").partial_fit(X, Y)
    for labels in (pd.Series(Y, dtype="Int64"), Y.astype(float), Y.astype(object), Y.tolist()):
        model.partial_fit(X, labels)
        assert model.classes_.tolist() == [0, 1, 2]
        assert model.classes_.dtype.kind == "i"
    assert model.partial_fit(X, pd.Series(Y + 1, dtype="Float64")).classes_.tolist() == [0, 1, 2, 3]
    closed = pd.array([0, 1, 2], dtype="Int64")
    assert ImprintEstimator("qi").partial_fit(X, Y, classes=closed).score(X, Y) > 0.9
    words = pd.Categorical(["a", "b", "c"])
    assert ImprintEstimator("qi").partial_fit(X, WORDS[Y], classes=words).score(X, WORDS[Y]) > 0.9


def test_labels_composed_in_two_ways_are_named():
    message = r"'caf\\xe9'.*one name, composed in two ways"
    with pytest.raises(ImprintError, match=message):
        fitted(np.array([NFC, NFD, "c"])[Y])
    model = ImprintEstimator("qi").partial_fit(X, np.array([NFC, "b", "c"])[Y])
    with pytest.raises(ImprintError, match=message):
        model.partial_fit(X, np.array([NFD, "b", "c"])[Y])
    assert len(model.classes_) == 3


def test_plain_labels_keeps_what_numpy_knows_and_what_is_none_of_its_business():
    for labels in (Y, WORDS[Y], [0.5, 1.5], [[1, 2], [3]], None, "cat", [(1, 2), (3, 4)]):
        kept = plain_labels(labels)
        assert kept is labels or np.array_equal(kept, labels)
    assert plain_labels(Y.astype(object)[:, None]).shape == (150, 1)
    assert plain_labels([True, 2]).tolist() == [1, 2]


def test_a_label_that_the_type_does_not_hold_makes_it_wider():
    assert with_label(np.array([0, 2], "int8"), 1).dtype == np.int8
    assert with_label(np.array([0, 2], "int8"), 300).tolist() == [0, 2, 300]
    assert with_label(np.array(["a", "c"]), "bbb").tolist() == ["a", "bbb", "c"]


def test_imprint_takes_whole_numbers_of_pandas():
    x = torch.tensor(X).float()
    expected = imprint(x, torch.tensor(Y), "lda").scores(x)
    for labels in (pd.Series(Y, dtype="Int64"), pd.Series(Y, dtype="category"), Y.astype(object)):
        assert torch.equal(imprint(x, labels, "lda").scores(x), expected)


def state(names, keep="embeddings"):
    x, y = torch.tensor(X).float(), torch.tensor(Y)
    return State.of(x, y, imprint(x, y, "qi", class_names=names), keep)


def test_a_class_of_a_state_is_found_in_either_composition_of_its_name():
    first = state(["a", NFC, "c"])
    with pytest.raises(ImprintError, match="is there already"):
        first.add_class(NFD, first.x[:5])
    assert first.add_examples(NFD, first.x[:5]).counts.tolist() == [50, 55, 50]
    assert first.remove_class(NFD).class_names == ["a", "c"]
    with pytest.raises(ImprintError, match="there is no class 'C'; did you mean 'c'"):
        first.remove_class("C")


@pytest.mark.parametrize("keep", ["embeddings", "moments"])
def test_classes_of_one_name_are_not_merged_when_another_comes(keep):
    first = state(["crane", "crane", "c"], keep)
    grown = first.add_class("new", torch.tensor(X[:7]).float())
    assert grown.counts.tolist() == [50, 50, 50, 7]
    assert grown.remove_class("c").counts.tolist() == [50, 50, 7]
    with pytest.raises(ImprintError, match="2 classes are called 'crane'"):
        grown.remove_class("crane")


@pytest.mark.parametrize("name", [3, None, "", " ", b"fox"])
def test_a_name_of_a_class_is_a_text(name):
    model = ImprintedClassifier(torch.nn.Identity(), "qi")
    model.state = state(["a", "b", "c"])
    with pytest.raises(ImprintError, match="class name .* give a text"):
        model.add_class(name, torch.tensor(X[:5]).float())
    assert model.state.class_names == ["a", "b", "c"]


def test_a_class_that_differs_in_case_or_spaces_alone_is_named():
    model = ImprintedClassifier(torch.nn.Identity(), "qi")
    model.state = state(["cat", "dog", "ice bear"])
    for name, other in (("Cat", "cat"), ("ice  bear", "ice bear")):
        with pytest.warns(UserWarning, match=f"'{other}' and '{name}' differ in case or spaces"):
            model.add_class(name, torch.tensor(X[:5]).float())
        model.remove_class(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_class("cat 2", torch.tensor(X[:5]).float())


def test_near_names_are_found_in_any_case():
    assert did_you_mean("CAT", ["dog", "cat"]) == "; did you mean 'cat'?"


def test_chosen_classes_come_in_any_composition_and_as_arrays():
    names = ["a", NFC, "c"]
    assert resolve_classes([NFD], names) == [1]
    assert resolve_task(np.array(["c", "a"]), names) == [[2], [0]]
    assert resolve_task(torch.tensor([2, 0]), names) == [[2], [0]]
    assert resolve_task(pd.Series([2, 0]), names) == [[2], [0]]
    with pytest.raises(ImprintError, match="have no order"):
        resolve_task({"a", "c"}, names)
    with pytest.raises(ImprintError, match=r"give a list, as in classes=\['a'\]"):
        resolve_task("a", names)


def test_extend_refuses_a_class_that_is_there_and_one_name_in_two_compositions():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    x = torch.eye(2)
    with pytest.raises(ImprintError, match="one name, composed in two ways"):
        extend(net, "0", {NFC: x, NFD: x})
    old = Points(x, torch.arange(2), ["cat", NFC])
    with pytest.raises(ImprintError, match="is one of old_data's: give a new one another name"):
        extend(net, "0", {NFD: x + 3}, old_data=old)
    assert extend(net, "0", {"fox": x + 3}, old_data=old)(x).shape == (2, 3)


def test_the_confusion_matrix_has_the_heads_classes_in_its_order():
    x, y = torch.tensor(X).float(), torch.tensor(Y)
    model = ImprintedClassifier(torch.nn.Identity(), "lda")
    model.head.load_state_dict(imprint(x, y, "lda", class_names=["a", "b", "c"]).state_dict())
    callback = WandbResults()
    trainer = quiet_trainer(callbacks=[callback])
    trainer.test(model, Points(x, 2 - y, ["c", "b", "a"]), verbose=False)
    own = trainer.callback_metrics["test/accuracy"]
    assert own > 0.95
    assert callback.confusion.diagonal().sum() == round(150 * own.item())


def test_labels_of_a_batch_that_are_texts_are_named():
    with pytest.raises(ImprintError, match="no numbers: give integers 0..C−1, and the names as"):
        split_batch((torch.eye(2), ["cat", "dog"]))


def test_scikit_learns_tools_take_nullable_labels():
    labels = pd.Series(Y, dtype="Int64")
    assert cross_val_score(ImprintEstimator("lda"), X, labels).mean() > 0.9
    grid = GridSearchCV(ImprintEstimator("qi"), {"recipe": ["qi", "lda"]}).fit(X, labels)
    assert grid.best_params_ == {"recipe": "lda"}
    assert grid.predict(X).dtype.kind == "i"


@pytest.mark.parametrize("names", [{1: "b", 0: "a"}, np.array(["a", "b"]), pd.Index(["a", "b"])])
def test_class_names_of_a_datamodule_may_be_an_array_or_a_table(names):
    assert names_of(Points(torch.eye(2), torch.arange(2), names)) == ["a", "b"]
    with pytest.raises(ImprintError, match="class_names has 3: names are texts"):
        names_of(Points(torch.eye(2), torch.arange(2), [3, 4]))
