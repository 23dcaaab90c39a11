"""Random augmentations, each sampled as a plan and then applied to images, boxes and masks.

Geometric transforms are those of torchvision's `transforms.v2.functional`. All colour changes of an
image are combined into one matrix product.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kd.errors import UserError
from kd.registry import check_options
from kd.utils.images import scaled_size

Matrix = npt.NDArray[np.float64]

_LUMA = np.array([0.2989, 0.587, 0.114])  # torchvision's weights
_TO_GREY = np.tile(_LUMA / _LUMA.sum(), (3, 1))
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True, kw_only=True)
class ColourChange:
    """Colour changes, applied in the order of the fields; the defaults change nothing."""

    rgb_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False
    order: tuple[int, int, int] = (0, 1, 2)

    def matrix(self, mean: Matrix) -> tuple[Matrix, Matrix]:
        """Combine all changes into one affine map of RGB in 0..255: weights (3, 3), offsets (3,).

        `mean` (3,) is the mean RGB of the image, which contrast changes leave unchanged.
        """
        weight = np.eye(3) * self.brightness
        offset = np.array(self.rgb_shift) * self.brightness
        centre = (_TO_GREY @ (weight @ mean + offset))[0]
        weight, offset = weight * self.contrast, offset * self.contrast
        offset = offset + (1 - self.contrast) * centre
        mix = self.saturation * np.eye(3) + (1 - self.saturation) * _TO_GREY
        mix = _hue_rotation(self.hue) @ mix
        if self.grey:
            mix = _TO_GREY @ mix
        mix = mix[list(self.order)]
        return mix @ weight, mix @ offset

    def __call__(self, image: Tensor) -> Tensor:
        """Apply the changes to an image (3, H, W) uint8."""
        flat = image.reshape(3, -1).float()
        weight, offset = self.matrix(flat.mean(dim=1).double().numpy())
        weights = torch.from_numpy(weight).float()
        offsets = torch.from_numpy(offset).float()[:, None]
        changed = torch.addmm(offsets, weights, flat).round_().clamp_(0, 255)
        return changed.to(torch.uint8).view_as(image)


def _hue_rotation(angle: float) -> Matrix:
    if not angle:
        return np.eye(3)
    cosine, sine = math.cos(2 * math.pi * angle), math.sin(2 * math.pi * angle)
    rotation = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    rotated: Matrix = _FROM_YIQ @ rotation @ _TO_YIQ
    return rotated


T = TypeVar("T", bound=Tensor)  # one of torchvision's tv_tensors

_BLUR_KERNEL = 5
_GEOMETRY = ("flip", "shift", "rotate", "crop")
_COLOURS = ("rgb_shift", "shuffle", "grey", "jitter")
_PROBABILITIES = (*_GEOMETRY, *_COLOURS, "blur")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sampled augmentation of one image, applied in the order crop, flip, shift, rotation."""

    size: tuple[int, int]  # height and width of the result, pixels
    crop: tuple[int, int, int, int] | None = None  # top, left, height, width; scaled to `size`
    flip: bool = False  # mirror left and right
    shift: tuple[int, int] = (0, 0)  # pixels to the right and down; vacated pixels are 0
    angle: float = 0.0  # degrees anticlockwise about the centre; vacated corners are 0
    blur: float = 0.0  # standard deviation of a Gaussian blur in pixels; 0 for no blur
    colour: ColourChange | None = None

    def move(self, inputs: T) -> T:
        """Apply the geometric transforms to a tv_tensor: `Image`, `Mask` or `BoundingBoxes`."""
        moved: Any = inputs
        if self.crop is not None:
            moved = F.resized_crop(moved, *self.crop, size=list(self.size), antialias=True)
        if self.flip:
            moved = F.horizontal_flip(moved)
        if self.shift != (0, 0):
            right, down = self.shift
            moved = F.crop(moved, -down, -right, *self.size)  # pads outside the image
        if self.angle:
            moved = F.rotate(moved, self.angle, interpolation=InterpolationMode.BILINEAR)
        return moved  # type: ignore[no-any-return]

    def image(self, image: Tensor) -> Tensor:
        """Apply geometric transforms, blur and colour changes to (3, H, W) uint8: (3, *size)."""
        changed: Tensor = self.move(tv_tensors.Image(image)).as_subclass(Tensor)
        if self.blur:
            changed = F.gaussian_blur(changed, [_BLUR_KERNEL] * 2, [self.blur] * 2)
        return changed if self.colour is None else self.colour(changed)

    @property
    def is_identity(self) -> bool:
        """Whether the plan has no geometric transform."""
        return self.crop is None and not (self.flip or self.angle or self.shift != (0, 0))

    def of_mirrored(self, size: tuple[int, int]) -> Plan:
        """Return the plan that gives the same result on the mirrored image of `size`."""
        crop = self.crop
        if crop is not None:
            top, left, height, width = crop
            crop = (top, size[1] - left - width, height, width)
        return replace(self, flip=False, crop=crop)

    def sources(self, size: tuple[int, int]) -> Matrix:
        """Affine map (2, 3) from (x, y, 1) in the result to (x, y) in the input of `size`."""
        height, width = self.size
        # Inverted in reverse order: rotation about the centre, shift, flip, crop and scale.
        radians = math.radians(self.angle)
        cosine, sine = math.cos(radians), math.sin(radians)
        centre = _translation(width / 2, height / 2)
        rotation = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
        matrix = centre @ rotation @ np.linalg.inv(centre)
        matrix = _translation(-self.shift[0], -self.shift[1]) @ matrix
        if self.flip:
            matrix = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]]) @ matrix
        top, left, tall, wide = self.crop or (0, 0, *size)
        scale = np.diag([wide / width, tall / height, 1.0])
        whole: Matrix = _translation(left, top) @ scale @ matrix
        return whole[:2]

    def masks(self, masks: Tensor) -> Tensor:
        """Apply the geometric transforms to masks (K, H, W) bool."""
        return self.move(tv_tensors.Mask(masks)).as_subclass(Tensor)  # type: ignore[no-any-return]

    def boxes(self, boxes: Tensor, size: tuple[int, int]) -> Tensor:
        """Apply the geometric transforms to (M, 4) xyxy pixel boxes of an image; do not clip them.

        `size` is the height and width of the image.
        """
        canvas: Any = {"format": "XYXY", "canvas_size": size, "clamping_mode": None}
        moved: Tensor = self.move(tv_tensors.BoundingBoxes(boxes, **canvas)).as_subclass(Tensor)
        return moved


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Random augmentation of a training image at its working size.

    The fields from `flip` to `jitter` are independent probabilities.
    """

    flip: float = 0.5  # mirror left and right
    shift: float = 0.1  # shift by up to `max_shift`
    rotate: float = 0.1  # rotate by up to `max_angle`
    crop: float = 0.0  # crop a part, and scale it to the image's long side
    rgb_shift: float = 0.1  # add up to +-`max_rgb_shift` to each channel
    shuffle: float = 0.1  # permute the channels
    grey: float = 0.1  # remove the colour
    blur: float = 0.1  # blur by a Gaussian with a standard deviation of up to `max_blur`
    jitter: float = 0.1  # change brightness, contrast, saturation and hue
    max_shift: float = 0.0625  # fraction of width and height
    max_angle: float = 10.0  # degrees
    crop_scale: tuple[float, float] = (0.5, 1.0)  # range of the crop's fraction of the image area
    max_rgb_shift: float = 20.0  # of 255
    max_blur: float = 1.5  # pixels
    max_jitter: float = 0.2  # factors of brightness, contrast and saturation are 1 +- this
    max_hue: float = 0.1  # fraction of the colour circle
    min_visible: float = 0.3  # drop objects of whose box a smaller fraction stays in the image

    def __post_init__(self) -> None:
        fractions = ("max_shift", "max_jitter", "max_hue", "min_visible")
        check_fractions(self, (*_PROBABILITIES, *fractions))
        for name in ("max_angle", "max_rgb_shift", "max_blur"):
            if getattr(self, name) < 0:
                raise UserError(f"augment.{name}: got {getattr(self, name)}, expected at least 0")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError(
                f"augment.crop_scale: got {self.crop_scale}, expected two fractions of the area, "
                "0 < smallest <= largest <= 1"
            )

    def draw(
        self, random: np.random.Generator, size: tuple[int, int], *, frame: int | None = None
    ) -> Plan:
        """Sample the augmentation of one image of `size` = (height, width).

        If `frame` is given, the result must fit into a square of this side. Larger images are
        cropped to the square at a random position, instead of by `crop`.
        """
        chosen = dict(zip(_PROBABILITIES, random.random(len(_PROBABILITIES)).tolist(), strict=True))
        enabled = {name: value < getattr(self, name) for name, value in chosen.items()}
        crop = self._draw_crop(random, size) if enabled["crop"] else None
        after = scaled_size(crop[2], crop[3], max(size)) if crop else size
        if frame is not None and max(size) > frame:
            crop = _draw_window(random, size, (min(size[0], frame), min(size[1], frame)))
            after = crop[2:]
        shift = (0, 0)
        if enabled["shift"]:
            right, down = random.uniform(-self.max_shift, self.max_shift, 2).tolist()
            shift = (round(right * after[1]), round(down * after[0]))
        return Plan(
            size=after,
            crop=crop,
            flip=enabled["flip"],
            shift=shift,
            angle=random.uniform(-self.max_angle, self.max_angle) if enabled["rotate"] else 0.0,
            blur=random.uniform(0.0, self.max_blur) if enabled["blur"] else 0.0,
            colour=self._draw_colour(random, enabled),
        )

    def _draw_crop(
        self, random: np.random.Generator, size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        side = math.sqrt(random.uniform(*self.crop_scale))
        height, width = (max(1, round(length * side)) for length in size)
        return _draw_window(random, size, (height, width))

    def _draw_colour(
        self, random: np.random.Generator, enabled: dict[str, bool]
    ) -> ColourChange | None:
        if not any(enabled[name] for name in _COLOURS):
            return None
        options: dict[str, Any] = {"grey": enabled["grey"]}
        if enabled["rgb_shift"]:
            shift = random.uniform(-self.max_rgb_shift, self.max_rgb_shift, 3)
            options["rgb_shift"] = tuple(shift.tolist())
        if enabled["jitter"]:
            factors = random.uniform(1 - self.max_jitter, 1 + self.max_jitter, 3).tolist()
            options |= dict(zip(("brightness", "contrast", "saturation"), factors, strict=True))
            options["hue"] = random.uniform(-self.max_hue, self.max_hue)
        if enabled["shuffle"]:
            options["order"] = tuple(random.permutation(3).tolist())
        return ColourChange(**options)


def build_augment(options: dict[str, Any] | None) -> Augment | None:
    """Build the augmentation from its options; None stays None."""
    if options is None:
        return None
    check_options(Augment, options, what="augment")
    return Augment(**options)


def check_fractions(options: object, names: Iterable[str]) -> None:
    """Raise a `UserError` for the first of the named options that is not in 0..1."""
    for name in names:
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"augment.{name}: got {getattr(options, name)}, expected 0 to 1")


def visible(
    boxes: Tensor, size: tuple[int, int], min_visible: float, *, whole: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Clip (M, 4) xyxy boxes to the image; also return which are still visible, (M,) bool.

    A box is visible if at least `min_visible` of its area stays in the image and its clipped sides
    are at least one pixel. If the boxes were clipped before, pass the original boxes as `whole`.
    """
    limit = boxes.new_tensor([size[1], size[0]]).repeat(2)
    cut = torch.minimum(boxes.clamp(min=0), limit)
    sides = cut[:, 2:] - cut[:, :2]
    before = boxes if whole is None else whole
    area = (before[:, 2:] - before[:, :2]).prod(dim=1)
    visible_enough = sides.prod(dim=1) >= min_visible * area
    return cut, visible_enough & (sides >= 1).all(dim=1)


def pad(image: Tensor, size: int | tuple[int, int], *, fill: int = 0) -> Tensor:
    """Pad (C, h, w) below and on the right to (C, *size); a single number gives a square."""
    height, width = (size, size) if isinstance(size, int) else size
    added = (0, width - image.shape[2], 0, height - image.shape[1])
    return torch.nn.functional.pad(image, added, value=fill)


def _draw_window(
    random: np.random.Generator, size: tuple[int, int], part: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Sample a window of size `part` at a random position: top, left, height and width."""
    top = int(random.integers(size[0] - part[0] + 1))
    left = int(random.integers(size[1] - part[1] + 1))
    return top, left, *part


def _translation(right: float, down: float) -> Matrix:
    return np.array([[1, 0, right], [0, 1, down], [0, 0, 1]], dtype=np.float64)
