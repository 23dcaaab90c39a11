"""Writes pairs of pastes as three data sets in COCO's layout: `in`, `out` and `original`.

Image k of each set shows object k: pasted where it belongs, pasted where it does not, and unpasted
in the photograph it comes from. Object k has the id k everywhere and is the only one that is asked
about; the other objects of a scene have `"asked": false` and are its company.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pycocotools import mask as run_lengths

from kd.context.pasting.cutout import FINE, Bytes, Cutout, Look, cover_of, cut_out, look_of, paste
from kd.context.pasting.pairs import Pair, Place, scale_between
from kd.formats.coco import CocoIndex
from kd.formats.coco_validate import read_json
from kd.utils.images import read_image

Json = dict[str, Any]
Bools = npt.NDArray[np.bool_]

SETS = ("in", "out", "original")
FIRST_COMPANY = 1_000_000  # ids of other objects start above those of all pairs
_QUALITY = 95
_LOSSLESS = (".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Pasted:
    """A finished picture and its entries.

    Attributes:
        picture: (H, W, 3).
        image: Its entry in the JSON.
        annotations: The object asked about, then its company.
    """

    picture: Bytes
    image: Json
    annotations: list[Json]


class Paster:
    """Makes the pictures and annotations of pairs.

    Args:
        index: The data set.
        log_prior: (C,) log share of each class.
        harmony: As in `kd.context.pasting.cutout.paste`.
        seed: Of the grain.
    """

    def __init__(
        self,
        index: CocoIndex,
        log_prior: npt.NDArray[np.float64],
        *,
        harmony: float = 0.3,
        seed: int = 0,
    ) -> None:
        self.index, self.log_prior, self.harmony, self.seed = index, log_prior, harmony, seed
        self.content, _ = read_json(index.annotation_file)
        self.images = {entry["id"]: entry for entry in self.content["images"]}
        self.entries = {entry["id"]: entry for entry in self.content["annotations"]}
        self.of_image: dict[int, list[Json]] = defaultdict(list)
        for entry in self.content["annotations"]:
            self.of_image[entry["image_id"]].append(entry)
        self._look = lru_cache(maxsize=None)(self._measure)

    def original(self, number: int, pair: Pair) -> Pasted:
        """Object `pair.row` as it was photographed; image and object get the id `number`."""
        index = self.index
        image, own = index.image_of(pair.row), int(index.object_ids[pair.row])
        asked = {**self.entries[own], "id": number, "image_id": number, "asked": True}
        others = [entry for entry in self._company(image) if entry["id"] != own]
        return self._finished(number, image, self._picture(image, None), asked, others)

    def pasted(self, number: int, pair: Pair, place: Place) -> Pasted:
        """Object `pair.row` in another scene."""
        index, source = self.index, self.index.image_of(pair.row)
        scale = scale_between(index, source, place.image)
        cutout = self._cut(pair.row, scale)
        random = np.random.default_rng((self.seed, number, place.image))
        picture = paste(
            self._picture(place.image, None), self._look(place.image, 1.0), cutout, place.shift,
            harmony=self.harmony, random=random,
        )  # fmt: skip
        entry = self.entries[int(index.object_ids[pair.row])]
        size = (int(index.heights[place.image]), int(index.widths[place.image]))
        mask = covered(cutout, place.shift, size)
        asked = {
            **moved_annotation(entry, scale, place.shift, mask),
            "id": number,
            "image_id": number,
            "asked": True,
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
            seen
            for other in self._company(place.image)
            if (seen := behind(other, mask)) is not None
        ]
        return self._finished(number, place.image, picture, asked, others)

    def _finished(
        self, number: int, image: int, picture: Bytes, asked: Json, others: list[Json]
    ) -> Pasted:
        entry = self.images[int(self.index.image_ids[image])]
        suffix = ".png" if Path(entry["file_name"]).suffix.lower() in _LOSSLESS else ".jpg"
        about = {**entry, "id": number, "file_name": f"{number:06d}{suffix}"}
        company = [{**other, "image_id": number, "asked": False} for other in others]
        return Pasted(picture, about, [asked, *company])

    def _company(self, image: int) -> list[Json]:
        return self.of_image[int(self.index.image_ids[image])]

    def _cut(self, row: int, scale: float) -> Cutout:
        """The object, its picture scaled first; its outline is drawn at the final size."""
        source = self.index.image_of(row)
        picture = self._picture(source, scale)
        height, width = picture.shape[:2]
        cover = cover_of(self.index.mask_of(row, (height * FINE, width * FINE)))
        return cut_out(picture, cover, self._look(source, scale))

    def _measure(self, image: int, scale: float) -> Look:
        return look_of(self._picture(image, scale))

    def _picture(self, image: int, scale: float | None) -> Bytes:
        index = self.index
        expected = (int(index.heights[image]), int(index.widths[image]))
        size = None if scale in (None, 1.0) else round(max(expected) * float(scale or 1))
        pixels = read_image(index.path(image), size, expected=expected)
        return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def covered(cutout: Cutout, shift: tuple[int, int], size: tuple[int, int]) -> Bools:
    """Pixels of a scene that a paste covers by half or more, (H, W)."""
    mask = np.zeros(size, np.bool_)
    x, y = cutout.corner[0] + shift[0], cutout.corner[1] + shift[1]
    height, width = cutout.cover.shape
    mask[y : y + height, x : x + width] = cutout.cover >= 0.5
    return mask


def moved_annotation(entry: Json, scale: float, shift: tuple[int, int], mask: Bools) -> Json:
    """An object's annotation after it was scaled and shifted; run lengths are those of `mask`."""
    x, y, width, height = (value * scale for value in entry["bbox"])
    moved = {**entry, "bbox": [x + shift[0], y + shift[1], width, height], "iscrowd": 0}
    segment = entry.get("segmentation")
    if isinstance(segment, list):
        moved["segmentation"] = [
            [round(value * scale + shift[place % 2], 3) for place, value in enumerate(ring)]
            for ring in segment
        ]
    else:
        moved["segmentation"] = encoded(mask)
    if "area" in entry:
        moved["area"] = entry["area"] * scale**2
    return moved


