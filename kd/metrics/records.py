"""Records: the predictions of a run as named arrays, stored in `predictions.npz`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from kd.errors import UserError
from kd.utils.io import write_atomic

Array = NDArray[Any]
Records = Mapping[str, Array]
T = TypeVar("T")


def save_records(records: Records, path: Path, *, compressed: bool = False) -> None:
    """Write records to an .npz file, atomically.

    Raises:
        UserError: The folder is not writable or the disk is full.
    """
    save: Any = np.savez_compressed if compressed else np.savez

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # numpy would append .npz to a file name
            save(file, **records)

    write_atomic(path, write)


def gathered(part: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gather a picklable value from all ranks, in order of rank; all ranks must call this."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [part]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group=group)
    return parts


def check_arrays(records: Records, names: Iterable[str], where: str, what: str = "") -> None:
    """Raise a `UserError` if an array is missing; the message starts with `where`.

    `what` names the expected predictions in the message, such as " of boxes".
    """
    if missing := [name for name in names if name not in records]:
        raise UserError(f"{where}: no {', '.join(missing)}; not a file of predictions{what}")


def check_same_classes(own: int, other: int, pair: str) -> None:
    """Raise a `UserError` if two runs differ in their number of classes; `pair` names both runs."""
    if own != other:
        raise UserError(f"{pair} have different numbers of classes: {own} and {other}")


def class_number(metric: str, wanted: str, records: Records, num_classes: int) -> int:
    """Return the index of a class given by index or by its name in the array `names`.

    Raises:
        UserError: The class does not exist; the message starts with the metric's name.
    """
    names = [str(name) for name in records.get("names", ())]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < num_classes:
        return int(wanted)
    known = f"there are {', '.join(names)}" if names else f"there are 0 to {num_classes - 1}"
    raise UserError(f"metric '{metric}/{wanted}': no such class; {known}")
