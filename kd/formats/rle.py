"""COCO's run lengths: checked, and decoded to masks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_masks


def pixels_of(packed: bytes) -> int:
    """Count the pixels that compressed run lengths cover, -1 if they are malformed.

    pycocotools does not look: where runs end early its decoder returns uninitialised memory.
    A character carries 5 bits, bit 5 says that more follow; from the fourth run on a number is the
    difference to the run two before (the COCO API's `rleToString`).
    """
    chunks = np.frombuffer(packed, np.uint8).astype(np.int64) - 48
    if not len(chunks) or chunks.min() < 0 or chunks.max() > 63 or chunks[-1] & 32:
        return -1
    ends = np.flatnonzero(chunks & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:
        return -1
    place = np.arange(len(chunks)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((chunks & 31) << (5 * place), starts)
    numbers -= np.where(chunks[ends] & 16, 1 << (5 * (ends - starts + 1)), 0)
    runs = np.concatenate([numbers[:1], np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])])
    return int(runs.sum()) if runs.min() >= 0 else -1


def decode(rle: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """A mask (H, W) from COCO's `{"size", "counts"}`, compressed."""
    with warnings.catch_warnings():
        # pycocotools 2.0 predates the copy keyword of NumPy 2; the result is right all the same.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return np.asarray(rle_masks.decode(rle), dtype=np.bool_)


def resize_nearest(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """A mask at another (height, width), each pixel taken from the nearest of its own."""
    if mask.shape == size:
        return mask
    rows, columns = (
        ((np.arange(wanted) + 0.5) * have / wanted).astype(np.int64)
        for wanted, have in zip(size, mask.shape, strict=True)
    )
    resized: npt.NDArray[np.bool_] = mask[rows[:, None], columns]
    return resized
