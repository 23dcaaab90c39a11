"""Results of a plain detector on the embedded scenes: it sees well, and knows nothing of context.

    python -m kd.scenes.detector --scenes datasets/scenes --split val --out results.json

Boxes are right but for a few per cent, some objects are missed, some boxes hold nothing. What an
object *looks* like is recognised, as surely as a draw says; which of the classes of that look it is
gets a coin's answer, so that each box comes with several classes of nearly equal scores, as boxes
of real detectors do. Neither the scene nor the other objects have a part in any number. The same
arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.errors import UserError
from kd.formats.coco_validate import read_json
from kd.utils.io import write_whole

MISSED = 0.05  # share of objects without a box
SHIFT, STRETCH = 0.04, 0.05  # standard deviations of the centre, in sides, and of the log sides
SEEN = (2.0, 1.0)  # logit of the look of a true object: mean and standard deviation
EMPTY = (-1.5, 1.0)  # of the look that a box with nothing in it seems to have
FALSE_BOXES = 1.0  # boxes with nothing in them, mean number an image
MISTAKEN = 0.1  # share of boxes that get a second look, 2 below the first
COIN = 0.3  # standard deviation of the log odds between classes of one look
_STREAM = 7  # keeps these draws apart from those of the scenes

Json = dict[str, Any]


@dataclass(frozen=True)
class _Eye:
    """What the detector has learned: which classes look alike, and nothing else."""

    looks: list[list[int]]  # category ids of each look

    def look_of(self, category: int) -> int:
        """The look of a category."""
        return next(place for place, ids in enumerate(self.looks) if category in ids)

    def name(self, look: int, logit: float, random: np.random.Generator) -> list[tuple[int, float]]:
        """Category ids and scores for something of a look: the look's score shared by a coin."""
        ids = self.looks[look]
        weights = np.exp(random.normal(0.0, COIN, len(ids)))
        scores = weights / weights.sum() / (1 + np.exp(-logit))
        return list(zip(ids, scores.tolist(), strict=True))


def detect(content: Json, *, seed: int = 0) -> list[Json]:
    """Results for all images of an embedded scenes' COCO file.

    Args:
        content: The parsed JSON; categories tell their `look`.
        seed: Of everything random.

    Returns:
        COCO results, image by image.
    """
    by_look: dict[str, list[int]] = {}
    for category in content["categories"]:
        by_look.setdefault(category["look"], []).append(int(category["id"]))
    eye = _Eye(list(by_look.values()))
    objects: dict[int, list[Json]] = {}
    for annotation in content["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    results: list[Json] = []
    for image in content["images"]:
        random = np.random.default_rng((_STREAM, seed, image["id"]))
        for annotation in objects.get(image["id"], []):
            if random.random() >= MISSED:
                look = eye.look_of(annotation["category_id"])
                results += _answers(image, annotation["bbox"], look, SEEN, eye, random)
        for _ in range(random.poisson(FALSE_BOXES)):
            sides = random.uniform(0.1, 0.35, 2) * image["width"]
            place = random.uniform(0, 1, 2) * (image["width"] - sides)
            look = int(random.integers(len(eye.looks)))
            results += _answers(image, [*place, *sides], look, EMPTY, eye, random)
    return results


def _answers(
    image: Json,
    box: Sequence[float],
    look: int,
    logits: tuple[float, float],
    eye: _Eye,
    random: np.random.Generator,
) -> list[Json]:
    """All that is said about one box."""
    place = _blur(np.asarray(box, dtype=np.float64), (image["width"], image["height"]), random)
    logit = float(random.normal(*logits))
    named = eye.name(look, logit, random)
    if random.random() < MISTAKEN:
        other = (look + 1 + int(random.integers(len(eye.looks) - 1))) % len(eye.looks)
        named += eye.name(other, logit - 2.0, random)
    return [
        {"image_id": image["id"], "category_id": category, "bbox": place, "score": round(score, 4)}
        for category, score in named
    ]


def _blur(
    box: np.ndarray[Any, np.dtype[np.float64]],
    picture: tuple[int, int],
    random: np.random.Generator,
) -> list[float]:
    """A box found a little beside the true one, x, y, width, height, inside the image."""
    sides = box[2:] * np.exp(random.normal(0.0, STRETCH, 2))
    centre = box[:2] + box[2:] / 2 + random.normal(0.0, SHIFT, 2) * box[2:]
    low = np.clip(centre - sides / 2, 0, np.array(picture) - 1.0)
    high = np.clip(centre + sides / 2, low + 1.0, picture)
    return [round(float(value), 2) for value in (*low, *(high - low))]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m kd.scenes.detector`."""
    parser = argparse.ArgumentParser(
        prog="python -m kd.scenes.detector",
        description="Write COCO results of a detector that sees the embedded scenes' objects, "
        "and knows nothing of context.",
    )
    parser.add_argument("--scenes", type=Path, required=True, help="folder of kd.data.scenes")
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="results JSON")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    args = parser.parse_args(argv)
    try:
        annotations = args.scenes / "annotations" / f"instances_{args.split}.json"
        content, _ = read_json(annotations)
        if any("look" not in category for category in content["categories"]):
            raise UserError(f"{annotations}: its categories have no 'look': not embedded scenes")
        results = detect(content, seed=args.seed)
        text = json.dumps(results, separators=(",", ":"))
        write_whole(args.out, lambda file: file.write_text(text + "\n", encoding="utf-8"))
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"{args.out}: {len(results)} results on {len(content['images'])} images\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
