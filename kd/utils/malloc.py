"""Tuning of the C library's allocator for tensors on the CPU."""

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
    """Make glibc reuse large freed blocks instead of returning them to the operating system.

    By default, glibc requests every block above 32 MiB from the system, which zeroes it page by
    page at first use. The feature maps of a few photographs are such blocks, in each layer of each
    step. As the same block sizes occur in every step, reuse needs little more memory;
    `benchmarks/allocator.py` measures it.

    Returns:
        False, without any effect, if the C library is not glibc or the user has tuned it.
    """
    if os.name != "posix" or any(name in os.environ for name in _TUNED):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_MMAP_THRESHOLD, _FROM_HEAP), (_TRIM_THRESHOLD, _MOST_FREE))
    return mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)
