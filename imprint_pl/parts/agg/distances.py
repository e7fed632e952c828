"""Distances between samples and proxies, for the aggregation of the m nearest proxies."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from imprint_pl.numerics.values import SMALLEST_LENGTH

DISTANCES = ("euclidean", "cosine", "manhattan", "chebyshev", "mahalanobis")
REGULARISATION = 1e-6


def distances(z: Tensor, proxies: Tensor, distance: str) -> Tensor:
    """Compute the distances between samples and proxies.

    Args:
        z: Samples `(B, d)`.
        proxies: Proxies `(P, d)`.
        distance: One of `DISTANCES` but "mahalanobis".

    Returns:
        `(B, P)`.
    """
    if distance == "cosine":
        z, proxies = (
            functional.normalize(rows, dim=1, eps=SMALLEST_LENGTH) for rows in (z, proxies)
        )
        # Rounding can make a distance negative, and with it a vote by distance.
        return (1 - z @ proxies.T).clamp(min=0)
    if distance == "euclidean":
        # Near the origin |z|² − 2 z·p + |p|² loses fewer digits.
        centre = proxies.mean(0)
        return _euclidean(z - centre, proxies - centre)
    if torch.compiler.is_exporting():
        apart = (z[:, None] - proxies).abs()
        return apart.sum(2) if distance == "manhattan" else apart.amax(2)
    return torch.cdist(z, proxies, p=1 if distance == "manhattan" else torch.inf)


def _euclidean(z: Tensor, proxies: Tensor) -> Tensor:
    if not torch.compiler.is_exporting():
        return torch.cdist(z, proxies)
    # ONNX has no cdist.
    squares = z.square().sum(1, keepdim=True) + proxies.square().sum(1)
    return (squares - 2 * z @ proxies.T).clamp(min=0).sqrt()


class Mahalanobis:
    """Distances under S = Cov(proxies) + 1e-6 I, in float64.

    With the eigenvectors u_i and eigenvalues λ_i of the covariance that are not 0,
    d²(z, p) = |z_⊥|² / 1e-6 + Σ_i (u_i · (z − p))² / (λ_i + 1e-6); z_⊥ is the part of z − mean
    outside the span of the u_i. With fewer proxies than dimensions all distances share this large
    first term, and the inverse of the d × d matrix is not needed.

    Args:
        proxies: `(P, d)`.
    """

    def __init__(self, proxies: Tensor) -> None:
        proxies = proxies.double()
        self.mean = proxies.mean(0)
        deviations = (proxies - self.mean) / max(len(proxies) - 1, 1) ** 0.5
        if deviations.shape[0] < deviations.shape[1]:
            _, singular, rows = torch.linalg.svd(deviations, full_matrices=False)
            values, vectors = singular.square(), rows.T
        else:
            values, vectors = torch.linalg.eigh(deviations.T @ deviations)
        kept = values > 1e-12 * values.max().clamp(min=1e-300)
        self.vectors = vectors[:, kept]
        self.scale = (values[kept] + REGULARISATION).rsqrt()

    def __call__(self, z: Tensor, proxies: Tensor) -> Tensor:
        """`z (B, d)` → `(B, P)`, float64."""
        z = z.double() - self.mean
        inside = z @ self.vectors
        outside = (z.square().sum(1) - inside.square().sum(1)).clamp(min=0)
        projected = (proxies.double() - self.mean) @ self.vectors
        near = _euclidean(inside * self.scale, projected * self.scale)
        return (near.square() + outside[:, None] / REGULARISATION).sqrt()
