"""COCO annotations for images that were resized: boxes, polygons and run lengths follow."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as run_lengths

Json = dict[str, Any]
Size = tuple[int, int]

_DECIMALS = 3


def scale_annotations(
    dataset: Json,
    *,
    leave_out: Container[int],
    rescale: Callable[[int, int], Size],
    rename: Callable[[str], str],
) -> Json:
    """Scale a whole COCO JSON.

    Args:
        dataset: The JSON's content; it is left as it is.
        leave_out: Ids of images to drop with their annotations.
        rescale: Gives an image's new height and width from the old ones.
        rename: Gives an image's new file name.

    Returns:
        A dataset of the same layout; what it does not know is copied.
    """
    images, scales = [], {}
    for entry in dataset["images"]:
        if entry["id"] in leave_out:
            continue
        height, width = rescale(entry["height"], entry["width"])
        scales[entry["id"]] = ((height, width), (width / entry["width"], height / entry["height"]))
        name = rename(entry["file_name"])
        images.append(entry | {"height": height, "width": width, "file_name": name})
    annotations = [
        _scale_annotation(entry, *scales[entry["image_id"]])
        for entry in dataset.get("annotations", ())
        if entry.get("image_id") in scales
    ]
    return dataset | {"images": images, "annotations": annotations}


def _scale_annotation(entry: Json, size: Size, scale: tuple[float, float]) -> Json:
    changed = dict(entry)
    if "bbox" in entry:
        changed["bbox"] = _scale_pairs(entry["bbox"], scale)
    if "area" in entry:
        changed["area"] = round(entry["area"] * scale[0] * scale[1], _DECIMALS)
    segment = entry.get("segmentation")
    if isinstance(segment, list):
        changed["segmentation"] = [_scale_pairs(ring, scale) for ring in segment]
    elif isinstance(segment, dict):
        try:
            changed["segmentation"] = _scale_run_lengths(segment, size)
        except (TypeError, ValueError, KeyError):
            del changed["segmentation"]  # corrupt: the box remains
    return changed


def _scale_pairs(values: Any, scale: tuple[float, float]) -> Any:
    if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
        return values  # a broken ring; the reader of the copy counts it as it did in the original
    return [round(value * scale[place % 2], _DECIMALS) for place, value in enumerate(values)]


def _scale_run_lengths(segment: Json, size: Size) -> Json:
    if isinstance(segment["counts"], list):
        segment = run_lengths.frPyObjects(segment, *segment["size"])
    mask = torch.from_numpy(run_lengths.decode(segment))
    resized = F.interpolate(mask[None, None], size=size, mode="nearest-exact")[0, 0]
    encoded = run_lengths.encode(np.asfortranarray(resized.numpy()))
    return {"size": list(size), "counts": encoded["counts"].decode("ascii")}
