"""What a data set of annotated pictures is told: checked, and which labels it may know."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from kd.data.coco import CocoIndex
from kd.data.hide import SHAPES
from kd.errors import UserError


def shares_of(
    boxes: npt.NDArray[np.float32], pictures: npt.NDArray[np.int64] | int
) -> npt.NDArray[np.float64]:
    sides = (boxes[:, 2:] - boxes[:, :2]).astype(np.float64)
    shares: npt.NDArray[np.float64] = sides.prod(axis=1) / pictures
    return shares


def check_frame(size: int, seed: int) -> None:
    if size < 1:
        raise UserError(f"size: {size} is not a number of pixels")
    if seed < 0:
        raise UserError(f"seed: {seed} is below 0")


def check_options(
    size: int,
    mode: str,
    shape: str,
    shares: tuple[float, float],
    partial: tuple[float, float] | None,
    seed: int,
) -> None:
    check_frame(size, seed)
    if mode not in ("one", "all"):
        raise UserError(f"mode: {mode!r} is unknown; use 'one' or 'all'")
    if shape not in SHAPES:
        raise UserError(f"shape: {shape!r} is unknown; use one of {', '.join(SHAPES)}")
    if not 0 <= shares[0] <= shares[1] <= 1:
        raise UserError(f"min_share {shares[0]}, max_share {shares[1]}: expected 0 <= min <= max")
    if partial is not None and not (0 <= partial[0] <= 1 and 0 <= partial[1] <= 1):
        raise UserError(f"partial: {partial}: expected a share and a progress, both in 0..1")


def known_labels(
    index: CocoIndex,
    images: npt.NDArray[np.int64],
    labelled: Collection[int] | npt.NDArray[np.int64] | None,
) -> npt.NDArray[np.bool_]:
    if labelled is None:
        return np.ones(len(images), np.bool_)
    ids = np.fromiter(labelled, np.int64, len(labelled))
    strangers = ids[~np.isin(ids, index.image_ids)]
    if len(strangers):
        raise UserError(
            f"labelled: {index.annotation_file} has no image {strangers[0]} "
            f"({len(strangers)} unknown ids)"
        )
    return np.isin(index.image_ids[images], ids)


def repeated(
    images: npt.NDArray[np.int64], known: npt.NDArray[np.bool_], times: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Images and whether their labels are known, those with labels so many times."""
    again = np.tile(np.flatnonzero(known), times - 1)
    return np.concatenate([images, images[again]]), np.concatenate([known, known[again]])
