"""Numbers of label maps from the confusion of each image: the arrays of a `predictions.npz`.

`image_ids` (N,), `confusion` (N, C, C), pixels by true class (rows) and predicted class (columns),
and, where they are known, `names` (C,).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, drawn_again
from kd.metrics.records import Array, Records

REQUIRED = ("image_ids", "confusion")
ROWS = ("mIoU", "mean_accuracy", "pixel_accuracy")
IOU = "iou/"  # and a class, by name or number

Float = NDArray[np.float64]


class Pixels(NamedTuple):
    """Pixels of each class in each of R sets of images, (R, C) each."""

    right: Float  # of a class that is said
    true: Float  # of a class
    said: Float

    def drawn(self, counts: Float) -> Pixels:
        """Their sums where the image of row n counts `counts[:, n]` times."""
        return Pixels(*(counts @ part for part in self))


def pixels(records: Records) -> Pixels:
    """Of each image, (N, C)."""
    confusion = records["confusion"]
    parts = (np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1))
    return Pixels(*(part.astype(np.float64) for part in parts))


def number_of(name: str, found: Pixels, records: Records) -> Float:
    """A metric of each set, (R,); NaN where nothing counts for it.

    Args:
        name: One of `ROWS`, or `iou/` and a class.
        found: Pixels of R sets.
        records: Whose classes `name` means.

    Raises:
        UserError: There is no such metric or class.
    """
    if name == "pixel_accuracy":
        return np.asarray(found.right.sum(axis=1) / found.true.sum(axis=1))
    if name == "mean_accuracy":
        return _mean(_share(found.right, found.true))
    iou = _share(found.right, found.true + found.said - found.right)
    if name == "mIoU":
        return _mean(iou)
    if name.startswith(IOU):
        return np.asarray(iou[:, class_number(name.removeprefix(IOU), records)])
    raise UserError(f"metric {name!r}: unknown; there are {', '.join(ROWS)}, {IOU}<class>")


def class_number(wanted: str, records: Records) -> int:
    """A class by name, or by number in 0..C-1.

    Raises:
        UserError: There is none.
    """
    names, num_classes = names_of(records), records["confusion"].shape[1]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < num_classes:
        return int(wanted)
    known = f"; there are {', '.join(names)}" if names else f" among {num_classes}"
    raise UserError(f"metric '{IOU}{wanted}': no such class{known}")


def names_of(records: Records) -> list[str]:
    """The class names, none where they are not known."""
    return [str(name) for name in records["names"]] if "names" in records else []


class ClassRow(NamedTuple):
    """One class that is there or said."""

    label: int
    share: float  # of the pixels that are scored
    iou: float
    accuracy: float  # NaN where the class is not there
    instead: tuple[tuple[int, float], ...]  # what is said in its place, and of what share of it


def per_class(records: Records, *, instead: int = 2) -> list[ClassRow]:
    """Every class that is there or said, the most frequent first.

    Args:
        records: As this module describes.
        instead: Wrong answers that each row names at most, the most frequent first.
    """
    confusion = records["confusion"].sum(axis=0)
    true, said, right = confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion)
    iou, accuracy = _share(right, true + said - right), _share(right, true)
    rows = []
    for c in np.argsort(-true, kind="stable").tolist():
        if np.isnan(iou[c]):
            continue
        wrong = np.where(np.arange(len(true)) == c, 0, confusion[c])
        order = [n for n in np.argsort(-wrong, kind="stable").tolist() if wrong[n]][:instead]
        found = tuple((n, float(wrong[n] / true[c])) for n in order)
        share = float(true[c] / true.sum())
        rows.append(ClassRow(c, share, float(iou[c]), float(accuracy[c]), found))
    return rows


def value(records: Records, name: str) -> float | None:
    """A metric of all images; None for a class that is neither true nor predicted anywhere."""
    found = pixels(records).drawn(np.ones((1, len(records["image_ids"]))))
    number = float(number_of(name, found, records)[0])
    return None if np.isnan(number) else number


def interval(records: Records, name: str) -> Interval:
    """A metric of one run with its 95 % interval, images drawn again."""
    found = pixels(records)
    return drawn_again(lambda n: number_of(name, found.drawn(n), records), len(found.true))


def difference(records: Records, twin: Records, name: str) -> Interval:
    """A metric less that of a twin on the same images; both are given the same ones again."""
    own, other = pixels(records), pixels(twin)

    def gap(counts: Float) -> Float:
        a, b = (number_of(name, one.drawn(counts), records) for one in (own, other))
        return np.asarray(a - b)

    return drawn_again(gap, len(own.true))


def check(records: Records, where: str) -> None:
    """Check records before a number is computed from them.

    Args:
        records: As this module describes.
        where: What the message begins with.

    Raises:
        UserError: A missing array, wrong shapes, or not one pixel was scored.
    """
    if missing := [name for name in REQUIRED if name not in records]:
        raise UserError(f"{where}: no {', '.join(missing)}; these are no predictions")
    confusion, ids = records["confusion"], records["image_ids"]
    if confusion.ndim != 3 or len(confusion) != len(ids) or len(set(confusion.shape[1:])) > 1:
        raise UserError(
            f"{where}: confusion is {confusion.shape} for {len(ids)} images, expected (N, C, C)"
        )
    if "names" in records and len(records["names"]) != confusion.shape[1]:
        raise UserError(
            f"{where}: {len(records['names'])} class names, there are {confusion.shape[1]} classes"
        )
    if confusion.size and int(confusion.min()) < 0:
        raise UserError(f"{where}: confusion holds numbers below zero")
    if not confusion.sum():
        raise UserError(f"{where}: not one pixel was scored; are the maps all void?")


def _share(part: Array, whole: Array) -> Float:
    """NaN where there is nothing."""
    shares = np.full(part.shape, np.nan)
    np.divide(part, whole, out=shares, where=whole > 0)
    return shares


def _mean(shares: Float) -> Float:
    """Over the classes that there are, (R,)."""
    there = ~np.isnan(shares)
    return _share(np.where(there, shares, 0.0).sum(axis=1), there.sum(axis=1))


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Check that two have the same classes, and the same pixels of each in every image.

    Raises:
        UserError: They differ; the message begins with `pair`, which names both.
    """
    own, others = (pixels(one).true for one in (records, other))
    if own.shape != others.shape:
        raise UserError(
            f"{pair} know different numbers of classes: {own.shape[1]} and {others.shape[1]}"
        )
    if wrong := int((own != others).any(axis=1).sum()):
        raise UserError(f"{pair} disagree on the label maps of {wrong} images: other data")
