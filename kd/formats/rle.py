"""Validate, decode and encode COCO's run-length encoding of masks."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as rle_masks


def pixels_of(packed: bytes) -> int:
    """Count the pixels that compressed run lengths cover; -1 if they are malformed.

    Check this before decoding: pycocotools returns uninitialised memory if too few are covered. The
    format is that of `rleToString` in the COCO API.
    """
    chunks = np.frombuffer(packed, np.uint8).astype(np.int64) - 48
    if not len(chunks) or chunks.min() < 0 or chunks.max() > 63 or chunks[-1] & 32:
        return -1
    ends = np.flatnonzero(chunks & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 6:
        return -1
    position = np.arange(len(chunks)) - np.repeat(starts, ends - starts + 1)
    numbers = np.add.reduceat((chunks & 31) << (5 * position), starts)
    numbers -= np.where(chunks[ends] & 16, 1 << (5 * (ends - starts + 1)), 0)
    runs = np.concatenate([numbers[:1], np.cumsum(numbers[1::2]), np.cumsum(numbers[2::2])])
    return int(runs.sum()) if runs.min() >= 0 else -1


def decode(rle: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """Decode compressed COCO run lengths, `{"size", "counts"}`, to a mask (H, W)."""
    with warnings.catch_warnings():
        # pycocotools 2.0 lacks NumPy 2's `copy` argument and causes a warning; the mask is correct.
        warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
        return np.asarray(rle_masks.decode(rle), dtype=np.bool_)


def encode(mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Encode a mask (H, W) as compressed COCO run lengths, `{"size", "counts"}`, ready for JSON."""
    rle = rle_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def resize_nearest(mask: npt.NDArray[np.bool_], size: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Resize a mask to (height, width) with nearest-neighbour sampling."""
    if mask.shape == size:
        return mask
    rows, columns = (
        ((np.arange(target) + 0.5) * source / target).astype(np.int64)
        for target, source in zip(size, mask.shape, strict=True)
    )
    resized: npt.NDArray[np.bool_] = mask[rows[:, None], columns]
    return resized
