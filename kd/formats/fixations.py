"""Where people looked: fixations of an image, checked, and the density map drawn from them."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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

UNKNOWN = -1  # an observer whom the dataset does not tell apart from others
INSIDE = 0.5  # share of an image's fixations that lie on it; with fewer, sizes disagree


class Fixations(NamedTuple):
    """Of one image.

    `points` (F, 2) float64: x and y in pixels from the upper left corner of the file, so that
    column c covers c..c+1. `observers` (F,) int64, who looked; `UNKNOWN` where nobody knows.
    """

    points: NDArray[np.float64]
    observers: NDArray[np.int64]

    def of(self, chosen: NDArray[np.bool_]) -> Fixations:
        """Some of them."""
        return Fixations(self.points[chosen], self.observers[chosen])


class FixationReader(Protocol):
    """Fixations of a dataset's images, as its files have them."""

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        """Of the image at a place in the split, of a height and width; perhaps outside of it.

        Raises:
            UserError: A file is missing, broken, or of another size than the image.
        """
        ...


@dataclass(frozen=True)
class GazeSplit:
    """One split: images and who looked where.

    Attributes:
        where: What messages begin with.
        names: Of the images, without ending.
        images: Files.
        read: Their fixations.
        degree: Pixels of the files that a degree of visual angle has, the standard deviation of
            the Gaussian around each fixation.
        maps: Published density maps, in the same order; without any they are drawn.
    """

    where: str
    names: tuple[str, ...]
    images: tuple[Path, ...]
    read: FixationReader
    degree: float
    maps: tuple[Path, ...] = ()

    def fixations(self, number: int, size: tuple[int, int]) -> Fixations:
        """Those on the image: blinks and looks beside it, which lie outside, are left out.

        Args:
            number: Place in the split.
            size: Height and width of the file.

        Raises:
            UserError: There is none, more than half are outside, or what the reader raises.
        """
        found, path = self.read(number, size), self.images[number]
        if not len(found.points):
            raise UserError(
                f"{path}: nobody's fixation is known for this stimulus ({self.where}); take it out "
                "of the dataset"
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
        """Where people look, on a grid over the image: (1, *grid) float32, its sum is 1.

        Args:
            number: Place in the split.
            size: Height and width of the file.
            grid: Of the result.

        Raises:
            UserError: As `fixations` and `drawn_density`, or the published map is missing, broken,
                of another size or all zeros.
        """
        if not self.maps:
            return drawn_density(self.fixations(number, size).points, size, grid, self.degree)
        published = read_density(self.maps[number], expected=size)
        return normalised(F.resize(published, list(grid), antialias=True).clamp(min=0))


def drawn_density(
    points: NDArray[np.float64], size: tuple[int, int], grid: tuple[int, int], degree: float
) -> Tensor:
    """A Gaussian around each fixation, added up, of what lies on the image.

    Gaussians are separable: the map is one product of two narrow matrices, exact on any grid.

    Args:
        points: Fixations, (F, 2) x, y in pixels of the file.
        size: Height and width of the file.
        grid: Of the result.
        degree: Standard deviation, pixels of the file.

    Returns:
        (1, *grid) float32, its sum is 1.

    Raises:
        UserError: The Gaussians are so narrow that they lie between the grid's places.
    """
    sides = []
    for axis, (pixels, places) in enumerate(zip(size, grid, strict=True)):
        middles = (torch.arange(places, dtype=torch.float64) + 0.5) * (pixels / places)
        away = middles - torch.from_numpy(points[:, 1 - axis, None].astype(np.float64))
        sides.append((-0.5 * (away / degree).square()).exp().float())  # (F, places)
    rows, columns = sides
    density = (rows.T @ columns)[None]
    if not density.any():
        raise UserError(
            f"a degree of {degree:g} pixels is too narrow to be seen on a grid of "
            f"{grid[1]} x {grid[0]} over {size[1]} x {size[0]} pixels; correct data.degree, or "
            "take a larger data.size"
        )
    return normalised(density)


def normalised(maps: Tensor) -> Tensor:
    """Maps (..., h, w), none below 0 and none all zeros, each with a sum of 1."""
    whole = maps.double().sum(dim=(-2, -1), keepdim=True)
    return (maps / whole).float()


def read_density(path: Path, *, expected: tuple[int, int]) -> Tensor:
    """Decode a published density map, grey, of 8 bits or more: (1, H, W) float32, not normalised.

    Args:
        path: An image file.
        expected: Height and width of its image.

    Raises:
        UserError: It is missing, broken, of another size, or all zeros: nobody looked anywhere.
    """
    try:
        with Image.open(path) as picture:
            grey = picture if picture.mode.startswith(("I", "F")) else picture.convert("L")
            values = np.asarray(grey).astype(np.float32)
    except FileNotFoundError as error:
        raise UserError(f"{path}: the density map is missing") from error
    except UNREADABLE as error:
        raise UserError(f"{path}: this density map cannot be read: {error}") from error
    if values.shape != expected:
        raise UserError(
            f"{path}: the density map is {values.shape[1]} x {values.shape[0]}, its image "
            f"{expected[1]} x {expected[0]}"
        )
    if not values.any():
        raise UserError(f"{path}: this density map is all zeros, it says that nobody looked")
    return torch.from_numpy(values)[None]


_POINT = 128  # a JPEG of single points blurs them: what is at least so bright is one
_COLUMNS = ("image", "subject", "x", "y")


@dataclass(frozen=True)
class SaliconGaze:
    """SALICON's .mat files: `gaze`, one a observer, with `fixations` (F, 2); `resolution`.

    Coordinates are MATLAB's, pixel 1 is the first.

    Args:
        files: Of the split's images.
    """

    files: tuple[Path, ...]

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        """All observers' fixations."""
        path = self.files[number]
        content = _read_mat(path, "gaze")
        if "resolution" in content:
            told = tuple(int(side) for side in np.ravel(content["resolution"]))
            _check_size(path, told, size)
        points, observers = [], []
        for observer, one in enumerate(np.ravel(content["gaze"])):
            try:
                own = np.asarray(one["fixations"], np.float64).reshape(-1, 2) - 0.5
            except (ValueError, IndexError, KeyError, TypeError) as error:
                raise UserError(f"{path}: gaze {observer + 1} has no fixations (F, 2)") from error
            points.append(own)
            observers.append(np.full(len(own), observer))
        if not points:
            return Fixations(np.zeros((0, 2)), np.zeros(0, np.int64))
        return Fixations(np.concatenate(points), np.concatenate(observers))


@dataclass(frozen=True)
class MatPoints:
    """CAT2000's .mat files: `fixLocs` (H, W), 1 where somebody looked.

    Args:
        files: Of the split's images.
    """

    files: tuple[Path, ...]

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        """Nobody knows whose."""
        path = self.files[number]
        return _points(path, np.asarray(_read_mat(path, "fixLocs")["fixLocs"]) > 0, size)


@dataclass(frozen=True)
class PointMaps:
    """MIT1003's `_fixPts.jpg`: white where somebody looked.

    Args:
        files: Of the split's images.
    """

    files: tuple[Path, ...]

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        """Nobody knows whose."""
        path = self.files[number]
        try:
            with Image.open(path) as picture:
                there = np.asarray(picture.convert("L")) >= _POINT
        except UNREADABLE as error:
            raise UserError(f"{path}: this map of fixations cannot be read: {error}") from error
        return _points(path, there, size)


@dataclass(frozen=True, eq=False)
class Table:
    """All fixations of a dataset in one array.

    Args:
        points: (F, 2), in the order of the split's images.
        observers: (F,).
        first: (N + 1,), where each image's begin.
    """

    points: NDArray[np.float64]
    observers: NDArray[np.int64]
    first: NDArray[np.int64]

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        """A copy-free part of the table."""
        part = slice(int(self.first[number]), int(self.first[number + 1]))
        return Fixations(self.points[part], self.observers[part])


def read_table(path: Path, names: Sequence[str]) -> Table:
    """Read a .npz of `columns` (names) and `data` (rows): image, subject, x, y in any order.

    Args:
        path: The file.
        names: Of a split's images; they are numbers, as `image` is.

    Raises:
        UserError: It is missing, broken, lacks a column, holds what is not finite; an image's
            name is not finite.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            columns, data = [str(name) for name in stored["columns"]], np.asarray(stored["data"])
    except FileNotFoundError as error:
        raise UserError(f"{path}: the table of fixations is missing") from error
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no table of fixations, columns and data: {error}") from error
    if lacking := [name for name in _COLUMNS if name not in columns]:
        raise UserError(f"{path}: no column {', '.join(lacking)}; it has {', '.join(columns)}")
    if data.ndim != 2 or data.shape[1] != len(columns):
        raise UserError(f"{path}: data is {data.shape}, expected a column for each of {columns}")
    image, subject, x, y = (data[:, columns.index(name)].astype(np.float64) for name in _COLUMNS)
    if not (np.isfinite(image) & np.isfinite(subject) & np.isfinite(x) & np.isfinite(y)).all():
        raise UserError(f"{path}: holds numbers that are not finite")
    if wrong := [name for name in names if not name.isdecimal()]:
        raise UserError(f"{path}: tells images by number, but there is an image {wrong[0]!r}")
    wanted = np.array([int(name) for name in names], np.int64)
    order = np.argsort(image, kind="stable")
    low, high = (np.searchsorted(image[order], wanted, side=side) for side in ("left", "right"))
    rows = [order[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    taken = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    first = np.concatenate([[0], np.cumsum(high - low)]).astype(np.int64)
    points = np.stack([x, y], axis=1)[taken]
    return Table(points, subject[taken].astype(np.int64), first)


def _points(path: Path, there: NDArray[np.bool_], size: tuple[int, int]) -> Fixations:
    _check_size(path, there.shape, size)
    rows, columns = np.nonzero(there)
    points = np.stack([columns, rows], axis=1).astype(np.float64) + 0.5
    return Fixations(points, np.full(len(points), UNKNOWN))


def _check_size(path: Path, told: tuple[int, ...], size: tuple[int, int]) -> None:
    if tuple(told) != tuple(size):
        sides = " x ".join(str(side) for side in reversed(told))
        raise UserError(
            f"{path}: fixations on an image of {sides} pixels, but it has {size[1]} x {size[0]}"
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
