"""Pascal VOC's average precision: by hand, and equal to a slow loop over random boxes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from kd.errors import UserError
from kd.metrics.coco_ap import Boxes, Floats, mean_of_known
from kd.metrics.voc_ap import Points, VocAP

Row = tuple[int, int, list[float]]  # image, label, x y width height
BOTH: tuple[Points, ...] = ("11", "area")


def boxes(rows: list[Row], difficult: list[int] | None = None) -> Boxes:
    flags = np.zeros(len(rows), np.bool_)
    flags[difficult or []] = True
    xywh = np.array([row[2] for row in rows], np.float64).reshape(-1, 4)
    return Boxes(
        image=np.array([row[0] for row in rows], np.int64),
        label=np.array([row[1] for row in rows], np.int64),
        xywh=xywh,
        areas=xywh[:, 2] * xywh[:, 3],
        crowd=flags,
    )


def ap(
    truth: Boxes, found: Boxes, scores: list[float], points: Points, images: int = 1
) -> list[float]:
    meter = VocAP(truth, found, images, 2)
    matches = meter.match(np.array(scores))
    return [float(one) for one in meter.average(matches, points=points)[0]]


def iou(a: Floats, b: Floats) -> float:
    sides = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    shared = float(np.prod(np.maximum(sides, 0)))
    return shared / (float(a[2] * a[3] + b[2] * b[3]) - shared)


def slow_ap(truth: Boxes, found: Boxes, scores: Floats, label: int, points: Points) -> float:
    """One class, as the challenge's description has it."""
    mine = [g for g in range(len(truth)) if truth.label[g] == label]
    objects = sum(not truth.crowd[g] for g in mine)
    if not objects:
        return float("nan")
    taken: set[int] = set()
    right: list[bool] = []
    ranked = sorted(range(len(found)), key=lambda d: (-scores[d], found.image[d], d))
    for d in ranked:
        if found.label[d] != label:
            continue
        best, most = -1, -1.0
        for g in mine:
            if truth.image[g] == found.image[d] and iou(found.xywh[d], truth.xywh[g]) > most:
                best, most = g, iou(found.xywh[d], truth.xywh[g])
        if most < 0.5:
            right.append(False)
        elif not truth.crowd[best]:
            right.append(best not in taken)
            taken.add(best)
    hits = [sum(right[: n + 1]) for n in range(len(right))]
    precisions = [hit / (n + 1) for n, hit in enumerate(hits)]
    if points == "11":
        steps = [
            max([p for p, hit in zip(precisions, hits, strict=True) if 10 * hit >= k * objects],
                default=0.0)
            for k in range(11)
        ]  # fmt: skip
        return sum(steps) / 11
    area = 0.0
    for n, good in enumerate(right):
        if good:
            area += max(precisions[n:]) / objects
    return area


def random_boxes(seed: int) -> tuple[Boxes, Boxes, Floats]:
    """Five images of two classes, a fifth of the objects difficult; equal scores abound."""
    random = np.random.default_rng(seed)
    rows: list[Row] = []
    results: list[Row] = []
    for _ in range(40):
        box = [*random.uniform(0, 60, 2), *random.uniform(10, 40, 2)]
        image, label = int(random.integers(5)), int(random.integers(2))
        rows.append((image, label, box))
        for _ in range(int(random.integers(4))):
            near = np.array(box) * random.uniform(0.8, 1.25, 4)
            said = label if random.random() < 0.8 else 1 - label
            results.append((image, said, near.tolist()))
    difficult = np.flatnonzero(random.random(len(rows)) < 0.2).tolist()
    return boxes(rows, difficult), boxes(results), random.random(len(results)).round(1)


SQUARES: list[Row] = [(0, 0, [20.0 * n, 0.0, 10.0, 10.0]) for n in range(4)]
AWAY: Row = (0, 0, [0.0, 50.0, 10.0, 10.0])


def test_a_list_of_five_by_hand() -> None:
    # Right, wrong, right, wrong, right, of four: precisions 1, 2/3, 3/5 at recalls 1/4, 1/2, 3/4.
    found = boxes([SQUARES[0], AWAY, SQUARES[1], AWAY, SQUARES[2]])
    scores = [0.9, 0.8, 0.7, 0.6, 0.5]
    area, none = ap(boxes(SQUARES), found, scores, "area")
    assert area == pytest.approx((1 + 2 / 3 + 3 / 5) / 4)
    assert np.isnan(none)
    # Recalls 0, .1, .2 - .3, .4, .5 - .6, .7 - none above.
    elevens = ap(boxes(SQUARES), found, scores, "11")[0]
    assert elevens == pytest.approx((3 * 1 + 3 * 2 / 3 + 2 * 3 / 5) / 11)


