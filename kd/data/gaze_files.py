"""Files of fixations, read: MATLAB's, maps of single points, tables."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

from kd.data.gaze import UNKNOWN, Fixations
from kd.data.images import UNREADABLE
from kd.errors import UserError

_POINT = 128  # a JPEG of single points blurs them: what is at least so bright is one
_COLUMNS = ("image", "subject", "x", "y")


@dataclass(frozen=True)
class SaliconGaze:
    """SALICON's .mat files: `gaze`, one a observer, with `fixations` (F, 2); `resolution`.

    Coordinates are MATLAB's, pixel 1 is the first.

    Args:
        files: Of the split's pictures.
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
        files: Of the split's pictures.
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
        files: Of the split's pictures.
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
    """All fixations of a data set in one array.

    Args:
        points: (F, 2), in the order of the split's pictures.
        observers: (F,).
        first: (N + 1,), where each picture's begin.
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
        names: Of a split's pictures; they are numbers, as `image` is.

    Raises:
        UserError: It is missing, broken, lacks a column, holds what is no number; a picture's
            name is no number.
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
        raise UserError(f"{path}: tells pictures by number, but there is a picture {wrong[0]!r}")
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
            f"{path}: fixations on a picture of {sides} pixels, but it has {size[1]} x {size[0]}"
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
