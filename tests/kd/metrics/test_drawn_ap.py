"""Averages over images that count more or less often: a slow loop, both ways to add up."""

from __future__ import annotations

import numpy as np
import pytest

from kd.metrics.coco_ap import RECALLS, Bools, Floats, Ints, average_precision, recall, sums_before


def slow(hit: Bools, counted: Bools, often: Floats, objects: float) -> float:
    """COCO's average precision; each detection stands in the list as often as its image counts."""
    right, total, precisions, recalls = 0.0, 0.0, [], []
    for good, there, times in zip(hit, counted, often, strict=True):
        for _ in range(int(times)):
            right, total = right + float(good and there), total + float(there)
            precisions.append(right / (total + np.spacing(1)))
            recalls.append(right / objects)
    best = [max((p for p, r in zip(precisions, recalls, strict=True) if r >= wanted), default=0.0)
            for wanted in RECALLS]  # fmt: skip
    return float(np.mean(best))


def case(columns: int) -> tuple[Bools, Bools, Ints, Floats, Floats]:
    """Eight detections an image, three overlaps, images drawn with replacement."""
    rng = np.random.default_rng(3)
    image = rng.permutation(np.repeat(np.arange(9), 8))
    hit = rng.random((3, len(image))) < np.array([[0.5], [0.3], [0.0]])
    counted = rng.random((3, len(image))) < 0.8
    counted[1] = counted[0]  # two overlaps share the sums, with places of their own
    weights = rng.multinomial(9, np.full(9, 1 / 9), size=columns).T.astype(float)
    support = rng.integers(8, 12, 9).astype(float)
    return hit, counted, image, weights, support @ weights


@pytest.mark.parametrize("columns", [1, 4, 40])
def test_equals_a_list_in_which_images_are_repeated(columns: int) -> None:
    hit, counted, image, weights, objects = case(columns)
    ours = average_precision(hit, counted, image, weights, objects)
    assert ours.shape == (columns, 3) and (ours[:, 2] == 0).all()
    for r in range(columns):
        for t in range(2):
            expected = slow(hit[t], counted[t], weights[image, r], objects[r])
            assert ours[r, t] == pytest.approx(expected, abs=1e-12)


def test_few_columns_and_many_are_added_up_alike() -> None:
    _, counted, image, weights, _ = case(40)
    places = np.array([0, 5, 6, 71])
    many = sums_before(counted[0], places, image, weights)
    few = [sums_before(counted[0], places, image, weights[:, [c]])[:, 0] for c in range(40)]
    assert np.array_equal(many, np.stack(few, axis=1))
    whole = np.cumsum(weights[image] * counted[0][:, None], axis=0)
    assert np.array_equal(many, whole[places])


def test_recalls_that_rounding_puts_out_of_reach_are_cocos() -> None:
    """70 of 100 objects: 70 * 0.01 is above 0.7, so that recall 0.7 has not been reached."""
    hit = np.ones((1, 70), np.bool_)
    image = np.zeros(70, np.int64)
    one, objects = np.ones((1, 1)), np.array([100.0])
    assert RECALLS[70] > 0.7
    assert average_precision(hit, hit, image, one, objects)[0, 0] == pytest.approx(70 / 101)
    few, objects = np.ones((1, 7), np.bool_), np.array([20.0])  # 0.35, the same
    found = average_precision(few, few, image[:7], one, objects)[0, 0]
    assert found == pytest.approx(35 / 101)


def test_without_objects_there_is_no_number_and_without_detections_nothing() -> None:
    hit, counted, image, weights, objects = case(12)
    objects[3] = 0.0
    ours = average_precision(hit, counted, image, weights, objects)
    assert np.isnan(ours[3]).all() and not np.isnan(np.delete(ours, 3, axis=0)).any()
    nothing = np.zeros((3, 0), np.bool_)
    ours = average_precision(nothing, nothing, image[:0], weights, objects + 1)
    assert (ours == 0).all()
    assert (recall(nothing, image[:0], weights, objects + 1) == 0).all()


def test_recall_is_the_fraction_of_what_is_there() -> None:
    hit = np.array([[True, False, True], [False, False, True]])
    image = np.array([0, 1, 1])
    weights = np.array([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
    found = recall(hit, image, weights, np.array([4.0, 2.0, 0.0]))
    assert found[:2].tolist() == [[0.5, 0.25], [1.0, 0.0]]
    assert np.isnan(found[2]).all()
