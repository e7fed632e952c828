"""Runs many recipes on many tasks: a grid, on one machine or on several, see `run.py`.

`read.py` and `grid.py` turn a YAML into configurations, and `plan.py` groups them into units of
work. `work.py` runs a unit, with the rows of `samples.py`, GEN in `proxies.py`, NORM_post to AGG in
`scores.py`, and configurations that share nothing in `unshared.py`.
"""

from imprint_pl.errors import needs
from imprint_pl.experiments import CHUNK_BYTES

with needs("sweep", "sweep"):
    import pyarrow  # noqa: F401, here, so that a missing one is named before the work

    from imprint_pl.experiments.sweep.read import checked_sweep, read_sweep
    from imprint_pl.experiments.sweep.run import describe, sweep

__all__ = ["CHUNK_BYTES", "checked_sweep", "describe", "read_sweep", "sweep"]
