"""Shared fixtures: fixed seeds, one thread, real data if available, tiny datasets."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before torch and matplotlib are imported; inherited by child processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
SEED = 20

# The order of additions depends on threads; with one, equal seeds give equal bits.
torch.set_num_threads(1)

# id -> name; with gaps, as in COCO, so that labels and ids differ.
CATEGORIES = {1: "ball", 3: "box", 7: "tent", 18: "kite"}
CORNERS = {1: 16, 3: 4, 7: 3, 18: 4}
COLOURS = {1: (214, 60, 48), 3: (52, 120, 200), 7: (60, 160, 80), 18: (232, 196, 60)}


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start each test from the same random state."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data, `KD_DATA` or ../shared/data beside the project; skips if missing."""
    folder = Path(os.environ.get("KD_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (KD_DATA names another folder)")
    return folder


@pytest.fixture(scope="session")
def coco_mini(shared_data: Path) -> Path:
    """Small COCO dataset of photographs, laid out as COCO 2017; skips if missing."""
    folder = shared_data / "coco_mini"
    if not folder.is_dir():
        pytest.skip(f"no coco_mini in {shared_data}")
    return folder


def outline(category: int, x: float, y: float, radius: float) -> list[float]:
    """Polygon of a shape in COCO format: x1, y1, x2, y2, ..., pixels, two decimals."""
    corners = CORNERS[category]
    turn = (
        math.pi / 4 if category == 3 else -math.pi / 2
    )  # a box stands on its side, others on a tip
    angles = [turn + 2 * math.pi * corner / corners for corner in range(corners)]
    points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
    return [round(value, 2) for point in points for value in point]


def annotation(
    number: int, image_id: int, category: int, polygon: list[float]
) -> dict[str, object]:
    """COCO annotation of one object, with box and area from the polygon."""
    xs, ys = np.asarray(polygon[0::2]), np.asarray(polygon[1::2])
    area = 0.5 * abs(float(xs @ np.roll(ys, -1) - ys @ np.roll(xs, -1)))
    left, top = float(xs.min()), float(ys.min())
    return {
        "id": number,
        "image_id": image_id,
        "category_id": category,
        "iscrowd": 0,
        "area": area,
        "bbox": [left, top, float(xs.max()) - left, float(ys.max()) - top],
        "segmentation": [polygon],
    }


def write_split(root: Path, split: str, images: int, size: tuple[int, int], first_id: int) -> None:
    """Write `images` JPEGs of two to four separate shapes, and their annotation file."""
    height, width = size
    rng = np.random.default_rng(first_id)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rows: list[dict[str, object]] = []
    objects: list[dict[str, object]] = []
    for image_id in range(first_id, first_id + images):
        image = Image.new("RGB", (width, height), tuple(rng.integers(90, 160, 3).tolist()))
        draw = ImageDraw.Draw(image)
        slots = rng.permutation(4)[: rng.integers(2, 5)]  # the image's four quarters
        for slot in slots.tolist():
            category = int(rng.choice(list(CATEGORIES)))
            radius = float(rng.uniform(0.12, 0.22)) * min(size)
            x, y = width * (0.25 + 0.5 * (slot % 2)), height * (0.25 + 0.5 * (slot // 2))
            polygon = outline(category, x, y, radius)
            draw.polygon(polygon, fill=COLOURS[category])
            objects.append(annotation(10 * image_id + slot, image_id, category, polygon))
        name = f"{image_id:012d}.jpg"
        image.save(root / split / name, quality=95)
        rows.append({"id": image_id, "file_name": name, "height": height, "width": width})
    categories = [{"id": i, "name": n, "supercategory": "shape"} for i, n in CATEGORIES.items()]
    content = {"info": {}, "images": rows, "annotations": objects, "categories": categories}
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture
def tiny_coco(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a small valid dataset, laid out as COCO 2017, and returns its folder.

    `tiny_coco(images=4, size=(48, 64), splits=("train2017", "val2017"), name="tiny_coco")` writes
    `train2017/*.jpg`, `annotations/instances_train2017.json`, and so on, below `tmp_path / name`;
    `size` is height, width. Four categories with gaps between their ids (1, 3, 7, 18), one polygon
    an object, no crowds. Equal arguments write equal files; splits share no image id.
    """

    def write(
        *,
        images: int = 4,
        size: tuple[int, int] = (48, 64),
        splits: Sequence[str] = ("train2017", "val2017"),
        name: str = "tiny_coco",
    ) -> Path:
        root = tmp_path / name
        for number, split in enumerate(splits):
            write_split(root, split, images, size, first_id=1 + 1000 * number)
        return root

    return write


@pytest.fixture(scope="session")
def small_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded scenes, 24 for training and 8 for validation."""
    from kd.data.scenes import generate_scenes

    root = tmp_path_factory.mktemp("small") / "scenes"
    return generate_scenes(root, train=24, val=8, size=64, seed=0, workers=1)


@pytest.fixture(scope="session")
def small_data(small_scenes: Path) -> list[str]:
    """`--set` flags that replace a recipe's data by `small_scenes`, at 32 pixels."""
    settings = [
        f"data.root={small_scenes}",
        "data.generate={train: 24, val: 8, size: 64, seed: 0}",
        "data.size=32",
        "data.workers=0",
    ]
    return [text for setting in settings for text in ("--set", setting)]


@pytest.fixture(scope="session")
def small_teacher(small_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a tiny CNN teacher with two folds, trained on `small_scenes`."""
    from kd import train_teacher

    out = tmp_path_factory.mktemp("small") / "teacher"
    settings = [
        "teacher={name: cnn, options: {width: 4, downs: 3, patch: 1, region: false, hidden: 16}}",
        "train={epochs: 1, batch_size: 8, images: 0, precision: fp32}",
        "folds=2",
        "hide=one",
    ]
    flags = [text for setting in settings for text in ("--set", setting)]
    assert train_teacher.main(["--teacher", "cnn", *small_data, *flags, "--out", str(out)]) == 0
    return out
