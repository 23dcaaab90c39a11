"""Does the seam give a paste away? Edges in numbers, and a judge that learns them.

The judge is logistic regression on what can be measured around an object's outline: slopes,
sharpness and grain beside those of the whole picture. It sees no class and no scene. One judge sees
the ring around the outline; another is given the outline itself, which tells real objects by the
sloppiness of hand-drawn outlines: a paste's edge lies on its outline to the pixel, a real one only
about. Area under the ROC curve: .5 says that it cannot tell, 1 that it always can.
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
_DECAY = 0.01  # of the judge's weights, times the number of examples
_REACH = 4.0  # pixels on either side of the outline
_BANDS = (-4.0, -2.0, 0.0, 2.0, 4.0)  # pixels, negative outside
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
RING = 3 * len(_QUANTILES)
_GRAIN = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], np.float64)


class Verdict(NamedTuple):
    """How well the judge told two sets apart."""

    auc: float
    error: float  # standard error


def seam_features(picture: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> Floats:
    """What an object's outline looks like beside its picture, (F,).

    First `RING` features of the ring around the outline as a whole, then those of bands that follow
    the outline exactly.

    Args:
        picture: (H, W, 3).
        mask: (H, W), the object, not empty.
    """
    pixels = picture.astype(np.float64)
    grey = pixels.mean(axis=2)
    # Pixels' centres lie half a pixel from the outline that runs between them.
    away = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
    away -= 0.5 * np.sign(away)
    slope = np.hypot(ndimage.sobel(grey, 0), ndimage.sobel(grey, 1)) / 8
    maps = (slope, np.abs(ndimage.laplace(grey)), np.abs(ndimage.convolve(grey, _GRAIN)))
    usual = [np.log(part.mean() + 1.0) for part in maps]
    ring = np.abs(away) <= _REACH
    whole = [_log(np.quantile(part[ring], _QUANTILES)) - own
             for part, own in zip(maps, usual, strict=True)]  # fmt: skip
    bands = [(away > low) & (away <= high) for low, high in pairwise(_BANDS)]
    bands = [band if band.any() else mask for band in bands]
    along = [_log(np.array([part[band].mean() for band in bands])) - own
             for part, own in zip(maps, usual, strict=True)]  # fmt: skip
    seam = _log(np.quantile(slope[np.abs(away) <= 1.0], _QUANTILES)) - usual[0]
    colours = np.stack([pixels[band].mean(axis=0) for band in bands])
    steps = _log(np.abs(np.diff(colours, axis=0)).mean(axis=1))
    return np.concatenate([*whole, *along, seam, steps - usual[0]])


def _log(values: Floats) -> Floats:
    return np.asarray(np.log(values + 1.0), dtype=np.float64)


def features_of(index: CocoIndex) -> tuple[Ints, Floats]:
    """Ids of the objects asked about, ascending, and the features of their outlines (K, F)."""
    asked = np.ones(len(index.object_ids), np.bool_) if index.asked is None else index.asked
    rows = np.flatnonzero(asked)
    rows = rows[np.argsort(index.object_ids[rows])]
    found = []
    for row in rows:
        image = index.image_of(int(row))
        picture = read_image(index.path(image), None).permute(1, 2, 0).numpy()
        mask = index.mask_of(int(row), (picture.shape[0], picture.shape[1]))
        found.append(seam_features(picture, mask))
    return index.object_ids[rows].astype(np.int64), np.stack(found)


def told_apart(first: Floats, second: Floats, groups: Ints) -> Verdict:
    """How well a judge tells two sets of outlines apart that it has not seen.

    Args:
        first: (K, F) features.
        second: (K, F), row by row of the same objects.
        groups: (K,) the photograph that each object comes from: none is judged by a judge that
            learned from it.

    Returns:
        Area under the ROC curve over all of them, and its standard error (Hanley and McNeil, 1982).
    """
    features = np.concatenate([first, second])
    truth = np.repeat([0.0, 1.0], [len(first), len(second)])
    fold = np.unique(groups, return_inverse=True)[1] % FOLDS
    fold = np.concatenate([fold, fold])
    scores = np.zeros(len(truth))
    for number in range(FOLDS):
        seen = fold != number
        if not seen.any() or seen.all():
            continue
        mean, spread = features[seen].mean(axis=0), features[seen].std(axis=0) + 1e-9
        normal = (features - mean) / spread
        weights = _fit(normal[seen], truth[seen])
        # Ranks within the fold: judges of different folds have scales of their own.
        held = ~seen
        scores[held] = stats.rankdata(normal[held] @ weights) / held.sum()
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


def area_under_roc(scores: Floats, truth: Floats) -> Verdict:
    """Chance that one of the second kind (`truth` 1) scores above one of the first, ties half."""
    ranks = stats.rankdata(scores)
    positive, negative = float(truth.sum()), float((1 - truth).sum())
    auc = (ranks[truth == 1].sum() - positive * (positive + 1) / 2) / (positive * negative)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)
    return Verdict(float(auc), float(np.sqrt(max(variance, 0) / (positive * negative))))
