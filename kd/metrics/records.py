"""Records: the predictions of a run as arrays by name, which `predictions.npz` holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.utils.io import write_atomic

Array = NDArray[Any]
Records = Mapping[str, Array]


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
