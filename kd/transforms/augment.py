"""Augmentations: drawn first, then only what was drawn is done.

Geometry goes through torchvision's `transforms.v2.functional`, which dispatches on the type of
its input, so that images, boxes and masks follow together; colours are `kd.transforms.augment`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kd.errors import UserError
from kd.utils.images import scaled_size

Matrix = npt.NDArray[np.float64]

_LUMA = np.array([0.2989, 0.587, 0.114])  # torchvision's weights
_TO_GREY = np.tile(_LUMA / _LUMA.sum(), (3, 1))
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class ColourChange:
    """Colour changes in the order they are applied; the defaults change nothing."""

    rgb_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False
    order: tuple[int, int, int] = (0, 1, 2)

    def matrix(self, mean: Matrix) -> tuple[Matrix, Matrix]:
        """Multiply everything out.

        Args:
            mean: (3,) the image's mean RGB, which contrast is stretched about.

        Returns:
            Weights (3, 3) and offsets (3,) on the scale 0..255.
        """
        weight = np.eye(3) * self.brightness
        offset = np.array(self.rgb_shift) * self.brightness
        middle = (_TO_GREY @ (weight @ mean + offset))[0]
        weight, offset = weight * self.contrast, offset * self.contrast
        offset = offset + (1 - self.contrast) * middle
        mix = self.saturation * np.eye(3) + (1 - self.saturation) * _TO_GREY
        mix = _turn_hue(self.hue) @ mix
        if self.grey:
            mix = _TO_GREY @ mix
        mix = mix[list(self.order)]
        return mix @ weight, mix @ offset

    def __call__(self, image: Tensor) -> Tensor:
        """Apply to (3, H, W) uint8."""
        flat = image.reshape(3, -1).float()
        weight, offset = self.matrix(flat.mean(dim=1).double().numpy())
        weights = torch.from_numpy(weight).float()
        offsets = torch.from_numpy(offset).float()[:, None]
        changed = torch.addmm(offsets, weights, flat).round_().clamp_(0, 255)
        return changed.to(torch.uint8).view_as(image)


def _turn_hue(turn: float) -> Matrix:
    if not turn:
        return np.eye(3)
    cosine, sine = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    turned: Matrix = _FROM_YIQ @ rotation @ _TO_YIQ
    return turned


T = TypeVar("T", bound=Tensor)  # one of torchvision's tv_tensors

_BLUR_KERNEL = 5
_GEOMETRY = ("flip", "shift", "rotate", "crop")
_COLOURS = ("rgb_shift", "shuffle", "grey", "jitter")
_PROBABILITIES = (*_GEOMETRY, *_COLOURS, "blur")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What was drawn for one image.

    Attributes:
        size: Height and width of the result, pixels.
        crop: Top, left, height and width of the part that is scaled to `size`.
        flip: Mirror left and right.
        shift: Pixels to the right and down; what comes in from outside is 0.
        angle: Degrees, anticlockwise about the middle; corners that come in are 0.
        blur: Standard deviation in pixels, 0 for none.
        colour: Colour changes, or None.
    """

    size: tuple[int, int]
    crop: tuple[int, int, int, int] | None = None
    flip: bool = False
    shift: tuple[int, int] = (0, 0)
    angle: float = 0.0
    blur: float = 0.0
    colour: ColourChange | None = None

    def move(self, inputs: T) -> T:
        """Apply the geometry to a tv_tensor: `Image`, `Mask` or `BoundingBoxes`."""
        moved: Any = inputs
        if self.crop is not None:
            moved = F.resized_crop(moved, *self.crop, size=list(self.size), antialias=True)
        if self.flip:
            moved = F.horizontal_flip(moved)
        if self.shift != (0, 0):
            right, down = self.shift
            moved = F.crop(moved, -down, -right, *self.size)  # pads where it leaves the image
        if self.angle:
            moved = F.rotate(moved, self.angle, interpolation=InterpolationMode.BILINEAR)
        return moved  # type: ignore[no-any-return]

    def image(self, image: Tensor) -> Tensor:
        """Apply everything to (3, H, W) uint8; the result is (3, *size) uint8."""
        changed: Tensor = self.move(tv_tensors.Image(image)).as_subclass(Tensor)
        if self.blur:
            changed = F.gaussian_blur(changed, [_BLUR_KERNEL] * 2, [self.blur] * 2)
        return changed if self.colour is None else self.colour(changed)

    @property
    def is_identity(self) -> bool:
        """Whether the geometry stays as it is."""
        return self.crop is None and not (self.flip or self.angle or self.shift != (0, 0))

    def of_mirrored(self, size: tuple[int, int]) -> Plan:
        """What leads to the same result from the mirrored image, for a plan that flips.

        Args:
            size: Height and width of the image before.
        """
        crop = self.crop
        if crop is not None:
            top, left, height, width = crop
            crop = (top, size[1] - left - width, height, width)
        return replace(self, flip=False, crop=crop)

    def sources(self, size: tuple[int, int]) -> Matrix:
        """Where a place of the result comes from, the inverse of `boxes`.

        Args:
            size: Height and width of the image before.

        Returns:
            (2, 3): takes (x, y, 1) in pixels of the result to (x, y) of the image before.
        """
        height, width = self.size
        # Undone in the reverse order: rotation about the middle, shift, flip, crop and scale.
        turn = math.radians(self.angle)
        cosine, sine = math.cos(turn), math.sin(turn)
        middle = _translation(width / 2, height / 2)
        rotation = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        matrix = middle @ rotation @ np.linalg.inv(middle)
        matrix = _translation(-self.shift[0], -self.shift[1]) @ matrix
        if self.flip:
            matrix = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) @ matrix
        top, left, tall, wide = self.crop or (0, 0, *size)
        scale = np.diag([wide / width, tall / height, 1.0])
        whole: Matrix = _translation(left, top) @ scale @ matrix
        return whole[:2]

    def masks(self, masks: Tensor) -> Tensor:
        """Apply the geometry to (K, H, W) bool."""
        moved: Tensor = self.move(tv_tensors.Mask(masks)).as_subclass(Tensor)
        return moved

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Apply the geometry to (M, 4) xyxy pixels in an image of `size`; nothing is cut off."""
        canvas: Any = {"format": "XYXY", "canvas_size": size, "clamping_mode": None}
        moved: Tensor = self.move(tv_tensors.BoundingBoxes(boxes, **canvas)).as_subclass(Tensor)
        return moved


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random augmentations of a training image that already has its working size.

    `flip` to `jitter` are probabilities, each drawn by itself; the rest are the extents.

    Attributes:
        flip: Mirror left and right.
        shift: Move by up to `max_shift` of each side.
        rotate: Turn by up to `max_angle` degrees.
        crop: Cut out a part of `crop_scale` of the area, scale it back to the long side.
        rgb_shift: Add up to +-`max_rgb_shift` (of 255) to each channel.
        shuffle: Permute the channels.
        grey: Drop the colour.
        blur: Gaussian blur with a standard deviation of up to `max_blur` pixels.
        jitter: Change brightness, contrast and saturation by factors of 1 +- `max_jitter`, hue by
            up to +-`max_hue` of the colour circle.
        min_visible: An object of which less than this share of the box stays in the image is
            dropped.
    """

    flip: float = 0.5
    shift: float = 0.1
    rotate: float = 0.1
    crop: float = 0.0
    rgb_shift: float = 0.1
    shuffle: float = 0.1
    grey: float = 0.1
    blur: float = 0.1
    jitter: float = 0.1
    max_shift: float = 0.0625
    max_angle: float = 10.0
    crop_scale: tuple[float, float] = (0.5, 1.0)
    max_rgb_shift: float = 20.0
    max_blur: float = 1.5
    max_jitter: float = 0.2
    max_hue: float = 0.1
    min_visible: float = 0.3

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            UserError: A probability or an extent is out of range.
        """
        for name in (*_PROBABILITIES, "max_shift", "max_jitter", "max_hue", "min_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name}: {getattr(self, name)} is not in 0..1")
        for name in ("max_angle", "max_rgb_shift", "max_blur"):
            if getattr(self, name) < 0:
                raise UserError(f"augment.{name}: {getattr(self, name)} is below 0")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(
                f"augment.crop_scale: {self.crop_scale}: expected two shares of the area, "
                "0 < smallest <= largest <= 1"
            )

    def draw(
        self, random: np.random.Generator, size: tuple[int, int], *, frame: int | None = None
    ) -> Plan:
        """Decide what to do with one image.

        Args:
            random: Drawn from.
            size: Height and width of the image.
            frame: Side of a square that the result must fit in: of a larger image a part as
                large as the square is cut out anywhere, and no other `crop` then; None: as it is.
        """
        chosen = dict(zip(_PROBABILITIES, random.random(len(_PROBABILITIES)).tolist(), strict=True))
        wanted = {name: value < getattr(self, name) for name, value in chosen.items()}
        crop = self._draw_crop(random, size) if wanted["crop"] else None
        after = scaled_size(crop[2], crop[3], max(size)) if crop else size
        if frame is not None and max(size) > frame:
            crop = _draw_window(random, size, (min(size[0], frame), min(size[1], frame)))
            after = crop[2:]
        shift = (0, 0)
        if wanted["shift"]:
            across, down = random.uniform(-self.max_shift, self.max_shift, 2).tolist()
            shift = (round(across * after[1]), round(down * after[0]))
        return Plan(
            size=after,
            crop=crop,
            flip=wanted["flip"],
            shift=shift,
            angle=random.uniform(-self.max_angle, self.max_angle) if wanted["rotate"] else 0.0,
            blur=random.uniform(0.0, self.max_blur) if wanted["blur"] else 0.0,
            colour=self._draw_colour(random, wanted),
        )

    def _draw_crop(
        self, random: np.random.Generator, size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        side = math.sqrt(random.uniform(*self.crop_scale))
        height, width = (max(1, round(length * side)) for length in size)
        return _draw_window(random, size, (height, width))

    def _draw_colour(
        self, random: np.random.Generator, wanted: dict[str, bool]
    ) -> ColourChange | None:
        if not any(wanted[name] for name in _COLOURS):
            return None
        options: dict[str, Any] = {"grey": wanted["grey"]}
        if wanted["rgb_shift"]:
            shift = random.uniform(-self.max_rgb_shift, self.max_rgb_shift, 3)
            options["rgb_shift"] = tuple(shift.tolist())
        if wanted["jitter"]:
            factors = random.uniform(1 - self.max_jitter, 1 + self.max_jitter, 3).tolist()
            options |= dict(zip(("brightness", "contrast", "saturation"), factors, strict=True))
            options["hue"] = random.uniform(-self.max_hue, self.max_hue)
        if wanted["shuffle"]:
            options["order"] = tuple(random.permutation(3).tolist())
        return ColourChange(**options)


def build_augment(options: dict[str, Any] | None) -> Augment | None:
    """Make the augmentations from their options; None stays None.

    Raises:
        UserError: An option is unknown or out of range.
    """
    if options is None:
        return None
    known = [field.name for field in fields(Augment)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UserError(f"augment: unknown {', '.join(unknown)}; known: {', '.join(known)}")
    return Augment(**options)


def visible(
    boxes: Tensor, size: tuple[int, int], min_visible: float, *, whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cut boxes at the image's border and say which keep enough.

    Args:
        boxes: (M, 4) xyxy pixels.
        size: Height and width of the image.
        min_visible: Smallest share of a box's area that must stay.
        whole: The same boxes before something else cut them, (M, 4); None: nothing has.

    Returns:
        The cut boxes (M, 4), and (M,) bool: at least `min_visible` and one pixel stays.
    """
    limit = boxes.new_tensor([size[1], size[0]]).repeat(2)
    cut = torch.minimum(boxes.clamp(min=0), limit)
    sides = cut[:, 2:] - cut[:, :2]
    before = boxes if whole is None else whole
    area = (before[:, 2:] - before[:, :2]).prod(dim=1)
    enough = sides.prod(dim=1) >= min_visible * area
    return cut, enough & (sides >= 1).all(dim=1)


def pad(image: Tensor, size: int) -> Tensor:
    """Pad (C, h, w) with zeros, below and right, to (C, size, size)."""
    padded = image.new_zeros((image.shape[0], size, size))
    padded[:, : image.shape[1], : image.shape[2]] = image
    return padded


def _draw_window(
    random: np.random.Generator, size: tuple[int, int], part: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a part of an image, anywhere in it."""
    top = int(random.integers(size[0] - part[0] + 1))
    left = int(random.integers(size[1] - part[1] + 1))
    return top, left, *part


def _translation(right: float, down: float) -> Matrix:
    return np.array([[1, 0, right], [0, 1, down], [0, 0, 1]], dtype=np.float64)
