"""The NORMs by name."""

from __future__ import annotations

from imprint_pl.parts.norm.base import NoNorm
from imprint_pl.parts.norm.centre import Centre
from imprint_pl.parts.norm.l2 import L2
from imprint_pl.parts.norm.layers import JoinLayers, LastLayer
from imprint_pl.parts.norm.nystrom import Nystrom
from imprint_pl.parts.norm.power import Power
from imprint_pl.parts.norm.quantile import Quantile
from imprint_pl.parts.norm.random_projection import RandomProjection
from imprint_pl.parts.norm.whiten import Whiten

NORMS = {part.name: part for part in (NoNorm, L2, Power)}

# Quantile is for proxies only: a single embedding at inference has no reference distribution.
PROXY_NORMS = NORMS | {Quantile.name: Quantile}

LEARNED = {part.name: part for part in (Centre, Whiten, RandomProjection, Nystrom)}

# For embeddings of several layers.
LAYERS = {part.name: part for part in (JoinLayers, LastLayer)}
