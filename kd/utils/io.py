"""Files that are written whole or not at all, and where they go if not where they belong."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kd.errors import UserError

PARTIAL = ".partial"  # how files end that are still being written; a kill leaves them behind


def in_cache(kind: str, of: Path, name: str) -> Path:
    """Where what was made from a path is kept that cannot lie beside it.

    In `$KD_CACHE`, or in `~/.cache/kd` where that is not set.

    Args:
        kind: A folder of the cache.
        of: The path; two of them never share a place.
        name: What it would be called beside that.
    """
    cache = Path(os.environ.get("KD_CACHE") or "~/.cache/kd").expanduser()
    place = hashlib.sha256(os.fsencode(of.resolve())).hexdigest()[:12]
    return cache / kind / f"{place}-{name}"


def write_whole(path: Path, write: Any) -> None:
    """Write through a temporary file, so that a kill or a full disk leaves the old one.

    Args:
        path: The file to be.
        write: Called with the temporary path.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise UserError(
            f"{path}: cannot be written: {error}. What was there before is unharmed; "
            "make room or name another folder with --out, then --resume"
        ) from error
