"""KITTI's average precision of boxes at three difficulties, with 11 or 40 recall points.

Geiger et al., 2012, https://doi.org/10.1109/CVPR.2012.6248074, as implemented in the benchmark's
development kit; 40 points: Simonelli et al., 2019, https://arxiv.org/abs/1905.12365. Unlike in
COCO, objects choose detections, in file order, and precision is computed only at the scores whose
recalls are nearest to 0, 1/40, ... 1.

There are two differences from the kit. There, a detection below the minimum height can also match
an object of another class. Here, objects of exactly the minimum height are included; copies of the
kit differ in this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pycocotools import mask as coco_masks

from kd.errors import UserError
from kd.metrics.coco_ap import Bools, Boxes, Floats, Ints

OVERLAPS = {"car": 0.7, "pedestrian": 0.5, "cyclist": 0.5}
_STEPS = 40  # recall steps from 0 to 1


class Difficulty(NamedTuple):
    """Limits for the objects that must be found; other objects are ignored."""

    height: float  # minimum, pixels; smaller detections are ignored, too
    occluded: int  # maximum
    truncated: float  # maximum


DIFFICULTIES = {
    "easy": Difficulty(40.0, 0, 0.15),
    "moderate": Difficulty(25.0, 1, 0.30),
    "hard": Difficulty(25.0, 2, 0.50),
}


@dataclass(frozen=True)
class KittiTruth:
    """Ground truth of all images.

    Attributes:
        boxes: Objects, neighbours and regions, each with the class that it belongs to.
        truncated: (K,) float64, fraction outside the image.
        occluded: (K,) int64, from 0 = fully visible to 2 = mostly hidden; 3 = unknown.
        neighbour: (K,) bool, True for objects of a similar class, such as vans for cars; their
            detections are ignored.
        region: (K,) bool, True for DontCare regions; detections mostly inside are ignored.
    """

    boxes: Boxes
    truncated: Floats
    occluded: Ints
    neighbour: Bools
    region: Bools


class _Scene(NamedTuple):
    """D detections and G objects (including neighbours) of one class in one image."""

    overlaps: Floats  # (D, G)
    excused: Bools  # (D,) mostly inside a DontCare region
    scores: Floats  # (D,)
    low: Bools  # (D,) below the minimum height
    optional: Bools  # (G,) ignored object


def kitti_ap(
    truth: KittiTruth,
    found: Boxes,
    scores: Floats,
    *,
    overlaps: Sequence[float],
    points: int = _STEPS,
) -> Floats:
    """Compute AP by difficulty and class, (3, C) in 0..1; NaN where there are no objects.

    As in the kit, recalls that no score reaches have precision 0, so that with fewer than 40
    objects even perfect detections have an AP below 1.

    Args:
        truth: Ground truth.
        found: The detections.
        scores: (D,).
        overlaps: IoU that a correct detection must exceed, by class, such as `OVERLAPS`. It is also
            the fraction of a detection that must lie in a DontCare region for it to be ignored.
        points: 40 for recalls 1/40, 2/40, ... 1; 11 for 0, 0.1, ... 1.

    Raises:
        UserError: `points` or an overlap is out of range.
    """
    if points not in (11, 40):
        raise UserError(f"kitti_ap: points must be 11 or 40, got {points}")
    if not all(0 < one < 1 for one in overlaps):
        raise UserError(f"kitti_ap: overlaps must be in (0, 1), got {list(overlaps)}")
    recalls = slice(1, None) if points == _STEPS else slice(0, None, _STEPS // 10)
    result = np.full((len(DIFFICULTIES), len(overlaps)), np.nan)
    for row, difficulty in enumerate(DIFFICULTIES.values()):
        for label, overlap in enumerate(overlaps):
            scenes = list(_scenes(truth, found, scores, label, overlap, difficulty))
            objects = sum(int((~scene.optional).sum()) for scene in scenes)
            if objects:
                result[row, label] = _precisions(scenes, objects, overlap)[recalls].mean()
    return result


def _scenes(
    truth: KittiTruth,
    found: Boxes,
    scores: Floats,
    label: int,
    overlap: float,
    difficulty: Difficulty,
) -> Iterator[_Scene]:
    """Yield the images with objects or detections of a class."""
    boxes = truth.boxes
    optional = (
        truth.neighbour
        | (boxes.xywh[:, 3] < difficulty.height)
        | (truth.occluded > difficulty.occluded)
        | (truth.truncated > difficulty.truncated)
    )
    own, others = np.flatnonzero(found.label == label), np.flatnonzero(boxes.label == label)
    own, others = (
        rows[np.argsort(image[rows], kind="stable")]
        for rows, image in ((own, found.image), (others, boxes.image))
    )
    for image in np.union1d(found.image[own], boxes.image[others]).tolist():
        rows, there = _of_image(own, found.image, image), _of_image(others, boxes.image, image)
        objects, regions = there[~truth.region[there]], there[truth.region[there]]
        # As for COCO's crowds, the overlap is a fraction of the detection.
        inside = _overlaps(found, rows, boxes, regions, crowd=True)
        yield _Scene(
            overlaps=_overlaps(found, rows, boxes, objects, crowd=False),
            excused=np.asarray((inside > overlap).any(axis=1)),
            scores=scores[rows],
            low=found.xywh[rows, 3] < difficulty.height,
            optional=optional[objects],
        )


def _of_image(rows: Ints, images: Ints, image: int) -> Ints:
    """Return the rows of one image; `rows` must be sorted by image."""
    start, end = np.searchsorted(images[rows], [image, image + 1])
    return rows[start:end]


def _overlaps(found: Boxes, rows: Ints, truth: Boxes, objects: Ints, *, crowd: bool) -> Floats:
    """IoU of detections with objects, (D, G)."""
    if not len(rows) or not len(objects):
        return np.zeros((len(rows), len(objects)))
    flags = np.full(len(objects), crowd, np.uint8)
    return np.asarray(coco_masks.iou(found.xywh[rows], truth.xywh[objects], flags))


def _precisions(scenes: Sequence[_Scene], objects: int, overlap: float) -> Floats:
    """Compute the best precision at each of the 41 recalls or above, (41,)."""
    hits = [score for scene in scenes for score in _hit_scores(scene, overlap)]
    limits = _limits(np.sort(np.array(hits))[::-1], objects)
    right, wrong = np.zeros(len(limits)), np.zeros(len(limits))
    for scene in scenes:
        found, mistaken = _counts(scene, limits, overlap)
        right += found
        wrong += mistaken
    precision = np.zeros(_STEPS + 1)
    precision[: len(limits)] = right / np.maximum(right + wrong, 1)
    return np.asarray(np.maximum.accumulate(precision[::-1])[::-1])


def _hit_scores(scene: _Scene, overlap: float) -> list[float]:
    """Scores of correct detections if each object matches its best-scored detection."""
    free = np.ones(len(scene.scores), np.bool_)
    scores = []
    for number, optional in enumerate(scene.optional):
        possible = free & (scene.overlaps[:, number] > overlap)
        if not possible.any():
            continue
        taken = int(np.where(possible, scene.scores, -np.inf).argmax())
        free[taken] = False
        if not optional and not scene.low[taken]:
            scores.append(float(scene.scores[taken]))
    return scores


def _limits(hits: Floats, objects: int) -> Floats:
    """Score thresholds whose recalls are nearest to 0, 1/40, ...; at most 41, descending."""
    limits: list[float] = []
    wanted = 0.0
    for place, score in enumerate(hits.tolist()):
        here, following = (place + 1) / objects, (place + 2) / objects
        if place + 1 < len(hits) and following - wanted < wanted - here:
            continue
        limits.append(score)
        wanted += 1 / _STEPS  # summed up as in the kit: the rounding decides ties
    return np.array(limits)


def _counts(scene: _Scene, limits: Floats, overlap: float) -> tuple[Floats, Floats]:
    """Count one image's correct and wrong detections above each of T score limits, both (T,).

    Each object matches the detection of largest overlap; one below the minimum height only if there
    is no other.
    """
    counted = scene.scores >= limits[:, None]  # (T, D)
    free = counted.copy()
    right = np.zeros(len(limits))
    lines = np.arange(len(limits))
    for number, optional in enumerate(scene.optional):
        own = scene.overlaps[:, number]
        if not (own > overlap).any():
            continue
        possible = free & (own > overlap)
        high = np.where(possible & ~scene.low, own, -1.0)
        taken = np.where(high.max(axis=1) > 0, high.argmax(axis=1), possible.argmax(axis=1))
        some = possible.any(axis=1)
        free[lines[some], taken[some]] = False
        if not optional:
            right += some & ~scene.low[taken]
    wrong = free & ~scene.low & ~scene.excused
    return right, wrong.sum(axis=1).astype(np.float64)
