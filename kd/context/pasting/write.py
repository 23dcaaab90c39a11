"""Write pairs of pastes as three COCO-format datasets: `in`, `out` and `original`.

Image k of each dataset shows the object with id k: in a probable scene, an improbable scene, or its
source photograph. Other objects have `"scored": false` and serve as context.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as run_lengths

from kd.context.pasting.cutout import FINE, Bytes, Cutout, coverage, cut_out, measure_image, paste
from kd.context.pasting.pairs import Pair, Placement, scale_between
from kd.formats.coco import CocoIndex
from kd.formats.coco_validate import read_json
from kd.formats.rle import decode, encode
from kd.utils.images import read_image

Json = dict[str, Any]
Bools = npt.NDArray[np.bool_]

SETS = ("in", "out", "original")
FIRST_CONTEXT_ID = 1_000_000  # above the ids of all scored objects
_QUALITY = 95
_LOSSLESS = (".png", ".bmp", ".tif", ".tiff")


# An image (H, W, 3), its JSON entry and its objects' JSON entries, the scored one first.
Pasted = tuple[Bytes, Json, list[Json]]


class Paster:
    """Creates the images and annotations of pairs; `harmony` is an option of `cutout.paste`."""

    def __init__(
        self, index: CocoIndex, log_prior: npt.NDArray[np.float64], *, harmony: float, seed: int
    ) -> None:
        self.index, self.log_prior, self.harmony, self.seed = index, log_prior, harmony, seed
        self.content, _ = read_json(index.annotation_file)
        self.images = {entry["id"]: entry for entry in self.content["images"]}
        self.entries = {entry["id"]: entry for entry in self.content["annotations"]}
        self.of_image: dict[int, list[Json]] = defaultdict(list)
        for entry in self.content["annotations"]:
            self.of_image[entry["image_id"]].append(entry)
        self._stats = lru_cache(maxsize=None)(lambda *key: measure_image(self._read(*key)))

    def original(self, number: int, pair: Pair) -> Pasted:
        """Return object `pair.row` in its source photograph; image and object get id `number`."""
        index = self.index
        image, own = index.image_of(pair.row), int(index.object_ids[pair.row])
        scored = {**self.entries[own], "id": number, "image_id": number, "scored": True}
        others = [entry for entry in self._context_objects(image) if entry["id"] != own]
        return self._finished(number, image, self._read(image, None), scored, others)

    def pasted(self, number: int, pair: Pair, place: Placement) -> Pasted:
        """Return object `pair.row` pasted into a scene; image and object get id `number`."""
        index, source = self.index, self.index.image_of(pair.row)
        scale = scale_between(index, source, place.image)
        cutout = self._cut(pair.row, scale)
        random = np.random.default_rng((self.seed, number, place.image))
        pixels = paste(
            self._read(place.image, None), self._stats(place.image, 1.0), cutout, place.shift,
            harmony=self.harmony, random=random,
        )  # fmt: skip
        entry = self.entries[int(index.object_ids[pair.row])]
        size = index.size_of(place.image)
        mask = covered_pixels(cutout, place.shift, size)
        scored = {
            **moved_annotation(entry, scale, place.shift, mask),
            "id": number,
            "image_id": number,
            "scored": True,
            "paste": {
                "pair": number,
                "source_image": int(index.image_ids[source]),
                "source_object": entry["id"],
                "target_image": int(index.image_ids[place.image]),
                "scale": scale,
                "shift": list(place.shift),
                "log_lift": round(place.lift, 4),
                "log_prob": round(place.lift + float(self.log_prior[index.labels[pair.row]]), 4),
            },
        }
        others = [
            visible
            for other in self._context_objects(place.image)
            if (visible := occluded(other, mask)) is not None
        ]
        return self._finished(number, place.image, pixels, scored, others)

    def _finished(
        self, number: int, image: int, pixels: Bytes, scored: Json, others: list[Json]
    ) -> Pasted:
        entry = self.images[int(self.index.image_ids[image])]
        suffix = ".png" if Path(entry["file_name"]).suffix.lower() in _LOSSLESS else ".jpg"
        about = {**entry, "id": number, "file_name": f"{number:06d}{suffix}"}
        context = [{**other, "image_id": number, "scored": False} for other in others]
        return pixels, about, [scored, *context]

    def _context_objects(self, image: int) -> list[Json]:
        return self.of_image[int(self.index.image_ids[image])]

    def _cut(self, row: int, scale: float) -> Cutout:
        """Scale an object's image and cut the object out, with its outline drawn at that scale."""
        source = self.index.image_of(row)
        pixels = self._read(source, scale)
        height, width = pixels.shape[:2]
        cover = coverage(self.index.mask_of(row, (height * FINE, width * FINE)))
        return cut_out(pixels, cover, self._stats(source, scale))

    def _read(self, image: int, scale: float | None) -> Bytes:
        index = self.index
        expected = index.size_of(image)
        size = None if scale in (None, 1.0) else round(max(expected) * float(scale or 1))
        pixels = read_image(index.path(image), size, expected=expected)
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def covered_pixels(cutout: Cutout, shift: tuple[int, int], size: tuple[int, int]) -> Bools:
    """Return a mask (H, W) of the scene's pixels that a paste covers at least by half."""
    mask = np.zeros(size, np.bool_)
    x, y = cutout.corner[0] + shift[0], cutout.corner[1] + shift[1]
    height, width = cutout.cover.shape
    mask[y : y + height, x : x + width] = cutout.cover >= 0.5
    return mask


