"""Neural collapse: how tightly the samples of each class lie around their mean.

NC1 shows how multimodal the classes of a task are, and so how many proxies a class needs
(Westerhoff et al., TMLR 2025, Section 5.4). Low values mean collapsed classes. There are functions
and torchmetrics metrics.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from imprint_pl.numerics.moments import Moments
from imprint_pl.numerics.passes import blocks

# Smallest eigenvalue that counts, relative to the largest one. The rounding errors of smaller ones
# would make NC1 explode.
TOLERANCE = 1e-10
LARGEST_STATE = 4 * 2**30


def nc1(x: Tensor, y: Tensor, *, average: str = "macro", as_published: bool = False) -> float:
    """Compute NC1, the within-class over the between-class variability of embeddings.

    NC1 = tr(Σ_W Σ_B⁺) / C, with μ_c the mean of class c, μ_G the mean of all samples,
    Σ_B = (1/C) Σ_c (μ_c − μ_G)(μ_c − μ_G)ᵀ and Σ_W the average of the classes' covariances, in
    float64. The paper measures l2-normalised embeddings; this function normalises nothing.

    Args:
        x: Embeddings `(N, d)`.
        y: Integer labels `(N,)`; only the classes that occur count.
        average: "macro" gives each class the same weight, "micro" each sample.
        as_published: Subtract μ_c − μ_G from the samples of class c as the paper's code does, which
            adds μ_Gᵀ Σ_B⁺ μ_G / C.

    Returns:
        NC1, a float; NaN with a warning for fewer than two classes.

    Source: Papyan et al. 2020; Westerhoff et al. 2025, Section 3.4.

    >>> x = torch.tensor([[-1.0], [1.0], [3.0], [4.0], [5.0]])
    >>> y = torch.tensor([0, 0, 1, 1, 1])
    >>> round(nc1(x, y), 4)  # Σ_W = (1 + 2/3) / 2, μ_G = 2.4, Σ_B = (2.4² + 1.6²) / 2
    0.1002
    """
    _check_average(average)
    classes, y = torch.unique(y, return_inverse=True)
    if len(classes) < 2:
        return _too_few_classes(len(classes))
    moments = Moments.of(x, y, len(classes), gram="none")
    projector = _between_pseudo_root(moments)
    weights = torch.ones_like(moments.counts) if average == "micro" else 1 / moments.counts
    # Only the part of Σ_W inside the span of the class means counts. It needs C numbers per sample
    # instead of d².
    trace = 0.0
    means = moments.means
    for block in blocks(len(x), "NC1"):
        labels = y[block]
        centred = (x[block].to(projector.dtype) - means[labels]) @ projector
        trace += (centred.square().sum(1) * weights[labels]).sum().item()
    trace /= (weights * moments.counts).sum().item()
    if as_published:
        trace += (moments.global_mean @ projector).square().sum().item()
    return trace / len(classes)


def vci(x: Tensor, y: Tensor, *, average: str = "macro", as_published: bool = False) -> float:
    """Compute the variability collapse index: 1 − tr(Σ_T⁺ Σ_B) / rank(Σ_B), Σ_T = Σ_W + Σ_B.

    It is 0 if the classes are collapsed to their means, and 1 if the means contain no information
    on the classes. Computed in float64.

    Args:
        x: Embeddings `(N, d)`.
        y: Integer labels `(N,)`; only the classes that occur count.
        average: As in `nc1`.
        as_published: As in `nc1`.

    Returns:
        VCI, a float; NaN with a warning for fewer than two classes.

    Source: Xu and Liu 2023, "Quantifying the Variability Collapse of Neural Networks".

    >>> x = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 0.0], [4.0, 2.0]])
    >>> abs(round(vci(x, torch.tensor([0, 0, 1, 1])), 4))
    0.0
    """
    _check_average(average)
    classes, y = torch.unique(y, return_inverse=True)
    if len(classes) < 2:
        return _too_few_classes(len(classes))
    weights = 1 / torch.bincount(y).double() if average == "macro" else None
    moments = Moments.of(x, y, len(classes), class_weights=weights)
    return vci_of_moments(moments, average, as_published)


def nc1_of(moments: Moments, *, average: str = "macro", as_published: bool = False) -> float:
    """Compute `nc1` from sums of embeddings.

    Args:
        moments: Sums with the Gram matrix that `Moments.within(average)` needs; only classes with
            samples count.
        average: As in `nc1`.
        as_published: As in `nc1`.

    Returns:
        NC1, as `nc1`.
    """
    moments = moments.present()
    if moments.num_classes < 2:
        return _too_few_classes(moments.num_classes)
    projector = _between_pseudo_root(moments)
    trace = ((moments.within(average) @ projector) * projector).sum()
    if as_published:
        trace = trace + (moments.global_mean @ projector).square().sum()
    return trace.item() / moments.num_classes


class _CollapseMetric(Metric):
    """Adds up over batches and ranks; how samples are distributed does not change the value.

    Args:
        num_classes: C; classes that never occur do not count.
        embedding_dim: d.
        average: "macro" or "micro", as in `nc1`.
        class_counts: Number of samples of each class, `(C,)`, if known beforehand. Without them
            "macro" keeps a Gram matrix for each class, `8 C d²` bytes; with them one, `8 d²`.
        as_published: As in `nc1`.
    """

    counts: Tensor
    sums: Tensor
    gram: Tensor
    class_weights: Tensor | None

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(
        self,
        num_classes: int,
        embedding_dim: int,
        *,
        average: str = "macro",
        class_counts: Tensor | None = None,
        as_published: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_average(average)
        self.average, self.as_published = average, as_published
        per_class = average == "macro" and class_counts is None
        size = 8 * embedding_dim**2 * (num_classes if per_class else 1)
        if size > LARGEST_STATE:
            raise ValueError(
                f"{type(self).__name__} would keep {size / 2**30:.1f} GiB of sums for "
                f"num_classes={num_classes}, embedding_dim={embedding_dim}: give class_counts, "
                'or average="micro"'
            )
        weights = None
        if average == "macro" and class_counts is not None:
            weights = 1 / torch.as_tensor(class_counts).double().clamp(min=1)
        zeros = Moments.zeros(
            num_classes,
            embedding_dim,
            gram="per_class" if per_class else "pooled",
            class_weights=weights,
        )
        for name in ("counts", "sums", "gram"):
            self.add_state(name, getattr(zeros, name), dist_reduce_fx="sum")
        self.class_weights = zeros.class_weights

    def update(self, x: Tensor, y: Tensor) -> None:
        """Add embeddings `x (B, d)` with labels `y (B,)` in 0..C−1."""
        self._moments().add(x.to(self.sums.device), y.to(self.sums.device))

    def _moments(self) -> Moments:
        weights = self.class_weights
        if weights is not None:
            weights = weights.to(self.sums.device)
        return Moments(self.counts, self.sums, self.gram, weights)

    def compute(self) -> Tensor:
        moments = self._moments().present()
        if moments.num_classes < 2:
            return torch.tensor(_too_few_classes(moments.num_classes))
        return torch.tensor(self._value(moments), dtype=torch.float64)

    def _value(self, moments: Moments) -> float:
        raise NotImplementedError


class NC1(_CollapseMetric):
    __doc__ = f"""NC1 as a torchmetrics metric. See `nc1`. {_CollapseMetric.__doc__}"""

    def _value(self, moments: Moments) -> float:
        return nc1_of(moments, average=self.average, as_published=self.as_published)


class VCI(_CollapseMetric):
    __doc__ = f"""VCI as a torchmetrics metric. See `vci`. {_CollapseMetric.__doc__}"""

    def _value(self, moments: Moments) -> float:
        return vci_of_moments(moments, self.average, self.as_published)


def vci_of_moments(moments: Moments, average: str = "macro", as_published: bool = False) -> float:
    """Compute `vci` from sums with a Gram matrix, where every class has a sample."""
    deviations = (moments.means - moments.global_mean) / moments.num_classes**0.5
    within = moments.within(average)
    if as_published:
        within = within + torch.outer(moments.global_mean, moments.global_mean)
    total = within + deviations.T @ deviations
    values, vectors = _eigh(total)
    kept = values > TOLERANCE * values[-1]
    projected = deviations @ vectors[:, kept]
    trace = (projected.square() / values[kept]).sum().item()
    rank = _between_pseudo_root(moments).shape[1]
    return 1 - trace / rank if rank else float("nan")


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, ascending, and the eigenvectors of a symmetric matrix `(d, d)`."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        # With few samples nearly all eigenvalues are 0, and the fast algorithm (divide and conquer)
        # sometimes does not converge. The slower QR algorithm does.
        from scipy.linalg import eigh

        values, vectors = map(torch.from_numpy, eigh(matrix.cpu().numpy(), driver="ev"))
        return values.to(matrix), vectors.to(matrix)


def _between_pseudo_root(moments: Moments) -> Tensor:
    """Return R `(d, rank)` with Σ_B⁺ = R Rᵀ, from the singular vectors of the class means."""
    deviations = (moments.means - moments.global_mean) / moments.num_classes**0.5
    _, values, rows = torch.linalg.svd(deviations, full_matrices=False)
    kept = values.square() > TOLERANCE * values[:1].square()
    return rows[kept].T / values[kept]


def _check_average(average: str) -> None:
    if average not in ("macro", "micro"):
        raise ValueError(f'average={average!r}: expected "macro" or "micro"')


def _too_few_classes(number: int) -> float:
    warnings.warn(
        f"neural collapse compares classes, and there is {number}: the value is NaN",
        stacklevel=3,
    )
    return float("nan")
