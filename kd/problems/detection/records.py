"""Detections and ground truth of a split: the records of `predictions.npz`.

Images: `image_ids` (I,) ascending. Classes: `names`, `category_ids` and, if known, `confusable`
(C,), the number of a class's group of confusable classes, -1 for none. Ground truth: `truth_images`
(G,), positions in `image_ids`, `truth_labels` (G,), `truth_boxes` (G, 4) x, y, width, height in
pixels of the file, `truth_areas` (G,) of the segments, `truth_crowds` (G,); of KITTI also
`truth_truncated`, `truth_occluded` and `truth_roles` (G,), see `ROLES`. Detections, sorted by
image: `found_images`, `found_labels`, `found_boxes` and `found_scores` (D,).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd.errors import UserError
from kd.metrics.classification import confusable_groups
from kd.metrics.coco_ap import Array, Boxes, Floats, Ints
from kd.metrics.kitti_ap import KittiTruth
from kd.metrics.records import Records
from kd.utils.io import write_atomic

TRUTH = ("truth_images", "truth_labels", "truth_boxes", "truth_areas", "truth_crowds")
FOUND = ("found_images", "found_labels", "found_boxes", "found_scores")
KITTI = ("truth_truncated", "truth_occluded", "truth_roles")
BY_CLASS = ("names", "category_ids", "confusable")
NOT_BY_ID = (*BY_CLASS, *TRUTH, *KITTI, *FOUND)
ROLES = ("object", "neighbour", "region")  # 0, 1, 2 in `truth_roles`


def box_records(
    truth: Boxes, found: Boxes, scores: Array, *, image_ids: Ints, names: Sequence[str],
    category_ids: Ints, confusable: Sequence[str | None] | None = None,
    kitti: KittiTruth | None = None,
) -> Records:  # fmt: skip
    """Build records.

    Args:
        truth: All objects, crowds included.
        found: Detections, of any float type.
        scores: (D,).
        image_ids: (I,) ascending.
        names: C class names.
        category_ids: (C,) ids of the classes in COCO's format.
        confusable: Names of groups of confusable classes, C of them, None for no group.
        kitti: The same objects with KITTI's difficulties.
    """
    order = np.argsort(found.image, kind="stable")
    records: dict[str, Array] = {
        "image_ids": np.asarray(image_ids, np.int64),
        "names": np.array(list(names)),
        "category_ids": np.asarray(category_ids, np.int64),
        "truth_images": truth.image.astype(np.int32),
        "truth_labels": truth.label.astype(np.int16),
        "truth_boxes": truth.xywh.astype(np.float64),  # as in the JSON: an IoU can be 0.5 exactly
        "truth_areas": truth.areas.astype(np.float64),
        "truth_crowds": truth.crowd,
        "found_images": found.image[order].astype(np.int32),
        "found_labels": found.label[order].astype(np.int16),
        "found_boxes": found.xywh[order],
        "found_scores": np.asarray(scores)[order],
    }
    if confusable is not None:
        records["confusable"] = confusable_groups(tuple(confusable)).astype(np.int16)
    if kitti is not None:
        records["truth_truncated"] = kitti.truncated.astype(np.float64)
        records["truth_occluded"] = kitti.occluded.astype(np.int8)
        records["truth_roles"] = np.where(kitti.region, 2, kitti.neighbour).astype(np.int8)
    return records


def detections(image: Ints, label: Ints, xywh: Array) -> Boxes:
    """Boxes whose areas are those of their sides, none of them a crowd."""
    return Boxes(image, label, xywh, xywh[:, 2] * xywh[:, 3], np.zeros(len(xywh), np.bool_))


def true_boxes(records: Records) -> Boxes:
    """All objects, crowds included."""
    return Boxes(
        image=records["truth_images"].astype(np.int64),
        label=records["truth_labels"].astype(np.int64),
        xywh=records["truth_boxes"].astype(np.float64),
        areas=records["truth_areas"].astype(np.float64),
        crowd=records["truth_crowds"].astype(np.bool_),
    )


def found_boxes(records: Records) -> Boxes:
    """The detections."""
    image, label = (records[name].astype(np.int64) for name in ("found_images", "found_labels"))
    return detections(image, label, records["found_boxes"].astype(np.float64))


def found_scores(records: Records) -> Floats:
    """Scores of the detections, (D,)."""
    return records["found_scores"].astype(np.float64)


def kitti_truth(records: Records) -> KittiTruth | None:
    """The objects with KITTI's difficulties; None for other data."""
    if any(name not in records for name in KITTI):
        return None
    roles = records["truth_roles"]
    return KittiTruth(
        boxes=true_boxes(records),
        truncated=records["truth_truncated"].astype(np.float64),
        occluded=records["truth_occluded"].astype(np.int64),
        neighbour=roles == ROLES.index("neighbour"),
        region=roles == ROLES.index("region"),
    )


