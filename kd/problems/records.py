"""Kinds of answers: what tables and comparisons ask of any `predictions.npz`.

Records of every kind are arrays by name; which arrays are there says of what kind they are.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.metrics.bootstrap import Interval, bootstrap, paired_bootstrap
from kd.metrics.records import Records
from kd.problems.detection import records as box_records
from kd.problems.detection import scores as box_scores
from kd.problems.objects.records import BY_CLASS, check_records
from kd.problems.saliency import baselines as saliency_references
from kd.problems.saliency import records as saliency_scores
from kd.problems.segmentation import records as map_scores


class Kind(Protocol):
    """How answers of one kind are read, scored and compared."""

    @property
    def things(self) -> str:
        """What is scored, in the plural: `objects`."""
        ...

    @property
    def ids(self) -> str:
        """The array that says which of them a row is about."""
        ...

    @property
    def not_by_id(self) -> tuple[str, ...]:
        """Arrays that have no row for each id; most of them have one for each class."""
        ...

    @property
    def rows(self) -> tuple[str, ...]:
        """The metrics of a table, unless others are asked for."""
        ...

    def references(self, records: Records) -> dict[str, Records]:
        """What tables hold answers against beside each other, by name: the same things' records."""
        ...

    def check(self, records: Records, where: str) -> None:
        """Raise a `UserError` that begins with `where`, if a number cannot be had from them."""
        ...

    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Raise a `UserError` if two, of the same ids, were scored by different truths."""
        ...

    def value(self, records: Records, name: str) -> float | None:
        """A metric; None where nothing counts for it. Of an unknown one a `UserError`."""
        ...

    def interval(self, records: Records, name: str) -> Interval | None:
        """A metric with its 95 % interval over images; None where none can be had."""
        ...

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """A metric less that of a twin, over the same images; NaN bounds where none can be had."""
        ...


class Objects:
    """Classes of objects, as `kd.problems.objects.records` describes."""

    things, ids, not_by_id = "objects", "object_ids", BY_CLASS
    rows = ("top1", "mean_class_top1", "top5", "nll", "ece", "confusable_top1",
            "confusable_pair_top1")  # fmt: skip

    def references(self, records: Records) -> dict[str, Records]:
        """Tables have their own words for the class prior."""
        return {}

    def check(self, records: Records, where: str) -> None:
        """As `check_records`."""
        check_records(records, where)

    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Classes and labels must be the same."""
        own, others = records["log_probs"].shape, other["log_probs"].shape
        if own != others:
            raise UserError(f"{pair} know different numbers of classes: {own[1]} and {others[1]}")
        if wrong := int((records["labels"] != other["labels"]).sum()):
            raise UserError(f"{pair} disagree on the labels of {wrong} objects: other data")

    def value(self, records: Records, name: str) -> float | None:
        """As `scores.value`."""
        return scores.value(records, name)

    def interval(self, records: Records, name: str) -> Interval | None:
        """`ece` has none: it is no mean over objects, its bins would have to be drawn again."""
        found = None if name == "ece" else scores.measure(records, name)
        if found is None:
            return None
        images = records["image_ids"][found.selected]
        return bootstrap(found.values, images, classes=found.classes)

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """`ece` has no bounds, see `interval`."""
        if name == "ece":
            a, b = (scores.value(one, name) for one in (twin, records))
            assert a is not None and b is not None
            return Interval(b - a, float("nan"), float("nan"))
        before, after = scores.measure(twin, name), scores.measure(records, name)
        assert before is not None and after is not None  # whoever compares has seen both
        images = records["image_ids"][after.selected]
        return paired_bootstrap(before.values, after.values, images, classes=after.classes)


