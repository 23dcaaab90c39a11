"""KITTI's average precision: by hand, and equal to a slow loop over random boxes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kd.errors import UserError
from kd.metrics.coco_ap import Boxes, Floats
from kd.metrics.kitti_ap import DIFFICULTIES, OVERLAPS, KittiTruth, kitti_ap

HALF = (0.5,)
OBJECTS = 240  # of a random scene


def boxes(rows: list[list[float]], images: list[int], labels: list[int] | None = None) -> Boxes:
    xywh = np.array(rows, np.float64).reshape(-1, 4)
    return Boxes(
        image=np.array(images, np.int64),
        label=np.array([0] * len(rows) if labels is None else labels, np.int64),
        xywh=xywh,
        areas=xywh[:, 2] * xywh[:, 3],
        crowd=np.zeros(len(rows), np.bool_),
    )


def truth_of(placed: Boxes, **marks: list[float]) -> KittiTruth:
    zeros = [0.0] * len(placed)
    return KittiTruth(
        boxes=placed,
        truncated=np.array(marks.get("truncated", zeros), np.float64),
        occluded=np.array(marks.get("occluded", zeros), np.int64),
        neighbour=np.array(marks.get("neighbour", zeros), np.bool_),
        region=np.array(marks.get("region", zeros), np.bool_),
    )


def columns(count: int, height: float = 50.0) -> list[list[float]]:
    """Boxes of 20 pixels' width side by side."""
    return [[30.0 * n, 0.0, 20.0, height] for n in range(count)]


def ap(truth: KittiTruth, found: Boxes, scores: list[float], points: int = 40) -> list[float]:
    """By difficulty, of one class."""
    result = kitti_ap(truth, found, np.array(scores, np.float64), overlaps=HALF, points=points)
    assert result.shape == (3, 1)
    return [float(one) for one in result[:, 0]]


def falling(count: int) -> list[float]:
    return [0.9 - 0.8 * n / count for n in range(count)]


def test_the_published_settings_are_the_defaults() -> None:
    assert OVERLAPS == {"car": 0.7, "pedestrian": 0.5, "cyclist": 0.5}
    assert list(DIFFICULTIES) == ["easy", "moderate", "hard"]
    assert [tuple(one) for one in DIFFICULTIES.values()] == [
        (40.0, 0, 0.15), (25.0, 1, 0.30), (25.0, 2, 0.50)
    ]  # fmt: skip


def test_perfect_detections_of_eighty_objects_get_one() -> None:
    all_of_them = boxes(columns(80), [0] * 80)
    for points in (11, 40):
        assert ap(truth_of(all_of_them), all_of_them, falling(80), points) == [1.0] * 3


def test_half_the_objects_found_is_half_of_the_recalls() -> None:
    truth = truth_of(boxes(columns(80), [0] * 80))
    found = boxes(columns(40), [0] * 40)
    # Recalls up to 20 of 40; 0 to 0.5 are six of the eleven.
    assert ap(truth, found, falling(40)) == pytest.approx([0.5] * 3)
    assert ap(truth, found, falling(40), 11) == pytest.approx([6 / 11] * 3)


def test_two_objects_by_hand() -> None:
    # One right, one wrong, one right: limits .9 and .5, precisions 1 and 2/3 at the first two
    # recalls of 41, nothing beyond; of the forty only the second counts, of the eleven the first.
    truth = truth_of(boxes(columns(2), [0, 0]))
    found = boxes([columns(1)[0], [500.0, 0.0, 20.0, 50.0], columns(2)[1]], [0, 0, 0])
    assert ap(truth, found, [0.9, 0.7, 0.5]) == pytest.approx([2 / 3 / 40] * 3)
    assert ap(truth, found, [0.9, 0.7, 0.5], 11) == pytest.approx([1 / 11] * 3)


def test_difficulties_ask_for_heights_occlusion_and_truncation() -> None:
    heights = [40.0, 39.9, 50.0, 50.0, 50.0, 50.0, 25.0, 24.9]
    placed = boxes([[30.0 * n, 0.0, 20.0, h] for n, h in enumerate(heights)], [0] * 8)
    truth = truth_of(
        placed, occluded=[0, 0, 1, 2, 0, 0, 0, 0], truncated=[0.15, 0, 0, 0, 0.3, 0.5, 0, 0]
    )
    # Only the one of the last place is found, below 25 pixels: it counts for none of them.
    last = boxes([placed.xywh[7].tolist()], [0])
    assert ap(truth, last, [0.5]) == [0.0] * 3
    for row, found in ((0, [1, 1, 1]), (1, [0, 1, 1]), (3, [0, 0, 1]), (4, [0, 1, 1])):
        one = boxes([placed.xywh[row].tolist()], [0])
        # At 11 recalls a single right detection is the precision of 1 at the recall of 0.
        assert ap(truth, one, [0.5], 11) == pytest.approx([n / 11 for n in found]), row


