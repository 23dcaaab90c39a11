"""Simulate a detector that ignores context on the embedded scenes, and write its COCO results.

    python -m kd.scenes.detector --scenes datasets/scenes --split val --out results.json

Boxes are slightly inexact, some objects are missed, and some boxes contain no object. The score of
an object's *look* is divided at random among the classes with this look, so a box has several
classes with similar scores. The same arguments always give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.errors import UserError
from kd.formats.coco_validate import read_json
from kd.utils.io import write_text

MISSED = 0.05  # fraction of objects without a box
SHIFT, STRETCH = 0.04, 0.05  # standard deviations of the centre, in sides, and of the log sides
TRUE_LOGIT = (2.0, 1.0)  # mean and standard deviation of the logit of a true object's look
FALSE_LOGIT = (-1.5, 1.0)  # mean and standard deviation for a box without an object
FALSE_BOXES = 1.0  # mean number of boxes without an object per image
AMBIGUOUS = 0.1  # fraction of boxes with a second look, whose logit is lower by 2
CLASS_NOISE = 0.3  # standard deviation of the log odds between confusable classes
_STREAM = 7  # separates this random stream from others

Json = dict[str, Any]


def detect(content: Json, *, seed: int = 0) -> list[Json]:
    """Simulate COCO results for the content of a scenes JSON, whose categories have a `look`."""
    by_look: dict[str, list[int]] = {}
    for category in content["categories"]:
        by_look.setdefault(category["look"], []).append(int(category["id"]))
    looks = list(by_look.values())
    objects: dict[int, list[Json]] = {}
    for annotation in content["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    results: list[Json] = []
    for image in content["images"]:
        random = np.random.default_rng((_STREAM, seed, image["id"]))
        for annotation in objects.get(image["id"], []):
            if random.random() >= MISSED:
                category = annotation["category_id"]
                look = next(place for place, ids in enumerate(looks) if category in ids)
                box = annotation["bbox"]
                results += _detections(image, box, look, TRUE_LOGIT, looks, random)
        for _ in range(random.poisson(FALSE_BOXES)):
            sides = random.uniform(0.1, 0.35, 2) * image["width"]
            place = random.uniform(0, 1, 2) * (image["width"] - sides)
            look = int(random.integers(len(looks)))
            results += _detections(image, [*place, *sides], look, FALSE_LOGIT, looks, random)
    return results


def _detections(
    image: Json,
    box: Sequence[float],
    look: int,
    logits: tuple[float, float],
    looks: list[list[int]],
    random: np.random.Generator,
) -> list[Json]:
    """Simulate the detections of one box, one per class; `looks` lists each look's class ids."""
    size = (image["width"], image["height"])
    place = _jitter_box(np.asarray(box, dtype=np.float64), size, random)
    logit = float(random.normal(*logits))
    classified = _classify(looks[look], logit, random)
    if random.random() < AMBIGUOUS:
        other = (look + 1 + int(random.integers(len(looks) - 1))) % len(looks)
        classified += _classify(looks[other], logit - 2.0, random)
    return [
        {"image_id": image["id"], "category_id": category, "bbox": place, "score": round(score, 4)}
        for category, score in classified
    ]


def _classify(
    categories: list[int], logit: float, random: np.random.Generator
) -> list[tuple[int, float]]:
    """Divide the score of a look at random among its categories."""
    weights = np.exp(random.normal(0.0, CLASS_NOISE, len(categories)))
    scores = weights / weights.sum() / (1 + np.exp(-logit))
    return list(zip(categories, scores.tolist(), strict=True))


def _jitter_box(
    box: np.ndarray[Any, np.dtype[np.float64]], size: tuple[int, int], random: np.random.Generator
) -> list[float]:
    """Perturb a box (x, y, width, height) and clip it to the image."""
    sides = box[2:] * np.exp(random.normal(0.0, STRETCH, 2))
    centre = box[:2] + box[2:] / 2 + random.normal(0.0, SHIFT, 2) * box[2:]
    low = np.clip(centre - sides / 2, 0, np.array(size) - 1.0)
    high = np.clip(centre + sides / 2, low + 1.0, size)
    return [round(float(value), 2) for value in (*low, *(high - low))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `python -m kd.scenes.detector`."""
    parser = argparse.ArgumentParser(
        prog="python -m kd.scenes.detector",
        description="Write COCO results of a simulated detector that ignores context, on the "
        "embedded scenes.",
    )
    parser.add_argument(
        "--scenes", type=Path, required=True, help="folder written by kd.data.scenes"
    )
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="COCO results to write"
    )
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args(argv)
    try:
        annotations = args.scenes / "annotations" / f"instances_{args.split}.json"
        content, _ = read_json(annotations)
        if any("look" not in category for category in content["categories"]):
            raise UserError(f"{annotations}: not embedded scenes: categories have no 'look'")
        results = detect(content, seed=args.seed)
        text = json.dumps(results, separators=(",", ":"))
        write_text(args.out, text + "\n")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{args.out}: {len(results)} results on {len(content['images'])} images\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