def test_perfect_detections_get_one_and_none_get_nothing() -> None:
    for points in BOTH:
        scores = [0.1, 0.2, 0.3, 0.4]
        assert ap(boxes(SQUARES), boxes(SQUARES), scores, points)[0] == 1.0
        assert ap(boxes(SQUARES), boxes([]), [], points)[0] == 0.0
        assert ap(boxes(SQUARES), boxes([AWAY]), [0.5], points)[0] == 0.0


def test_three_of_ten_reach_the_recall_of_three_tenths() -> None:
    rows: list[Row] = [(0, 0, [20.0 * n, 0.0, 10.0, 10.0]) for n in range(10)]
    assert ap(boxes(rows), boxes(rows[:3]), [0.3, 0.2, 0.1], "11")[0] == pytest.approx(4 / 11)


def test_a_second_detection_of_an_object_is_wrong_even_if_another_is_near() -> None:
    near = [3.0, 0.0, 10.0, 10.0]  # IoU 7/13 with the first
    truth = boxes([(0, 0, [0.0, 0.0, 10.0, 10.0]), (0, 0, [6.5, 0.0, 10.0, 10.0])])
    found = boxes([(0, 0, [0.0, 0.0, 10.0, 10.0]), (0, 0, near)])
    # 6.5/13.5 with the second object: below a half, and not its best anyway.
    assert ap(truth, found, [0.9, 0.8], "area")[0] == pytest.approx(1 / 2)


def test_an_overlap_of_a_half_is_enough() -> None:
    truth = boxes([(0, 0, [0.0, 0.0, 10.0, 10.0])])
    assert ap(truth, boxes([(0, 0, [0.0, 0.0, 5.0, 10.0])]), [0.5], "area")[0] == 1.0
    assert ap(truth, boxes([(0, 0, [0.0, 0.0, 4.9, 10.0])]), [0.5], "area")[0] == 0.0


def test_difficult_objects_and_what_finds_them_count_neither_way() -> None:
    found = boxes([SQUARES[0], SQUARES[0], SQUARES[1], SQUARES[2]])
    scores = [0.9, 0.8, 0.7, 0.6]
    for points in BOTH:
        assert ap(boxes(SQUARES[:3], [0]), found, scores, points)[0] == 1.0
        assert np.isnan(ap(boxes(SQUARES[:1], [0]), found, scores, points)[0])


@pytest.mark.parametrize("points", BOTH)
@pytest.mark.parametrize("seed", range(6))
def test_equals_a_slow_loop(seed: int, points: Points) -> None:
    truth, found, scores = random_boxes(seed)
    meter = VocAP(truth, found, 5, 2)
    ours = meter.average(meter.match(scores), points=points)[0]
    slow = [slow_ap(truth, found, scores, label, points) for label in range(2)]
    np.testing.assert_allclose(ours, slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("points", BOTH)
def test_an_image_that_counts_twice_is_an_image_that_is_there_twice(points: Points) -> None:
    truth, found, _ = random_boxes(7)
    scores = np.random.default_rng(7).random(len(found))  # without ties, whose order would differ
    meter = VocAP(truth, found, 5, 2)
    weights = np.array([[1, 0, 2, 1, 1], [0, 0, 0, 0, 0]])
    ours = meter.average(meter.match(scores), weights, points=points)
    assert np.isnan(ours[1]).all()

    def drawn(one: Boxes, values: Floats) -> tuple[Boxes, Floats]:
        rows = [n for n in range(len(one)) for _ in range(int(weights[0, one.image[n]]))]
        # The second copy of an image is an image of its own.
        images = [int(one.image[n]) + 5 * rows[:place].count(n) for place, n in enumerate(rows)]
        again = dataclasses.replace(
            one, image=np.array(images), label=one.label[rows], xywh=one.xywh[rows],
            areas=one.areas[rows], crowd=one.crowd[rows],
        )  # fmt: skip
        return again, values[rows]

    more_truth, _ = drawn(truth, np.zeros(len(truth)))
    more_found, more_scores = drawn(found, scores)
    again = VocAP(more_truth, more_found, 10, 2)
    expected = again.average(again.match(more_scores), points=points)[0]
    np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-12)


def test_the_mean_is_over_classes_with_an_object() -> None:
    averages = np.array([[0.5, np.nan, 0.25], [np.nan, np.nan, np.nan]])
    mean = mean_of_known(averages)
    assert mean[0] == pytest.approx(0.375) and np.isnan(mean[1])


def test_options_out_of_range_are_refused() -> None:
    meter = VocAP(boxes(SQUARES), boxes([AWAY]), 1, 1)
    with pytest.raises(UserError, match="points must be '11' or 'area', got '12'"):
        meter.average(meter.match(np.ones(1)), points="12")  # type: ignore[arg-type]
