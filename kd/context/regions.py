"""Regions of an image: given by the user, random, or sliding windows.

A region contains the pixels whose centres it contains, as in `kd.transforms.hide`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from kd.errors import UserError
from kd.utils.images import UNREADABLE

Box = tuple[float, float, float, float]
Mask = npt.NDArray[np.bool_]

_ASPECTS = (0.5, 2.0)  # width / height of random boxes


@dataclass(frozen=True, eq=False)
class Region:
    """A part of one image, with a `name` for figures and messages ("sky.png")."""

    name: str
    box: Box  # xyxy pixels within the image; the bounding box of `mask` if given
    mask: Mask | None = None  # (H, W) bool, for regions that are not boxes


# Creates a region from the image's name (for messages) and its height and width; raises a
# `UserError` if the region lies outside the image or is a mask of a different size.
Shape = Callable[[str, tuple[int, int]], Region]


def box_region(corners: Box, image: str, size: tuple[int, int]) -> Region:
    """Clip a box, xyxy pixels, to an image."""
    x1, y1, x2, y2 = corners
    box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(size[1])), min(y2, float(size[0])))
    name = "box " + ",".join(f"{corner:g}" for corner in corners)
    if box[0] >= box[2] or box[1] >= box[3]:
        raise UserError(_outside(image, name, size))
    return Region(name, box)


def polygon_region(
    corners: Sequence[tuple[float, float]], image: str, size: tuple[int, int]
) -> Region:
    """Create a region from polygon corners x, y in pixels, by the even-odd rule."""
    mask = polygon_mask(np.array(corners), size)
    name = f"polygon of {len(corners)} corners"
    if not mask.any():
        raise UserError(_outside(image, name, size))
    return Region(name, _box_around(mask), mask)


def _mask_region(file: Path, mask: Mask, image: str, size: tuple[int, int]) -> Region:
    if mask.shape != size:
        have, want = (f"{wide} x {high}" for high, wide in (mask.shape, size))
        raise UserError(f"{file}: is {have} pixels, but {image} is {want}")
    return Region(file.name, _box_around(mask), mask)


def parse_box(text: str) -> Shape:
    """Parse a box "x1,y1,x2,y2" in pixels."""
    numbers = _numbers(text, "box")
    if len(numbers) != 4:
        raise UserError(f"box {text!r}: expected x1,y1,x2,y2 in pixels, got {len(numbers)} numbers")
    x1, y1, x2, y2 = numbers
    if x1 >= x2 or y1 >= y2:
        raise UserError(f"box {text!r}: x1,y1 must lie left of and above x2,y2")
    return partial(box_region, (x1, y1, x2, y2))


def parse_polygon(text: str) -> Shape:
    """Parse a polygon "x1,y1,x2,y2,x3,y3,..." in pixels, with at least three corners."""
    numbers = _numbers(text, "polygon")
    if len(numbers) % 2 or len(numbers) < 6:
        raise UserError(
            f"polygon {text!r}: expected x1,y1,x2,y2,x3,y3,... in pixels, three corners or more; "
            f"got {len(numbers)} numbers"
        )
    return partial(polygon_region, list(zip(numbers[0::2], numbers[1::2], strict=True)))


def read_mask(file: Path) -> Shape:
    """Read a mask image, whose nonzero pixels are the region."""
    try:
        with Image.open(file) as image:
            pixels = np.asarray(_without_alpha(image))
    except FileNotFoundError:
        raise UserError(f"{file}: mask not found") from None
    except UNREADABLE as error:
        raise UserError(f"{file}: cannot read this mask: {error}") from None
    mask: Mask = pixels != 0 if pixels.ndim == 2 else (pixels != 0).any(axis=2)
    if not mask.any():
        raise UserError(f"{file}: the mask is empty: no pixel is other than 0")
    return partial(_mask_region, file, mask)


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("RGB" if image.mode.upper() == "RGBA" else "L")
    # A palette image is converted to colours, because palette index 0 may be white.
    return image.convert("RGB") if image.mode == "P" else image


def polygon_mask(corners: npt.NDArray[np.float64], size: tuple[int, int]) -> Mask:
    """Rasterize a polygon (n, 2) of x, y corners to a mask (H, W), by the even-odd rule."""
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    mask = np.zeros(size, np.bool_)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crossed = np.flatnonzero((y1 <= rows) != (y2 <= rows))
        if len(crossed):  # else horizontal, or above and below all centres
            at = x1 + (rows[crossed] - y1) * ((x2 - x1) / (y2 - y1))
            mask[crossed] ^= columns >= at[:, None]
    return mask


def random_boxes(
    count: int, size: tuple[int, int], fractions: tuple[float, float], random: np.random.Generator
) -> list[Region]:
    """Sample boxes uniformly in position, log area fraction and log aspect ratio (1:2 to 2:1).

    `fractions` are the smallest and largest area as a fraction of the image.
    """
    regions = []
    for _ in range(count):
        area = math.exp(random.uniform(*np.log(fractions))) * size[0] * size[1]
        aspect = math.exp(random.uniform(*np.log(_ASPECTS)))
        width = min(max(1.0, math.sqrt(area * aspect)), float(size[1]))
        height = min(max(1.0, area / width), float(size[0]))
        left, top = random.uniform(0, size[1] - width), random.uniform(0, size[0] - height)
        x1, y1, x2, y2 = map(round, (left, top, left + width, top + height))
        box = (float(x1), float(y1), float(max(x2, x1 + 1)), float(max(y2, y1 + 1)))
        regions.append(box_region(box, "image", size))
    return regions


class Windows(NamedTuple):
    """Boxes of one size on a regular grid; the outer boxes touch the image's borders."""

    boxes: Tensor  # (rows * columns, 4) xyxy pixels, row by row
    grid: tuple[int, int]  # rows and columns