def test_without_an_object_of_a_difficulty_there_is_no_number() -> None:
    truth = truth_of(boxes(columns(1, 30.0), [0]))
    found = ap(truth, truth.boxes, [0.5], 11)
    assert np.isnan(found[0]) and found[1:] == pytest.approx([1 / 11] * 2)


def test_what_finds_a_neighbour_or_lies_in_a_region_is_not_wrong() -> None:
    rows = [*columns(3), [200.0, 0.0, 100.0, 100.0]]
    inside, beside = [210.0, 10.0, 30.0, 45.0], [190.0, 10.0, 20.0, 45.0]
    marks = {"neighbour": [0.0, 1.0, 0.0, 0.0], "region": [0.0, 0.0, 0.0, 1.0]}
    truth = truth_of(boxes(rows, [0] * 4), **marks)
    right = [rows[0], rows[2]]
    excused = boxes([rows[1], inside, *right], [0] * 4)
    scores = [0.9, 0.9, 0.8, 0.7]
    assert ap(truth, excused, scores, 11) == pytest.approx([1 / 11] * 3)
    # Half in the region is not mostly in it.
    wrong = boxes([rows[1], beside, *right], [0] * 4)
    assert ap(truth, wrong, scores, 11) == pytest.approx([2 / 3 / 11] * 3)
    # A second detection of the neighbour is wrong, as of an object.
    twice = boxes([rows[1], rows[1], *right], [0] * 4)
    assert ap(truth, twice, scores, 11) == pytest.approx([2 / 3 / 11] * 3)


def test_low_detections_count_neither_way() -> None:
    truth = truth_of(boxes(columns(1), [0]))
    low = [300.0, 0.0, 20.0, 30.0]
    found = ap(truth, boxes([low, columns(1)[0]], [0, 0]), [0.9, 0.5], 11)
    assert found == pytest.approx([1 / 11, 1 / 22, 1 / 22])


def test_other_images_and_classes_are_apart() -> None:
    truth = truth_of(boxes([*columns(1), *columns(1)], [0, 1], [0, 1]))
    found = boxes([*columns(1), *columns(1)], [1, 1], [0, 1])
    result = kitti_ap(truth, found, np.array([0.5, 0.5]), overlaps=(0.5, 0.5), points=11)
    np.testing.assert_allclose(result, [[0.0, 1 / 11]] * 3)


def test_without_a_detection_all_is_zero() -> None:
    assert ap(truth_of(boxes(columns(2), [0, 0])), boxes([], []), []) == [0.0] * 3


def test_options_out_of_range_are_refused() -> None:
    truth = truth_of(boxes(columns(1), [0]))
    with pytest.raises(UserError, match="points must be 11 or 40, got 41"):
        kitti_ap(truth, truth.boxes, np.ones(1), overlaps=HALF, points=41)
    with pytest.raises(UserError, match=r"overlaps must be in \(0, 1\), got \[0.5, 1.0\]"):
        kitti_ap(truth, truth.boxes, np.ones(1), overlaps=(0.5, 1.0))


def shared(a: Floats, b: Floats) -> float:
    sides = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    return float(np.prod(np.maximum(sides, 0)))


