"""The AGGs by name."""

from __future__ import annotations

from imprint_pl.parts.agg.logsumexp import LogSumExp
from imprint_pl.parts.agg.max import Max
from imprint_pl.parts.agg.nearest import NearestProxies

AGGS = {part.name: part for part in (Max, NearestProxies, LogSumExp)}
