"""Subsets of a dataset chosen by image id or name, independent of the order of files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from kd.formats.coco import CocoIndex


def labelled_images(index: CocoIndex, fraction: float, seed: int) -> NDArray[np.int64] | None:
    """Ids of the labelled images; None = all.

    Chosen by (seed, image id), independent of the order of the file.
    """
    if fraction >= 1.0:
        return None
    positions = np.array([_hash_to_unit(f"labelled/{seed}/{i}") for i in index.image_ids.tolist()])
    count = max(1, round(fraction * len(positions)))
    return np.asarray(index.image_ids[np.argsort(positions, kind="stable")[:count]], dtype=np.int64)


def objects_on(
    index: CocoIndex, images: Collection[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the objects on images with these ids (None = all), and the position of each image."""
    owners = np.repeat(np.arange(len(index)), np.diff(index.first))
    rows = np.arange(len(owners))
    if images is not None:
        rows = np.flatnonzero(np.isin(index.image_ids, list(images))[owners])
    return rows, owners[rows]


def fold_of(image_ids: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Fold of each image, a function of its id only."""
    positions = [_hash_to_unit(f"fold/{i}") for i in image_ids.tolist()]
    return np.minimum((np.array(positions) * folds).astype(np.int64), folds - 1)


def _hash_to_unit(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    return float(int.from_bytes(digest[:7], "big")) / float(1 << 56)


def random_split(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Names in the val split of a dataset without splits.

    Chosen by (seed, name): adding or removing an image moves another one only by the rounding of
    the limit.

    Args:
        names: All image names.
        fraction: Fraction of the val split; both splits get at least one image if there are two.
        seed: Random seed.
    """
    order = sorted(names, key=lambda name: _hash_to_unit(f"val/{seed}/{name}"))
    count = min(max(1, round(fraction * len(order))), max(1, len(order) - 1))
    return set(order[:count])
