"""Tuning of glibc's memory allocator for tensors on the CPU."""

from __future__ import annotations

import ctypes
import os

# Parameters of `mallopt` in glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_FREE = 2**31 - 1  # bytes of freed memory to retain; the largest int
_FROM_HEAP = 2**30  # blocks below this size reuse freed memory
# Leave glibc alone if the user tuned it.
_TUNED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Make glibc reuse large freed blocks; return False if libc is not glibc or was configured.

    By default, glibc requests blocks above 32 MiB, such as feature maps, from the operating system
    in each step, which zeroes every page again. `benchmarks/allocator.py` measures the effect.
    Nothing changes if the user has set malloc's environment variables.
    """
    if os.name != "posix" or any(name in os.environ for name in _TUNED):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_MMAP_THRESHOLD, _FROM_HEAP), (_TRIM_THRESHOLD, _MOST_FREE))
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)
