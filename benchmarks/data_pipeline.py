"""Compare images per second and core of the published input pipeline and ours.

    python benchmarks/data_pipeline.py [--images 48] [--rounds 5]

The published pipeline uses albumentations and OpenCV: read a 640 px JPEG, LongestMaxSize 384,
PadIfNeeded, the augmentations, normalise to float, hide one object's box, fill a dense
91 x 384 x 384 float target from the boxes, and collate. Ours is measured in two ways: `host` up to
the loader's batch, and `host + device` including normalising, hiding and the dense target, which a
GPU would normally do, on the same core. CPU time of one thread; the variants take turns.

Photographs come from coco_mini (`KD_DATA`, or ../shared/data), enlarged to 640 px with camera-like
noise so that the files are as large as COCO's. Without coco_mini, images are generated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # otherwise it checks for updates

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import default_collate

from kd.data.loader import SampleLoader
from kd.data.prepare import prepare, scale_annotations
from kd.formats.coco import CocoIndex, load_coco
from kd.problems.objects.data import ObjectSamples
from kd.transforms.hide import IMAGENET_MEAN, IMAGENET_STD, class_maps, hide, normalise, regions_of
from kd.utils.images import scaled_size

SOURCE, SIZE, CLASSES, BATCH = 640, 384, 91, 8
NOISE = 7.0  # standard deviation; gives files of about 100 kB, COCO's are 50 to 250
AUGMENT = {"crop": 0.1, "crop_scale": (0.8, 1.0)}  # scaling as published, otherwise defaults
Round = Callable[[int], int]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        index = write_photographs(Path(folder), options.images)
        prepare(index.annotation_file, index.image_folder, Path(folder, "copy"), size=SIZE)
        report(index, measure(variants(index, Path(folder, "copy")), options.rounds))


def variants(index: CocoIndex, copy: Path) -> dict[str, Round]:
    """Return the functions to time; each runs an epoch and returns its number of images."""
    return {
        "published (albumentations, OpenCV)": published(index, dense=True),
        "published, without the dense target": published(index, dense=False),
        "kd, 640 px JPEG, host": ours(index, None, device=False),
        "kd, 640 px JPEG, host + device": ours(index, None, device=True),
        "kd, prepared copy, host": ours(index, copy, device=False),
        "kd, prepared copy, host + device": ours(index, copy, device=True),
    }


def measure(rounds_of: dict[str, Round], rounds: int) -> dict[str, float]:
    """Measure the median number of images per second of CPU time, in turns."""
    speeds: dict[str, list[float]] = {name: [] for name in rounds_of}
    for epoch in range(rounds + 1):
        for name, run in rounds_of.items():
            start = time.process_time()
            count = run(epoch)
            if epoch:  # the first round warms up
                speeds[name].append(count / (time.process_time() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def report(index: CocoIndex, speeds: dict[str, float]) -> None:
    """Print speeds and ratios."""
    sizes = [path.stat().st_size for path in index.image_folder.iterdir()]
    print(f"{len(index)} photographs, {SOURCE} px, {statistics.mean(sizes) / 1000:.0f} kB each")
    base = next(iter(speeds.values()))
    print(f"{'':38}{'images/s/core':>14}{'ratio':>8}")
    for name, speed in speeds.items():
        print(f"{name:38}{speed:14.1f}{speed / base:8.2f}")


def published(index: CocoIndex, *, dense: bool) -> Round:
    """Run the published code's pipeline, one image after another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ShiftScaleRotate is deprecated but part of the baseline
        transform = A.Compose(
            [
                A.LongestMaxSize(SIZE),
                A.PadIfNeeded(SIZE, SIZE, position="top_left", border_mode=cv2.BORDER_CONSTANT),
                A.RGBShift(p=0.1),
                A.HorizontalFlip(p=0.5),
                A.ShiftScaleRotate(rotate_limit=10, p=0.1),
                A.ChannelShuffle(p=0.1),
                A.ToGray(p=0.1),
                A.Blur(p=0.1),
                A.ColorJitter(p=0.1),
                A.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ],
            bbox_params=A.BboxParams("pascal_voc", label_fields=["labels"], min_visibility=0.3),
            seed=0,
        )
    random = np.random.default_rng(0)

    def sample(image: int) -> tuple[torch.Tensor, ...]:
        rows = slice(int(index.first[image]), int(index.first[image + 1]))
        pixels = cv2.imread(str(index.path(image)), cv2.IMREAD_COLOR_RGB)
        result = transform(
            image=pixels, bboxes=np.array(index.boxes[rows]), labels=index.labels[rows].tolist()
        )
        pixels, boxes = result["image"], np.asarray(result["bboxes"]).reshape(-1, 4).astype(int)
        hidden = np.zeros((SIZE, SIZE, 1), np.float32)
        if len(boxes):
            x1, y1, x2, y2 = boxes[random.integers(len(boxes))]
            pixels[y1:y2, x1:x2] = 0
            hidden[y1:y2, x1:x2] = 1
        inputs = np.concatenate([pixels, hidden], axis=2).transpose(2, 0, 1)
        sampled = (torch.from_numpy(np.ascontiguousarray(inputs)),)
        if not dense:
            return sampled
        target = np.zeros((CLASSES, SIZE, SIZE), np.float32)
        for (x1, y1, x2, y2), label in zip(boxes, result["labels"], strict=True):
            target[int(label), y1:y2, x1:x2] = 1
        return *sampled, torch.from_numpy(target)

    def run(_: int) -> int:
        for start in range(0, len(index), BATCH):
            end = min(start + BATCH, len(index))
            default_collate([sample(image) for image in range(start, end)])
        return len(index)

    return run


