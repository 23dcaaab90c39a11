"""Detection metrics of COCO, Pascal VOC and KITTI, overall and per class.

Overall metrics are means over the classes with an object. Intervals are bootstrapped over images:
all metrics of a run come from one pass over the resamples, which are the same for all runs on the
same images, so that runs can be subtracted. Repeated images raise AP (by 1.6 points on 228 images
of COCO), so bounds are shifted by that bias.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from kd.errors import UserError
from kd.metrics.bootstrap import Interval, percentiles, resamples
from kd.metrics.coco_ap import AREAS, SUMMARY, THRESHOLDS, Array, Bools, Floats, Matches, MeanAP
from kd.metrics.kitti_ap import DIFFICULTIES, OVERLAPS, kitti_ap
from kd.metrics.records import Records
from kd.metrics.voc_ap import Points, VocAP, mean_over_classes
from kd.problems.detection import records as box_records

# COCO's metrics: name in tables -> name in `coco_ap.SUMMARY`.
COCO = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AP_small": "small", "AP_medium": "medium",
        "AP_large": "large"}  # fmt: skip
AR = "AR100"
# Average recall: name -> size of the objects, and detections used per class and image.
RECALLS = {"AR1": ("all", 1), "AR10": ("all", 10), AR: ("all", 100), "AR_small": ("small", 100),
           "AR_medium": ("medium", 100), "AR_large": ("large", 100)}  # fmt: skip
VOC: dict[str, Points] = {"VOC07_mAP": "11", "VOC_mAP": "area"}
CONFUSABLE = "confusable_"  # prefix of COCO's metrics: over classes with confusable ones
_KITTI = re.compile(rf"KITTI(11)?_({'|'.join(DIFFICULTIES)})")
KITTI = tuple(f"KITTI_{name}" for name in DIFFICULTIES)
ROWS = (*COCO, AR, f"{CONFUSABLE}AP50", *KITTI)
SIZES = {"AP_small": "small", "AP_medium": "medium", "AP_large": "large"}  # metric -> area range
_CACHED = 32  # runs

Numbers = Mapping[str, Floats]  # by metric, (R, C) each, NaN for classes without objects


def value(records: Records, name: str) -> float | None:
    """A metric; None if it is undefined.

    Args:
        records: See `kd.problems.detection.records`.
        name: One of `ROWS`, `RECALLS` or `VOC`, `KITTI11_<difficulty>`, `confusable_<one of COCO>`;
            all but `confusable_` can be followed by `/` and a class.

    Raises:
        UserError: There is no such metric or class.
    """
    number = float(_number(_RecordsKey(records), name, drawn=False)[0])
    return None if np.isnan(number) else number


def interval(records: Records, name: str) -> Interval | None:
    """A metric with its 95 % interval; None for KITTI's, whose bootstrap would take minutes."""
    known = _RecordsKey(records)
    mean = float(_number(known, name, drawn=False)[0])
    if np.isnan(mean) or _KITTI.match(name):
        return None
    if len(records["image_ids"]) < 2:
        return Interval(mean, np.nan, np.nan)
    low, high = percentiles(mean, _number(known, name, drawn=True), centred=True)[1:]
    return Interval(mean, max(low, 0.0), min(high, 1.0))


def difference(records: Records, twin: Records, name: str) -> Interval:
    """A metric minus a twin's, with the interval of a paired bootstrap over images."""
    both = _RecordsKey(records), _RecordsKey(twin)
    own, other = (float(_number(one, name, drawn=False)[0]) for one in both)
    if len(records["image_ids"]) < 2 or _KITTI.match(name):
        return Interval(own - other, np.nan, np.nan)
    after, before = (_number(one, name, drawn=True) for one in both)
    return percentiles(own - other, after - before, centred=True)


def evaluate(records: Records) -> dict[str, float]:
    """Every overall metric that is defined for these records, and the `count` of images."""
    names = (*COCO, *RECALLS, f"{CONFUSABLE}AP50", *VOC, *KITTI)
    found = {name: value(records, name) for name in names}
    numbers = {name: number for name, number in found.items() if number is not None}
    return {**numbers, "count": float(len(records["image_ids"]))}


