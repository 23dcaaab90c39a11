"""Precision and recall of one class where images count more or less often: folds, resamples.

Sums over detections are products of a sparse matrix with the images' weights: each detection adds
the weight of its image to the place of the next right one, and only at right ones does the best
precision change. Weights in single precision make it twice as fast; counts stay exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

RECALLS = np.linspace(0.0, 1.0, 101)
# COCO's steps are sums of 0.01; of some, 0.35 say, rounding makes more than 35 / 100 is.
_ROUNDED_UP = np.arange(101) / 100 < RECALLS
_CELLS_AT_ONCE = 300_000  # as many as stay in a processor's cache
_FEW = 8  # columns


def average_precision(
    hit: Bools, counted: Bools, image: Ints, weights: Floats, objects: Floats
) -> Floats:
    """COCO's 101-point average of precision, (R, T).

    Args:
        hit: (T, D) right detections, the best scored first.
        counted: (T, D) those that count, right or wrong.
        image: (D,) of each detection.
        weights: (I, R) how often each image counts.
        objects: (R,) how many there are to find; NaN results where there are none.
    """
    result = np.full((weights.shape[1], len(hit)), np.nan)
    right = hit & counted
    same: dict[bytes, list[int]] = {}  # overlaps at which the same detections count
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
    """The share of the objects that is found, (R, T); NaN where there is none.

    Args:
        hit: (T, D) right detections.
        image: (D,) of each detection.
        weights: (I, R) how often each image counts.
        objects: (R,) how many there are to find.
    """
    threshold, place = np.nonzero(hit)
    found = _times(threshold, image[place], len(hit), weights)  # (T, R)
    shares = np.full(found.shape, np.nan)
    np.divide(found, objects, out=shares, where=objects > 0)
    return shares.T


def sums_before(counted: Bools, places: Ints, image: Ints, weights: Floats) -> Floats:
    """How many detections there are up to each of some places, it included, (n, R).

    Args:
        counted: (D,) which of them are counted.
        places: (n,) ascending.
        image: (D,) of each detection.
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
    """Parts of the columns: a matrix of so many rows and of one part stays in the cache."""
    step = max(1, _CELLS_AT_ONCE // max(1, rows))
    for start in range(0, columns, step):
        yield slice(start, start + step)


def _times(row: Ints, column: Ints, rows: int, weights: Floats) -> Floats:
    """How often each pair occurs, a matrix of so many rows, times the weights; rows ascend."""
    starts = np.searchsorted(row, np.arange(rows + 1))
    content = np.ones(len(row), weights.dtype), column, starts
    matrix: Any = sparse.csr_matrix(content, shape=(rows, len(weights)))
    return np.asarray(matrix @ weights)


def _area_below(hits: Floats, detections: Floats, objects: Floats) -> Floats:
    """The mean of the best precisions at each recall or above, (R,).

    Args:
        hits: (n, R) right detections up to each right one.
        detections: (n, R) all detections up to there.
        objects: (R,).
    """
    if not len(hits):
        return np.zeros(len(objects))
    precision = hits / (detections + np.spacing(hits.dtype.type(1)))
    best_after = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    # How many of the 101 recalls have been reached at each right detection.
    share = 100 * hits / np.maximum(objects, 1e-9).astype(hits.dtype)
    reached = np.floor(np.minimum(share, 100))
    exactly = np.nonzero(share == reached)
    reached[exactly] -= _ROUNDED_UP[reached[exactly].astype(np.int64)]
    best_after[1:] *= reached[1:] - reached[:-1]
    best_after[0] *= reached[0] + 1
    return np.asarray(best_after.sum(axis=0) / len(RECALLS))
