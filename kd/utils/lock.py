"""One process at a time in a folder, so that ranks do not do the same slow work side by side."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

log = logging.getLogger(__name__)


@contextmanager
def folder_lock(folder: Path) -> Iterator[bool]:
    """Hold an advisory lock on a folder itself, which leaves no lock file behind.

    It must not be nested for one folder: the second request would wait for the first.

    Args:
        folder: An existing folder.

    Yields:
        False where the file system cannot lock folders (some network ones); then nothing is held.
    """
    handle = -1
    try:
        handle = _acquire(folder)
        yield handle >= 0
    finally:
        if handle >= 0:
            os.close(handle)  # closing releases the lock, as does the end of a killed process


def _acquire(folder: Path) -> int:
    if sys.platform == "win32":
        return -1  # goes without: what is written under this lock is written atomically anyway
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return -1
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that is writing here", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        os.close(handle)
        return -1
    return handle
