"""COCO's average precision of boxes, matched once and averaged over any weighting of the images.

The numbers are those of pycocotools' `COCOeval` (Lin et al., 2014, https://arxiv.org/abs/1405.0312;
a test compares them). Evaluating the same boxes again is fast: overlaps are computed once, and each
fold or bootstrap resample is a column of image weights.
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
# COCO's steps are sums of 0.01; rounding makes some, such as 0.35, larger than 35 / 100.
_ROUNDED_UP = np.arange(101) / 100 < RECALLS
_CACHED_CELLS = 300_000  # numbers that fit a processor's cache
_FEW = 8  # columns of weights up to which a cumulative sum beats a sparse product


def average_precision(
    hit: Bools, counted: Bools, image: Ints, weights: Floats, objects: Floats
) -> Floats:
    """COCO's 101-point interpolated average precision, (R, T); NaN where there are no objects.

    Args:
        hit: (T, D) correct detections, in falling order of score.
        counted: (T, D) detections that count, correct or not.
        image: (D,) image of each detection.
        weights: (I, R) how often each image counts.
        objects: (R,) number of objects.
    """
    result = np.full((weights.shape[1], len(hit)), np.nan)
    right = hit & counted
    same: dict[bytes, list[int]] = {}  # thresholds at which the same detections count
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
    """Fraction of the objects that are found, (R, T); arguments as `average_precision`."""
    threshold, place = np.nonzero(hit)
    found = _times(threshold, image[place], len(hit), weights)  # (T, R)
    fractions = np.full(found.shape, np.nan)
    np.divide(found, objects, out=fractions, where=objects > 0)
    return fractions.T


def sums_before(counted: Bools, places: Ints, image: Ints, weights: Floats) -> Floats:
    """Weighted number of detections up to and including each of the given ones, (n, R).

    Args:
        counted: (D,) detections that count.
        places: (n,) indices of detections, ascending.
        image: (D,) image of each detection.
        weights: (I, R) how often each image counts.
    """
    rows = np.flatnonzero(counted)
    if weights.shape[1] <= _FEW:  # building a matrix takes longer than using it
        sums = np.cumsum(weights[image[rows]], axis=0)
        return np.asarray(sums[np.searchsorted(rows, places, side="right") - 1])
    next_place = np.searchsorted(places, rows)
    rows, next_place = (part[next_place < len(places)] for part in (rows, next_place))
    return np.asarray(np.cumsum(_times(next_place, image[rows], len(places), weights), axis=0))


def blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the columns, each small enough that `rows` times its width stays in the cache."""
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
    """Mean over recalls of the best precision at that recall or above, (R,).

    Args:
        hits: (n, R) correct detections up to each correct one.
        detections: (n, R) all detections up to there.
        objects: (R,).
    """
    if not len(hits):
        return np.zeros(len(objects))
    precision = hits / (detections + np.spacing(hits.dtype.type(1)))
    best_after = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # How many of the 101 recalls have been reached at each right detection.
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
MOST_PER_CLASS = 100  # detections per image and class that are evaluated, best scored first
# Name in tables -> area range and overlap; None = mean over all ten.
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
        image: (K,) int64, position of the image in ascending order of ids.
        label: (K,) int64, 0..C-1 by ascending category id.
        xywh: (K, 4) float64, pixels.
        areas: (K,) float64, square pixels: of the segment where there is one.
        crowd: (K,) bool, a region of many objects; detections in it are ignored.
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
    """Correct and ignored detections by area range (A) and overlap (T), for one set of scores.

    Attributes:
        order: (D,) detections in falling order of score, ties by image, then as in the file.
        hit: (A, T, D) bool, in the detections' own order; (D,) for VOC.
        ignored: As `hit`: neither correct nor wrong, since matched to a crowd (VOC: a difficult
            object) or to an object of another size.
    """

    order: Ints
    hit: Bools
    ignored: Bools


@dataclass(frozen=True)
class _Chunk:
    """Groups (one image, one class) that are matched at once."""

    overlaps: list[Floats]  # of each group (candidates, objects)
    rows: list[Ints]  # detections that overlap an object enough to be correct
    objects: list[Ints]


