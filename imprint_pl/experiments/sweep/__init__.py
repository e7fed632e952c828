"""Many recipes on many tasks: a grid on one machine, or on several, see `run.py`.

`read.py` and `grid.py` make configurations of a YAML, `plan.py` deals them into units of work, and
`work.py` does a unit: `samples.py` has its rows, `proxies.py` GEN, `scores.py` NORM_post to AGG,
`unshared.py` what shares nothing.
"""

from imprint_pl.errors import needs
from imprint_pl.experiments import CHUNK_BYTES

with needs("sweep", "sweep"):
    import pyarrow  # noqa: F401, here, so that a missing one is named before the work

    from imprint_pl.experiments.sweep.read import checked_sweep, read_sweep
    from imprint_pl.experiments.sweep.run import describe, sweep

__all__ = ["CHUNK_BYTES", "checked_sweep", "describe", "read_sweep", "sweep"]
