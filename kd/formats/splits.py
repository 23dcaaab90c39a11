"""Parts of a dataset drawn by image id, whatever the order of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from kd.formats.coco import CocoIndex


def labelled_images(index: CocoIndex, share: float, seed: int) -> NDArray[np.int64] | None:
    """Ids of the images whose labels a student may see; None = all.

    Drawn by (seed, image id), so that the choice does not depend on the order of the file.
    """
    if share >= 1.0:
        return None
    places = np.array([_hash_to_unit(f"labelled/{seed}/{i}") for i in index.image_ids.tolist()])
    count = max(1, round(share * len(places)))
    return np.asarray(index.image_ids[np.argsort(places, kind="stable")[:count]], dtype=np.int64)


def objects_on(
    index: CocoIndex, images: Collection[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the objects on images with these ids, or on all, and the place of each image."""
    owners = np.repeat(np.arange(len(index)), np.diff(index.first))
    rows = np.arange(len(owners))
    if images is not None:
        rows = np.flatnonzero(np.isin(index.image_ids, list(images))[owners])
    return rows, owners[rows]


def fold_of(image_ids: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """The fold of each image, a function of its id alone."""
    places = [_hash_to_unit(f"fold/{i}") for i in image_ids.tolist()]
    return np.minimum((np.array(places) * folds).astype(np.int64), folds - 1)


def _hash_to_unit(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    return float(int.from_bytes(digest[:7], "big")) / float(1 << 56)


def drawn_split(names: Sequence[str], share: float, seed: int) -> set[str]:
    """The names that make up a val split where a dataset comes without one.

    Drawn by (seed, name): no other image's presence moves an image to the other side by more
    than the limit's rounding.

    Args:
        names: Of all images.
        share: Of the val split; at least one image stays on either side where there are two.
        seed: Another one draws others.
    """
    order = sorted(names, key=lambda name: _hash_to_unit(f"val/{seed}/{name}"))
    count = min(max(1, round(share * len(order))), max(1, len(order) - 1))
    return set(order[:count])
