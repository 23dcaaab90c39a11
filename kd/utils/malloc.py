"""How the C library gives out memory for tensors on a CPU."""

from __future__ import annotations

import ctypes
import os

# glibc's names for what `mallopt` sets (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = 2**31 - 1  # bytes of free memory that a process keeps for itself; the most an int says
_FROM_HEAP = 2**30  # bytes below which a block comes from memory once used
# A user who tuned glibc has decided already.
_TUNED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Use freed blocks again, large ones too, instead of handing them back to the system.

    glibc asks the system anew for each block above 32 MiB, and the system fills it with zeros page
    by page at its first use. The feature maps of a few photographs are such blocks, at each layer
    of each step. A network's blocks have the same sizes at every step, so that few more are held
    than are in use. What that costs and what it gains: `benchmarks/allocator.py`.

    Returns:
        Whether it was done: not with another C library than glibc, nor against a user's settings.
    """
    if os.name != "posix" or any(name in os.environ for name in _TUNED):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_MMAP_THRESHOLD, _FROM_HEAP), (_TRIM_THRESHOLD, _KEPT))
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)
