"""Which objects are pasted where: whole ones, at their height, and both sets in the same scenes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kd.context.pasting.pairs import (
    BORDER,
    COVERED,
    Placements,
    find_placements,
    interleave_classes,
    intersections,
    is_whole,
    matched_pairs,
    score_placements,
)
from kd.formats.coco import CocoIndex, load_coco


def square(x: float, y: float, side: float) -> list[float]:
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def write(folder: Path, images: list[tuple[int, int]], objects: list[dict[str, Any]]) -> CocoIndex:
    """Images of (height, width), and objects of (image, class, polygons)."""
    folder.mkdir()
    for number, (height, width) in enumerate(images, start=1):
        Image.new("RGB", (width, height)).save(folder / f"{number}.png")
    annotations = []
    for number, entry in enumerate(objects, start=1):
        points = np.array(entry["box"] if "box" in entry else list(chain(*entry["rings"]))).reshape(
            -1, 2
        )
        low, high = points.min(axis=0), points.max(axis=0)
        annotations.append(
            {
                "id": number,
                "image_id": entry["image"],
                "category_id": entry.get("class", 1),
                "bbox": [*low.tolist(), *(high - low).tolist()],
                "iscrowd": 0,
                **({"segmentation": entry["rings"]} if "rings" in entry else {}),
            }
        )
    content = {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": h, "width": w}
            for n, (h, w) in enumerate(images, start=1)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "ball"}, {"id": 2, "name": "box"}],
    }
    (folder / "all.json").write_text(json.dumps(content))
    return load_coco(folder / "all.json", folder)


def test_intersections_by_hand() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    others = np.array([[5.0, 5, 15, 15], [0, 0, 2, 3]])
    assert intersections(boxes, others).tolist() == [[25.0, 6.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("objects", "whole"),
    [
        ([{"rings": [square(20, 20, 20)]}], True),
        ([{"rings": [square(0, 20, 20)]}], False),  # cut off by the border
        ([{"box": [20, 20, 40, 40]}], False),  # no outline
        ([{"rings": [square(10, 10, 15), square(40, 40, 15)]}], False),  # in two pieces
        ([{"rings": [square(10, 10, 40), square(60, 60, 5)]}], True),  # a crumb beside it
        (
            [{"rings": [square(20, 20, 20)]}, {"rings": [square(30, 20, 20)]}],
            False,
        ),  # shared pixels
        ([{"rings": [square(20, 20, 20)]}, {"rings": [square(41, 20, 20)]}], True),  # one side met
        (
            [
                {"rings": [square(20, 20, 20)]},
                {"rings": [square(40, 20, 20)]},
                {"rings": [square(20, 40, 20)]},
            ],
            False,  # two of four sides are met: something may stand before it
        ),
    ],
)
def test_only_whole_objects_are_cut(
    objects: list[dict[str, Any]], whole: bool, tmp_path: Path
) -> None:
    index = write(tmp_path / "x", [(80, 90)], [{"image": 1, **entry} for entry in objects])
    assert is_whole(index, 0) == whole


def test_classes_take_turns(tmp_path: Path) -> None:
    objects = [{"image": 1, "class": c, "rings": [square(10, 10, 20)]} for c in (1, 1, 1, 1, 2, 2)]
    index = write(tmp_path / "x", [(80, 80)], objects)
    order = interleave_classes(index, np.arange(6), np.random.default_rng(0))
    assert sorted(order) == list(range(6))
    labels = index.labels[order]
    assert [sorted(labels[:2]), sorted(labels[2:4]), list(labels[4:])] == [[0, 1], [0, 1], [0, 0]]


def test_placements_keep_height_and_scale_and_do_not_cover_objects(tmp_path: Path) -> None:
    images = [(100, 100), (200, 200), (100, 100), (100, 150)]
    objects = [
        {"image": 1, "rings": [square(40, 50, 20)]},  # centre 50, bottom 70
        {"image": 3, "rings": [square(40, 50, 20)]},  # in its way at home
    ]
    index = write(tmp_path / "x", images, objects)
    rows = np.array([0])
    shifts, room = find_placements(
        index, rows, 1
    )  # twice the size: the box becomes 80, 100, 120, 140
    assert room.tolist() == [True] and shifts.tolist() == [[0, 0]]
    shifts, room = find_placements(index, rows, 2)  # sideways, past the object that stands there
    assert room.tolist() == [True] and shifts[0, 1] == 0 and shifts[0, 0] != 0
    moved = index.boxes[0] + np.tile(shifts[0], 2)
    assert intersections(moved[None], index.boxes[[1]].astype(np.float64))[0, 0] <= COVERED * 400
    assert moved[0] >= BORDER and moved[2] <= 100 - BORDER
    assert find_placements(index, rows, 0)[1].tolist() == [False]  # its own scene
    assert find_placements(index, rows, 3)[1].tolist() == [False]  # an image of another shape


def test_every_object_is_scored_in_every_scene_with_room(tmp_path: Path) -> None:
    images = [(100, 100)] * 3
    objects = [{"image": n, "class": n % 2 + 1, "rings": [square(40, 50, 20)]} for n in (1, 2, 3)]
    index = write(tmp_path / "x", images, objects)

    def score(image: int, classes: Any, boxes: Any) -> Any:
        return 10.0 * image + classes + boxes[:, 1] / 1000

    found = score_placements(index, np.arange(3), np.array([0, 2]), score)
    assert found.lifts.shape == (3, 2)
    assert np.isnan(found.lifts[0, 0]) and np.isnan(found.lifts[2, 1])
    assert found.lifts[1].tolist() == pytest.approx([0.05, 20.05])
    assert found.lifts[0, 1] == pytest.approx(20 + 1 + 0.05)


def choices(lifts: Any) -> Placements:
    array = np.array(lifts, np.float64)
    count, scenes = array.shape
    shifts = np.zeros((count, scenes, 2), np.int64)
    return Placements(np.arange(count) + 100, np.arange(scenes) + 7, shifts, array)


def most_by_trying(lifts: Any, margin: float) -> int:
    """The largest number of objects that can have both scenes, from all permutations."""
    good_in, good_out = lifts >= margin, lifts <= -margin
    step = (good_in[:, None] & good_out[None]).any(axis=2)
    counts = [
        sum(i != k for i, k in enumerate(order))
        for order in itertools.permutations(range(len(lifts)))
        if all(i == k or step[i, k] for i, k in enumerate(order))
    ]
    return max(counts)


@pytest.mark.parametrize("seed", range(12))
def test_pairing_is_maximal_and_both_sides_use_the_same_scenes(seed: int) -> None:
    random = np.random.default_rng(seed)
    lifts = random.normal(-0.2, 1.2, (6, 4))
    lifts[random.random(lifts.shape) < 0.3] = np.nan
    pairs = matched_pairs(choices(lifts), 6, 0.5, random)
    assert len(pairs) == most_by_trying(lifts, 0.5)
    assert len({pair.row for pair in pairs}) == len(pairs)
    inside = sorted(pair.inside.image for pair in pairs)
    assert inside == sorted(pair.outside.image for pair in pairs)
    for pair in pairs:
        for place, sign in ((pair.inside, 1), (pair.outside, -1)):
            assert sign * place.lift >= 0.5
            assert place.lift == lifts[pair.row - 100, place.image - 7]


def test_count_limits_pairs_to_the_first_objects() -> None:
    lifts = np.where(np.arange(20)[:, None] % 2 == np.arange(4) % 2, 2.0, -2.0)
    pairs = matched_pairs(choices(lifts), 6, 1.0, np.random.default_rng(0))
    assert [pair.row for pair in pairs] == [100, 101, 102, 103, 104, 105]
    assert matched_pairs(choices(np.abs(lifts)), 6, 1.0, np.random.default_rng(0)) == []


def test_images_of_two_sizes_share_a_set(tiny_coco: Callable[..., Path]) -> None:
    root = tiny_coco(images=6, splits=("val2017",))
    index = load_coco(root / "annotations/instances_val2017.json", root / "val2017")
    rows = np.arange(len(index.object_ids))
    for image in range(len(index)):
        shifts, room = find_placements(index, rows, image)
        boxes = index.boxes[rows] + np.tile(shifts, 2)
        assert (boxes[room, :2] >= BORDER).all()
        assert (boxes[room, 2:] <= np.array([64, 48]) - BORDER).all()
