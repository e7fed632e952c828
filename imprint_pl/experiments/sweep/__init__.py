"""Many recipes on many tasks: a grid on one machine, or on several, see `run.py`.

`read.py` and `grid.py` make configurations of a YAML, `plan.py` deals them into units of work, and
`work.py` does a unit: `samples.py` has its rows, `proxies.py` GEN, `scores.py` NORM_post to AGG,
`unshared.py` what shares nothing.
"""

from imprint_pl.experiments.sweep.read import checked_sweep, read_sweep
from imprint_pl.experiments.sweep.run import CHUNK_BYTES, describe, sweep

__all__ = ["CHUNK_BYTES", "checked_sweep", "describe", "read_sweep", "sweep"]
