"""COCO's average precision of boxes, as a function of image weights.

The results equal those of pycocotools' `COCOeval` (Lin et al., 2014,
https://arxiv.org/abs/1405.0312), which a test checks. Overlaps are computed once, and each fold or
bootstrap resample is a column of image weights, so that repeated evaluation is fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_masks
from scipy import sparse

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RECALLS = np.linspace(0.0, 1.0, 101)
# COCO's recalls are sums of 0.01; rounding makes some, such as 0.35, larger than 35 / 100.
_ROUNDED_UP = np.arange(101) / 100 < RECALLS
_CACHED_CELLS = 300_000  # numbers that fit into the processor's cache
_FEW = 8  # weight columns up to which a cumulative sum is faster than a sparse product


def average_precision(
    hit: Bools, counted: Bools, image: Ints, weights: Floats, objects: Floats
) -> Floats:
    """Compute COCO's 101-point interpolated AP, (R, T); NaN where there are no objects.

    Args:
        hit: (T, D) correct detections at each IoU threshold, by descending score.
        counted: (T, D) detections that are not ignored.
        image: (D,) image of each detection.
        weights: (I, R) weight of each image in each resample.
        objects: (R,) number of objects.
    """
    result = np.full((weights.shape[1], len(hit)), np.nan)
    right = hit & counted
    same: dict[bytes, list[int]] = {}  # thresholds with the same detections in `counted`
    for threshold, mask in enumerate(counted):
        same.setdefault(mask.tobytes(), []).append(threshold)
    for thresholds in same.values():
        places = np.flatnonzero(right[thresholds].any(axis=0))
        if not len(places):
            result[:, thresholds] = 0.0
            continue
        for part in blocks(len(places), weights.shape[1]):
            own, there = np.ascontiguousarray(weights[:, part]), objects[part]
            detections = sums_before(counted[thresholds[0]], places, image, own)
            for threshold in thresholds:
                rows = right[threshold, places]
                found = np.cumsum(own[image[places[rows]]], axis=0)
                result[part, threshold] = _area_below(found, detections[rows], there)
    result[objects <= 0] = np.nan
    return result


def recall(hit: Bools, image: Ints, weights: Floats, objects: Floats) -> Floats:
    """Compute the fraction of objects found, (R, T); same arguments as `average_precision`."""
    threshold, place = np.nonzero(hit)
    found = _times(threshold, image[place], len(hit), weights)  # (T, R)
    fractions = np.full(found.shape, np.nan)
    np.divide(found, objects, out=fractions, where=objects > 0)
    return fractions.T


def sums_before(counted: Bools, places: Ints, image: Ints, weights: Floats) -> Floats:
    """Sum the image weights of all counted detections up to each given one, (n, R).

    `counted` is (D,), `places` (n,) ascending indices of detections, `image` (D,) the image of each
    detection, and `weights` (I, R).
    """
    rows = np.flatnonzero(counted)
    if weights.shape[1] <= _FEW:
        sums = np.cumsum(weights[image[rows]], axis=0)
        return np.asarray(sums[np.searchsorted(rows, places, side="right") - 1])
    next_place = np.searchsorted(places, rows)
    rows, next_place = (part[next_place < len(places)] for part in (rows, next_place))
    return np.asarray(np.cumsum(_times(next_place, image[rows], len(places), weights), axis=0))


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Yield slices of the columns such that `rows` times a slice's width fits into the cache."""
    step = max(1, _CACHED_CELLS // max(1, rows))
    for start in range(0, columns, step):
        yield slice(start, start + step)


def _times(row: Ints, column: Ints, rows: int, weights: Floats) -> Floats:
    """Sum the weights of the columns paired with each row, (rows, R); `row` must be ascending."""
    starts = np.searchsorted(row, np.arange(rows + 1))
    content = np.ones(len(row), weights.dtype), column, starts
    matrix: Any = sparse.csr_matrix(content, shape=(rows, len(weights)))
    return np.asarray(matrix @ weights)


def _area_below(hits: Floats, detections: Floats, objects: Floats) -> Floats:
    """Mean over the 101 recalls of the best precision at each recall or above, (R,).

    `hits` and `detections` (n, R) count correct and all detections up to each correct one;
    `objects` is (R,).
    """
    if not len(hits):
        return np.zeros(len(objects))
    precision = hits / (detections + np.spacing(hits.dtype.type(1)))
    best_after = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # Number of the 101 recalls reached at each correct detection.
    percent = 100 * hits / np.maximum(objects, 1e-9).astype(hits.dtype)
    reached = np.floor(np.minimum(percent, 100))
    exactly = np.nonzero(percent == reached)
    reached[exactly] -= _ROUNDED_UP[reached[exactly].astype(np.int64)]
    best_after[1:] *= reached[1:] - reached[:-1]
    best_after[0] *= reached[0] + 1
    return np.asarray(best_after.sum(axis=0) / len(RECALLS))


Array = npt.NDArray[Any]

THRESHOLDS = np.linspace(0.5, 0.95, 10)
AREAS = {
    "all": (0.0, 1e10),
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
MOST_PER_CLASS = 100  # evaluated detections per image and class, by descending score
# Name in tables -> area range and IoU threshold; None = mean over all ten.
SUMMARY: dict[str, tuple[str, float | None]] = {
    "AP": ("all", None),
    "AP50": ("all", 0.5),
    "AP75": ("all", 0.75),
    "small": ("small", None),
    "medium": ("medium", None),
    "large": ("large", None),
}
_CELLS_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Boxes:
    """Boxes of a dataset's images: ground truth or detections.

    Attributes:
        image: (K,) int64, index of the image in ascending order of image ids.
        label: (K,) int64, 0..C-1 in ascending order of category ids.
        xywh: (K, 4) float64, pixels.
        areas: (K,) float64, square pixels; the segment's area if there is a segment.
        crowd: (K,) bool, True for regions of many objects; detections in them are ignored.
    """

    image: Ints
    label: Ints
    xywh: Floats
    areas: Floats
    crowd: Bools

    def __len__(self) -> int:
        """Number of boxes, K."""
        return len(self.image)


@dataclass(frozen=True)
class Matches:
    """Correct and ignored detections by area range (A) and IoU threshold (T), for given scores.

    Attributes:
        order: (D,) indices of detections by descending score; ties by image, then as in the file.
        hit: (A, T, D) bool, correct, in the original order of detections; (D,) for VOC.
        ignored: Same shape as `hit`: neither correct nor wrong, because the detection matches a
            crowd (VOC: a difficult object) or an object outside the area range.
    """

    order: Ints
    hit: Bools
    ignored: Bools


@dataclass(frozen=True)
class _Chunk:
    """Groups (one image and one class each) that are matched together."""

    overlaps: list[Floats]  # by group, (candidates, objects)
    rows: list[Ints]  # candidates: detections that overlap an object enough to be correct
    objects: list[Ints]


class MeanAP:
    """COCO's average precision of one set of detections, which can be scored repeatedly.

    Args:
        truth: All objects, including crowds.
        found: The detections.
        images: Number of images, I.
        classes: Number of classes, C.
    """

    def __init__(self, truth: Boxes, found: Boxes, images: int, classes: int) -> None:
        self.truth, self.found, self.images, self.classes = truth, found, images, classes
        limits = np.array(list(AREAS.values()))[:, :, None]
        self._left_out = truth.crowd | (truth.areas < limits[:, 0]) | (truth.areas > limits[:, 1])
        self._outside = (found.areas < limits[:, 0]) | (found.areas > limits[:, 1])  # (A, D)
        self._group = found.image * classes + found.label
        self._chunks = list(self._chunked())
        # Number of objects that are not ignored, (C, A, I).
        self.support = np.zeros((classes, len(AREAS), images))
        for area, left_out in enumerate(self._left_out):
            np.add.at(self.support[:, area], (truth.label[~left_out], truth.image[~left_out]), 1)

    def match(self, scores: Floats, *, areas: int = len(AREAS)) -> Matches:
        """Match detections to objects by their scores (D,), for the first `areas` area ranges."""
        order = np.lexsort((np.arange(len(scores)), self.found.image, -scores))
        place = np.empty(len(scores), np.int64)
        place[order] = np.arange(len(scores))
        shape = (areas, len(THRESHOLDS), len(scores))
        hit, ignored = np.zeros(shape, np.bool_), np.zeros(shape, np.bool_)
        for chunk in self._chunks:
            self._match_chunk(chunk, place, hit, ignored)
        ignored |= ~hit & self._outside[:areas, None]
        cut = self._beyond(order, MOST_PER_CLASS)
        hit[:, :, cut], ignored[:, :, cut] = False, True
        return Matches(order, hit, ignored)

    def average(self, matches: Matches, weights: Array | None = None) -> Floats:
        """Compute AP (R, A, T, C) in the A matched area ranges; NaN for classes without objects.

        `weights` (R, I) is the weight of each image in each resample: 0 or 1 for folds, counts for
        a bootstrap; None = 1. With float32 it takes half the time.
        """
        areas = len(matches.hit)
        columns = self._columns(weights)
        support = self.support[:, :areas].reshape(-1, self.images).astype(columns.dtype)
        whole = (support @ columns).reshape(self.classes, areas, -1)  # objects, (C, A, R)
        result = np.full((columns.shape[1], areas, len(THRESHOLDS), self.classes), np.nan)
        for label, rows in self._by_class(matches.order):
            image, objects = self.found.image[rows], whole[label]
            for area in np.flatnonzero(self.support[label, :areas].any(axis=1)).tolist():
                hit, counted = matches.hit[area][:, rows], ~matches.ignored[area][:, rows]
                result[:, area, :, label] = average_precision(
                    hit, counted, image, columns, objects[area]
                )
        return result

    def recall(
        self, matches: Matches, weights: Array | None = None, *, area: str = "all", most: int = 100
    ) -> Floats:
        """Compute recall in one matched area range, (R, T, C); the mean over T and C is COCO's AR.

        `most` limits the detections per image and class, by descending score. For `weights` see
        `average`.
        """
        columns, place = self._columns(weights), list(AREAS).index(area)
        whole = self.support[:, place].astype(columns.dtype) @ columns  # objects, (C, R)
        result = np.full((columns.shape[1], len(THRESHOLDS), self.classes), np.nan)
        found = matches.hit[place] & ~matches.ignored[place]
        found[:, self._beyond(matches.order, most)] = False
        for label, rows in self._by_class(matches.order):
            right = found[:, rows]
            result[:, :, label] = recall(right, self.found.image[rows], columns, whole[label])
        return result

    def _columns(self, weights: Array | None) -> Floats:
        """Transpose weights to (I, R); None gives each image the weight 1."""
        weights = np.ones((1, self.images)) if weights is None else np.asarray(weights)
        dtype = np.float32 if weights.dtype == np.float32 else np.float64
        return np.ascontiguousarray(weights.T, dtype=dtype)

    def _by_class(self, order: Ints) -> Iterator[tuple[int, Ints]]:
        """Yield each class with the indices of its detections by descending score."""
        labels = self.found.label[order]
        by_class = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[by_class], np.arange(self.classes + 1))
        for label, (start, end) in enumerate(pairwise(bounds.tolist())):
            yield label, order[by_class[start:end]]

    def _chunked(self) -> Iterator[_Chunk]:
        """Yield chunks of the groups that have a candidate detection, fewest objects first."""
        groups = shared_groups(self.found, self.truth, self.classes)
        chunk, cells = _Chunk([], [], []), 0
        for rows, objects in sorted(groups, key=lambda group: len(group[1])):
            crowd = self.truth.crowd[objects].astype(np.uint8)
            overlaps = coco_masks.iou(self.found.xywh[rows], self.truth.xywh[objects], crowd)
            near = (overlaps >= THRESHOLDS[0]).any(axis=1)
            if not near.any():
                continue
            chunk.overlaps.append(overlaps[near])
            chunk.rows.append(rows[near])
            chunk.objects.append(objects)
            cells += self._left_out.shape[0] * len(THRESHOLDS) * len(objects)
            if cells > _CELLS_AT_ONCE:
                yield chunk
                chunk, cells = _Chunk([], [], []), 0
        if chunk.rows:
            yield chunk

    def _match_chunk(self, chunk: _Chunk, place: Ints, hit: Bools, ignored: Bools) -> None:
        """Match the k-th best candidates of all groups together, for k = 0, 1, ..."""
        sorted_rows = [np.argsort(place[rows]) for rows in chunk.rows]
        most = max(map(len, chunk.objects))
        areas = len(hit)
        left_out = np.ones((len(chunk.rows), areas, most), np.bool_)
        crowd = np.zeros((len(chunk.rows), most), np.bool_)
        for group, objects in enumerate(chunk.objects):
            left_out[group, :, : len(objects)] = self._left_out[:areas, objects]
            crowd[group, : len(objects)] = self.truth.crowd[objects]
        free = np.ones((len(chunk.rows), areas, len(THRESHOLDS), most), np.bool_)
        for number in range(max(map(len, chunk.rows))):
            groups = np.array([g for g, rows in enumerate(chunk.rows) if len(rows) > number])
            rows = np.array([chunk.rows[g][sorted_rows[g][number]] for g in groups])
            overlaps = np.full((len(groups), most), -1.0)
            for line, group in zip(overlaps, groups, strict=True):
                own = chunk.overlaps[group][sorted_rows[group][number]]
                line[: len(own)] = own
            taken, ignore = _take(overlaps, free[groups], left_out[groups])  # (B, A, T) both
            has = taken >= 0
            hit[:, :, rows] = has.transpose(1, 2, 0)
            ignored[:, :, rows] = (has & ignore).transpose(1, 2, 0)
            b, a, t = np.nonzero(has & ~crowd[groups[:, None, None], taken])
            free[groups[b], a, t, taken[b, a, t]] = False

    def _beyond(self, order: Ints, most: int) -> Ints:
        """Return detections that are not among the `most` best of their image and class."""
        groups = self._group[order]
        by_group = np.argsort(groups, kind="stable")
        ordered = groups[by_group]
        first = np.searchsorted(ordered, ordered)
        return order[by_group[np.arange(len(order)) - first >= most]]


def summary(averages: Floats) -> dict[str, Floats]:
    """Compute COCO's summary metrics from `MeanAP.average`: name -> (R,), NaN without objects."""
    ranges = list(AREAS)[: averages.shape[1]]
    found = {}
    for name, (area, threshold) in SUMMARY.items():
        if area not in ranges:
            continue
        part = averages[:, ranges.index(area)]
        if threshold is not None:
            part = part[:, [int(np.argmin(abs(THRESHOLDS - threshold)))]]
        found[name] = mean_of_known(part, axis=(1, 2))
    return found


def mean_of_known(values: Floats, *, axis: int | tuple[int, ...] = -1) -> Floats:
    """Mean of the values that are not NaN; NaN if all are NaN."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def shared_groups(found: Boxes, truth: Boxes, classes: int) -> Iterator[tuple[Ints, Ints]]:
    """Yield the indices of detections and objects for each image and class that has both."""
    keys = [boxes.image * classes + boxes.label for boxes in (found, truth)]
    orders = [np.argsort(key, kind="stable") for key in keys]
    shared = np.intersect1d(keys[0], keys[1])
    bounds = [
        np.searchsorted(key[order], shared, side).tolist()
        for key, order in zip(keys, orders, strict=True)
        for side in ("left", "right")
    ]
    for start, end, true_start, true_end in zip(*bounds, strict=True):
        yield orders[0][start:end], orders[1][true_start:true_end]


def _take(overlaps: Floats, free: Bools, left_out: Bools) -> tuple[Ints, Bools]:
    """Match the next detection of each group to an object, like COCO.

    The free object with the largest overlap is matched, the last one of ties. Ignored objects
    (crowds, other sizes) are matched only if no other object fits.

    Args:
        overlaps: (B, G), -1 where there is no object.
        free: (B, A, T, G), objects not matched yet.
        left_out: (B, A, G), ignored objects.

    Returns:
        The object's index or -1, and whether the detection is ignored, both (B, A, T).
    """
    enough = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    possible = free & (overlaps[:, None, None] >= enough)
    counted = possible & ~left_out[:, :, None]
    allowed = np.where(counted.any(axis=3, keepdims=True), counted, possible)
    value = np.where(allowed, overlaps[:, None, None], -1.0)
    best = value.shape[3] - 1 - np.argmax(value[..., ::-1], axis=3)
    taken = np.where(allowed.any(axis=3), best, -1)
    return np.asarray(taken), np.asarray(~counted.any(axis=3))