def behind(entry: Json, mask: Bools) -> Json | None:
    """An object's annotation once a paste covers part of it; None where nothing is left to see."""
    segment = entry.get("segmentation")
    if not segment:
        return entry
    if isinstance(segment, list):
        whole = run_lengths.merge(run_lengths.frPyObjects(segment, *mask.shape))
    elif isinstance(segment["counts"], list):
        whole = run_lengths.frPyObjects(segment, *mask.shape)
    else:
        whole = segment
    seen = np.asarray(run_lengths.decode(whole), np.bool_)
    if not (seen & mask).any():
        return entry
    seen &= ~mask
    if not seen.any():
        return None
    rle = encoded(seen)
    if entry.get("iscrowd"):  # COCO's crowds have uncompressed or compressed run lengths alike
        return {**entry, "segmentation": rle}
    box = [float(value) for value in run_lengths.toBbox(rle)]
    return {**entry, "segmentation": rle, "area": float(seen.sum()), "bbox": box}


def encoded(mask: Bools) -> Json:
    """A mask as compressed run lengths that JSON can hold."""
    rle = run_lengths.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}


def write_sets(
    folder: Path,
    paster: Paster,
    pairs: list[Pair],
    watch: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> None:
    """Write the three sets into a folder: `in/`, `out/`, `original/` and `annotations/`.

    Args:
        folder: It exists.
        paster: Makes them.
        pairs: Numbered from 1.
        watch: Shows a bar around the pairs gone through.
    """
    images: dict[str, list[Json]] = {name: [] for name in SETS}
    annotations: dict[str, list[Json]] = {name: [] for name in SETS}
    for name in (*SETS, "annotations"):
        (folder / name).mkdir()
    for number, pair in enumerate(watch(pairs), start=1):
        made = {
            "in": paster.pasted(number, pair, pair.inside),
            "out": paster.pasted(number, pair, pair.outside),
            "original": paster.original(number, pair),
        }
        for name, one in made.items():
            save(one.picture, folder / name / one.image["file_name"])
            images[name].append(one.image)
            annotations[name] += one.annotations
    for name in SETS:
        company = (entry for entry in annotations[name] if not entry["asked"])
        for number, entry in enumerate(company, start=FIRST_COMPANY):
            entry["id"] = number
        content = {
            **{key: value for key, value in paster.content.items() if key in ("info", "licenses")},
            "images": images[name],
            "annotations": annotations[name],
            "categories": paster.content["categories"],
        }
        path = folder / "annotations" / f"instances_{name}.json"
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def save(picture: Bytes, path: Path) -> None:
    """PNG without loss, or JPEG at quality 95, by the name."""
    image = Image.fromarray(picture)
    if path.suffix == ".png":
        image.save(path, compress_level=1)
    else:
        image.save(path, quality=_QUALITY)
