"""Metrics of label maps from the records of `predictions.npz`.

`image_ids` (N,); `confusion` (N, C, C), pixels by true class (rows) and predicted class (columns);
`names` (C,), if they are known.
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
IOU = "iou/"  # followed by a class, its name or number

Float = NDArray[np.float64]


class Pixels(NamedTuple):
    """Pixels of each class in each of R sets of images, (R, C) each."""

    right: Float
    true: Float
    predicted: Float

    def drawn(self, counts: Float) -> Pixels:
        """Sums over R resamples, in which the image of row n occurs `counts[:, n]` times."""
        return Pixels(*(counts @ part for part in self))


def pixels(records: Records) -> Pixels:
    """Pixels of each image, (N, C)."""
    confusion = records["confusion"]
    parts = (np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1))
    return Pixels(*(part.astype(np.float64) for part in parts))


def number_of(name: str, found: Pixels, records: Records) -> Float:
    """A metric of each set, (R,); NaN where it is undefined.

    Args:
        name: One of `ROWS`, or `iou/` and a class.
        found: Pixels of R sets.
        records: Records with the class names.

    Raises:
        UserError: There is no such metric or class.
    """
    if name == "pixel_accuracy":
        return np.asarray(found.right.sum(axis=1) / found.true.sum(axis=1))
    if name == "mean_accuracy":
        return _mean(_ratio(found.right, found.true))
    iou = _ratio(found.right, found.true + found.predicted - found.right)
    if name == "mIoU":
        return _mean(iou)
    if name.startswith(IOU):
        return np.asarray(iou[:, class_number(name.removeprefix(IOU), records)])
    raise UserError(f"metric {name!r}: unknown; there are {', '.join(ROWS)}, {IOU}<class>")


def class_number(wanted: str, records: Records) -> int:
    """The number of a class given by name or number.

    Raises:
        UserError: There is no such class.
    """
    names = [str(name) for name in records["names"]] if "names" in records else []
    num_classes = records["confusion"].shape[1]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < num_classes:
        return int(wanted)
    known = f"; there are {', '.join(names)}" if names else f" among {num_classes}"
    raise UserError(f"metric '{IOU}{wanted}': no such class{known}")


class ClassRow(NamedTuple):
    """Metrics of a class that is true or predicted anywhere."""

    label: int
    fraction: float  # of the scored pixels
    iou: float
    accuracy: float  # NaN if no pixel has the class
    instead: tuple[tuple[int, float], ...]  # classes predicted in its place: (class, fraction)


def per_class(records: Records, *, instead: int = 2) -> list[ClassRow]:
    """Metrics of each class that is true or predicted, the most frequent first.

    Args:
        records: See the module.
        instead: How many of the classes predicted in its place each row has at most.
    """
    confusion = records["confusion"].sum(axis=0)
    true, predicted, right = confusion.sum(axis=1), confusion.sum(axis=0), np.diag(confusion)
    iou, accuracy = _ratio(right, true + predicted - right), _ratio(right, true)
    rows = []
    for c in np.argsort(-true, kind="stable").tolist():
        if np.isnan(iou[c]):
            continue
        wrong = np.where(np.arange(len(true)) == c, 0, confusion[c])
        order = [n for n in np.argsort(-wrong, kind="stable").tolist() if wrong[n]][:instead]
        found = tuple((n, float(wrong[n] / true[c])) for n in order)
        fraction = float(true[c] / true.sum())
        rows.append(ClassRow(c, fraction, float(iou[c]), float(accuracy[c]), found))
    return rows


def value(records: Records, name: str) -> float | None:
    """A metric of all images; None for a class that is neither true nor predicted anywhere."""
    found = pixels(records).drawn(np.ones((1, len(records["image_ids"]))))
    number = float(number_of(name, found, records)[0])
    return None if np.isnan(number) else number


def interval(records: Records, name: str) -> Interval:
    """A metric with its 95 % bootstrap interval over images."""
    found = pixels(records)
    return drawn_again(lambda n: number_of(name, found.drawn(n), records), len(found.true))


def difference(records: Records, twin: Records, name: str) -> Interval:
    """A metric minus a twin's, with the interval of a paired bootstrap over images."""
    own, other = pixels(records), pixels(twin)

    def gap(counts: Float) -> Float:
        a, b = (number_of(name, one.drawn(counts), records) for one in (own, other))
        return np.asarray(a - b)

    return drawn_again(gap, len(own.true))


def check(records: Records, where: str) -> None:
    """Check records; messages begin with `where`.

    Raises:
        UserError: A missing array, wrong shapes, negative numbers, or no pixel was scored.
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


def _ratio(part: Array, whole: Array) -> Float:
    """NaN where the denominator is 0."""
    ratios = np.full(part.shape, np.nan)
    np.divide(part, whole, out=ratios, where=whole > 0)
    return ratios


def _mean(values: Float) -> Float:
    """Over the classes where the metric is defined, (R,)."""
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1))


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Check that two records have the same classes, with the same pixels in every image."""
    own, others = (pixels(one).true for one in (records, other))
    if own.shape != others.shape:
        raise UserError(
            f"{pair} know different numbers of classes: {own.shape[1]} and {others.shape[1]}"
        )
    if wrong := int((own != others).any(axis=1).sum()):
        raise UserError(f"{pair} disagree on the label maps of {wrong} images: other data")