def ours(index: CocoIndex, copy: Path | None, *, device: bool) -> Round:
    """Run this project's loader without workers; with `device`, also the work of a GPU."""
    dataset = ObjectSamples(index, size=SIZE, augment=AUGMENT, prepared=copy)
    loader = SampleLoader(dataset, batch_size=BATCH, seed=0, shuffle=True)
    memory = torch.empty(BATCH, CLASSES, SIZE, SIZE, dtype=torch.bool)

    def run(epoch: int) -> int:
        loader.set_epoch(epoch)
        for batch in loader:
            if device:
                on_device(batch, memory[: len(batch["images"])])
        return len(dataset)

    return run


def on_device(batch: dict[str, torch.Tensor], memory: torch.Tensor) -> None:
    """Normalise, hide objects and draw the dense target."""
    image_of = batch["image_of"]
    hide(normalise(batch["images"]), image_of[batch["hidden"]], regions_of(batch))
    boxes, labels, count = batch["boxes"], batch["labels"], len(batch["images"])
    class_maps(boxes, labels, image_of, count, CLASSES, (SIZE, SIZE), out=memory)


def write_photographs(folder: Path, count: int) -> CocoIndex:
    """Write 640 px JPEGs and their annotations."""
    root = Path(os.environ.get("KD_DATA", "../shared/data"), "coco_mini")
    annotations = root / "annotations" / "instances_val2017.json"
    random = np.random.default_rng(0)
    if annotations.is_file():
        source = json.loads(annotations.read_text())
        with_objects = {entry["image_id"] for entry in source["annotations"]}
        entries = [entry for entry in source["images"] if entry["id"] in with_objects][:count]
        opened: list[Image.Image] = [
            Image.open(root / "val2017" / entry["file_name"]) for entry in entries
        ]
    else:
        source, entries, opened = generated(count, random)
    target = scale_annotations(
        source | {"images": entries},
        leave_out=(),
        rescale=lambda height, width: scaled_size(height, width, SOURCE),
        rename=str,
    )
    (folder / "images").mkdir()
    for entry, image in zip(target["images"], opened, strict=True):
        size = (entry["width"], entry["height"])
        pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
        noisy = pixels + random.normal(0, NOISE, pixels.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
            folder / "images" / entry["file_name"], "JPEG", quality=92
        )
    (folder / "annotations.json").write_text(json.dumps(target))
    return load_coco(folder / "annotations.json", folder / "images")


def generated(
    count: int, random: np.random.Generator
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Image.Image]]:
    """Generate smooth random images with seven random boxes each, as many as in COCO."""
    coarse = random.integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)
    opened = [Image.fromarray(grid).resize((384, 288), Image.Resampling.BICUBIC) for grid in coarse]
    entries = [
        {"id": number, "file_name": f"{number}.jpg", "width": 384, "height": 288}
        for number in range(count)
    ]
    annotations = []
    for number in range(7 * count):
        width, height = random.uniform(30, 120, 2).tolist()
        x, y = random.uniform(0, 384 - width), random.uniform(0, 288 - height)
        annotations.append(
            {
                "id": number,
                "image_id": number // 7,
                "category_id": number % 80,
                "bbox": [x, y, width, height],
            }
        )
    categories = [{"id": number, "name": str(number)} for number in range(80)]
    source = {"images": entries, "annotations": annotations, "categories": categories}
    return source, entries, opened


if __name__ == "__main__":
    main()
