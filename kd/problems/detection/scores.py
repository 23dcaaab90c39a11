"""Detection records (the arrays of `predictions.npz`) and their COCO, Pascal VOC and KITTI metrics.

- Images: `image_ids` (I,), ascending.
- Classes: `names` (C,), `category_ids` (C,), and optionally `confusable` (C,), the index of each
  class's group of confusable classes, or -1.
- Ground truth: `truth_images` (G,), indices into `image_ids`; `truth_labels` (G,); `truth_boxes`
  (G, 4), x, y, width, height in file pixels; `truth_areas` (G,), segment areas; `truth_crowds`
  (G,). KITTI adds `truth_truncated`, `truth_occluded` and `truth_roles` (G,), see `ROLES`.
- Detections, sorted by image: `found_images`, `found_labels`, `found_scores` (D,), `found_boxes`
  (D, 4).

Means are over classes that have an object. Intervals use the same bootstrap resamples of images for
all runs, so that runs can be compared in pairs. Repeated images raise AP (by 1.6 points on 228 COCO
images), so interval bounds are corrected for this bias.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, percentiles, resamples
from kd.metrics.classification import confusable_groups
from kd.metrics.coco_ap import (
    AREAS,
    SUMMARY,
    THRESHOLDS,
    Array,
    Bools,
    Boxes,
    Floats,
    Ints,
    Matches,
    MeanAP,
    mean_of_known,
)
from kd.metrics.kitti_ap import DIFFICULTIES, OVERLAPS, KittiTruth, kitti_ap
from kd.metrics.records import Records, check_arrays, check_same_classes, class_number
from kd.metrics.voc_ap import Points, VocAP
from kd.utils.io import write_atomic

TRUTH = ("truth_images", "truth_labels", "truth_boxes", "truth_areas", "truth_crowds")
FOUND = ("found_images", "found_labels", "found_boxes", "found_scores")
DIFFICULTY = ("truth_truncated", "truth_occluded", "truth_roles")
BY_CLASS = ("names", "category_ids", "confusable")
NOT_BY_ID = (*BY_CLASS, *TRUTH, *DIFFICULTY, *FOUND)
ROLES = ("object", "neighbour", "region")  # meaning of 0, 1 and 2 in `truth_roles`


def box_records(
    truth: Boxes, found: Boxes, scores: Array, *, image_ids: Ints, names: Sequence[str],
    category_ids: Ints, confusable: Sequence[str | None] | None = None,
    kitti: KittiTruth | None = None,
) -> Records:  # fmt: skip
    """Build records of detections and ground truth; the module docstring lists the arrays.

    Args:
        truth: All objects, crowds included.
        found: Detections, in any float dtype.
        scores: Scores of the detections, (D,).
        image_ids: Ids of the images, (I,), ascending.
        names: C class names.
        category_ids: COCO category ids of the classes, (C,).
        confusable: For each class, its group of confusable classes, or None.
        kitti: KITTI only: the objects of `truth` with their difficulties.
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
    """Build non-crowd boxes from x, y, width, height (D, 4); areas are width times height."""
    return Boxes(image, label, xywh, xywh[:, 2] * xywh[:, 3], np.zeros(len(xywh), np.bool_))


def true_boxes(records: Records) -> Boxes:
    return Boxes(
        image=records["truth_images"].astype(np.int64),
        label=records["truth_labels"].astype(np.int64),
        xywh=records["truth_boxes"].astype(np.float64),
        areas=records["truth_areas"].astype(np.float64),
        crowd=records["truth_crowds"].astype(np.bool_),
    )


def found_boxes(records: Records) -> Boxes:
    image, label = (records[name].astype(np.int64) for name in ("found_images", "found_labels"))
    return detections(image, label, records["found_boxes"].astype(np.float64))


def found_scores(records: Records) -> Floats:
    return records["found_scores"].astype(np.float64)