class BoxRow(NamedTuple):
    """COCO's metrics of a class with an object."""

    label: int
    objects: int
    numbers: dict[str, float]  # by the names of `COCO`, without sizes that the class lacks


def per_class(records: Records) -> list[BoxRow]:
    """COCO's metrics of each class with an object, the most frequent first."""
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
    """Objects of each class in a size range of `AREAS`, (C,)."""
    low, high = AREAS[size]
    areas = records["truth_areas"]
    kept = ~records["truth_crowds"] & (areas >= low) & (areas <= high)
    return np.bincount(records["truth_labels"][kept], minlength=len(records["category_ids"]))


def right_at_half(records: Records) -> tuple[Bools, Bools]:
    """Detections that are right at an overlap of 0.5, (D,) bool, and those that are ignored."""
    _, matches = _matched(records, areas=1)
    return matches.hit[0, 0], matches.ignored[0, 0]


def class_number(wanted: str, records: Records) -> int:
    """The number of a class given by name or number.

    Raises:
        UserError: There is no such class.
    """
    names = [str(name) for name in records["names"]]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise UserError(f"metric of class {wanted!r}: no such class; there are {', '.join(names)}")


class _RecordsKey:
    """Records as a cache key: equal if their content is."""

    def __init__(self, records: Records) -> None:
        self.records = records

    @cached_property
    def digest(self) -> bytes:
        """Hash of all arrays that metrics depend on."""
        content = hashlib.blake2b(digest_size=16)
        for name in ("image_ids", "category_ids", "names", "confusable", *box_records.TRUTH,
                     *box_records.KITTI, *box_records.FOUND):  # fmt: skip
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
    """A metric of the images, (1,), or of every resample, (R,)."""
    records = known.records
    metric, _, wanted = name.partition("/")
    label = class_number(wanted, records) if wanted else None
    kept = np.ones(len(records["category_ids"]), np.bool_)
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
            f"metric {name!r}: unknown; there are {names}, "
            f"KITTI11_<difficulty>, {CONFUSABLE}<one of COCO's>, and of a class: AP/<class>"
        )
    return found[:, label] if label is not None else mean_over_classes(found[:, kept])


def _matched(records: Records, *, areas: int = len(AREAS)) -> tuple[MeanAP, Matches]:
    meter = MeanAP(
        box_records.true_boxes(records),
        box_records.found_boxes(records),
        len(records["image_ids"]),
        len(records["category_ids"]),
    )
    return meter, meter.match(box_records.found_scores(records), areas=areas)


def _numbers(meter: MeanAP, matches: Matches, weights: Array | None) -> dict[str, Floats]:
    """COCO's metrics of each class, (R, C)."""
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
    """In float32 to save memory, which is enough for bounds."""
    meter, matches = _matched(known.records)
    drawn = (weights.astype(np.float32) for weights in resamples(meter.images))
    parts = [_numbers(meter, matches, weights) for weights in drawn]
    return {
        name: np.concatenate([part[name].astype(np.float32) for part in parts]) for name in parts[0]
    }


@lru_cache(maxsize=2 * _CACHED)
def _voc(known: _RecordsKey, points: Points, drawn: bool) -> Floats:
    """(R, C)."""
    records = known.records
    sides = box_records.true_boxes(records), box_records.found_boxes(records)
    meter = VocAP(*sides, len(records["image_ids"]), len(records["category_ids"]))
    matches = meter.match(box_records.found_scores(records))
    counts = list(resamples(meter.images)) if drawn else [None]
    return np.concatenate([meter.average(matches, one, points=points) for one in counts])


@lru_cache(maxsize=_CACHED)
def _kitti(known: _RecordsKey, points: int) -> Floats:
    """(3, C), NaN for other data; overlap 0.5 for classes that KITTI does not define."""
    records = known.records
    names = [str(name) for name in records["names"]]
    result = np.full((len(DIFFICULTIES), len(names)), np.nan)
    truth = box_records.kitti_truth(records)
    if truth is not None:
        overlaps = [OVERLAPS.get(name.lower(), 0.5) for name in names]
        sides = box_records.found_boxes(records), box_records.found_scores(records)
        result = kitti_ap(truth, *sides, overlaps=overlaps, points=points)
    return result