class Pictures:
    """Label maps of whole pictures, as `kd.problems.segmentation.records` describes."""

    things, ids, not_by_id = "pictures", "image_ids", ("names",)
    rows = map_scores.ROWS

    def references(self, records: Records) -> dict[str, Records]:
        """None."""
        return {}

    def check(self, records: Records, where: str) -> None:
        """As `map_scores.check`."""
        map_scores.check(records, where)

    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Classes, and the pixels of each in every picture, must be the same."""
        own, others = (map_scores.pixels(one).true for one in (records, other))
        if own.shape != others.shape:
            raise UserError(
                f"{pair} know different numbers of classes: {own.shape[1]} and {others.shape[1]}"
            )
        if wrong := int((own != others).any(axis=1).sum()):
            raise UserError(f"{pair} disagree on the label maps of {wrong} pictures: other data")

    def value(self, records: Records, name: str) -> float | None:
        """None for a class that is neither there nor said."""
        found = map_scores.pixels(records).drawn(np.ones((1, len(records["image_ids"]))))
        number = float(map_scores.number_of(name, found, records)[0])
        return None if np.isnan(number) else number

    def interval(self, records: Records, name: str) -> Interval | None:
        """Every metric has one."""
        return map_scores.interval(records, name)

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """Pictures are drawn, and their confusions summed anew."""
        return map_scores.difference(records, twin, name)


class Detections:
    """Boxes found on pictures, as `kd.problems.detection.records` describes."""

    things, ids, not_by_id = "pictures with boxes", "image_ids", box_records.NOT_BY_ID
    rows = box_scores.ROWS

    def references(self, records: Records) -> dict[str, Records]:
        """None."""
        return {}

    def check(self, records: Records, where: str) -> None:
        """As `box_records.check`."""
        box_records.check(records, where)

    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """Classes and true objects must be the same."""
        own, others = (len(one["category_ids"]) for one in (records, other))
        if own != others:
            raise UserError(f"{pair} know different numbers of classes: {own} and {others}")
        own, others = (len(one["truth_images"]) for one in (records, other))
        if own != others:
            raise UserError(f"{pair} have different numbers of objects: {own} and {others}")
        for name in box_records.TRUTH:
            differing = (records[name] != other[name]).nonzero()[0]
            if wrong := len(set(differing.tolist())):
                raise UserError(f"{pair} disagree on {name} of {wrong} objects: other data")

    def value(self, records: Records, name: str) -> float | None:
        """As `box_scores.value`."""
        return box_scores.value(records, name)

    def interval(self, records: Records, name: str) -> Interval | None:
        """KITTI's numbers have none."""
        return box_scores.interval(records, name)

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """Pictures are drawn, and precision averaged anew; KITTI's numbers have no bounds."""
        return box_scores.difference(records, twin, name)


class Saliency:
    """Where people look on pictures, as `kd.problems.saliency.records` describes."""

    things, ids, not_by_id = "pictures with fixations", "image_ids", ()
    rows = saliency_scores.ROWS

    def references(self, records: Records) -> dict[str, Records]:
        """The centre prior and other observers, where the records hold them."""
        return saliency_references.references(records)

    def check(self, records: Records, where: str) -> None:
        """As `saliency_scores.check`."""
        saliency_scores.check(records, where)

    def check_same_truth(self, records: Records, other: Records, pair: str) -> None:
        """As `saliency_scores.check_same_truth`."""
        saliency_scores.check_same_truth(records, other, pair)

    def value(self, records: Records, name: str) -> float | None:
        """The mean over pictures; None where no picture has the metric."""
        return saliency_scores.value(records, name)

    def interval(self, records: Records, name: str) -> Interval | None:
        """As `saliency_scores.interval`."""
        return saliency_scores.interval(records, name)

    def difference(self, records: Records, twin: Records, name: str) -> Interval:
        """As `saliency_scores.difference`."""
        return saliency_scores.difference(records, twin, name)


OBJECTS: Kind = Objects()
PICTURES: Kind = Pictures()
DETECTIONS: Kind = Detections()
SALIENCY: Kind = Saliency()
# By the array that only answers of this kind have.
KINDS: dict[str, Kind] = {
    "confusion": PICTURES,
    "found_boxes": DETECTIONS,
    "fixation_counts": SALIENCY,
    "log_probs": OBJECTS,
}


def kind_of(records: Records) -> Kind:
    """The kind of some records; those that are of none are taken for objects, and refused there."""
    return next((kind for array, kind in KINDS.items() if array in records), OBJECTS)


def check_same(records: Records, other: Records, pair: str) -> None:
    """Refuse to compare answers that are not about the same things.

    Args:
        records: Of one run.
        other: Of another.
        pair: Names both, for the message.

    Raises:
        UserError: Other kinds of answers, other ids, classes or truths.
    """
    kind = kind_of(records)
    if kind is not kind_of(other):
        raise UserError(
            f"{pair} answer different questions: about {kind.things} and about "
            f"{kind_of(other).things}"
        )
    ids, others = records[kind.ids], other[kind.ids]
    if not np.array_equal(ids, others):
        common = len(np.intersect1d(ids, others))
        where = " or other limits of share" if kind is OBJECTS else ""
        raise UserError(
            f"{pair} scored different {kind.things} ({len(ids)} and {len(others)}, {common} in "
            f"both): other data, another split{where}; evaluate both on the same"
        )
    kind.check_same_truth(records, other, pair)
