"""Records: the predictions of a run as arrays by name, which `predictions.npz` holds."""

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
    """Gather a picklable value from every rank, in order of rank; every rank must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return [part]
    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, part, group=group)
    return parts


def check_arrays(records: Records, names: Iterable[str], where: str, what: str = "") -> None:
    """Check that records have arrays with these names; messages begin with `where`.

    Raises:
        UserError: One is missing; `what` says of what predictions are expected: " of boxes".
    """
    if missing := [name for name in names if name not in records]:
        raise UserError(f"{where}: no {', '.join(missing)}; not a file of predictions{what}")


def check_same_classes(own: int, other: int, pair: str) -> None:
    """Check that two runs have equally many classes; `pair` names both in the message."""
    if own != other:
        raise UserError(f"{pair} have different numbers of classes: {own} and {other}")


def class_number(metric: str, wanted: str, records: Records, num_classes: int) -> int:
    """Number of a class given by its number or by its name in the array `names`.

    Raises:
        UserError: There is no such class; the message begins with the metric.
    """
    names = [str(name) for name in records.get("names", ())]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < num_classes:
        return int(wanted)
    known = f"there are {', '.join(names)}" if names else f"there are 0 to {num_classes - 1}"
    raise UserError(f"metric '{metric}/{wanted}': no such class; {known}")
