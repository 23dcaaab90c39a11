"""Splits of published datasets, and random subsets of images chosen by hashes of ids or names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd.errors import UserError
from kd.formats.coco import CocoIndex

_SUFFIXES = (".jpg", ".jpeg", ".png")


def labelled_images(index: CocoIndex, fraction: float, seed: int) -> NDArray[np.int64] | None:
    """Choose the ids of the images whose labels a student may use; None if it may use all labels.

    The images are chosen by a hash of (seed, image id), independent of their order in the file.
    """
    if fraction >= 1.0:
        return None
    positions = np.array([_hash_to_unit(f"labelled/{seed}/{i}") for i in index.image_ids.tolist()])
    count = max(1, round(fraction * len(positions)))
    return np.asarray(index.image_ids[np.argsort(positions, kind="stable")[:count]], dtype=np.int64)


def objects_on(
    index: CocoIndex, images: Collection[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the objects in images with these ids (None: all), and the image index of each row."""
    owners = np.repeat(np.arange(len(index)), np.diff(index.first))
    rows = np.arange(len(owners))
    if images is not None:
        rows = np.flatnonzero(np.isin(index.image_ids, list(images))[owners])
    return rows, owners[rows]


def fold_of(image_ids: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Assign each image to a fold, 0..folds-1, by a hash of its id: (K,)."""
    positions = [_hash_to_unit(f"fold/{i}") for i in image_ids.tolist()]
    return np.minimum((np.array(positions) * folds).astype(np.int64), folds - 1)


def _hash_to_unit(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    return float(int.from_bytes(digest[:7], "big")) / float(1 << 56)


def random_split(names: Sequence[str], fraction: float, seed: int) -> set[str]:
    """Choose image names for the val split of a dataset without published splits.

    Names are ranked by a hash of (seed, name), so adding or removing an image moves at most one
    other image between the splits. With two or more images, neither split is empty.
    """
    order = sorted(names, key=lambda name: _hash_to_unit(f"val/{seed}/{name}"))
    count = min(max(1, round(fraction * len(order))), max(1, len(order) - 1))
    return set(order[:count])


@dataclass(frozen=True)
class Layout:
    """A published layout of a dataset's files.

    `open` opens a split, given the dataset's folder, the split name and further options. `holds` is
    the relative path that identifies the layout, or a function from a split name to this path.
    `splits` lists the split names in a dataset's folder: by default train and val, split at random.
    """

    open: Callable[..., Any]
    holds: str | Callable[[str], str]
    splits: Callable[[Path], Iterable[str]] = lambda root: ("train", "val")

    def known_by(self, split: str) -> str:
        """Relative path by which a folder in this layout is recognised, given a split's name."""
        return self.holds if isinstance(self.holds, str) else self.holds(split)

    def check(self, root: Path, layout: str, split: str) -> None:
        """Raise a UserError unless folder `root` is in this layout and has the split."""
        if not (root / self.known_by(split)).exists():
            raise UserError(
                f"{root}: no {self.known_by(split)} in it, so it is not the folder of {layout}; "
                "set it with --set data.root=DIR"
            )
        if split not in (known := sorted(self.splits(root))):
            known_splits = ", ".join(known)
            raise UserError(f"{root}: {layout} has no split {split!r} there; it has {known_splits}")


def image_files(folder: Path) -> list[Path]:
    """List the image files in a folder, sorted by name."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: image folder cannot be read: {error.strerror}") from None
    return [folder / name for name in names if Path(name).suffix.lower() in _SUFFIXES]


def images_in(folder: Path) -> dict[str, Path]:
    """Map file names without suffix to the paths of the images in a folder."""
    return {path.stem: path for path in image_files(folder)}


def check_files(files: Mapping[str, Sequence[Path]]) -> None:
    """Raise a UserError for missing files; the keys, e.g. "label map", appear in the message."""
    for kind, paths in files.items():
        if missing := [path for path in paths if not path.is_file()]:
            raise UserError(
                f"{missing[0]}: this {kind} is missing ({len(missing)} of {len(paths)} are)"
            )
