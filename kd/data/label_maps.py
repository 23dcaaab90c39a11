"""Label maps: files that say the class of each pixel, read as ids, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from kd.data.images import UNREADABLE
from kd.errors import UserError
from kd.metrics.segmentation import VOID

_IDS = ("L", "P", "1")  # Pillow's kinds whose pixels are numbers of up to 8 bits
_STRETCHED = ("L;2", "L;4")  # grey PNGs of 2 and 4 bits, whose numbers Pillow spreads over 0..255
UNKNOWN = -1  # in a table: a number that may not be in a file

Table = NDArray[np.int16]  # (256,): what a number in a file means


def id_table(classes: Mapping[int, int] | int, *, void: int | tuple[int, ...] = ()) -> Table:
    """What each number in a file means: a class, `VOID`, or that it may not be there.

    Args:
        classes: Numbers to classes, or C where 0..C-1 are the classes themselves.
        void: Numbers that are no class.
    """
    table = np.full(256, UNKNOWN, np.int16)
    pairs = {c: c for c in range(classes)} if isinstance(classes, int) else dict(classes)
    for number, label in pairs.items():
        table[number] = label
    for number in (void,) if isinstance(void, int) else void:
        table[number] = VOID
    return table


def read_label_map(path: Path, table: Table, *, expected: tuple[int, int] | None = None) -> Tensor:
    """Decode a label map; palettes are ignored, the numbers count.

    Args:
        path: A PNG of 8 bits, grey or with a palette.
        table: What the numbers mean.
        expected: Height and width of its image.

    Returns:
        (H, W) uint8: classes, `VOID` where there is none.

    Raises:
        UserError: The file is missing or broken, holds colours, 16 bits or grey of 2 or 4, is of
            another size than its image, or has a number that the table does not know.
    """
    try:
        with Image.open(path) as picture:
            mode = picture.mode
            if mode not in _IDS:
                raise UserError(_wrong_kind(path, mode))
            if picture.tile and picture.tile[0].args in _STRETCHED:
                raise UserError(
                    f"{path}: a grey label map of {picture.tile[0].args[-1]} bits; write it with 8"
                )
            numbers = np.asarray(picture).astype(np.uint8)
    except UserError:  # a ValueError too
        raise
    except FileNotFoundError as error:
        raise UserError(f"{path}: the label map is missing") from error
    except UNREADABLE as error:
        raise UserError(f"{path}: this label map cannot be read: {error}") from error
    if expected is not None and numbers.shape != expected:
        height, width = numbers.shape
        raise UserError(
            f"{path}: the label map is {width} x {height}, its image {expected[1]} x {expected[0]}"
            "; scale it without interpolation (nearest), or find the right one"
        )
    labels = table[numbers]
    if (wrong := labels == UNKNOWN).any():
        row, column = (int(place) for place in np.argwhere(wrong)[0])
        found = ", ".join(str(number) for number in np.unique(numbers[wrong])[:5].tolist())
        raise UserError(
            f"{path}: {found} not among the ids of this data set, first at x {column}, y {row} "
            f"({int(wrong.sum())} pixels)"
        )
    return torch.from_numpy(labels.astype(np.uint8))


def _wrong_kind(path: Path, mode: str) -> str:
    if mode.startswith("I"):
        return f"{path}: a label map of 16 bits; write it with 8 (ids of 0 to 255)"
    return (
        f"{path}: a picture of colours ({mode}), not of class ids; write a grey or palette PNG "
        "whose numbers are the ids"
    )
