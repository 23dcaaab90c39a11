"""The synthetic gaze model: deterministic, and at objects more than elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kd.errors import UserError
from kd.formats.coco import CocoIndex, load_coco
from kd.scenes.gaze import FIXATIONS, INTEREST, OBSERVERS, SceneGaze

SIZE = (64, 64)


@pytest.fixture(scope="module")
def index(small_scenes: Path) -> CocoIndex:
    return load_coco(small_scenes / "annotations" / "instances_train.json", small_scenes / "train")


def test_fixations_are_deterministic(index: CocoIndex) -> None:
    first, again = SceneGaze(index)(3, SIZE), SceneGaze(index)(3, SIZE)
    np.testing.assert_array_equal(first.points, again.points)
    assert len(first.points) == OBSERVERS * FIXATIONS
    assert np.bincount(first.observers).tolist() == [FIXATIONS] * OBSERVERS
    assert not np.array_equal(first.points, SceneGaze(index, seed=1)(3, SIZE).points)
    assert not np.array_equal(first.points, SceneGaze(index)(4, SIZE).points)


def test_most_fixations_are_on_objects_and_all_in_the_image(index: CocoIndex) -> None:
    at_objects = total = covered = 0.0
    for number in range(len(index)):
        points = SceneGaze(index)(number, SIZE).points
        assert ((points >= 0) & (points < 64)).all()
        boxes = index.boxes[int(index.first[number]) : int(index.first[number + 1])]
        hit = [((points >= box[:2]) & (points <= box[2:])).all(axis=1) for box in boxes]
        at_objects += np.any(hit, axis=0).sum()
        total += len(points)
        grid = np.stack(np.meshgrid(np.arange(64), np.arange(64)), axis=-1).reshape(-1, 2) + 0.5
        covered += np.any(
            [((grid >= b[:2]) & (grid <= b[2:])).all(axis=1) for b in boxes], axis=0
        ).mean()
    assert at_objects / total > 0.75 > 2 * covered / len(index)


def test_people_attract_more_fixations_than_clouds(index: CocoIndex) -> None:
    fixations: dict[str, list[int]] = {"person": [], "cloud": []}
    for number in range(len(index)):
        points = SceneGaze(index)(number, SIZE).points
        for row in range(int(index.first[number]), int(index.first[number + 1])):
            name = index.class_names[int(index.labels[row])]
            if name in fixations:
                box = index.boxes[row]
                fixations[name].append(
                    int(((points >= box[:2]) & (points <= box[2:])).all(1).sum())
                )
    assert np.mean(fixations["person"]) > 2 * np.mean(fixations["cloud"])
    assert INTEREST["person"] > INTEREST["cloud"]


def test_an_image_of_another_size_is_rejected(index: CocoIndex) -> None:
    with pytest.raises(UserError, match=r"32 x 16 pixels, but 64 x 64 in "):
        SceneGaze(index)(0, (16, 32))