def kitti_truth(records: Records) -> KittiTruth | None:
    """Return the ground truth with KITTI's difficulties; None for other datasets."""
    if any(name not in records for name in DIFFICULTY):
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
    """Raise a UserError, prefixed with `where`, if records are malformed or have no object."""
    required = ("image_ids", "names", "category_ids", *TRUTH, *FOUND)
    check_arrays(records, required, where, " of boxes")
    classes = len(records["category_ids"])
    _check_shapes(records, where, classes)
    if (np.diff(records["image_ids"]) <= 0).any():
        raise UserError(f"{where}: image_ids must ascend, without repeated ids")
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
        raise UserError(
            f"{where}: the annotations have no objects for these images; are they the right file?"
        )


def _check_shapes(records: Records, where: str, classes: int) -> None:
    rows = {
        "image_ids": len(records["image_ids"]),
        **dict.fromkeys(BY_CLASS, classes),
        **dict.fromkeys((*TRUTH, *DIFFICULTY), len(records["truth_images"])),
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
    if name == "found_boxes" and not wrong.any():  # COCO's ground truth has such boxes
        wrong, problem = (values[:, 2:] < 0).any(axis=1), "has a negative side"
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        image = records["image_ids"][records[f"{name.partition('_')[0]}_images"][row]]
        raise UserError(f"{where}: {name}[{row}] on image {image} {problem}: {values[row]}")


def check_same_truth(records: Records, other: Records, pair: str) -> None:
    """Raise a UserError, prefixed with `pair`, if two runs differ in classes or ground truth."""
    check_same_classes(len(records["category_ids"]), len(other["category_ids"]), pair)
    own, others = (len(one["truth_images"]) for one in (records, other))
    if own != others:
        raise UserError(f"{pair} have different numbers of objects: {own} and {others}")
    for name in TRUTH:
        differing = (records[name] != other[name]).nonzero()[0]
        if wrong := len(set(differing.tolist())):
            raise UserError(
                f"{pair} have different {name} for {wrong} objects; they were evaluated on "
                "different data"
            )


# COCO's average precision: name in tables -> name in `coco_ap.SUMMARY`.
COCO = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium",
        "AP_large": "large"}  # fmt: skip
AR = "AR100"
# COCO's average recall: name -> size range of the objects, detections per class and image.
RECALLS = {"AR1": ("all", 1), "AR10": ("all", 10), AR: ("all", 100), "AR_small": ("small", 100),
           "AR_medium": ("medium", 100), "AR_large": ("large", 100)}  # fmt: skip
VOC: dict[str, Points] = {"VOC07_mAP": "11", "VOC_mAP": "area"}
CONFUSABLE = "confusable_"  # prefix of means over only the classes in a confusable group
_KITTI = re.compile(rf"KITTI(11)?_({'|'.join(DIFFICULTIES)})")
KITTI = tuple(f"KITTI_{name}" for name in DIFFICULTIES)
ROWS = (*COCO, AR, f"{CONFUSABLE}AP50", *KITTI)
SIZES = {"AP_small": "small", "AP_medium": "medium", "AP_large": "large"}  # metric -> size range
_CACHED = 32  # number of runs whose metrics are cached

Numbers = Mapping[str, Floats]  # metric -> values (R, C), NaN for classes without objects


def value(records: Records, name: str) -> float | None:
    """Compute a metric in 0..1; None if it is undefined.

    Args:
        records: Detection records; the module docstring lists the arrays.
        name: One of `ROWS`, `RECALLS` or `VOC`, `KITTI11_<difficulty>` or `confusable_<name in
            COCO>`. Append `/<class>` for a single class (not for `confusable_`).

    Raises:
        UserError: The metric or class is unknown.
    """
    number = float(_number(_RecordsKey(records), name, drawn=False)[0])
    return None if np.isnan(number) else number


