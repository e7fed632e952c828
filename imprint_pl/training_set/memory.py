"""How much memory an imprint epoch will take, and whether the machine has it: an error before the
run beats the kernel's in the middle of it.
"""

from __future__ import annotations

from pathlib import Path

import psutil

from imprint_pl.errors import ImprintError

# Of GEN, of the bytes of the embeddings that it sees: themselves, in order, normalised, clustered,
# of the folds that choose a temperature. Measured with k-means, before they were put in order: 3.3
# to 4.2.
COPIES = 5.5


# Less than this is not worth a word.
WORTH_SAYING = 2**30


def check_memory(samples: int, dim: int) -> str | None:
    """Whether `samples` embeddings of `dim` float32 numbers can be kept and imprinted here.

    Returns:
        A sentence with the estimate, where it is above a GiB.

    Raises:
        ImprintError: the machine does not have so much.
    """
    embeddings = 4 * samples * dim
    needed, free = int(COPIES * embeddings), available_bytes()
    estimate = (
        f"the embeddings of {samples:,} images take {_size(embeddings)}, imprinting them some "
        f"{_size(needed)}, and {_size(free)} of memory are available"
    )
    if needed > free:
        fits = max(1, int(free / (COPIES * 4 * dim)))
        raise ImprintError(
            f"{estimate}: bound them with max_per_class (room is for {fits:,} in all), or take a "
            "recipe that needs sums alone, such as ridge or ranpac"
        )
    return estimate if needed > WORTH_SAYING else None


def available_bytes() -> int:
    """What this process may still take: of the machine, or of the control group (container) that it
    runs in."""
    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        pairs = (line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Pages of files that are not in use, which the kernel gives back.
        cached = int(dict(pairs).get("inactive_file", 0))
    except (OSError, ValueError):  # no such group, or "max"
        return free
    return min(free, limit - used + cached)


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB"
