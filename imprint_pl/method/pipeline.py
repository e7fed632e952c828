"""The figure, run once from left to right: checked embeddings through the five parts into a head.

`imprinting.py` says above what users give, `auto.py` runs this for many candidates, and
`holdout.py` for heads that have not seen some samples.
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
    """What is asked of a head beside its recipe; see `imprint` for each.

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
    """A head, and the sums that it was made of, where samples can be held out of them."""

    head: ImprintedHead
    sums: Sums | None


def row_weights(y: Tensor, gen: Any, sample_weight: Tensor | None = None) -> Tensor | None:
    """The weights `(N,)` of samples with labels `y (N,)`, float64, N in all; `None` where all weigh
    alike.

    They are `sample_weight (N,)`, all above 0, times what makes the sums of the classes equal where
    GEN has `class_weight="balanced"`.
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

    Random choices follow the places of the rows: `in_order` makes them depend on the set of rows
    alone. A class without samples gets no proxy. `weights (N,)` are those of `row_weights`, which
    the recipe decides on by default.
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
    """An orthonormal basis of the space that N samples span, `(d, N)`, as the N reflections that
    LAPACK makes of them: the matrix itself would take as long again.

    Attributes:
        reflections, scale: `(d, N)` and `(N,)`, as `torch.geqrf` gives them.
    """

    reflections: Tensor
    scale: Tensor

    @classmethod
    def of(cls, z: Tensor) -> tuple[Basis, Tensor]:
        """The basis of samples `z (N, d)`, N < d, and their coordinates `(N, N)`, float64."""
        basis = cls(*torch.geqrf(double(z).T))
        return basis, basis.reflections[: len(z)].triu().T

    def turn_back(self, coordinates: Tensor) -> Tensor:
        """Coordinates `(P, N)` → `(P, d)`, float64."""
        padded = self.reflections.new_zeros(len(self.reflections), len(coordinates))
        padded[: coordinates.shape[1]] = coordinates.T
        return torch.ormqr(self.reflections, self.scale, padded).T


@dataclass(frozen=True)
class Sums:
    """Training embeddings as sums of NORM_pre(x): of them a head is made, and heads without some
    samples.

    With fewer samples than features, they may be the sums of coordinates in the space that the
    samples span: the Gram matrix is then `(N, N)`, and the proxies are the same.

    Attributes:
        norm_pre, norm_inf: fitted.
        moments: the sums, of C classes.
        rows: `(N, q)`, the samples as they were added up, where these are few.
        basis: the space of such coordinates; `None` where the sums are those of NORM_pre(x).
        device: where proxies go that a basis gives.
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
        """Fits NORM_pre, and what NORM_inf shares with it, on `x (N, d)`, `y (N,)`; adds x up, with
        its `weights (N,)` where it has any."""
        norm_pre = norm_pre.to(x.device)
        if not isinstance(norm_pre, Norm):
            return cls.of(norm_pre, norm_inf, gen, x, y, request.num_classes, weights)
        present, labels = torch.unique(y, return_inverse=True)
        if few_for(gen, norm_pre, x):
            norm_pre.fit(x, labels, len(present), request.seed)
            return cls.of(norm_pre, norm_inf, gen, x, y, request.num_classes, weights)
        if len(x) <= CHUNK and not learns_from_sums(norm_pre):
            # One chunk is whole in memory in any case. Kept, it need not be computed again for the
            # rows that are left out or held out.
            z = norm_pre.fit_transform(x, labels, len(present), request.seed)
            moments = Moments.of(z, y, request.num_classes, weights, gram=gram_of(gen))
            return cls(norm_pre, norm_inf, moments, z)
        more = {} if weights is None else {"weights": weights}
        moments = norm_pre.fit_sums(x, labels, len(present), request.seed, gram_of(gen), **more)
        return cls(norm_pre, norm_inf, moments.relabelled(present, request.num_classes))

    @classmethod
    def of_kept(cls, norm_pre: Any, norm_inf: nn.Module, moments: Moments) -> Sums:
        """Takes sums that were kept of samples which went by; see `kept_sums`.

        Where they are sums of the samples before NORM_pre, copies of NORM_pre and NORM_inf learn
        from them.
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
        """What GEN makes of these sums, or of others in the same space, of the same classes;
        classes are numbered without those that have no samples."""
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
        """Makes the proxies of these sums, or of others in the same space, of the same classes."""
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
    """Whether GEN gives the same for `x (N, d)`, fewer than features, in the space that they span.

    It does where its proxies lie in that space, and turn with it.
    """
    if not (getattr(gen, "spans", False) and gen.lam != 0 and isinstance(norm_pre, Norm)):
        return False
    return len(x) < norm_pre.features(x.shape[1], len(x))


def holds_out_of_sums(parts: Recipe) -> bool:
    """Whether a head without some samples is that of the sums of all less those of the samples.

    Another such head is then cheap. A NORM_pre that looks at labels is to be fitted anew.
    """
    return parts.gen.from_moments and not getattr(parts.norm_pre, "uses_labels", False)


def gram_of(gen: Any) -> str:
    """The Gram matrix that a GEN needs, as `Moments.zeros` takes it."""
    return "pooled" if gen.needs_gram else "none"


def learns_from_sums(norm_pre: nn.Module) -> bool:
    """Whether NORM_pre learns from the sums of all samples, which are kept as they come."""
    return getattr(norm_pre, "from_moments", False)


def kept_gram(parts: Recipe) -> str:
    """The Gram matrix of the sums that are kept for a recipe, as `Moments.zeros` takes it."""
    gram = gram_of(parts.gen)
    return "diagonal" if gram == "none" and learns_from_sums(parts.norm_pre) else gram


def kept_sums(parts: Recipe, norm_pre: nn.Module, x: Tensor, y: Tensor, classes: int) -> Moments:
    """The sums to keep of `x (N, d)`, `y (N,)`: of NORM_pre(x), or of x where NORM_pre
    `learns_from_sums`."""
    if learns_from_sums(norm_pre):
        return Moments.of(x, y, classes, gram=kept_gram(parts))
    return sums_of(norm_pre, x, y, classes, kept_gram(parts))


def check_reference(parts: Recipe, classifier: Tensor | None) -> None:
    """Raises an `ImprintError` where NORM_post takes a classifier of one layer as the reference for
    proxies of several."""
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

    A head of an earlier version may have a random projection of fewer features than were asked for;
    then as many as it has.
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
    """The empty head with its proxies, on their device, and its settings."""
    head = head.to(proxies.weights.device)
    head.fill(proxies, request.num_classes, request.class_names)
    chosen = {f"chosen_{name}": value for name, value in proxies.chosen.items()}
    head.settings = parts.parameters | {"seed": request.seed} | chosen
    return head


def _finished(
    proxies: Proxies, parts: Recipe, present: Tensor, classifier: Tensor | None
) -> Proxies:
    """The proxies after NORM_post, with labels of the task instead of places among `present`."""
    check_reference(parts, classifier)
    norm_post: Any = parts.norm_post
    weights = norm_post.of_proxies(proxies.weights, proxies.classes, classifier)
    return proxies._replace(weights=weights, classes=present[proxies.classes])
