"""The imprinted head: NORM_inf, proxies and AGG, in a plain `nn.Module` from embeddings to class
scores. A deployed classifier needs only its backbone and this head.
"""

from __future__ import annotations

import copy
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError, needs
from imprint_pl.files import check_tensor
from imprint_pl.method.familiarity import Familiarity
from imprint_pl.method.pretrained import Pretrained
from imprint_pl.method.sets import PredictionSets, checked_coverage
from imprint_pl.numerics.constants import Constants
from imprint_pl.numerics.measures import compared_by
from imprint_pl.numerics.values import MAX_CLASSES, is_number, to_json_value
from imprint_pl.parts.agg.max import Max
from imprint_pl.parts.by_name import build, describe, steps_of
from imprint_pl.parts.gen.base import Proxies
from imprint_pl.parts.norm.base import NoNorm

if TYPE_CHECKING:
    import pandas as pd

# Most numbers in proxies that get gradients. Larger proxies are a whole training set (GEN `all`),
# for which gradients would only take memory.
TRAINABLE = 2**26
# How many class names `print(head)` shows.
NAMES_SHOWN = 6
# The label of an image that belongs to no class, and its name.
NONE, NONE_NAME = -1, "none of these"


class ImprintedHead(Constants, Pretrained):
    """Embeddings `(B, d)` → class scores `(B, C)`; the largest score decides.

    Empty when made, filled by `fill` (see `imprint_pl.imprint`) or by `load_state_dict`, which
    takes the sizes from the file.

    Args:
        norm_inf: module applied to the embeddings, a part of `imprint_pl.parts.norm`.
        agg: module that turns proxies into class scores, a part of `imprint_pl.parts.agg`. A head
            made without either takes both from the state dict that it loads.

    Attributes:
        proxies: `(P, d)` parameter, so that a head can be fine-tuned.
        log_scale: parameter, a number: log(1 / T) with the temperature T, which turns a softmax of
            the scores into calibrated probabilities.
        bias: `(P,)`, a constant.
        proxy_classes: `(P,)` int64, the class of each proxy, a constant.
        class_names: C names, or an empty list where there are none.
        settings: names and numbers of the recipe that filled it.
        tried: what `auto` compared, a row a candidate; empty for other recipes.
        familiar: the score of familiarity; empty where none was fitted.
        threshold: familiarity that an embedding has to reach; `None` accepts everything. In a head
            without a familiarity, such as those of earlier versions, the score that the best class
            has to reach. See `imprint_pl.method.threshold`.
        sets: the constants of prediction sets; empty where none were fitted.
        coverage: the probability that a prediction set holds the truth, unless another is asked
            for; `None` where none was fitted.
        held_out_accuracy: the accuracy on the held-out samples that the temperature rests on, a
            fraction, by heads made without them; `None` where none were held out. Training the head
            does not change it.
    """

    constants = ("bias", "proxy_classes")

    def __init__(self, norm_inf: nn.Module | None = None, agg: nn.Module | None = None) -> None:
        super().__init__()
        if (norm_inf is None) != (agg is None):
            raise ValueError("give norm_inf and agg, or neither")
        self.takes_parts_of_file = norm_inf is None
        self.norm_inf = NoNorm() if norm_inf is None else norm_inf
        self.agg = Max() if agg is None else agg
        self.familiar = Familiarity()
        self.sets = PredictionSets()
        self._empty()

    def clear(self) -> None:
        """Empties the head and its NORM_inf."""
        self._empty()
        forget = getattr(self.norm_inf, "clear", None)
        if callable(forget):
            forget()

    def _empty(self) -> None:
        old = getattr(self, "proxies", None)
        device = None if old is None else old.device
        # Leave inference mode, since tensors made under it cannot be changed later.
        with torch.inference_mode(False):
            self.proxies = nn.Parameter(torch.zeros(0, 0, device=device))
            self.bias = torch.zeros(0, device=device)
            self.proxy_classes = torch.zeros(0, dtype=torch.int64, device=device)
            self.log_scale = nn.Parameter(torch.zeros((), device=device))
        self.class_names: list[str] = []
        self.num_classes = 0
        self.settings: dict[str, Any] = {}
        self.tried: list[dict[str, Any]] = []
        self.threshold: float | None = None
        self.familiar.clear()
        self.coverage: float | None = None
        self.sets.clear()
        self.held_out_accuracy: float | None = None

    def fill(
        self, proxies: Proxies, num_classes: int, class_names: list[str] | None = None
    ) -> ImprintedHead:
        """Fills the head with copies of proxies, so that it can be trained even if they were made
        under inference mode; returns itself."""
        device = self.proxies.device
        with torch.inference_mode(False):
            weights = proxies.weights.detach().clone().to(device)
            self.proxies = nn.Parameter(weights, requires_grad=weights.numel() <= TRAINABLE)
            self.bias = proxies.bias.detach().clone().to(device)
            self.proxy_classes = proxies.classes.detach().clone().to(device)
        self.num_classes = num_classes
        self.class_names = list(class_names or [])
        return self

    def take(self, other: ImprintedHead) -> None:
        """Takes copies of the parts, the proxies and the settings of another head.

        This head stays on its device and stays the same object, so that references to it stay
        valid.
        """
        device = self.proxies.device
        with torch.inference_mode(False), torch.no_grad():
            norm_inf, agg = copy.deepcopy((other.norm_inf, other.agg))
            self.norm_inf = norm_inf.to(device).train(self.training)
            self.agg = agg.to(device).train(self.training)
            proxies = Proxies(other.proxies, other.bias, other.proxy_classes)
            self.fill(proxies, other.num_classes, other.class_names)
            self.log_scale.copy_(other.log_scale)
            self.familiar = copy.deepcopy(other.familiar).to(device)
            self.sets = copy.deepcopy(other.sets).to(device)
        self.settings, self.tried = copy.deepcopy((other.settings, other.tried))
        self.threshold, self.coverage = other.threshold, other.coverage
        self.held_out_accuracy = other.held_out_accuracy

    @property
    def is_empty(self) -> bool:
        return self.num_classes == 0

    @property
    def embedding_dim(self) -> int:
        """The dimension d of the embeddings that go in."""
        return getattr(self.norm_inf, "input_dim", None) or self.feature_dim

    @property
    def feature_dim(self) -> int:
        """The dimension of the proxies; not d if NORM_inf maps to other dimensions."""
        return self.proxies.shape[1]

    @property
    def layer_widths(self) -> list[int] | None:
        """Features of each layer in the embeddings that go in; `None` for one layer."""
        for step in steps_of(self.norm_inf):
            widths = getattr(step, "layer_widths", None)
            if widths is not None and len(widths) > 1:
                return list(widths)
        return None

    @property
    def temperature(self) -> float:
        """T of the softmax that turns scores into probabilities; 1 if none was fitted."""
        return (-self.log_scale).exp().item()

    @temperature.setter
    def temperature(self, value: float) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.log_scale = nn.Parameter(torch.full_like(self.log_scale, -math.log(value)))

    def forward(self, embeddings: Tensor | np.ndarray) -> Tensor:
        """Compute logits, which are the scores divided by the temperature; their softmax gives
        probabilities.

        Args:
            embeddings: `(B, d)`; a NumPy array is moved to the head's device.

        Returns:
            `(B, C)`.
        """
        if isinstance(embeddings, np.ndarray):
            embeddings = torch.as_tensor(embeddings).to(self.proxies.device)
        return self.scores(embeddings) * self.log_scale.exp()

    def scores(self, embeddings: Tensor) -> Tensor:
        """Compute the scores of the classes, in the units of AGG.

        Args:
            embeddings: `(B, d)`.

        Returns:
            `(B, C)`. A class without proxies has −∞. An embedding has NaN if it is not finite or
            its square is too large for float32.

        Raises:
            ImprintError: the head is empty, or made for another `d`.
        """
        if self.is_empty:
            raise ImprintError("this head has no proxies yet: imprint it, or load a checkpoint")
        if embeddings.ndim != 2:
            raise ImprintError(f"embeddings of shape {tuple(embeddings.shape)}: expected (B, d)")
        if embeddings.shape[1] != self.embedding_dim:
            raise ImprintError(
                f"embeddings of {embeddings.shape[-1]} numbers for a head made for "
                f"{self.embedding_dim}: use the backbone that the head was imprinted with"
            )
        z = self.norm_inf(embeddings.to(self.proxies.dtype))
        if z.shape[-1] != self.feature_dim:
            raise ImprintError(
                f"NORM_inf makes {z.shape[-1]} numbers of an embedding, the proxies have "
                f"{self.feature_dim}: give norm_inf='same', or parts that fit each other"
            )
        scores = self.agg(z, self.proxies, self.bias, self.proxy_classes, self.num_classes)
        # Give NaN if the embedding, or its length, is not finite. Some parts, such as a ReLU or a
        # vote, would hide this and return an arbitrary class.
        return scores + 0 * embeddings.float().square().sum(-1, keepdim=True).to(scores.dtype)

    def tried_table(self) -> pd.DataFrame:
        """Returns `tried` as a pandas table, the best first by the metric of the comparison.

        Raises:
            ImprintError: pandas is not installed.
        """
        with needs("sweep", "head.tried_table()", "or read the rows of head.tried"):
            import pandas as pd
        table = pd.DataFrame(self.tried)
        by = compared_by(self.tried)
        return table.sort_values(by, ascending=False) if len(table) else table

    def name_classes(self, names: list[str] | None) -> ImprintedHead:
        """Names the classes if they have no names yet and `names` has one for each; returns
        itself."""
        if not self.class_names and names and len(names) == self.num_classes:
            self.class_names = list(names)
        return self

    def extra_repr(self) -> str:
        """The first line of `print(head)`: recipe, classes and proxies."""
        if self.is_empty:
            return "empty"
        names = self.class_names
        classes = f"{self.num_classes} classes"
        if names:
            more = f", … {names[-1]}" if len(names) > NAMES_SHOWN else ""
            classes += f" ({', '.join(names[:NAMES_SHOWN])}{more})"
        recipe = self.settings.get("recipe")
        found = [] if recipe is None else [f"recipe={recipe}"]
        found += [classes, f"{len(self.proxies)} proxies of {self.feature_dim} numbers"]
        return ", ".join(found)

    def familiarity(self, embeddings: Tensor, scores: Tensor | None = None) -> Tensor:
        """Compute the familiarity of embeddings, see `Familiarity`.

        Args:
            embeddings: `(B, d)`.
            scores: `(B, C)`, the result of `scores` for them; computed if not given.

        Returns:
            `(B,)`: about 0 for samples like those of the training set, and lower for unusual ones.

        Raises:
            ImprintError: none was fitted.
        """
        if self.familiar.is_empty:
            raise ImprintError(
                "this head has no score of familiarity: fit with accept=0.95, or call "
                "set_threshold(head, x, y, accept)"
            )
        scores = self.scores(embeddings) if scores is None else scores
        return self.familiar(embeddings, scores.amax(1))

    def decide(self, scores: Tensor, familiarity: Tensor | None = None) -> Tensor:
        """Turn scores into labels.

        Args:
            scores: `(B, C)`, the result of `scores`.
            familiarity: `(B,)`, the result of `familiarity`; needed if the head has a familiarity
                and a threshold.

        Returns:
            `(B,)`: the class with the best score, or −1 if the familiarity is below the threshold
            or NaN. In a head without familiarity the best score is compared with the threshold.

        Raises:
            ImprintError: the familiarity is missing.
        """
        best, labels = scores.max(1)
        if self.threshold is not None and not self.familiar.is_empty:
            if familiarity is None:
                raise ImprintError(
                    "the threshold of this head is one of familiarity: call "
                    "head.label(embeddings), or "
                    "head.decide(scores, head.familiarity(embeddings, scores))"
                )
            best = familiarity.where(best == best, best.to(familiarity))
        least = -math.inf if self.threshold is None else self.threshold
        return labels.where(best >= least, NONE)

    def label(self, embeddings: Tensor) -> Tensor:
        """Predict labels.

        Args:
            embeddings: `(B, d)`.

        Returns:
            `(B,)`; −1, "none of these", for embeddings that do not reach the threshold.
        """
        scores = self.scores(embeddings)
        known = None if self.familiar.is_empty else self.familiarity(embeddings, scores)
        return self.decide(scores, known)

    def prediction_sets(self, embeddings: Tensor, coverage: float | None = None) -> Tensor:
        """Find for each embedding the classes that may be true.

        For a new image of one of the classes, the set contains its class with the probability
        `coverage`. An empty set means that no class is as probable as it usually is for its own
        images. Embeddings that do not reach the threshold of `accept` have an empty set, too.

        Args:
            embeddings: `(B, d)`.
            coverage: the probability, such as 0.95; by default that of the fit.

        Returns:
            `(B, C)` bool.

        Raises:
            ImprintError: none was fitted, or the coverage is out of range.
        """
        scores = self.scores(embeddings)
        known = None if self.familiar.is_empty else self.familiarity(embeddings, scores)
        sets = self.sets_of(scores * self.log_scale.exp(), self.bounds(coverage))
        return sets & (self.decide(scores, known) != NONE)[:, None]

    def bounds(self, coverage: float | None = None) -> Tensor:
        """Return the smallest log-probability with which each class is in a prediction set.

        Args:
            coverage: the probability, such as 0.95; by default that of the fit.

        Returns:
            `(C,)`.

        Raises:
            ImprintError: as for `prediction_sets`.
        """
        if self.sets.is_empty:
            raise ImprintError(
                "this head has no prediction sets: fit with coverage=0.95, or call "
                "set_coverage(head, x, y, coverage)"
            )
        return self.sets.bounds(checked_coverage(coverage, self.coverage), self.num_classes)

    @staticmethod
    def sets_of(logits: Tensor, bounds: Tensor) -> Tensor:
        """Compute prediction sets without regard to the threshold.

        Args:
            logits: `(B, C)`.
            bounds: `(C,)`, the result of `bounds`.

        Returns:
            `(B, C)` bool.
        """
        # A class without proxies is never true; NaN is in no set.
        possible = logits > -math.inf
        return (logits.log_softmax(1) >= bounds.to(logits)) & possible

    def name_of(self, label: int) -> str:
        """Return the name of a label: that of the class, its number without names, or "none of
        these" for −1."""
        if label == NONE:
            return NONE_NAME
        return self.class_names[label] if self.class_names else str(label)

    def get_extra_state(self) -> Tensor:
        """Everything that is not a tensor, as JSON in bytes, for `weights_only` and safetensors."""
        values = {
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "norm_inf": describe(self.norm_inf),
            "agg": describe(self.agg),
            "settings": self.settings,
            "tried": self.tried,
            "threshold": self.threshold,
        }
        for name in ("coverage", "held_out_accuracy"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        text = json.dumps(values, default=to_json_value)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def check(self) -> ImprintedHead:
        """Return the head itself; raise an `ImprintError` if its parts do not fit each other."""
        P, C = len(self.proxies), self.num_classes
        proxies, bias, classes = self.proxies.detach(), self.bias, self.proxy_classes
        fits = proxies.ndim == 2 and bias.shape == classes.shape == (P,)
        fits &= proxies.is_floating_point() and bias.is_floating_point()
        fits &= classes.dtype == torch.int64 and bool(((classes >= 0) & (classes < C)).all())
        fits &= len(self.class_names) in (0, C) and self.log_scale.numel() == 1
        fits &= self.familiar.fits(self.embedding_dim) and self.sets.fits(C)
        numbers = (proxies, bias, self.log_scale.exp())
        fits &= all(bool(numbers_of.isfinite().all()) for numbers_of in numbers)
        try:
            if fits and not self.is_empty:
                with torch.no_grad():
                    x = proxies.new_zeros(1, self.embedding_dim)
                    fits = self.scores(x).shape == (1, C) and self.label(x).shape == (1,)
        except (RuntimeError, IndexError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ImprintError(
                f"a head of {C} classes with proxies {tuple(proxies.shape)} whose parts do not fit "
                "each other: the file is damaged or forged"
            )
        return self

    def set_extra_state(self, state: Tensor) -> None:
        values = _read(state)
        for name in ("num_classes", "class_names", "settings", "tried"):
            setattr(self, name, values[name])
        # Heads of earlier versions have none.
        self.threshold, self.coverage = values.get("threshold"), values.get("coverage")
        self.held_out_accuracy = values.get("held_out_accuracy")

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        extra = state_dict.get(prefix + "_extra_state")
        if self.takes_parts_of_file and extra is not None:
            values = _read(extra)
            device = self.proxies.device
            self.norm_inf = build("norm_inf", values["norm_inf"]).to(device)
            self.agg = build("agg", values["agg"]).to(device)
        # Make room of the saved shapes first, since the file decides on the sizes.
        saved = state_dict.get(prefix + "proxies")
        if saved is not None:
            check_tensor(prefix + "proxies", saved)
            room = torch.empty(saved.shape, dtype=saved.dtype, device=self.proxies.device)
            self.proxies = nn.Parameter(room, requires_grad=room.numel() <= TRAINABLE)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _read(state: Tensor) -> dict[str, Any]:
    check_tensor("the head's settings", state)
    try:
        values = json.loads(state.cpu().numpy().astype("uint8", casting="no").tobytes().decode())
        types = dict(num_classes=int, class_names=list, norm_inf=list, agg=list, settings=dict)
        right = all(isinstance(values[name], kind) for name, kind in types.items())
        right &= isinstance(values["tried"], list) and 0 <= values["num_classes"] <= MAX_CLASSES
        right &= all(isinstance(name, str) for name in values["class_names"])
        right &= values.get("threshold") is None or is_number(values["threshold"])
        coverage = values.get("coverage")
        right &= coverage is None or (is_number(coverage) and 0 < coverage <= 1)
        accuracy = values.get("held_out_accuracy")
        right &= accuracy is None or (is_number(accuracy) and 0 <= accuracy <= 1)
        if not right:
            raise ValueError("values of other types")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ImprintError(
            f"the head's settings cannot be read ({type(error).__name__}): the file is damaged, or "
            "not a head of this package"
        ) from error
    return values
