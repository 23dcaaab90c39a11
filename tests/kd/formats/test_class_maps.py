"""Class-id maps: drawn once, the small on top, moved by nearest, refused when out of date."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.data.loader import collate
from kd.formats.class_maps import ClassMaps, draw_class_map
from kd.formats.coco import CocoIndex, load_coco
from kd.problems.objects.data import ObjectSamples
from kd.transforms.augment import Plan, build_augment

MOVING = {"shift": 0.7, "rotate": 0.7, "crop": 0.7, "rgb_shift": 0, "shuffle": 0, "grey": 0,
          "blur": 0, "jitter": 0}  # fmt: skip


@pytest.fixture
def index(tiny_coco: Callable[..., Path]) -> CocoIndex:
    root = tiny_coco(images=5, size=(48, 64), splits=("train2017",))
    return load_coco(root / "annotations" / "instances_train2017.json", root / "train2017")


def edited(index: CocoIndex, change: Callable[[dict[str, Any]], None]) -> CocoIndex:
    """The same file with other annotations in it."""
    content = json.loads(index.annotation_file.read_text())
    change(content)
    index.annotation_file.write_text(json.dumps(content))
    return load_coco(index.annotation_file, index.image_folder)


def overlapping(content: dict[str, Any]) -> None:
    """The first image has a large box without a segment and a small triangle on it."""
    image = content["images"][0]["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image]
    common = {"image_id": image, "iscrowd": 0}
    triangle = [20.0, 10.0, 30.0, 10.0, 20.0, 20.0]
    content["annotations"] += [
        {**common, "id": 900, "category_id": 3, "bbox": [20, 10, 10, 10], "area": 50.0,
         "segmentation": [triangle]},
        {**common, "id": 901, "category_id": 7, "bbox": [8, 4, 40, 30], "area": 1200.0,
         "segmentation": []},
    ]  # fmt: skip


def test_smaller_objects_are_drawn_on_top_and_segments_are_exact(index: CocoIndex) -> None:
    index = edited(index, overlapping)
    drawn = draw_class_map(index, 0, (48, 64))
    assert drawn.dtype == np.uint8 and drawn.shape == (48, 64)
    assert drawn[0, 0] == 0  # background
    assert drawn[5, 9] == 3 and drawn[33, 47] == 3  # category 7 is class 2: its box, to its edges
    assert drawn[34, 47] == 0 and drawn[33, 48] == 0
    assert drawn[11, 21] == 2  # category 3 is class 1: inside the triangle
    assert drawn[18, 28] == 3  # in the triangle's box, not in it
    assert (drawn == 2).sum() == pytest.approx(50, abs=6)


def test_a_map_is_drawn_at_its_own_size_without_interpolated_classes(index: CocoIndex) -> None:
    index = edited(index, overlapping)
    drawn = draw_class_map(index, 0, (12, 16))
    assert set(np.unique(drawn).tolist()) == {0, 2, 3}
    assert drawn[2, 4] == 3 and drawn[3, 5] == 2


def test_maps_are_drawn_once_and_reused(index: CocoIndex, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    maps = ClassMaps(index, 32)
    place = Path(maps.store.url)
    assert place.parent == index.annotation_file.parent and place.name.endswith("class_maps-32")
    assert "this happens only once" in caplog.text
    files = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    caplog.clear()
    again = ClassMaps(index, 32)
    assert "drawn" not in caplog.text
    assert {n: (place / n).stat().st_mtime_ns for n in files if n[0].isdigit()} == {
        n: time for n, time in files.items() if n[0].isdigit()
    }
    plan = Plan(size=(24, 32))
    for image in range(len(index)):
        whole = again(image, plan, (24, 32))
        assert whole.shape == (32, 32) and not whole[24:].any()
        np.testing.assert_array_equal(whole[:24], draw_class_map(index, image, (24, 32)))
    assert len(pickle.loads(pickle.dumps(again))(0, plan, (24, 32))) == 32


def test_maps_of_other_annotations_are_redrawn(
    index: CocoIndex, caplog: pytest.LogCaptureFixture
) -> None:
    before = ClassMaps(index, 64)(0, Plan(size=(48, 64)), (48, 64))
    other = edited(index, overlapping)
    after = ClassMaps(other, 64)(0, Plan(size=(48, 64)), (48, 64))
    assert "class maps of other annotations; redrawing them" in caplog.text
    assert not torch.equal(before, after) and (after == 3).any()


def test_a_corrupt_file_is_redrawn(index: CocoIndex, caplog: pytest.LogCaptureFixture) -> None:
    maps = ClassMaps(index, 32)
    whole = maps(1, Plan(size=(24, 32)), (24, 32))
    shard = next(Path(maps.store.url).glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-500] ^= 1
    shard.write_bytes(bytes(content))
    assert torch.equal(ClassMaps(index, 32)(1, Plan(size=(24, 32)), (24, 32)), whole)
    assert "corrupt shard, redrawing" in caplog.text


def test_maps_of_a_read_only_dataset_are_stored_in_the_cache(
    index: CocoIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KD_CACHE", str(tmp_path / "cache"))
    folder = index.annotation_file.parent
    folder.chmod(0o555)
    try:
        maps = ClassMaps(index, 32)
    finally:
        folder.chmod(0o755)
    assert Path(maps.store.url).is_relative_to(tmp_path / "cache")
    assert maps(0, Plan(size=(24, 32)), (24, 32)).any()


def test_a_flip_moves_the_map_with_its_image(index: CocoIndex) -> None:
    maps = ClassMaps(index, 64)
    still = maps(2, Plan(size=(48, 64)), (48, 64))
    flipped = maps(2, Plan(size=(48, 64), flip=True), (48, 64))
    assert torch.equal(flipped[:48], still[:48].flip(1))
    assert not flipped[48:].any()


@pytest.mark.parametrize("seed", range(6))
def test_a_map_follows_its_image_without_new_classes(index: CocoIndex, seed: int) -> None:
    maps = ClassMaps(index, 64)
    augment = build_augment(dict(MOVING))
    assert augment is not None
    plan = augment.draw(np.random.default_rng(seed), (48, 64))
    moved, still = maps(3, plan, (48, 64)), maps(3, Plan(size=(48, 64)), (48, 64))
    assert set(moved.unique().tolist()) <= {0, *still.unique().tolist()}
    for name in still.unique().tolist():
        mask = (still == name)[None, :48]
        follows = plan.masks(mask)[0]
        inside = plan.masks(torch.ones_like(mask))[0]
        here = (moved[: plan.size[0], : plan.size[1]] == name) & inside
        assert torch.equal(here, follows & inside)


def test_odd_sizes_of_prepared_copies_are_handled(index: CocoIndex) -> None:
    maps = ClassMaps(index, 32)
    assert maps(0, Plan(size=(25, 32)), (25, 32)).shape == (32, 32)


def test_a_batch_has_class_maps_if_requested(index: CocoIndex) -> None:
    dataset = ObjectSamples(
        index, size=32, mode="all", augment=MOVING, class_maps=ClassMaps(index, 32)
    )
    batch = collate([dataset[0, place] for place in range(3)])
    assert batch["class_maps"].shape == (3, 32, 32) and batch["class_maps"].dtype == torch.uint8
    assert "class_maps" not in collate([ObjectSamples(index, size=32)[0, 0]])
    plain = ObjectSamples(index, size=64, train=False, mode="all", class_maps=ClassMaps(index, 64))
    sample = plain[0, 1]
    for box, label in zip(sample["boxes"], sample["labels"], strict=True):
        x1, y1, x2, y2 = box.round().int().tolist()
        assert (sample["class_maps"][y1:y2, x1:x2] == label + 1).any()


def test_many_classes_have_wide_ids(index: CocoIndex) -> None:
    def many(content: dict[str, Any]) -> None:
        content["categories"] += [{"id": 1000 + i, "name": f"c{i}"} for i in range(300)]
        content["annotations"][0]["category_id"] = 1299

    wide = edited(index, many)
    image = int(np.flatnonzero(wide.labels == wide.labels.max())[0])
    drawn = ClassMaps(wide, 32)(wide.image_of(image), Plan(size=(24, 32)), (24, 32))
    assert drawn.dtype == torch.int16 and drawn.max() == 304
