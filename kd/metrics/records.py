"""Records: the predictions of a run as arrays by name, which `predictions.npz` holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from kd.utils.io import write_atomic

Array = NDArray[Any]
Records = Mapping[str, Array]
T = TypeVar("T")


def save_records(records: Records, path: Path, *, compressed: bool = False) -> None:
    """Write records as an .npz file, atomically.

    Raises:
        UserError: The folder cannot be written or the disk is full.
    """
    save: Any = np.savez_compressed if compressed else np.savez

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # given a name, numpy would append its own suffix
            save(file, **records)

    write_atomic(path, write)


def gathered(part: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Values of every rank, pickled, in order of rank; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [part]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group=group)
    return parts
