"""Estimates the memory and the disk space of an imprint epoch, and raises before the run if the
machine does not have them. Otherwise the kernel might kill the process in the middle of the run.
"""

from __future__ import annotations

from imprint_pl.numerics.copies import projected_bytes
from imprint_pl.numerics.large import COPIES, FILES, check_disk, check_in_memory, fits, in_gib, room

# Estimates below this many bytes are not mentioned.
WORTH_SAYING = 2**30


def check_room(samples: int, dim: int, in_memory: str | None = None) -> str | None:
    """Checks that embeddings can be kept and imprinted on this machine, in memory or in files.

    Files are used if the embeddings do not fit into the memory budget.

    Args:
        samples: the number of embeddings.
        dim: the number of float32 values in each.
        in_memory: why the embeddings have to be in memory; `None` if files will do.

    Returns:
        A sentence with the estimate if it is above a GiB, otherwise `None`.

    Raises:
        ImprintError: the machine has neither the memory nor the disk.
    """
    embeddings = 4 * samples * dim
    if in_memory is not None or fits(embeddings):
        estimate = check_in_memory(samples, dim, in_memory or "they fit into memory_budget")
    else:
        files = FILES * embeddings + projected_bytes(samples, dim)
        disk = check_disk(files)
        reason = f" ({disk.passed_over})" if disk.passed_over else ""
        estimate = (
            f"the embeddings of {samples:,} images take {in_gib(embeddings)}, imprinting them in "
            f"memory some {in_gib(COPIES * embeddings)}, more than memory_budget, "
            f"{in_gib(COPIES * room())}: they go to files in {disk.folder}{reason} of up to "
            f"{in_gib(files)}, which vanish with the run"
        )
    return estimate if COPIES * embeddings > WORTH_SAYING else None
