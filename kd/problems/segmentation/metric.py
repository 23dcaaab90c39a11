"""Segmentation records (the arrays of `predictions.npz`) and their metrics.

The arrays are `image_ids` (N,); `confusion` (N, C, C), each image's pixel counts by true class
(rows) and predicted class (columns); and optionally `names` (C,).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, drawn_again
from kd.metrics.records import Array, Records, check_arrays, check_same_classes, class_number
from kd.problems.images import PerImage
from kd.utils.images import VOID

ROWS = ("mIoU", "mean_accuracy", "pixel_accuracy")
IOU = "iou"  # prefix of a metric of a single class: `iou/<name or number of the class>`

Float = NDArray[np.float64]
Counts = NDArray[np.int64]


def confusion(predicted: Tensor, truth: Tensor, num_classes: int) -> Tensor:
    """Count pixels by true class (rows) and predicted class (columns), (C, C) int64.

    `predicted` has class ids 0..C-1 in any shape. `truth` has the same shape and may contain
    `VOID`, which is ignored.
    """
    known = truth != VOID
    pairs = truth[known].long() * num_classes + predicted[known].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


class MeanIoU(PerImage[Counts]):
    """Mean IoU and pixel accuracies, from the confusion matrix of each image."""

    compressed = True  # because most entries of an image's confusion matrix are 0

    def __init__(self, num_classes: int, *, where: str = "evaluation") -> None:
        super().__init__(where=where)
        self.num_classes = num_classes

    def take(self, decoded: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Add predicted class ids (N, H, W), scored against the batch's `label_maps`."""
        for own, truth, number in zip(
            decoded, batch["label_maps"], batch["image_ids"].tolist(), strict=True
        ):
            self._images[number] = confusion(own, truth, self.num_classes).cpu().numpy()

    def compute(self) -> dict[str, float]:
        """Metrics in 0..1 by name, and `count`, the number of images.

        `mIoU` is averaged over classes that occur in ground truth or predictions, `mean_accuracy`
        over classes in the ground truth; `pixel_accuracy` is the fraction of correct pixels.
        """
        total = sum(self._images.values(), np.zeros((self.num_classes, self.num_classes), np.int64))
        whole = {"image_ids": np.zeros(1, np.int64), "confusion": total[None]}
        check(whole, self._where)
        found = pixels(whole)
        values = {name: float(number_of(name, found, whole)[0]) for name in ROWS}
        return {**values, "count": float(len(self._images))}

    def records(self) -> dict[str, Counts]:
        """`image_ids` (N,), ascending, and `confusion` (N, C, C), checked."""
        numbers, shape = sorted(self._images), (-1, self.num_classes, self.num_classes)
        records = {
            "image_ids": np.array(numbers, np.int64),
            "confusion": np.array([self._images[n] for n in numbers], np.int64).reshape(shape),
        }
        check(records, self._where)
        return records


class Pixels(NamedTuple):
    """Correct, true and predicted pixel counts by class, for R sets of images, (R, C) each."""

    right: Float
    true: Float
    predicted: Float

    def drawn(self, counts: Float) -> Pixels:
        """Sum pixel counts over R resamples; resample r has image n `counts[r, n]` times."""
        return Pixels(*(counts @ part for part in self))


def pixels(records: Records) -> Pixels:
    """Correct, true and predicted pixel counts by class of each image, (N, C) each."""
    confusion = records["confusion"]
    parts = (np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(axis=2), confusion.sum(axis=1))
    return Pixels(*(part.astype(np.float64) for part in parts))


def number_of(name: str, found: Pixels, records: Records) -> Float:
    """Compute a metric on each of R sets of images, (R,); NaN where undefined.

    `name` is one of `ROWS` or `iou/<class>`; `found` has the pixel counts of the R sets.
    """
    if name == "pixel_accuracy":
        return np.asarray(found.right.sum(axis=1) / found.true.sum(axis=1))
    if name == "mean_accuracy":
        return _mean(_ratio(found.right, found.true))
    iou = _ratio(found.right, found.true + found.predicted - found.right)
    if name == "mIoU":
        return _mean(iou)
    metric, _, wanted = name.partition("/")
    if metric == IOU:
        return np.asarray(iou[:, class_number(metric, wanted, records, iou.shape[1])])
    raise UserError(f"metric {name!r}: unknown; there are {', '.join(ROWS)}, {IOU}/<class>")


class ClassRow(NamedTuple):
    """Metrics of a class that occurs in ground truth or predictions."""

    label: int
    fraction: float  # of the scored pixels
    iou: float
    accuracy: float  # NaN if no pixel has the class
    instead: tuple[tuple[int, float], ...]  # most frequent wrong predictions: (class, fraction)


def per_class(records: Records, *, instead: int = 2) -> list[ClassRow]:
    """Metrics of each class in ground truth or predictions, most frequent class first.

    Each row lists up to `instead` classes that were wrongly predicted most often.
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
    """Compute a metric over all images; None if undefined, as for a class that never occurs."""
    found = pixels(records).drawn(np.ones((1, len(records["image_ids"]))))
    number = float(number_of(name, found, records)[0])
    return None if np.isnan(number) else number


def interval(records: Records, name: str) -> Interval:
    """Metric with its 95 % bootstrap interval over images."""
    found = pixels(records)
    return drawn_again(lambda n: number_of(name, found.drawn(n), records), len(found.true))


def difference(records: Records, twin: Records, name: str) -> Interval:
    """Metric of `records` minus that of `twin`, with a paired bootstrap interval over images."""
    own, other = pixels(records), pixels(twin)

    def gap(counts: Float) -> Float:
        a, b = (number_of(name, one.drawn(counts), records) for one in (own, other))
        return np.asarray(a - b)

    return drawn_again(gap, len(own.true))


def check(records: Records, where: str) -> None:
    """Raise a UserError, prefixed with `where`, if records are malformed or no pixel was scored."""
    check_arrays(records, ("image_ids", "confusion"), where)
    confusion, ids = records["confusion"], records["image_ids"]
    if confusion.ndim != 3 or len(confusion) != len(ids) or len(set(confusion.shape[1:])) > 1:
        raise UserError(
            f"{where}: confusion is {confusion.shape} for {len(ids)} images, expected (N, C, C)"
        )
    if "names" in records and len(records["names"]) != confusion.shape[1]:
        raise UserError(
            f"{where}: {len(records['names'])} class names for {confusion.shape[1]} classes"
        )
    if confusion.size and int(confusion.min()) < 0:
        raise UserError(f"{where}: confusion has negative counts")
    if not confusion.sum():
        raise UserError(f"{where}: no pixel was scored; are all label maps void?")


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Raise a UserError, prefixed with `pair`, if two runs differ in classes or label maps."""
    own, others = (pixels(one).true for one in (records, other))
    check_same_classes(own.shape[1], others.shape[1], pair)
    if wrong := int((own != others).any(axis=1).sum()):
        raise UserError(
            f"{pair} have different label maps for {wrong} images; they were evaluated on "
            "different data"
        )


def _ratio(part: Array, whole: Array) -> Float:
    """Quotient of two arrays; NaN where the denominator is 0."""
    ratios = np.full(part.shape, np.nan)
    np.divide(part, whole, out=ratios, where=whole > 0)
    return ratios


def _mean(values: Float) -> Float:
    """Mean over the classes, (R,), ignoring NaN."""
    there = ~np.isnan(values)
    return _ratio(np.where(there, values, 0.0).sum(axis=1), there.sum(axis=1))