def interval(records: Records, name: str) -> Interval | None:
    """Metric with its 95 % interval; None if undefined, or for KITTI (too slow to bootstrap)."""
    known = _RecordsKey(records)
    mean = float(_number(known, name, drawn=False)[0])
    if np.isnan(mean) or _KITTI.match(name):
        return None
    if len(records["image_ids"]) < 2:
        return Interval(mean, np.nan, np.nan)
    low, high = percentiles(mean, _number(known, name, drawn=True), centred=True)[1:]
    return Interval(mean, max(low, 0.0), min(high, 1.0))


def difference(records: Records, twin: Records, name: str) -> Interval:
    """Metric of `records` minus that of `twin`, with a paired bootstrap interval over images."""
    both = _RecordsKey(records), _RecordsKey(twin)
    own, other = (float(_number(one, name, drawn=False)[0]) for one in both)
    if len(records["image_ids"]) < 2 or _KITTI.match(name):
        return Interval(own - other, np.nan, np.nan)
    after, before = (_number(one, name, drawn=True) for one in both)
    return percentiles(own - other, after - before, centred=True)


def evaluate(records: Records) -> dict[str, float]:
    """Compute all metrics that are defined for these records, and `count`, the number of images."""
    names = (*COCO, *RECALLS, f"{CONFUSABLE}AP50", *VOC, *KITTI)
    found = {name: value(records, name) for name in names}
    numbers = {name: number for name, number in found.items() if number is not None}
    return {**numbers, "count": float(len(records["image_ids"]))}


class BoxRow(NamedTuple):
    """COCO metrics of a class that has at least one object."""

    label: int
    objects: int
    numbers: dict[str, float]  # metric name in `COCO` -> value; undefined metrics are missing


def per_class(records: Records) -> list[BoxRow]:
    """COCO metrics of each class that has an object, most frequent class first."""
    numbers = _observed(_RecordsKey(records))
    support = objects_of(records)
    rows = []
    for label in np.argsort(-support, kind="stable").tolist():
        if support[label]:
            own = {name: float(numbers[name][0, label]) for name in COCO}
            known = {name: number for name, number in own.items() if not np.isnan(number)}
            rows.append(BoxRow(label, int(support[label]), known))
    return rows


def objects_of(records: Records, size: str = "all") -> Array:
    """Count the objects of each class in a size range of `AREAS`, (C,)."""
    low, high = AREAS[size]
    areas = records["truth_areas"]
    kept = ~records["truth_crowds"] & (areas >= low) & (areas <= high)
    return np.bincount(records["truth_labels"][kept], minlength=len(records["category_ids"]))


def right_at_half(records: Records) -> tuple[Bools, Bools]:
    """For each detection: whether it matches an object at IoU 0.5, and whether it is ignored."""
    _, matches = _matched(records, areas=1)
    return matches.hit[0, 0], matches.ignored[0, 0]


class _RecordsKey:
    """Hashable wrapper of records, for use as a cache key; compares the arrays by content."""

    def __init__(self, records: Records) -> None:
        self.records = records

    @cached_property
    def digest(self) -> bytes:
        content = hashlib.blake2b(digest_size=16)
        for name in ("image_ids", "category_ids", "names", "confusable", *TRUTH, *DIFFICULTY,
                     *FOUND):  # fmt: skip
            if name in self.records:
                part = np.ascontiguousarray(self.records[name])
                content.update(f"{name} {part.dtype} {part.shape}".encode())
                content.update(part.tobytes())
        return content.digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _RecordsKey) and self.digest == other.digest