def parse_scale(text: str) -> tuple[float, float]:
    """Parse "WxH", fractions of the image's width and height in (0, 1]."""
    parts = text.lower().split("x")
    try:
        width, height = (float(part) for part in parts)
    except ValueError:
        width = height = math.nan
    if not (0 < width <= 1 and 0 < height <= 1):
        raise UserError(
            f"region {text!r}: expected WxH, fractions of the image's width and height above 0 and "
            "at most 1, such as 0.2x0.2"
        )
    return width, height


def check_stride(stride: float) -> None:
    """Raise a `UserError` unless a stride, as a fraction of the window, is in (0, 1]."""
    if not 0 < stride <= 1:
        raise UserError(
            f"stride {stride:g}: must be above 0 and at most 1, a fraction of the region"
        )


def windows(size: tuple[int, int], scale: tuple[float, float], stride: float) -> Windows:
    """Slide a window over an image of `size` (height, width).

    `scale` is the window's width and height as fractions of the image's. `stride` is the largest
    step between adjacent windows, as a fraction of the window's sides.
    """
    check_stride(stride)
    sides, starts = [], []
    for fraction, length in zip(scale, (size[1], size[0]), strict=True):
        sides.append(side := max(1.0, fraction * length))
        room = max(0.0, length - side)
        # The tolerance keeps rounding errors from adding a window.
        count = 1 + math.ceil(room / (stride * side) - 1e-6)
        starts.append(torch.linspace(0.0, room, count) if count > 1 else torch.tensor([room / 2]))
    top, left = torch.meshgrid(starts[1], starts[0], indexing="ij")
    low = torch.stack([left.flatten(), top.flatten()], dim=1)
    boxes = torch.cat([low, low + torch.tensor(sides)], dim=1)
    return Windows(boxes, (len(starts[1]), len(starts[0])))


def _numbers(text: str, what: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = [math.nan]
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(f"{what} {text!r}: expected numbers with commas between them")
    return numbers


def _box_around(mask: Mask) -> Box:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _outside(image: str, what: str, size: tuple[int, int]) -> str:
    return f"{image}: {what} lies outside of the image, which is {size[1]} x {size[0]} pixels"
