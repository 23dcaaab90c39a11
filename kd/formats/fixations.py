"""Fixations on images: file readers, and fixation density maps."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from kd.errors import UserError
from kd.utils.images import UNREADABLE

UNKNOWN = -1  # observer of datasets that do not identify observers
INSIDE = 0.5  # if a smaller fraction of fixations is inside the image, its size must be wrong


class Fixations(NamedTuple):
    """Fixations on one image.

    `points` is (F, 2) float64: x and y in pixels of the image file, where pixel column c spans
    c..c+1. `observers` is (F,) int64, `UNKNOWN` if the dataset does not identify observers.
    """

    points: NDArray[np.float64]
    observers: NDArray[np.int64]

    def of(self, chosen: NDArray[np.bool_]) -> Fixations:
        """Select the fixations where `chosen` (F,) is true."""
        return Fixations(self.points[chosen], self.observers[chosen])


# (index of the image in the split, (height, width)) -> its fixations, even those outside the frame.
# Raises a UserError if a file is missing, corrupt or of another size.
FixationReader = Callable[[int, tuple[int, int]], Fixations]


@dataclass(frozen=True)
class GazeSplit:
    """A split of images with fixations.

    `read` loads the fixations on an image. `degree` is the number of image pixels per degree of
    visual angle, also used as the standard deviation of the Gaussians in density maps. `maps` are
    published density maps in the order of `images`; if empty, maps are drawn from fixations.
    `where` is the file or folder of the split, for error messages.
    """

    where: str
    images: tuple[Path, ...]
    read: FixationReader
    degree: float
    maps: tuple[Path, ...] = ()

    def fixations(self, number: int, size: tuple[int, int]) -> Fixations:
        """Load the fixations that lie inside image `number` of `size` = (height, width)."""
        found, path = self.read(number, size), self.images[number]
        if not len(found.points):
            raise UserError(
                f"{path}: no fixations on this image ({self.where}); remove it from the dataset"
            )
        x, y = found.points.T
        inside = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
        if inside.mean() < INSIDE:
            raise UserError(
                f"{path}: {int((~inside).sum())} of {len(inside)} fixations lie outside of the "
                f"frame of {size[1]} x {size[0]} pixels; are they of an image of another size "
                f"({self.where})?"
            )
        return found.of(inside)

    def density(self, number: int, size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        """Fixation density of image `number` on a `grid` (h, w): (1, h, w) float32, sum 1."""
        if not self.maps:
            return gaussian_density(self.fixations(number, size).points, size, grid, self.degree)
        published = read_density(self.maps[number], expected=size)
        return normalised(F.resize(published, list(grid), antialias=True).clamp(min=0))


def gaussian_density(
    points: NDArray[np.float64], size: tuple[int, int], grid: tuple[int, int], degree: float
) -> Tensor:
    """Draw a fixation density map, a Gaussian around each fixation: (1, *grid) float32, sum 1.

    `points` are (F, 2) x, y in pixels of an image file of `size` = (height, width). `degree` is the
    Gaussians' standard deviation in these pixels. `grid` is the (height, width) of the map.
    """
    sides = []
    for axis, (pixels, places) in enumerate(zip(size, grid, strict=True)):
        centres = (torch.arange(places, dtype=torch.float64) + 0.5) * (pixels / places)
        away = centres - torch.from_numpy(points[:, 1 - axis, None].astype(np.float64))
        sides.append((-0.5 * (away / degree).square()).exp().float())  # (F, places)
    rows, columns = sides
    density = (rows.T @ columns)[None]
    if not density.any():
        raise UserError(
            f"a degree of {degree:g} pixels is too small for a grid of "
            f"{grid[1]} x {grid[0]} over {size[1]} x {size[0]} pixels; correct data.degree or "
            "increase data.size"
        )
    return normalised(density)


def normalised(maps: Tensor) -> Tensor:
    """Divide each map of (..., h, w) by its sum; maps must be non-negative and not all zero."""
    total = maps.double().sum(dim=(-2, -1), keepdim=True)
    return (maps / total).float()


def read_density(path: Path, *, expected: tuple[int, int]) -> Tensor:
    """Read a published grey density map, 8 bits or more: (1, H, W) float32, not normalised."""
    try:
        with Image.open(path) as file:
            grey = file if file.mode.startswith(("I", "F")) else file.convert("L")
            values = np.asarray(grey).astype(np.float32)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the density map is missing") from error
    except UNREADABLE as error:
        raise UserError(f"{path}: this density map cannot be read: {error}") from error
    if values.shape != expected:
        raise UserError(
            f"{path}: the density map is {values.shape[1]} x {values.shape[0]}, but its image is "
            f"{expected[1]} x {expected[0]} pixels"
        )
    if not values.any():
        raise UserError(f"{path}: this density map is all zeros")
    return torch.from_numpy(values)[None]


_POINT = 128  # pixels this bright are fixations; JPEG blurs their edges
_COLUMNS = ("image", "subject", "x", "y")


def read_salicon(path: Path, size: tuple[int, int]) -> Fixations:
    """Read the fixations of all observers from a .mat file of SALICON.

    It contains `gaze`, with one entry per observer whose `fixations` are 1-based coordinates (F,
    2), and optionally `resolution`, the image's height and width.
    """
    content = _read_mat(path, "gaze")
    if "resolution" in content:
        stated = tuple(int(side) for side in np.ravel(content["resolution"]))
        _check_size(path, stated, size)
    points, observers = [np.zeros((0, 2))], [np.zeros(0, np.int64)]
    for observer, one in enumerate(np.ravel(content["gaze"])):
        try:
            own = np.asarray(one["fixations"], np.float64).reshape(-1, 2) - 0.5
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise UserError(f"{path}: gaze {observer + 1} has no fixations (F, 2)") from error
        points.append(own)
        observers.append(np.full(len(own), observer))
    return Fixations(np.concatenate(points), np.concatenate(observers))


def read_cat2000(path: Path, size: tuple[int, int]) -> Fixations:
    """Read a .mat file of CAT2000: `fixLocs` (H, W) is 1 at fixations; observers are unknown."""
    return _points(path, np.asarray(_read_mat(path, "fixLocs")["fixLocs"]) > 0, size)


def read_mit1003(path: Path, size: tuple[int, int]) -> Fixations:
    """Read a `_fixPts.jpg` of MIT1003, which is white at fixations; observers are unknown."""
    try:
        with Image.open(path) as file:
            there = np.asarray(file.convert("L")) >= _POINT
    except UNREADABLE as error:
        raise UserError(f"{path}: this map of fixations cannot be read: {error}") from error
    return _points(path, there, size)


def read_table(path: Path, names: Sequence[str]) -> list[Fixations]:
    """Read the fixations on each image of a split from a .npz file.

    The file's `data` has one row per fixation. Its `columns` are image, subject, x and y in any
    order. `names` are the split's image names: the numbers that appear in the column `image`.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            columns, data = [str(name) for name in stored["columns"]], np.asarray(stored["data"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: the table of fixations is missing") from error
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a table of fixations (columns, data): {error}") from error
    if missing := [name for name in _COLUMNS if name not in columns]:
        raise UserError(f"{path}: no column {', '.join(missing)}; it has {', '.join(columns)}")
    if data.ndim != 2 or data.shape[1] != len(columns):
        raise UserError(f"{path}: data is {data.shape}, expected a column for each of {columns}")
    image, subject, x, y = (data[:, columns.index(name)].astype(np.float64) for name in _COLUMNS)
    if not (np.isfinite(image) & np.isfinite(subject) & np.isfinite(x) & np.isfinite(y)).all():
        raise UserError(f"{path}: the table has values that are not finite")
    if wrong := [name for name in names if not name.isdecimal()]:
        raise UserError(
            f"{path}: identifies images by number, but the image name {wrong[0]!r} is not a number"
        )
    ids = np.array([int(name) for name in names], np.int64)
    order = np.argsort(image, kind="stable")
    low, high = (np.searchsorted(image[order], ids, side=side) for side in ("left", "right"))
    points, observers = np.stack([x, y], axis=1), subject.astype(np.int64)
    rows = [order[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    return [Fixations(points[own], observers[own]) for own in rows]


def _points(path: Path, there: NDArray[np.bool_], size: tuple[int, int]) -> Fixations:
    _check_size(path, there.shape, size)
    rows, columns = np.nonzero(there)
    points = np.stack([columns, rows], axis=1).astype(np.float64) + 0.5
    return Fixations(points, np.full(len(points), UNKNOWN))


def _check_size(path: Path, stated: tuple[int, ...], size: tuple[int, int]) -> None:
    if tuple(stated) != tuple(size):
        sides = " x ".join(str(side) for side in reversed(stated))
        raise UserError(
            f"{path}: fixations on an image of {sides} pixels, but it is {size[1]} x {size[0]}"
        )


def _read_mat(path: Path, name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = loadmat(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the file of fixations is missing") from error
    except (OSError, ValueError, TypeError, EOFError, NotImplementedError, MatReadError) as error:
        raise UserError(f"{path}: this .mat file cannot be read: {error}") from error
    if name not in content:
        known = ", ".join(key for key in content if not key.startswith("__"))
        raise UserError(f"{path}: no {name!r} in it; it has {known or 'nothing'}")
    return content