class MeanAP:
    """COCO's average precision of one set of boxes under any scores.

    Args:
        truth: All objects, crowds included.
        found: The detections.
        images: I, the number of images.
        classes: C.
    """

    def __init__(self, truth: Boxes, found: Boxes, images: int, classes: int) -> None:
        self.truth, self.found, self.images, self.classes = truth, found, images, classes
        limits = np.array(list(AREAS.values()))[:, :, None]
        self._left_out = truth.crowd | (truth.areas < limits[:, 0]) | (truth.areas > limits[:, 1])
        self._outside = (found.areas < limits[:, 0]) | (found.areas > limits[:, 1])  # (A, D)
        self._group = found.image * classes + found.label
        self._chunks = list(self._chunked())
        # (C, A, I) objects that can be found
        self.support = np.zeros((classes, len(AREAS), images))
        for area, left_out in enumerate(self._left_out):
            np.add.at(self.support[:, area], (truth.label[~left_out], truth.image[~left_out]), 1)

    def match(self, scores: Floats, *, areas: int = len(AREAS)) -> Matches:
        """Match detections with these scores (D,) to objects, for the first `areas` of `AREAS`."""
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
        """Average precision (R, A, T, C) in the A matched ranges; NaN for classes without objects.

        Args:
            matches: From `match`.
            weights: (R, I) how often each image counts: 0 or 1 for folds, drawn counts for a
                bootstrap; float32 takes half the time. None counts each image once.
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
        """Recall of objects in one area range, (R, T, C); its mean over T and C is COCO's AR.

        Args:
            matches: From `match`.
            weights: As in `average`.
            area: One of `AREAS` that was matched.
            most: Detections per image and class that count, the best scored first.
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
        """Return weights as columns, (I, R); None means that each image counts once."""
        weights = np.ones((1, self.images)) if weights is None else np.asarray(weights)
        dtype = np.float32 if weights.dtype == np.float32 else np.float64
        return np.ascontiguousarray(weights.T, dtype=dtype)

    def _by_class(self, order: Ints) -> Iterator[tuple[int, Ints]]:
        """Yield each class with the indices of its detections in falling order of score."""
        labels = self.found.label[order]
        by_class = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[by_class], np.arange(self.classes + 1))
        for label, (start, end) in enumerate(pairwise(bounds.tolist())):
            yield label, order[by_class[start:end]]

    def _chunked(self) -> Iterator[_Chunk]:
        """Groups with at least one candidate detection, by ascending number of objects."""
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
        """Match the k-th best candidates of all groups at once, for k = 0, 1, ..."""
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
        """Detections that are not among the `most` best of their image and class."""
        groups = self._group[order]
        by_group = np.argsort(groups, kind="stable")
        ordered = groups[by_group]
        first = np.searchsorted(ordered, ordered)
        return order[by_group[np.arange(len(order)) - first >= most]]


def summary(averages: Floats) -> dict[str, Floats]:
    """COCO's summary metrics by name, (R,) each, from `MeanAP.average`; NaN without objects."""
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
    """Mean of the values that are not NaN, as of AP over classes with objects; NaN if all are."""
    known = ~np.isnan(values)
    total, count = np.where(known, values, 0.0).sum(axis=axis), known.sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def shared_groups(found: Boxes, truth: Boxes, classes: int) -> Iterator[tuple[Ints, Ints]]:
    """Rows of the detections and of the objects of each image and class that has both."""
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
    """Object that the next detection of each group matches (-1: none), and whether it is ignored.

    The largest overlap among free objects wins, the later one at ties; ignored objects (crowds,
    other sizes) only where no other fits.

    Args:
        overlaps: (B, G), -1 where there is no object.
        free: (B, A, T, G).
        left_out: (B, A, G).
    """
    enough = np.minimum(THRESHOLDS, 1 - 1e-10)[:, None]
    possible = free & (overlaps[:, None, None] >= enough)
    counted = possible & ~left_out[:, :, None]
    allowed = np.where(counted.any(axis=3, keepdims=True), counted, possible)
    value = np.where(allowed, overlaps[:, None, None], -1.0)
    best = value.shape[3] - 1 - np.argmax(value[..., ::-1], axis=3)
    taken = np.where(allowed.any(axis=3), best, -1)
    return np.asarray(taken), np.asarray(~counted.any(axis=3))
