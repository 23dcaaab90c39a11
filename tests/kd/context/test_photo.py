"""A user's images: turned upright, and what a COCO file knows of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.context.photo import KnownObjects, open_photograph
from kd.errors import UserError
from kd.utils.images import read_image

NAMES = ("kite", "ball", "box", "tent")  # another order than the file's


def turned(folder: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"turned{orientation}.png"
    pixels = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, exif=exif)
    return path


def test_images_are_whole_and_at_the_models_size(tiny_coco: Callable[..., Path]) -> None:
    path = tiny_coco() / "val2017" / "000000001001.jpg"
    photo = open_photograph(path, 32)
    assert photo.size == (48, 64)
    assert torch.equal(photo.scaled, read_image(path, 32))
    assert len(photo.boxes) == len(photo.labels) == 0


def test_a_turned_photograph_stands_upright(tmp_path: Path) -> None:
    photo = open_photograph(turned(tmp_path, 6), 25)
    assert photo.size == (50, 30)
    assert photo.scaled.shape == (3, 25, 15)


def test_known_objects_are_found_by_file_name(tiny_coco: Callable[..., Path]) -> None:
    root = tiny_coco()
    known = KnownObjects(root / "annotations" / "instances_val2017.json", NAMES)
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    photo = open_photograph(root / "val2017" / "000000001002.jpg", 32, known)
    mine = [a for a in content["annotations"] if a["image_id"] == 1002]
    assert [NAMES[label] for label in photo.labels] == [names[a["category_id"]] for a in mine]
    x, y, wide, high = np.array([a["bbox"] for a in mine]).T
    wanted = torch.from_numpy(np.stack([x, y, x + wide, y + high], axis=1)).float()
    torch.testing.assert_close(photo.boxes, wanted)


def test_an_image_that_the_file_does_not_have_is_warned_of(
    tiny_coco: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny_coco()
    known = KnownObjects(root / "annotations" / "instances_val2017.json", NAMES)
    with caplog.at_level(logging.WARNING, "kd"):
        photo = open_photograph(root / "train2017" / "000000000001.jpg", 32, known)
    assert len(photo.boxes) == 0
    assert "000000000001.jpg: not in" in caplog.text


def test_classes_that_the_teacher_does_not_know_stay_unnamed(
    tiny_coco: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    file = tiny_coco() / "annotations" / "instances_val2017.json"
    with caplog.at_level(logging.WARNING, "kd"):
        known = KnownObjects(file, ("ball", "tent"))
    assert "2 classes are unknown to the teacher, first 'box'" in caplog.text
    assert known.label_of.tolist() == [0, -1, 1, -1]
    with pytest.raises(UserError, match="none of its classes is one of the teacher's"):
        KnownObjects(file, ("dog", "cat"))


def annotated(path: Path, size: tuple[int, int]) -> KnownObjects:
    image = {"id": 1, "file_name": path.name, "height": size[0], "width": size[1]}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 11], "area": 110,
           "iscrowd": 0}  # fmt: skip
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "kite"}]}
    file = path.with_suffix(".json")
    file.write_text(json.dumps(content))
    return KnownObjects(file, NAMES)


def test_boxes_say_whether_an_image_is_meant_as_stored_or_upright(tmp_path: Path) -> None:
    path = turned(tmp_path, 6)
    assert open_photograph(path, 25, annotated(path, (30, 50))).size == (30, 50)
    upright = open_photograph(path, 25, annotated(path, (50, 30)))
    assert upright.size == (50, 30) and upright.scaled.shape == (3, 25, 15)
    with pytest.raises(UserError, match="the annotations say 31 x 50"):
        open_photograph(path, 25, annotated(path, (50, 31)))


def test_one_of_several_images_of_a_name_is_found_by_its_folder(tmp_path: Path) -> None:
    images = []
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / folder / "x.png")
        name = f"{folder}/x.png"
        images.append({"id": number, "file_name": name, "height": 10, "width": 20})
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 5], "area": 50,
           "iscrowd": 0}  # fmt: skip
    content = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "kite"}]}
    (tmp_path / "all.json").write_text(json.dumps(content))
    known = KnownObjects(tmp_path / "all.json", NAMES)
    counts = [len(open_photograph(tmp_path / f / "x.png", 16, known).boxes) for f in ("a", "b")]
    assert counts == [0, 1]
    Image.new("RGB", (20, 10)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="has 2 images of that name"):
        open_photograph(tmp_path / "x.png", 16, known)
