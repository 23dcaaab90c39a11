"""Regions of a image that somebody names, draws or leaves to chance, and windows sliding over it.

Pixel (row r, column c) belongs to a region that holds its centre, as everywhere
(`kd.transforms.hide`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """A part of one image.

    Attributes:
        name: As it was given: "box 10,20,30,40", "sky.png".
        box: xyxy pixels, within the image; around `mask` where there is one.
        mask: (H, W) bool, where the region is not the box itself.
    """

    name: str
    box: Box
    mask: Mask | None = None


@dataclass(frozen=True)
class BoxShape:
    """A box as the user gave it, for any image: xyxy pixels."""

    corners: Box

    def on(self, image: str, size: tuple[int, int]) -> Region:
        """The part of it that lies in a image of `size` = (height, width).

        Raises:
            UserError: None does.
        """
        x1, y1, x2, y2 = self.corners
        box = (max(x1, 0.0), max(y1, 0.0), min(x2, float(size[1])), min(y2, float(size[0])))
        name = "box " + _spell(self.corners)
        if box[0] >= box[2] or box[1] >= box[3]:
            raise UserError(_outside(image, name, size))
        return Region(name, box)


@dataclass(frozen=True)
class PolygonShape:
    """A polygon as the user gave it: corners x, y in pixels; crossing edges leave holes."""

    corners: tuple[tuple[float, float], ...]

    def on(self, image: str, size: tuple[int, int]) -> Region:
        """The part of it that lies in a image of `size`.

        Raises:
            UserError: It holds no pixel's centre there.
        """
        mask = polygon_mask(np.array(self.corners), size)
        name = f"polygon of {len(self.corners)} corners"
        if not mask.any():
            raise UserError(_outside(image, name, size))
        return Region(name, _box_around(mask), mask)


@dataclass(frozen=True, eq=False)
class MaskShape:
    """A mask from a file."""

    file: Path
    mask: Mask

    def on(self, image: str, size: tuple[int, int]) -> Region:
        """Itself, for a image of its own size.

        Raises:
            UserError: The image has another size.
        """
        if self.mask.shape != size:
            have, want = (f"{wide} x {high}" for high, wide in (self.mask.shape, size))
            raise UserError(f"{self.file}: is {have} pixels, but {image} is {want}")
        return Region(self.file.name, _box_around(self.mask), self.mask)


Shape = BoxShape | PolygonShape | MaskShape


def parse_box(text: str) -> BoxShape:
    """Read "x1,y1,x2,y2".

    Raises:
        UserError: Other than four numbers, or nothing between the corners.
    """
    numbers = _numbers(text, "box")
    if len(numbers) != 4:
        raise UserError(f"box {text!r}: expected x1,y1,x2,y2 in pixels, got {len(numbers)} numbers")
    x1, y1, x2, y2 = numbers
    if x1 >= x2 or y1 >= y2:
        raise UserError(f"box {text!r}: x1,y1 must lie left of and above x2,y2")
    return BoxShape((x1, y1, x2, y2))


def parse_polygon(text: str) -> PolygonShape:
    """Read "x1,y1,x2,y2,x3,y3,...".

    Raises:
        UserError: An odd number of numbers, or fewer than three corners.
    """
    numbers = _numbers(text, "polygon")
    if len(numbers) % 2 or len(numbers) < 6:
        raise UserError(
            f"polygon {text!r}: expected x1,y1,x2,y2,x3,y3,... in pixels, three corners or more; "
            f"got {len(numbers)} numbers"
        )
    return PolygonShape(tuple(zip(numbers[0::2], numbers[1::2], strict=True)))


def read_mask(file: Path) -> MaskShape:
    """Read a image whose pixels are hidden where they are not 0; transparency does not count.

    Raises:
        UserError: Missing, not a image, or 0 everywhere.
    """
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
    return MaskShape(file, mask)


def _without_alpha(image: Image.Image) -> Image.Image:
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("RGB" if image.mode.upper() == "RGBA" else "L")
    # The palette's colours count, not their numbers: number 0 may be white.
    return image.convert("RGB") if image.mode == "P" else image


def polygon_mask(corners: npt.NDArray[np.float64], size: tuple[int, int]) -> Mask:
    """Pixels whose centres lie inside a polygon, by the even-odd rule.

    Args:
        corners: (n, 2) x, y in pixels.
        size: Height and width.

    Returns:
        (height, width).
    """
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    mask = np.zeros(size, np.bool_)
    for (x1, y1), (x2, y2) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        crossed = np.flatnonzero((y1 <= rows) != (y2 <= rows))
        if len(crossed):  # else horizontal, or above and below all centres
            at = x1 + (rows[crossed] - y1) * ((x2 - x1) / (y2 - y1))
            mask[crossed] ^= columns >= at[:, None]
    return mask


def random_boxes(
    count: int, size: tuple[int, int], shares: tuple[float, float], random: np.random.Generator
) -> list[Region]:
    """Boxes anywhere within a image.

    The logarithm of a box's share of the image and that of its proportions (1:2 to 2:1) are
    uniform, as is its place.

    Args:
        count: How many.
        size: Height and width of the image.
        shares: The smallest and the largest share of the image.
        random: Numbers to draw from.
    """
    regions = []
    for _ in range(count):
        area = math.exp(random.uniform(*np.log(shares))) * size[0] * size[1]
        aspect = math.exp(random.uniform(*np.log(_ASPECTS)))
        width = min(max(1.0, math.sqrt(area * aspect)), float(size[1]))
        height = min(max(1.0, area / width), float(size[0]))
        left, top = random.uniform(0, size[1] - width), random.uniform(0, size[0] - height)
        box = (left, top, left + width, top + height)
        corners = tuple(round(corner) for corner in box)
        whole = (*corners[:2], max(corners[2], corners[0] + 1), max(corners[3], corners[1] + 1))
        regions.append(BoxShape(tuple(map(float, whole))).on("picture", size))  # type: ignore[arg-type]
    return regions


@dataclass(frozen=True, eq=False)
class Windows:
    """Boxes of one size at the places of an even grid; outer ones touch the image's borders.

    Attributes:
        boxes: (rows * columns, 4) xyxy pixels, row by row.
        grid: Rows and columns.
    """

    boxes: Tensor
    grid: tuple[int, int]


def parse_scale(text: str) -> tuple[float, float]:
    """Read "WxH", shares of the image's width and height, above 0 and at most 1.

    Raises:
        UserError: Anything else.
    """
    parts = text.lower().split("x")
    try:
        width, height = (float(part) for part in parts)
    except ValueError:
        width = height = math.nan
    if not (0 < width <= 1 and 0 < height <= 1):
        raise UserError(
            f"region {text!r}: expected WxH, shares of the image's width and height above 0 and "
            "at most 1, such as 0.2x0.2"
        )
    return width, height


def check_stride(stride: float) -> None:
    """Refuse a stride that covers nothing or leaves gaps.

    Raises:
        UserError: It is not above 0 and at most 1.
    """
    if not 0 < stride <= 1:
        raise UserError(f"stride {stride:g}: must be above 0 and at most 1, a share of the region")


def windows(size: tuple[int, int], scale: tuple[float, float], stride: float) -> Windows:
    """Slide a box over a image.

    Args:
        size: Height and width of the image.
        scale: Shares of its width and height that the box has.
        stride: Most that a box moves on from its neighbour, as a share of its sides.

    Raises:
        UserError: What `check_stride` raises.
    """
    check_stride(stride)
    sides, starts = [], []
    for share, length in zip(scale, (size[1], size[0]), strict=True):
        sides.append(side := max(1.0, share * length))
        room = max(0.0, length - side)
        # A hair's breadth is rounding, and asks for no window more.
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


def _spell(numbers: Sequence[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _outside(image: str, what: str, size: tuple[int, int]) -> str:
    return f"{image}: {what} lies outside of the image, which is {size[1]} x {size[0]} pixels"
