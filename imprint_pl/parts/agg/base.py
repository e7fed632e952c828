"""The base class of all AGGs, with the attributes by which a sweep can share work."""

from __future__ import annotations

from torch import nn


class Aggregation(nn.Module):
    """The base of all AGGs, from proxies to class scores; subclasses define `forward` like `Max`.

    A sweep reads `best_product` and `by_distance` only where the class states them in its own body
    (see `parts.by_name.declared`): a subclass inherits neither.

    Attributes:
        name: what messages call it.
        best_product: a class scores as the best of its inner products with the proxies.
        by_distance: scores come from the distances to the nearest proxies, by the methods `far`,
            `nearest_of` and `vote` of `NearestProxies`.
    """

    name = "own"
    best_product = False
    by_distance = False