def write_results(records: Records, path: Path) -> None:
    """Write the detections in COCO's results format, one per line, atomically."""
    images = records["image_ids"][records["found_images"]].tolist()
    categories = records["category_ids"][records["found_labels"]].tolist()
    boxes, scores = (records[name].astype(np.float64).tolist() for name in FOUND[2:])
    lines = (
        f'{{"image_id":{image},"category_id":{category},"bbox":{box},"score":{score}}}'
        for image, category, box, score in zip(images, categories, boxes, scores, strict=True)
    )

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.write("[")
            for number, line in enumerate(lines):
                file.write((",\n" if number else "\n") + line)
            file.write("\n]\n")

    write_atomic(path, write)


def check(records: Records, where: str) -> None:
    """Check records; messages begin with `where`.

    Raises:
        UserError: A missing array, wrong shapes, an unknown image or class, numbers that are not
            finite, negative sides, or no objects.
    """
    required = ("image_ids", "names", "category_ids", *TRUTH, *FOUND)
    if missing := [name for name in required if name not in records]:
        raise UserError(f"{where}: no {', '.join(missing)}; these are no predictions of boxes")
    classes = len(records["category_ids"])
    _check_shapes(records, where, classes)
    if (np.diff(records["image_ids"]) <= 0).any():
        raise UserError(f"{where}: image_ids do not ascend, or one of them is there twice")
    for side in ("truth", "found"):
        for name, limit in ((f"{side}_images", len(records["image_ids"])),
                            (f"{side}_labels", classes)):  # fmt: skip
            if (wrong := (records[name] < 0) | (records[name] >= limit)).any():
                row = int(np.flatnonzero(wrong)[0])
                raise UserError(
                    f"{where}: {name}[{row}] is {records[name][row]}, expected 0..{limit - 1}"
                )
    for name in ("truth_boxes", "truth_areas", "found_boxes", "found_scores"):
        _check_numbers(records, name, where)
    if not (~records["truth_crowds"]).any():
        raise UserError(f"{where}: not one object to find; are the annotations of these images?")


def _check_shapes(records: Records, where: str, classes: int) -> None:
    rows = {
        "image_ids": len(records["image_ids"]),
        **dict.fromkeys(BY_CLASS, classes),
        **dict.fromkeys((*TRUTH, *KITTI), len(records["truth_images"])),
        **dict.fromkeys(FOUND, len(records["found_images"])),
    }
    for name in (one for one in rows if one in records):
        expected = (rows[name], 4) if name.endswith("_boxes") else (rows[name],)
        if records[name].shape != expected:
            raise UserError(f"{where}: {name} is {records[name].shape}, expected {expected}")
    if records["truth_crowds"].dtype != np.bool_:
        raise UserError(f"{where}: truth_crowds is {records['truth_crowds'].dtype}, expected bool")


def _check_numbers(records: Records, name: str, where: str) -> None:
    values = records[name] if records[name].ndim > 1 else records[name][:, None]
    wrong = ~np.isfinite(values).all(axis=1)
    problem = "is not finite"
    if name == "found_boxes" and not wrong.any():  # COCO's own ground truth has some
        wrong, problem = (values[:, 2:] < 0).any(axis=1), "has a side below 0"
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        image = records["image_ids"][records[f"{name.partition('_')[0]}_images"][row]]
        raise UserError(f"{where}: {name}[{row}] on image {image} {problem}: {values[row]}")


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Check that two records have the same classes and ground truth."""
    own, others = (len(one["category_ids"]) for one in (records, other))
    if own != others:
        raise UserError(f"{pair} know different numbers of classes: {own} and {others}")
    own, others = (len(one["truth_images"]) for one in (records, other))
    if own != others:
        raise UserError(f"{pair} have different numbers of objects: {own} and {others}")
    for name in TRUTH:
        differing = (records[name] != other[name]).nonzero()[0]
        if wrong := len(set(differing.tolist())):
            raise UserError(f"{pair} disagree on {name} of {wrong} objects: other data")
