"""The shared fixtures do what they promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO


def test_tiny_coco_is_read_by_pycocotools(tiny_coco: Callable[..., Path]) -> None:
    root = tiny_coco(images=3)
    coco = COCO(str(root / "annotations" / "instances_train2017.json"))
    assert len(coco.imgs) == 3
    assert 6 <= len(coco.anns) <= 12
    assert sorted(coco.cats) == [1, 3, 7, 18]
    for row in coco.anns.values():
        image = coco.imgs[row["image_id"]]
        code = mask.merge(mask.frPyObjects(row["segmentation"], image["height"], image["width"]))
        edge = 2 * sum(row["bbox"][2:])  # a mask may lose or gain half a pixel along the outline
        assert abs(float(mask.area(code)) - row["area"]) < 0.5 * edge
        assert np.abs(mask.toBbox(code) - row["bbox"]).max() < 1.5


def test_tiny_coco_draws_each_object_where_its_polygon_says(tiny_coco: Callable[..., Path]) -> None:
    root = tiny_coco(images=2, size=(60, 80), splits=("val2017",))
    content = json.loads((root / "annotations" / "instances_val2017.json").read_text())
    names = {row["id"]: row["file_name"] for row in content["images"]}
    for row in content["annotations"]:
        with Image.open(root / "val2017" / names[row["image_id"]]) as picture:
            assert picture.size == (80, 60)
            x, y, width, height = row["bbox"]
            pixels = np.asarray(picture, dtype=np.int64)
        inside = pixels[round(y + height * 0.6), round(x + width / 2)]
        assert np.abs(inside - pixels[0, 0]).max() > 30


def test_tiny_coco_writes_the_same_twice_and_splits_share_no_image(
    tiny_coco: Callable[..., Path],
) -> None:
    first, second = tiny_coco(name="a"), tiny_coco(name="b")
    files = sorted(path.relative_to(first) for path in first.rglob("*.*"))
    assert len(files) == 10
    assert all((first / f).read_bytes() == (second / f).read_bytes() for f in files)
    splits = (json.loads((first / f).read_text())["images"] for f in files if f.suffix == ".json")
    train, val = ({row["id"] for row in images} for images in splits)
    assert not train & val


def test_torch_adds_in_one_thread() -> None:
    assert torch.get_num_threads() == 1
