"""How much memory and disk an imprint epoch will take, and whether the machine has it: an error
before the run beats the kernel's in the middle of it.
"""

from __future__ import annotations

from imprint_pl.numerics.copies import projected_bytes
from imprint_pl.numerics.large import COPIES, FILES, check_disk, check_in_memory, fits, in_gib, room

# Less than this is not worth a word.
WORTH_SAYING = 2**30


def check_room(samples: int, dim: int, in_memory: str | None = None) -> str | None:
    """Whether `samples` embeddings of `dim` float32 numbers can be kept and imprinted here: in
    memory, or in files where they do not fit into the budget.

    Args:
        in_memory: why they have to be in memory, where they do.

    Returns:
        A sentence with the estimate, where it is above a GiB.

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
