"""Measure whether seams reveal pastes, by the ROC AUC of a classifier; 0.5 if they do not.

The classifier is a logistic regression on gradients, sharpness and noise around an object's
outline. A second one is also given the annotated outline, by which it may recognize real objects:
hand-drawn outlines are imprecise.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize, stats

from kd.formats.coco import CocoIndex
from kd.utils.images import read_image

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FOLDS = 5
_DECAY = 0.01  # weight decay, times the number of examples
_REACH = 4.0  # pixels on either side of the outline
_BANDS = (-4.0, -2.0, 0.0, 2.0, 4.0)  # pixels, negative outside
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
RING = 3 * len(_QUANTILES)
_GRAIN = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)


class SeamAUC(NamedTuple):
    """ROC AUC and its standard error (Hanley and McNeil, 1982)."""

    auc: float
    error: float


def seam_features(image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> Floats:
    """Compute features (F,) of an object's edge, given its image (H, W, 3) and mask (H, W).

    The first `RING` features describe the whole ring around the outline. The others describe narrow
    bands along the outline.
    """
    pixels = image.astype(np.float64)
    grey = pixels.mean(axis=2)
    # The outline runs between pixels, half a pixel from their centres.
    away = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    away -= 0.5 * np.sign(away)
    slope = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)) / 8
    maps = (slope, np.abs(ndimage.laplace(grey)), np.abs(ndimage.convolve(grey, _GRAIN)))
    baseline = [np.log(part.mean() + 1.0) for part in maps]
    ring = np.abs(away) <= _REACH
    whole = [_log(np.quantile(part[ring], _QUANTILES)) - own
             for part, own in zip(maps, baseline, strict=True)]  # fmt: skip
    bands = [(away > low) & (away <= high) for low, high in pairwise(_BANDS)]
    bands = [band if band.any() else mask for band in bands]
    along = [_log(np.array([part[band].mean() for band in bands])) - own
             for part, own in zip(maps, baseline, strict=True)]  # fmt: skip
    seam = _log(np.quantile(slope[np.abs(away) <= 1.0], _QUANTILES)) - baseline[0]
    colours = np.stack([pixels[band].mean(axis=0) for band in bands])
    steps = _log(np.abs(np.diff(colours, axis=0)).mean(axis=1))
    return np.concatenate([*whole, *along, seam, steps - baseline[0]])


def _log(values: Floats) -> Floats:
    return np.asarray(np.log(values + 1.0), dtype=np.float64)


def outline_features(index: CocoIndex) -> tuple[Ints, Floats]:
    """Return the ids of the scored objects, ascending, and their outline features (K, F)."""
    rows_scored = np.ones(len(index.object_ids), np.bool_) if index.scored is None else index.scored
    rows = np.flatnonzero(rows_scored)
    rows = rows[np.argsort(index.object_ids[rows])]
    found = []
    for row in rows:
        path = index.path(index.image_of(int(row)))
        image = read_image(path, None).permute(1, 2, 0).numpy()
        mask = index.mask_of(int(row), (image.shape[0], image.shape[1]))
        found.append(seam_features(image, mask))
    return index.object_ids[rows].astype(np.int64), np.stack(found)


def separability(first: Floats, second: Floats, groups: Ints) -> SeamAUC:
    """Compute the cross-validated ROC AUC of a classifier that separates two sets of outlines.

    Rows of `first` (K, F) and `second` (K, F) are features of the same object. `groups` (K,) are
    source photographs, each of which is in one fold only.
    """
    features = np.concatenate([first, second])
    truth = np.repeat([0.0, 1.0], [len(first), len(second)])
    fold = np.unique(groups, return_inverse=True)[1] % FOLDS
    fold = np.concatenate([fold, fold])
    scores = np.zeros(len(truth))
    for number in range(FOLDS):
        train = fold != number
        if not train.any() or train.all():
            continue
        mean, spread = features[train].mean(axis=0), features[train].std(axis=0) + 1e-9
        normal = (features - mean) / spread
        weights = _fit(normal[train], truth[train])
        # Rank within the fold: scores of different folds are not comparable.
        test = ~train
        scores[test] = stats.rankdata(normal[test] @ weights) / test.sum()
    return area_under_roc(scores, truth)


def _fit(features: Floats, truth: Floats) -> Floats:
    signs = 2 * truth - 1

    def loss(weights: Floats) -> tuple[float, Floats]:
        margin = signs * (features @ weights)
        value = np.logaddexp(0, -margin).mean() + _DECAY * (weights**2).sum() / 2
        push = -signs / (1 + np.exp(np.clip(margin, -500, 500)))
        return float(value), features.T @ push / len(truth) + _DECAY * weights

    start = np.zeros(features.shape[1])
    return np.asarray(optimize.minimize(loss, start, jac=True, method="L-BFGS-B").x)


def area_under_roc(scores: Floats, truth: Floats) -> SeamAUC:
    """Compute the ROC AUC of scores for `truth` (0 or 1), counting ties as half."""
    ranks = stats.rankdata(scores)
    positive, negative = float(truth.sum()), float((1 - truth).sum())
    auc = (ranks[truth == 1].sum() - positive * (positive + 1) / 2) / (positive * negative)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)
    return SeamAUC(float(auc), float(np.sqrt(max(variance, 0) / (positive * negative))))
