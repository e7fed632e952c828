"""ImprintEstimator: imprinting as a scikit-learn classifier, on arrays, with labels of any kind.

A thin shell over `imprint`: it checks arrays as scikit-learn does, maps labels to 0..C−1 and back,
and imprints batch after batch by `partial_fit`, from the sums or rows that `training_set/` keeps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, unique_labels
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from imprint_pl.errors import ImprintError, did_you_mean
from imprint_pl.method.head import NONE, ImprintedHead
from imprint_pl.method.imprinting import imprint
from imprint_pl.method.recipes import (
    AggName,
    ClassWeightName,
    DistanceName,
    EngineName,
    GenName,
    InferenceNormNames,
    LamName,
    MetricName,
    NormNames,
    PriorName,
    ProxyNormNames,
    Recipe,
    RecipeName,
    ShrinkageName,
    VotesName,
    resolve,
)
from imprint_pl.method.threshold import Limits, set_limits
from imprint_pl.numerics.labels import check_composition, find_label, plain_labels, some, with_label
from imprint_pl.numerics.large import as_tensor, within_budget
from imprint_pl.numerics.values import check_values, checked_seed
from imprint_pl.parts.by_name import import_parts
from imprint_pl.parts.norm.base import transform
from imprint_pl.training_set.kept import State, check_keep
from imprint_pl.training_set.partial_fit import TrainingRows
from imprint_pl.training_set.sums import TrainingSums

DEFAULT_RECIPE = "auto"

AS_TENSOR: dict[str, Any] = {"dtype": np.float32, "order": "C"}
# A mapped file stays one, and is taken to float32 block by block. scikit-learn's check of its
# values would take memory of its size; `check_values` does not.
AS_IT_IS: dict[str, Any] = {
    "dtype": [np.float32, np.float16, np.float64],
    "ensure_all_finite": False,
}


class ImprintEstimator(ClassifierMixin, BaseEstimator):
    """A scikit-learn classifier on embeddings `(n, d)`, with labels of any kind.

    It works wherever scikit-learn takes a classifier: `Pipeline`, `GridSearchCV`,
    `cross_val_score`, pickles. Arithmetic is in float32; sums are in float64. Sparse input is
    not supported. Keywords that are `None` are the recipe's; one that the chosen
    parts do not use is an error, so that a grid is best a list of dicts, one a recipe.

    Args:
        recipe: "auto", which compares recipes on held-out rows, or a name in
            `imprint_pl.method.recipes.RECIPES`.
        norm_pre, gen, k, norm_post, norm_inf, agg: as for `resolve`.
        m, distance, votes, lam, shrinkage, projection_dim: as for `resolve`.
        temperature, engine, width, prior, intercept, as_published: as for
            `imprint_pl.method.recipes.resolve`; spelled out, since scikit-learn reads the
            signature.
        metric: by which "auto" compares recipes and λ is chosen, "accuracy" by default,
            "balanced_accuracy" or "macro_f1".
        class_weight: "balanced" lets all classes weigh alike, with ls, ridge, kernel, ranpac and
            auto.
        layer_widths: features of each layer, where `X` holds several layers of a model side by
            side, the last layer in the last columns; see `resolve`.
        keep: what `fit` keeps, so that classes can come and go later: "embeddings" (float32;
            suffices for every step) or "moments" (sums: see `imprint_pl.training_set.kept`).
        accept: share of training rows to accept, such as 0.95: fits a score of familiarity, see
            `familiarity` and `accepts`; not with `keep="moments"`.
        coverage: probability that a prediction set holds the truth, such as 0.95; see
            `predict_set`; not with `keep="moments"`.
        memory_budget: GiB of memory for `fit`; see `imprint`.
        progress: show bars on stderr during `fit`.
        seed: an integer that fixes every random choice; what `random_state` is elsewhere, but never
            the global generator.
        device: where to compute, such as "cuda"; the CPU by default. A pickle holds CPU tensors,
            whatever the device.
        own: keywords of parts of your own, which are instances, or import paths as in
            `gen="my_parts.Trimmed"`. A keyword that is given here is a parameter like the others.

    Attributes:
        classes_: `(C,)`, the labels, sorted: column c of the outputs is `classes_[c]`.
        head_: the `ImprintedHead`, with the recipe in `head_.settings`.
        n_features_in_: d.
        feature_names_in_: the columns' names, where `X` was a data frame.

    >>> X = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> model = ImprintEstimator("qi").fit(X, ["cat", "cat", "dog", "dog"])
    >>> model.predict([[5.0, 1.0], [1.0, 2.0]]).tolist()
    ['cat', 'dog']
    """

    _kept: TrainingRows | TrainingSums | None
    _tried: list[dict[str, Any]]
    _head: ImprintedHead | None
    _state: State | None
    _closed: bool

    def __init__(
        self,
        recipe: RecipeName = DEFAULT_RECIPE,
        *,
        norm_pre: NormNames | None = None,
        gen: GenName | None = None,
        k: int | None = None,
        norm_post: ProxyNormNames | None = None,
        norm_inf: InferenceNormNames | None = None,
        agg: AggName | None = None,
        m: int | None = None,
        distance: DistanceName | None = None,
        votes: VotesName | None = None,
        lam: float | LamName | None = None,
        shrinkage: float | ShrinkageName | None = None,
        projection_dim: int | None = None,
        temperature: float | None = None,
        engine: EngineName | None = None,
        width: float | None = None,
        prior: PriorName | None = None,
        intercept: bool | None = None,
        as_published: bool | None = None,
        metric: MetricName | None = None,
        class_weight: ClassWeightName | None = None,
        layer_widths: list[int] | None = None,
        keep: str | None = None,
        accept: float | None = None,
        coverage: float | None = None,
        memory_budget: float | None = None,
        progress: bool = False,
        seed: int = 0,
        device: str | torch.device | None = None,
        **own: Any,
    ) -> None:
        self.recipe = recipe
        self.norm_pre = norm_pre
        self.gen = gen
        self.k = k
        self.norm_post = norm_post
        self.norm_inf = norm_inf
        self.agg = agg
        self.m = m
        self.distance = distance
        self.votes = votes
        self.lam = lam
        self.shrinkage = shrinkage
        self.projection_dim = projection_dim
        self.temperature = temperature
        self.engine = engine
        self.width = width
        self.prior = prior
        self.intercept = intercept
        self.as_published = as_published
        self.metric = metric
        self.class_weight = class_weight
        self.layer_widths = layer_widths
        self.keep = keep
        self.accept = accept
        self.coverage = coverage
        self.memory_budget = memory_budget
        self.progress = progress
        self.seed = seed
        self.device = device
        if own:
            self._own = tuple(own)
            for name, value in own.items():
                setattr(self, name, value)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name, as scikit-learn has it, with the keywords of your own parts."""
        own = {name: getattr(self, name) for name in getattr(self, "_own", ())}
        return dict(super().get_params(deep)) | own

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> ImprintEstimator:
        """Imprints `X (n, d)`, labels `y (n,)`, and forgets what was fitted before.

        Args:
            sample_weight: `(n,)`, what each sample weighs, at least 0, with the recipes that take
                weights (see `imprint`); not with `keep`.

        Raises:
            ImprintError: an unknown recipe or part, or values that do not suit it (a `ValueError`).
            ValueError: shapes, NaN or types that scikit-learn refuses.
        """
        x, y = self._checked(X, y, reset=True)
        classes, codes = np.unique(y, return_inverse=True)
        _check_texts(classes)
        names = [str(label) for label in classes]
        seed, keywords = self._seed(), self._keywords()
        limits = Limits(self.accept, self.coverage)
        if self.keep is not None:
            check_keep(self.keep, bool(limits))
        labels = torch.from_numpy(codes)
        if sample_weight is not None:
            if self.keep is not None:
                raise ImprintError(
                    f"keep={self.keep!r} keeps no weights, and a grown head would be one without "
                    "them: leave sample_weight or keep out (class_weight goes with "
                    'keep="embeddings")'
                )
            if self.accept is not None or self.coverage is not None:
                raise ImprintError(
                    "accept and coverage hold samples out without their weights: leave "
                    "sample_weight out, or them (class_weight goes with both)"
                )
            keywords["sample_weight"] = torch.from_numpy(
                _check_sample_weight(sample_weight, X, dtype=np.float64, copy=True)
            )
        with within_budget(self.memory_budget, self.progress):
            self._head = imprint(
                x, labels, class_names=names, seed=seed, progress=self.progress, **keywords
            )
            set_limits(self._head, x, labels, limits)
        self._kept, self.classes_, self._state = None, classes, None
        if self.keep is not None:
            self._state = State.of(x, labels, self._head, self.keep, limits=limits)
        return self

    def add_class(self, label: Any, X: Any) -> ImprintEstimator:
        """Adds a class with its samples `X (n, d)`; `classes_` stays sorted.

        After `fit` with `keep=`; the head is that of all samples at once.

        Raises:
            ImprintError: nothing was kept, or it does not suffice (the message says what would);
                the class is there already.
        """
        kept = self._fitted_state()
        label, place = find_label(label, self.classes_)
        if place is not None:
            raise ImprintError(
                f"class {label!r} is there already: add_examples gives it more samples, or choose "
                "another label"
            )
        classes = with_label(self.classes_, label)
        place = int(np.searchsorted(classes, label))
        return self._become(kept.add_class(str(classes[place]), self._rows(X), place), classes)

    def add_examples(self, label: Any, X: Any) -> ImprintEstimator:
        """Adds samples `X (n, d)` to a class. Errors as of `add_class`."""
        kept = self._fitted_state()
        name = kept.class_names[self._place(label)]
        return self._become(kept.add_examples(name, self._rows(X)))

    def remove_class(self, label: Any, X: Any = None) -> ImprintEstimator:
        """Removes a class; `X`, all its samples, where `keep="moments"` asks for them."""
        kept = self._fitted_state()
        x = None if X is None else self._rows(X)
        place = self._place(label)
        left = kept.remove_class(kept.class_names[place], x)
        return self._become(left, np.delete(self.classes_, place))

    def _place(self, label: Any) -> int:
        label, place = find_label(label, self.classes_)
        if place is None:
            raise ImprintError(
                f"there is no class {label!r}{did_you_mean(label, map(str, self.classes_))} "
                f"({len(self.classes_)} classes: {some(self.classes_)})"
            )
        return place

    def _fitted_state(self) -> State:
        check_is_fitted(self)
        state = getattr(self, "_state", None)
        if state is None:
            raise ImprintError(
                'nothing was kept of the training set: fit with keep="embeddings" (suffices for '
                'every step) or keep="moments"; partial_fit adds batches without either'
            )
        return state

    def _rows(self, X: Any) -> Tensor:
        return as_tensor(validate_data(self, X, reset=False, **AS_TENSOR))

    def _become(self, state: State, classes: np.ndarray | None = None) -> ImprintEstimator:
        head = state.head()
        self._state, self._head = state, head.to(self.device or "cpu")
        self.classes_ = self.classes_ if classes is None else classes
        return self

    def partial_fit(
        self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None
    ) -> ImprintEstimator:
        """Adds a batch `X (n, d)`, `y (n,)`; the head is made anew at the next prediction.

        The first call reads the parameters and settles the recipe, the choice of "auto" included;
        a NORM_pre that learns is fitted on that first batch and stays, so let it be large and
        mixed. `join` alone (`ridge`, `lda` or `ls` on several layers) learns from all rows so far;
        in a chain, such as `join` and `l2`, it is fitted on the first batch, too.

        GENs that need sums alone (mean, ls, lda, ridge unless `lam="holdout"`) keep sums and at
        most 2,000 rows; with a NORM_pre that does not learn, or with `join` alone, batches give
        what `fit` gives on all rows. For the other GENs, such as k-means, **every row is kept**,
        and memory grows.

        `fit` keeps neither: `partial_fit` after it starts anew, with a warning.

        Args:
            classes: all labels, as elsewhere in scikit-learn; later calls may repeat them. Those
                without a sample yet are never predicted: probability 0, score −∞. Without
                `classes`, new labels may come with any batch, and `classes_` grows.
            sample_weight: refused, as is `class_weight`: what a sample weighs beside all others
                is known when the last one has come.

        Raises:
            ImprintError: a label outside `classes`; other `classes` than before; and as for `fit`.
                What the head needs, such as a matrix that is not singular, is asked for by the
                prediction.
        """
        for name, value in (("sample_weight", sample_weight), ("class_weight", self.class_weight)):
            if value is not None:
                raise ImprintError(
                    f"{name} is not for partial_fit: what a sample weighs beside all others is "
                    "known when the last one has come; give all samples to fit"
                )
        before: TrainingRows | TrainingSums | None = getattr(self, "_kept", None)
        first = before is None
        if first and hasattr(self, "classes_"):
            warnings.warn(
                "partial_fit after fit starts anew: fit keeps no sums to add to; call partial_fit "
                "from the first batch on",
                stacklevel=2,
            )
        x, y = self._checked(X, y, reset=first)
        limits = Limits(self.accept, self.coverage)
        check_values(x)
        known, closed = self._known(y, classes, first)
        labels = torch.from_numpy(np.searchsorted(known, y))
        kept: TrainingRows | TrainingSums
        if before is None:
            parts, self._tried = self._settle(x, labels)
            if parts.gen.from_moments:
                kept = TrainingSums(parts, x, labels, len(known), self._seed(), limits)
            else:
                kept = TrainingRows(parts, self._seed(), x.device, limits)
        else:
            kept = before
            if len(known) > len(self.classes_):
                kept.relabel(torch.from_numpy(np.searchsorted(known, self.classes_)), len(known))
        kept.add(x, labels)
        self._kept, self._head, self.classes_, self._closed = kept, None, known, closed
        self._state = None
        return self

    @property
    def head_(self) -> ImprintedHead:
        check_is_fitted(self)
        if self._head is None:
            assert self._kept is not None
            self._head = self._kept.head([str(label) for label in self.classes_])
            self._head.tried = self._tried
        return self._head

    def decision_function(self, X: Any) -> np.ndarray:
        """Logits `(n, C)`, whose softmax `predict_proba` is.

        Of two classes their difference `(n,)`, above 0 for `classes_[1]`.
        """
        logits = self._of_rows(X, lambda x: self.head_(x).double())
        if logits.shape[1] == 2:
            logits = logits[:, 1] - logits[:, 0]
        return logits.numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities `(n, C)`."""
        return self._of_rows(X, lambda x: self.head_(x).double().softmax(1)).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels `(n,)`."""
        best = self._of_rows(X, lambda x: self.head_(x).argmax(1))
        return self.classes_[best.numpy()]

    def familiarity(self, X: Any) -> np.ndarray:
        """How familiar rows are, `(n,)`: about 0 for rows like those of the training set, and the
        lower, the stranger. After `fit` or `partial_fit` with `accept`.

        Raises:
            ImprintError: there was no `accept`.
        """
        return self._of_rows(X, lambda x: self.head_.familiarity(x)).double().numpy()

    def accepts(self, X: Any) -> np.ndarray:
        """Which rows are familiar enough, `(n,)` bool: as many of the training set as `accept`
        says. `predict` labels the others, too."""
        self.familiarity(X[:1])  # raises where there was no `accept`
        return self._of_rows(X, lambda x: self.head_.label(x) != NONE).numpy()

    def predict_set(self, X: Any, coverage: float | None = None) -> np.ndarray:
        """Which classes may be true, `(n, C)` bool: column c stands for `classes_[c]`.

        After `fit` or `partial_fit` with `coverage`; see `ImprintedHead.prediction_sets`.

        Args:
            X: rows `(n, d)`.
            coverage: probability that a set holds the truth; the parameter's by default.

        Raises:
            ImprintError: there was no `coverage`, or it is out of range.
        """
        return self._of_rows(X, lambda x: self.head_.prediction_sets(x, coverage)).numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy on `X (n, d)`, labels `y (n,)`."""
        return super().score(X, plain_labels(y), sample_weight)

    def _of_rows(self, X: Any, function: Callable[[Tensor], Tensor]) -> Tensor:
        """What a function of the head makes of rows, on the CPU.

        Block by block: scores in many classes may take more memory than the rows.
        """
        check_is_fitted(self)
        x = self._tensor(validate_data(self, X, reset=False, **_types(X)))
        if isinstance(X, np.memmap):
            check_values(x)
        self.head_.to(x.device)
        with torch.no_grad():
            return transform(lambda rows: function(rows.float()), x).cpu()

    def _checked(self, X: Any, y: Any, reset: bool) -> tuple[Tensor, np.ndarray]:
        X, y = validate_data(self, X, plain_labels(y), reset=reset, **_types(X))
        check_classification_targets(y)
        return self._tensor(X), y

    def _tensor(self, X: np.ndarray) -> Tensor:
        return as_tensor(X).to(self.device or "cpu")

    def _seed(self) -> int:
        return checked_seed(self.seed)

    def _keywords(self) -> dict[str, Any]:
        """What was given of the recipe and its parts; NumPy's scalars, of a grid, as Python's."""
        given = self.get_params(deep=False)
        evaluation = ("keep", "accept", "coverage", "memory_budget", "progress")
        for name in ("seed", "device", *evaluation):
            del given[name]
        import_parts(given)
        return {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in given.items()
            if value is not None
        }

    def _known(self, y: np.ndarray, classes: Any, first: bool) -> tuple[np.ndarray, bool]:
        """All labels so far, sorted, and whether the first batch has named all that may come."""
        closed = classes is not None if first else self._closed
        classes = plain_labels(classes)
        if first:
            known = unique_labels(classes if closed else y)
        else:
            known = self.classes_ if closed else _with_new(self.classes_, y)
            if classes is not None and not np.array_equal(unique_labels(classes), known):
                raise ImprintError(
                    f"classes={list(classes)} are not those known so far, {some(known)}: give "
                    "them in the first partial_fit alone"
                )
        outside = ~np.isin(y, known)
        if outside.any():
            label = y[outside].tolist()[0]
            raise ImprintError(
                f"label {label!r} of sample {outside.argmax()} is not among the classes of the "
                f"first partial_fit, {some(known)}{did_you_mean(label, map(str, known))}: name it "
                "there, or leave `classes` out, and new labels may come with any batch"
            )
        _check_texts(known)
        return known, closed

    def _settle(self, x: Tensor, labels: Tensor) -> tuple[Recipe, list[dict[str, Any]]]:
        """The parts for all batches, and what "auto" tried on the first to find them."""
        keywords = self._keywords()
        if keywords.get("recipe") != "auto":
            return _recipe(keywords), []
        codes = torch.unique(labels, return_inverse=True)[1]
        head = imprint(x, codes, seed=self._seed(), calibrate=False, **keywords)
        del keywords["recipe"]
        # The recipe that was chosen may have no use for it, and names it where it has.
        keywords.pop("metric", None)
        chosen = {n: v for n, v in head.settings.items() if n in self.get_params(deep=False)}
        del chosen["seed"]
        return _recipe(chosen | keywords), head.tried

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # In float32 the last digits of a row's scores change with the rows beside it, by up to 1e-5
        # behind nystrom; scikit-learn's checks of invariance allow 1e-7.
        tags.non_deterministic = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "classes_")

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if self.device is not None and hasattr(self, "classes_"):
            # What was fitted on a GPU is read on machines without one.
            head, kept = copy.deepcopy((self._head, self._kept))
            for name, part in {"_head": head, "_kept": kept}.items():
                state[name] = None if part is None else part.cpu()
        return state


def _types(X: Any) -> dict[str, Any]:
    """How scikit-learn is to take rows."""
    return AS_IT_IS if isinstance(X, np.memmap) else AS_TENSOR


def _recipe(keywords: dict[str, Any]) -> Recipe:
    parts = resolve(**keywords)
    assert isinstance(parts, Recipe)  # "auto" has been settled
    return parts


def _check_texts(labels: np.ndarray) -> None:
    if labels.dtype.kind in "OU":
        check_composition(labels.tolist())


def _with_new(known: np.ndarray, y: np.ndarray) -> np.ndarray:
    """`known (C,)` with the labels of a batch, sorted; of the same type where none is new."""
    if (known.dtype.kind in "OU") != (y.dtype.kind in "OU"):
        find_label(y[0], known)  # raises: a text is no number
    new = y[~np.isin(y, known)]
    if not len(new):
        return known
    whole = known.dtype.kind in "biu" and new.dtype.kind == "f"
    return unique_labels(known, new.astype(np.int64) if whole else new)