def moved_annotation(entry: Json, scale: float, shift: tuple[int, int], mask: Bools) -> Json:
    """Scale and shift an annotation; an RLE is replaced by that of `mask`."""
    x, y, width, height = (value * scale for value in entry["bbox"])
    moved = {**entry, "bbox": [x + shift[0], y + shift[1], width, height], "iscrowd": 0}
    segment = entry.get("segmentation")
    if isinstance(segment, list):
        moved["segmentation"] = [
            [round(value * scale + shift[place % 2], 3) for place, value in enumerate(ring)]
            for ring in segment
        ]
    else:
        moved["segmentation"] = encode(mask)
    if "area" in entry:
        moved["area"] = entry["area"] * scale**2
    return moved


def occluded(entry: Json, mask: Bools) -> Json | None:
    """Clip an annotation to what a paste leaves visible; None if no pixel is left."""
    segment = entry.get("segmentation")
    if not segment:
        return entry
    if isinstance(segment, list):
        whole = run_lengths.merge(run_lengths.frPyObjects(segment, *mask.shape))
    elif isinstance(segment["counts"], list):
        whole = run_lengths.frPyObjects(segment, *mask.shape)
    else:
        whole = segment
    seen = decode(whole)
    if not (seen & mask).any():
        return entry
    seen &= ~mask
    if not seen.any():
        return None
    rle = encode(seen)
    if entry.get("iscrowd"):  # COCO allows compressed and uncompressed run lengths in crowds
        return {**entry, "segmentation": rle}
    box = [float(value) for value in run_lengths.toBbox(rle)]
    return {**entry, "segmentation": rle, "area": float(seen.sum()), "bbox": box}


def write_sets(
    folder: Path,
    paster: Paster,
    pairs: list[Pair],
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Write `in/`, `out/`, `original/` and `annotations/`; `track` wraps the loop over pairs."""
    images: dict[str, list[Json]] = {name: [] for name in SETS}
    annotations: dict[str, list[Json]] = {name: [] for name in SETS}
    for name in (*SETS, "annotations"):
        (folder / name).mkdir()
    for number, pair in enumerate(track(pairs), start=1):
        written = {
            "in": paster.pasted(number, pair, pair.inside),
            "out": paster.pasted(number, pair, pair.outside),
            "original": paster.original(number, pair),
        }
        for name, (pixels, image, objects) in written.items():
            path = folder / name / image["file_name"]
            options: Json = (
                {"compress_level": 1} if path.suffix == ".png" else {"quality": _QUALITY}
            )
            Image.fromarray(pixels).save(path, **options)
            images[name].append(image)
            annotations[name] += objects
    for name in SETS:
        context = (entry for entry in annotations[name] if not entry["scored"])
        for number, entry in enumerate(context, start=FIRST_CONTEXT_ID):
            entry["id"] = number
        content = {
            **{key: value for key, value in paster.content.items() if key in ("info", "licenses")},
            "images": images[name],
            "annotations": annotations[name],
            "categories": paster.content["categories"],
        }
        path = folder / "annotations" / f"instances_{name}.json"
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