class Slow:
    """One class at one difficulty, counted box by box as the development kit describes it."""

    def __init__(
        self, truth: KittiTruth, found: Boxes, scores: Floats, label: int, overlap: float, name: str
    ) -> None:
        self.truth, self.found, self.scores, self.overlap = truth, found, scores, overlap
        self.limits = DIFFICULTIES[name]
        rows = range(len(truth.boxes))
        mine = [g for g in rows if truth.boxes.label[g] == label]
        self.regions = [g for g in mine if truth.region[g]]
        self.objects = [g for g in mine if not truth.region[g]]
        self.detections = [d for d in range(len(found)) if found.label[d] == label]
        self.ious = {
            (d, g): self.measured(d, g)
            for d in self.detections
            for g in self.objects
            if found.image[d] == truth.boxes.image[g]
        }
        self.total = sum(not self.optional(g) for g in self.objects)

    def optional(self, g: int) -> bool:
        height, occluded, truncated = self.limits
        t = self.truth
        return bool(
            t.neighbour[g] or t.boxes.xywh[g, 3] < height
            or t.occluded[g] > occluded or t.truncated[g] > truncated
        )  # fmt: skip

    def low(self, d: int) -> bool:
        return bool(self.found.xywh[d, 3] < self.limits.height)

    def iou(self, d: int, g: int) -> float:
        return self.ious.get((d, g), 0.0)

    def measured(self, d: int, g: int) -> float:
        a, b = self.found.xywh[d], self.truth.boxes.xywh[g]
        both = shared(a, b)
        return both / (float(a[2] * a[3] + b[2] * b[3]) - both)

    def excused(self, d: int) -> bool:
        a = self.found.xywh[d]
        return any(
            self.found.image[d] == self.truth.boxes.image[g]
            and shared(a, self.truth.boxes.xywh[g]) / float(a[2] * a[3]) > self.overlap
            for g in self.regions
        )

    def hits(self) -> list[float]:
        free, scores = set(self.detections), []
        for g in self.objects:
            near = [d for d in self.detections if d in free and self.iou(d, g) > self.overlap]
            if near:
                best = max(near, key=lambda d: (self.scores[d], -d))
                free.remove(best)
                if not self.optional(g) and not self.low(best):
                    scores.append(float(self.scores[best]))
        return sorted(scores, reverse=True)

    def precision(self, limit: float) -> float:
        above = [d for d in self.detections if self.scores[d] >= limit]
        free, right = set(above), 0
        for g in self.objects:
            near = [d for d in above if d in free and self.iou(d, g) > self.overlap]
            high = [d for d in near if not self.low(d)]
            if near:
                best = max(high, key=lambda d: (self.iou(d, g), -d)) if high else near[0]
                free.remove(best)
                right += not self.optional(g) and not self.low(best)
        wrong = sum(not self.low(d) and not self.excused(d) for d in free)
        return right / (right + wrong) if right + wrong else 0.0

    def ap(self, points: int) -> float:
        if not self.total:
            return float("nan")
        hits, limits, wanted = self.hits(), [], 0.0
        for n, score in enumerate(hits):
            left, right = (n + 1) / self.total, (n + 2) / self.total
            if n == len(hits) - 1 or right - wanted >= wanted - left:
                limits.append(score)
                wanted += 1 / 40
        found = [self.precision(limit) for limit in limits] + [0.0] * (41 - len(limits))
        best = [max(found[n:]) for n in range(41)]
        return sum(best[1:]) / 40 if points == 40 else sum(best[::4]) / 11


def random_scene(seed: int) -> tuple[KittiTruth, Boxes, Floats]:
    """Twenty crowded images of two classes: neighbours, regions, low boxes, equal scores."""
    random = np.random.default_rng(seed)
    rows, images, labels, near, near_images, near_labels = [], [], [], [], [], []
    for _ in range(OBJECTS):
        box = [*random.uniform(0, 120, 2), *random.uniform(22, 80, 2)]
        image, label = int(random.integers(20)), int(random.integers(2))
        rows.append(box)
        images.append(image)
        labels.append(label)
        for _ in range(int(random.integers(4))):
            near.append((np.array(box) * random.uniform(0.94, 1.07, 4)).tolist())
            near_images.append(image)
            near_labels.append(label)
    truth = truth_of(
        boxes(rows, images, labels),
        truncated=random.choice([0.0, 0.0, 0.0, 0.0, 0.2, 0.4, 0.9], OBJECTS).tolist(),
        occluded=random.choice([0, 0, 0, 0, 0, 1, 2, 3], OBJECTS).tolist(),
        neighbour=(random.random(OBJECTS) < 0.15).tolist(),
    )
    region = (random.random(OBJECTS) < 0.1) & ~truth.neighbour
    truth = dataclasses.replace(truth, region=region)
    scores = random.random(len(near)).round(1 if seed % 2 else 6)
    return truth, boxes(near, near_images, near_labels), scores


@pytest.mark.parametrize(("seed", "points"), [(0, 40), (1, 40), (2, 11), (3, 11)])
def test_equals_a_slow_loop(seed: int, points: int) -> None:
    truth, found, scores = random_scene(seed)
    overlaps = (0.7, 0.5)
    ours = kitti_ap(truth, found, scores, overlaps=overlaps, points=points)
    slow = [
        [Slow(truth, found, scores, label, overlap, name).ap(points)
         for label, overlap in enumerate(overlaps)]
        for name in DIFFICULTIES
    ]  # fmt: skip
    np.testing.assert_allclose(ours, slow, rtol=0, atol=1e-12)
    assert (ours > 0.1).all() and (ours < 0.9).all()
