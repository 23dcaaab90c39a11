"""Pascal VOC's average precision of boxes: 11 recall points (2007) or area (since 2010).

Everingham et al., 2010, https://doi.org/10.1007/s11263-009-0275-4, sections 4.2 and 4.3 of the
development kits. Unlike COCO, a detection is matched to the object of largest overlap only, and is
wrong if that object has been found before.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pycocotools import mask as coco_masks

from kd.errors import UserError
from kd.metrics.coco_ap import (
    Array,
    Boxes,
    Floats,
    Ints,
    Matches,
    blocks,
    shared_groups,
    sums_before,
)

OVERLAP = 0.5  # least IoU of a correct detection
Points = Literal["11", "area"]
_RECALLS = 10  # steps between recalls 0 and 1


class VocAP:
    """VOC's average precision of one set of boxes under any scores.

    Args:
        truth: All objects; difficult ones have `crowd`, as `kd.formats.voc` writes them.
        found: The detections. Coordinates start at 0 and are continuous: unlike in VOC's kit, no
            pixel is added to widths and heights.
        images: I, the number of images.
        classes: C.
    """

    def __init__(self, truth: Boxes, found: Boxes, images: int, classes: int) -> None:
        self.truth, self.found, self.images, self.classes = truth, found, images, classes
        self._best = _best_objects(truth, found, classes)
        self.support = np.zeros((classes, images))  # objects that can be found
        counted = ~truth.crowd
        np.add.at(self.support, (truth.label[counted], truth.image[counted]), 1)

    def match(self, scores: Floats) -> Matches:
        """Match objects with the best-scored (D,) of the detections that overlap them most."""
        order = np.lexsort((np.arange(len(scores)), self.found.image, -scores))
        near = order[self._best[order] >= 0]  # overlap some object; in falling order of score
        _, first = np.unique(self._best[near], return_index=True)
        hit, ignored = (np.zeros(len(scores), np.bool_) for _ in range(2))
        hit[near[first]] = True
        ignored[near] = self.truth.crowd[self._best[near]]
        return Matches(order, hit & ~ignored, ignored)

    def average(
        self, matches: Matches, weights: Array | None = None, *, points: Points = "area"
    ) -> Floats:
        """Average precision, (R, C); NaN where a class has only difficult objects or none.

        Args:
            matches: From `match`.
            weights: (R, I) how often each image counts; None counts each once.
            points: "11" for the mean of the best precisions at recalls 0, 0.1, ... 1 or above
                (VOC 2007); "area" for the area below the best precisions (since VOC 2010).
        """
        if points not in ("11", "area"):
            raise UserError(f"VocAP: points must be '11' or 'area', got {points!r}")
        weights = np.ones((1, self.images)) if weights is None else weights
        columns = np.ascontiguousarray(np.asarray(weights, np.float64).T)  # (I, R)
        result = np.full((columns.shape[1], self.classes), np.nan)
        ranked = matches.order[~matches.ignored[matches.order]]
        for label in range(self.classes):
            rows = ranked[self.found.label[ranked] == label]
            objects, image = self.support[label] @ columns, self.found.image[rows]
            right = np.flatnonzero(matches.hit[rows])
            for part in blocks(len(right), columns.shape[1]):
                own, some = np.ascontiguousarray(columns[:, part]), objects[part] > 0
                hits = np.cumsum(own[image[right]], axis=0)
                detections = sums_before(np.ones(len(rows), np.bool_), right, image, own)
                known = _average(hits[:, some], detections[:, some], objects[part][some], points)
                result[part, label][some] = known
        return result


def _best_objects(truth: Boxes, found: Boxes, classes: int) -> Ints:
    """The object of its class that each detection overlaps most, (D,); -1 below `OVERLAP`."""
    best = np.full(len(found), -1, np.int64)
    for rows, objects in shared_groups(found, truth, classes):
        plain = np.zeros(len(objects), np.uint8)  # ordinary IoU with difficult objects, too
        overlaps = coco_masks.iou(found.xywh[rows], truth.xywh[objects], plain)
        most = overlaps.argmax(axis=1)
        enough = overlaps[np.arange(len(rows)), most] >= OVERLAP
        best[rows[enough]] = objects[most[enough]]
    return best


def _average(hits: Floats, detections: Floats, objects: Floats, points: Points) -> Floats:
    """Average precision of one class, (R,); arguments as `coco_ap._area_below`."""
    if not len(hits):
        return np.zeros(len(objects))
    # Precision has its maxima at correct detections.
    precision = hits / np.maximum(detections, np.spacing(1))
    best_after = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    if points == "area":
        newly = np.diff(hits, axis=0, prepend=0.0)
        return np.asarray((best_after * newly).sum(axis=0) / objects)
    # In tenths: 3 of 10 objects reach a recall of 0.3, which no float equals.
    reached = np.floor(_RECALLS * hits / objects) + 1
    newly = np.diff(reached, axis=0, prepend=0.0)
    return np.asarray((best_after * newly).sum(axis=0) / (_RECALLS + 1))
