"""Runs the paper's figure from left to right: from checked embeddings, by the five parts, to a
head.

Users call it by `imprinting.py`. `auto.py` runs it for many candidates, and `holdout.py` for heads
that are made without some samples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imprint_pl.errors import ImprintError
from imprint_pl.method.head import ImprintedHead
from imprint_pl.method.recipes import Recipe
from imprint_pl.numerics.factorisations import double
from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.passes import CHUNK
from imprint_pl.parts.by_name import steps_of
from imprint_pl.parts.gen import Proxies
from imprint_pl.parts.gen.base import BALANCED
from imprint_pl.parts.gen.choice_of_lam import LeftOut, rows_left_out
from imprint_pl.parts.norm.base import Norm, sums_of, transform
from imprint_pl.parts.norm.layers import JoinLayers
from imprint_pl.parts.norm.quantile import Quantile
from imprint_pl.parts.norm.random_projection import RandomProjection

# Settings of a head that are results, not keywords of its recipe.
RESULTS = ("seed", "chosen_lam", "chosen_by", "calibrated")


@dataclass(frozen=True)
class Request:
    """The options of a head beside its recipe; see `imprint` for each.

    Attributes:
        num_classes: C.
        class_names: C names, or `None`.
        seed: fixes every random choice.
        classifier: the backbone's original classifier, where NORM_post needs it.
        progress: whether GEN shows a bar.
    """

    num_classes: int
    class_names: list[str] | None = None
    seed: int = 0
    classifier: Tensor | None = None
    progress: bool = False


class Made(NamedTuple):
    """A head and, if samples can be held out by subtracting them, the sums that it was made of."""

    head: ImprintedHead
    sums: Sums | None


def row_weights(y: Tensor, gen: Any, sample_weight: Tensor | None = None) -> Tensor | None:
    """Return the weights `(N,)` of samples with labels `y (N,)`, float64, whose sum is N; `None` if
    all samples weigh the same.

    They are `sample_weight (N,)`, all above 0. If GEN has `class_weight="balanced"`, they are
    scaled so that all classes have the same sum of weights.
    """
    balances = getattr(gen, "class_weight", None) == BALANCED
    if sample_weight is None and not balances:
        return None
    weights = torch.ones(len(y)) if sample_weight is None else sample_weight
    weights, labels = double(weights).cpu(), y.cpu()
    if balances:
        sums = torch.zeros(int(labels.max()) + 1, dtype=torch.float64)
        weights = weights / sums.index_add_(0, labels, weights)[labels]
    weights = weights * (len(y) / weights.sum())
    return weights if y.device.type == "mps" else weights.to(y.device)


def make_head(
    x: Tensor, y: Tensor, parts: Recipe, request: Request, weights: Tensor | None = None
) -> Made:
    """Makes a head of temperature 1 from embeddings `x (N, d)`, labels `y (N,)` that were checked.

    Random choices depend on the order of the rows; pass rows sorted by `in_order` to make them
    depend on the set of rows alone. A class without samples gets no proxy. `weights (N,)` are those
    of `row_weights`, by default those that follow from the recipe.
    """
    norm_pre: Any
    weights = row_weights(y, parts.gen) if weights is None else weights
    norm_pre, head = parts.fresh()
    if parts.gen.from_moments:
        sums = Sums.fitted(norm_pre, head.norm_inf, parts.gen, x, y, request, weights)
        sums = sums.with_rows(parts.gen, x, y, request.seed, weights)
        return Made(sums.head(parts, request), sums if holds_out_of_sums(parts) else None)
    present, labels = torch.unique(y, return_inverse=True)
    if getattr(norm_pre, "learns", False):
        norm_pre.to(x.device).fit(x, labels, len(present), request.seed)
    z = transform(norm_pre, x)
    # Only a GEN that `takes_weights` gets any.
    more = {} if weights is None else {"weights": weights}
    proxies = parts.gen(z, labels, len(present), request.seed, request.progress, **more)
    del z
    proxies = _finished(proxies, parts, present, request.classifier)
    return Made(_filled(head, proxies, parts, request), None)


class Basis(NamedTuple):
    """An orthonormal basis `(d, N)` of the space that N samples span.

    It is stored as the N reflections that LAPACK computes; forming the matrix itself would double
    the time.

    Attributes:
        reflections, scale: `(d, N)` and `(N,)`, as `torch.geqrf` gives them.
    """

    reflections: Tensor
    scale: Tensor

    @classmethod
    def of(cls, z: Tensor) -> tuple[Basis, Tensor]:
        """Return the basis of samples `z (N, d)`, N < d, and their coordinates `(N, N)`."""
        basis = cls(*torch.geqrf(double(z).T))
        return basis, basis.reflections[: len(z)].triu().T

    def turn_back(self, coordinates: Tensor) -> Tensor:
        """Coordinates `(P, N)` → `(P, d)`, float64."""
        padded = self.reflections.new_zeros(len(self.reflections), len(coordinates))
        padded[: coordinates.shape[1]] = coordinates.T
        return torch.ormqr(self.reflections, self.scale, padded).T


@dataclass(frozen=True)
class Sums:
    """Training embeddings as sums of NORM_pre(x), from which heads of all or some samples are made.

    With fewer samples than features, the sums may be those of coordinates in the space that the
    samples span: the Gram matrix is then `(N, N)`, and the proxies are the same.

    Attributes:
        norm_pre, norm_inf: the fitted parts.
        moments: the sums, of C classes.
        rows: `(N, q)`, the samples as they were added up, if they are few.
        basis: the basis of such coordinates; `None` if the sums are those of NORM_pre(x).
        device: the device of proxies that are computed with a basis.
        left: some rows of the sums, where GEN needs them.
    """

    norm_pre: nn.Module
    norm_inf: nn.Module
    moments: Moments
    rows: Tensor | None = None
    basis: Basis | None = None
    device: torch.device | None = None
    left: LeftOut | None = None

    @classmethod
    def fitted(
        cls,
        norm_pre: Any,
        norm_inf: nn.Module,
        gen: Any,
        x: Tensor,
        y: Tensor,
        request: Request,
        weights: Tensor | None = None,
    ) -> Sums:
        """Fits NORM_pre, and the parts that NORM_inf shares with it, on `x (N, d)`, `y (N,)`; then
        adds up the rows, with their `weights (N,)` if there are any."""
        norm_pre = norm_pre.to(x.device)
        if not isinstance(norm_pre, Norm):
            return cls.of(norm_pre, norm_inf, gen, x, y, request.num_classes, weights)
        present, labels = torch.unique(y, return_inverse=True)
        if few_for(gen, norm_pre, x):
            norm_pre.fit(x, labels, len(present), request.seed)
            return cls.of(norm_pre, norm_inf, gen, x, y, request.num_classes, weights)
        if len(x) <= CHUNK and not learns_from_sums(norm_pre):
            # A single chunk is in memory as a whole anyway. Keep it, so that the rows to leave out
            # or hold out need not be computed again.
            z = norm_pre.fit_transform(x, labels, len(present), request.seed)
            moments = Moments.of(z, y, request.num_classes, weights, gram=gram_of(gen))
            return cls(norm_pre, norm_inf, moments, z)
        more = {} if weights is None else {"weights": weights}
        moments = norm_pre.fit_sums(x, labels, len(present), request.seed, gram_of(gen), **more)
        return cls(norm_pre, norm_inf, moments.relabelled(present, request.num_classes))

    @classmethod
    def of_kept(cls, norm_pre: Any, norm_inf: nn.Module, moments: Moments) -> Sums:
        """Takes the sums of samples that were not kept; see `kept_sums`.

        If they are sums of the samples before NORM_pre, copies of NORM_pre and NORM_inf are fitted
        on them.
        """
        if not learns_from_sums(norm_pre):
            return cls(norm_pre, norm_inf, moments)
        norm_pre, norm_inf = copy.deepcopy((norm_pre, norm_inf))
        norm_pre.fit_moments(moments)
        return cls(norm_pre, norm_inf, norm_pre.of_moments(moments))

    @classmethod
    def of(
        cls,
        norm_pre: nn.Module,
        norm_inf: nn.Module,
        gen: Any,
        x: Tensor,
        y: Tensor,
        num_classes: int,
        weights: Tensor | None = None,
    ) -> Sums:
        """Adds up `x (N, d)`, `y (N,)` in 0..C−1, with a NORM_pre that stays as it is."""
        if not few_for(gen, norm_pre, x):
            moments = sums_of(norm_pre, x, y, num_classes, gram_of(gen), weights)
            return cls(norm_pre, norm_inf, moments)
        basis, coordinates = Basis.of(transform(norm_pre, x))
        y = y.to(coordinates.device)
        moments = Moments.of(coordinates, y, num_classes, weights, gram=gram_of(gen))
        return cls(norm_pre, norm_inf, moments, coordinates, basis, x.device)

    def with_rows(
        self, gen: Any, x: Tensor, y: Tensor, seed: int, weights: Tensor | None = None
    ) -> Sums:
        """Adds the rows that GEN needs beside the sums.

        Args:
            gen: of the recipe.
            x, y: all embeddings and labels, in the order in which they were added up; or a random
                sample of them, as `rows_left_out` takes it.
            seed: fixes which rows are drawn.
            weights: of the rows, as the sums have them.
        """
        if not getattr(gen, "needs_rows", False):
            return self
        if self.rows is not None:
            return replace(self, left=rows_left_out(x, y, self.rows, seed, weights))
        left = rows_left_out(x, y, lambda rows: transform(self.norm_pre, x[rows]), seed, weights)
        return replace(self, left=left)

    def generated(self, moments: Moments, gen: Any) -> Proxies:
        """Make proxies by GEN from these sums, or from others of the same space and classes.

        In the result, classes are numbered without those that have no samples.
        """
        if self.left is None or not getattr(gen, "needs_rows", False):
            return gen(moments.present())
        places = (moments.counts > 0).long().cumsum(0) - 1
        y = places[self.left.y.to(places.device)]
        return gen(moments.present(), left=self.left._replace(y=y))

    def head(self, parts: Recipe, request: Request) -> ImprintedHead:
        """Makes the head of all samples, of temperature 1. A class without samples has no proxy."""
        head = ImprintedHead(self.norm_inf, copy.deepcopy(parts.agg))
        return _filled(head, self.proxies(self.moments, parts, request), parts, request)

    def proxies(self, moments: Moments, parts: Recipe, request: Request) -> Proxies:
        """Makes the final proxies from these sums, or from others of the same space and classes."""
        present = (moments.counts > 0).nonzero().flatten()
        if not len(present):
            raise ImprintError("the held-out samples are all there are")
        proxies = self.generated(moments, parts.gen)
        if self.basis is not None:
            weights = self.basis.turn_back(proxies.weights).float()
            proxies = proxies._replace(
                weights=weights.to(self.device),
                bias=proxies.bias.to(self.device),
                classes=proxies.classes.to(self.device),
            )
        present = present.to(proxies.classes.device)
        return _finished(proxies, parts, present, request.classifier)


def few_for(gen: Any, norm_pre: nn.Module, x: Tensor) -> bool:
    """Whether GEN can run on the samples' coordinates in the space that they span, as N < d.

    The proxies are the same if they lie in that space and rotate with it.
    """
    if not (getattr(gen, "spans", False) and gen.lam != 0 and isinstance(norm_pre, Norm)):
        return False
    return len(x) < norm_pre.features(x.shape[1], len(x))


def holds_out_of_sums(parts: Recipe) -> bool:
    """Whether samples can be held out by subtracting their sums from the sums of all samples.

    Each such head is then cheap. It is not possible for a NORM_pre that uses labels, since that has
    to be fitted anew without the samples.
    """
    return parts.gen.from_moments and not getattr(parts.norm_pre, "uses_labels", False)


def gram_of(gen: Any) -> str:
    """The Gram matrix that a GEN needs, in the words of `Moments.zeros`."""
    return "pooled" if gen.needs_gram else "none"


def learns_from_sums(norm_pre: nn.Module) -> bool:
    """Whether NORM_pre learns from the sums of all samples; sums of raw samples are then kept."""
    return getattr(norm_pre, "from_moments", False)


def kept_gram(parts: Recipe) -> str:
    """The Gram matrix of the sums that are kept for a recipe, in the words of `Moments.zeros`."""
    gram = gram_of(parts.gen)
    return "diagonal" if gram == "none" and learns_from_sums(parts.norm_pre) else gram


def kept_sums(parts: Recipe, norm_pre: nn.Module, x: Tensor, y: Tensor, classes: int) -> Moments:
    """Return the sums to keep of `x (N, d)`, `y (N,)`: those of NORM_pre(x), or those of x if
    NORM_pre `learns_from_sums`."""
    if learns_from_sums(norm_pre):
        return Moments.of(x, y, classes, gram=kept_gram(parts))
    return sums_of(norm_pre, x, y, classes, kept_gram(parts))


def check_reference(parts: Recipe, classifier: Tensor | None) -> None:
    """Raises an `ImprintError` if NORM_post would use a classifier of one layer as the reference
    for proxies of several layers."""
    uses = any(isinstance(s, Quantile) and not s.as_published for s in steps_of(parts.norm_post))
    joins = any(isinstance(s, JoinLayers) for s in steps_of(parts.norm_pre))
    widths = parts.layer_widths or []
    if classifier is None or not (uses and joins and len(widths) > 1):
        return
    if classifier.shape[-1] != sum(widths):
        raise ImprintError(
            f"norm_post='quantile' takes its values from a classifier of {classifier.shape[-1]} "
            f"numbers, and the proxies have the {sum(widths)} of {len(widths)} layers: take the "
            "last layer alone (norm_pre='last', or layers='last' of the backbone), or another "
            "norm_post"
        )


def keywords_of(head: ImprintedHead) -> dict[str, Any]:
    """The keywords of the recipe of a head, for `resolve`.

    A head of an earlier version may have a random projection with fewer features than its
    `projection_dim`; the keyword is then the number that it has.
    """
    keywords = {name: v for name, v in head.settings.items() if name not in RESULTS}
    for step in steps_of(head.norm_inf):
        if isinstance(step, RandomProjection) and step.input_dim and "projection_dim" in keywords:
            projection: Any = step.projection
            keywords["projection_dim"] = projection.shape[1]
    return keywords


def _filled(
    head: ImprintedHead, proxies: Proxies, parts: Recipe, request: Request
) -> ImprintedHead:
    """Fill an empty head with proxies, on their device, and with its settings."""
    head = head.to(proxies.weights.device)
    head.fill(proxies, request.num_classes, request.class_names)
    chosen = {f"chosen_{name}": value for name, value in proxies.chosen.items()}
    head.settings = parts.parameters | {"seed": request.seed} | chosen
    return head


def _finished(
    proxies: Proxies, parts: Recipe, present: Tensor, classifier: Tensor | None
) -> Proxies:
    """Apply NORM_post to the proxies, and turn their classes, which are indices into `present`,
    into labels of the task."""
    check_reference(parts, classifier)
    norm_post: Any = parts.norm_post
    weights = norm_post.of_proxies(proxies.weights, proxies.classes, classifier)
    return proxies._replace(weights=weights, classes=present[proxies.classes])