def _number(known: _RecordsKey, name: str, *, drawn: bool) -> Floats:
    """Compute a metric on all images, (1,), or on each bootstrap resample, (R,), if `drawn`."""
    records = known.records
    metric, _, wanted = name.partition("/")
    classes = len(records["category_ids"])
    label = class_number(metric, wanted, records, classes) if wanted else None
    kept = np.ones(classes, np.bool_)
    if metric.startswith(CONFUSABLE) and label is None:
        metric = metric.removeprefix(CONFUSABLE)
        kept = records["confusable"] >= 0 if "confusable" in records else ~kept
    if metric in COCO or metric in RECALLS:
        found = (_resampled(known) if drawn else _observed(known))[metric]
    elif metric in VOC:
        found = _voc(known, VOC[metric], drawn)
    elif matched := _KITTI.fullmatch(metric):
        rows = _kitti(known, 11 if matched[1] else 40)
        found = rows[[list(DIFFICULTIES).index(matched[2])]]
    else:
        names = ", ".join(dict.fromkeys((*ROWS, *RECALLS, *VOC)))
        raise UserError(
            f"metric {name!r}: unknown; there are {names}, KITTI11_<difficulty>, "
            f"{CONFUSABLE}<one of COCO's metrics>, and for a single class: AP/<class>"
        )
    return found[:, label] if label is not None else mean_of_known(found[:, kept])


def _matched(records: Records, *, areas: int = len(AREAS)) -> tuple[MeanAP, Matches]:
    meter = MeanAP(
        true_boxes(records),
        found_boxes(records),
        len(records["image_ids"]),
        len(records["category_ids"]),
    )
    return meter, meter.match(found_scores(records), areas=areas)


def _numbers(meter: MeanAP, matches: Matches, weights: Array | None) -> dict[str, Floats]:
    """COCO metrics of each class by name, (R, C).

    Row r weights the images by `weights[r]`; if `weights` is None, R is 1 and all weights are 1.
    """
    averages = meter.average(matches, weights)  # (R, A, T, C)
    found = {
        name: meter.recall(matches, weights, area=area, most=most).mean(axis=1)
        for name, (area, most) in RECALLS.items()
    }
    for name, key in COCO.items():
        area, threshold = SUMMARY[key]
        part = averages[:, list(AREAS).index(area)]
        place = None if threshold is None else int(np.argmin(abs(THRESHOLDS - threshold)))
        found[name] = part.mean(axis=1) if place is None else part[:, place]
    return found


@lru_cache(maxsize=_CACHED)
def _observed(known: _RecordsKey) -> Numbers:
    return _numbers(*_matched(known.records), None)


@lru_cache(maxsize=_CACHED)
def _resampled(known: _RecordsKey) -> Numbers:
    """COCO metrics on each bootstrap resample, in float32 to save memory."""
    meter, matches = _matched(known.records)
    drawn = (weights.astype(np.float32) for weights in resamples(meter.images))
    parts = [_numbers(meter, matches, weights) for weights in drawn]
    return {
        name: np.concatenate([part[name].astype(np.float32) for part in parts]) for name in parts[0]
    }


@lru_cache(maxsize=2 * _CACHED)
def _voc(known: _RecordsKey, points: Points, drawn: bool) -> Floats:
    """Pascal VOC AP by class, (1, C), or if `drawn` for each bootstrap resample, (R, C)."""
    records = known.records
    sides = true_boxes(records), found_boxes(records)
    meter = VocAP(*sides, len(records["image_ids"]), len(records["category_ids"]))
    matches = meter.match(found_scores(records))
    counts = list(resamples(meter.images)) if drawn else [None]
    return np.concatenate([meter.average(matches, one, points=points) for one in counts])


@lru_cache(maxsize=_CACHED)
def _kitti(known: _RecordsKey, points: int) -> Floats:
    """KITTI AP by difficulty and class, (3, C); NaN for other datasets.

    Classes without a KITTI overlap threshold are matched at an IoU of 0.5.
    """
    records = known.records
    names = [str(name) for name in records["names"]]
    result = np.full((len(DIFFICULTIES), len(names)), np.nan)
    truth = kitti_truth(records)
    if truth is not None:
        overlaps = [OVERLAPS.get(name.lower(), 0.5) for name in names]
        sides = found_boxes(records), found_scores(records)
        result = kitti_ap(truth, *sides, overlaps=overlaps, points=points)
    return result
