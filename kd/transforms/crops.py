"""Random crops of images and their label maps at random scales, and flips of whole images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from kd.errors import UserError
from kd.registry import check_options
from kd.transforms.augment import ColourChange, check_fractions, pad
from kd.utils.images import VOID


@dataclass(frozen=True, kw_only=True)
class Crop:
    """Sampled crop of one image."""

    window: tuple[int, int, int, int]  # top, left, height, width in pixels of the image file
    size: tuple[int, int]  # height and width to which the crop is scaled; the frame is padded
    flip: bool = False  # mirror left and right
    upside_down: bool = False  # mirror top and bottom
    colour: ColourChange | None = None

    def image(self, pixels: Tensor, frame: tuple[int, int]) -> Tensor:
        """Crop, scale, recolour and mirror an image (3, H, W) uint8; pad with 0 to (3, *frame)."""
        part = F.resized_crop(pixels, *self.window, size=list(self.size), antialias=True)
        part = part if self.colour is None else self.colour(part)
        return self.placed(part, frame)

    def label_map(self, labels: Tensor, frame: tuple[int, int]) -> Tensor:
        """Crop, scale (nearest), mirror and pad a label map (H, W) uint8; the padding is `VOID`."""
        nearest = InterpolationMode.NEAREST_EXACT
        part = F.resized_crop(labels[None], *self.window, list(self.size), interpolation=nearest)
        return self.placed(part, frame, fill=VOID)[0]

    def placed(self, part: Tensor, frame: tuple[int, int], *, fill: int = 0) -> Tensor:
        """Mirror a crop that is already scaled, (C, *size), and pad it with `fill` to the frame."""
        part = F.horizontal_flip(part) if self.flip else part
        part = F.vertical_flip(part) if self.upside_down else part
        return pad(part, frame, fill=fill)

    def sources(self) -> NDArray[np.float64]:
        """Affine map (2, 3) from (x, y, 1) in the frame to (x, y) in the image file."""
        top, left, height, width = self.window
        across, down = width / self.size[1], height / self.size[0]
        row = [0.0, -down, top + height] if self.upside_down else [0.0, down, top]
        if self.flip:
            return np.array([[-across, 0.0, left + width], row])
        return np.array([[across, 0.0, left], row])

    def of_mirrored(self, size: tuple[int, int]) -> Crop:
        """Return the crop that gives the same result on the mirrored image of `size`."""
        top, left, height, width = self.window
        return replace(self, flip=False, window=(top, size[1] - left - width, height, width))


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Distribution of training crops; the defaults are those of structured distillation.

    `scale` is the range of scales relative to the working size. `flip` is the probability of
    mirroring left and right. `jitter` is the probability of multiplying brightness, contrast and
    saturation by factors in 1 +- `max_jitter`.
    """

    scale: tuple[float, float] = (0.5, 2.1)
    flip: float = 0.5
    jitter: float = 0.5
    max_jitter: float = 0.3

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"augment.scale: got {self.scale}, expected 0 < smallest <= largest")
        check_fractions(self, ("flip", "jitter", "max_jitter"))

    def draw(
        self,
        random: np.random.Generator,
        size: tuple[int, int],
        frame: tuple[int, int],
        *,
        factor: float = 1.0,
    ) -> Crop:
        """Sample a crop of an image file of `size` to fill `frame`, both (height, width).

        `factor` is the working size divided by the size of the file; it multiplies every scale.
        """
        scale = factor * random.uniform(*self.scale)
        places = random.random(2).tolist()
        flip, jitter = (random.random(2) < (self.flip, self.jitter)).tolist()
        colour = _random_colour(random, self.max_jitter)
        sides = [min(side, max(1, round(to / scale))) for side, to in zip(size, frame, strict=True)]
        starts = [
            round(place * (side - part))
            for place, side, part in zip(places, size, sides, strict=True)
        ]
        # If the crop is smaller than the image, it must fill the frame: without this, rounding
        # could leave a line of padding.
        scaled = [
            to if part < side else min(to, max(1, round(part * scale)))
            for side, part, to in zip(size, sides, frame, strict=True)
        ]
        return Crop(
            window=(starts[0], starts[1], sides[0], sides[1]),
            size=(scaled[0], scaled[1]),
            flip=flip,
            colour=colour if jitter else None,
        )


@dataclass(frozen=True, kw_only=True)
class Flips:
    """Distribution of flips of whole images; the defaults are those of saliency students.

    `flip` and `upside_down` are the probabilities of mirroring left-right and top-bottom. For
    `jitter` and `max_jitter` see `Crops`.
    """

    flip: float = 0.5
    upside_down: float = 0.5
    jitter: float = 0.0
    max_jitter: float = 0.3

    def __post_init__(self) -> None:
        check_fractions(self, ("flip", "upside_down", "jitter", "max_jitter"))

    def draw(
        self, random: np.random.Generator, size: tuple[int, int], scaled: tuple[int, int]
    ) -> Crop:
        """Sample flips and colour changes of an image of `size` that is resized to `scaled`."""
        chances = (self.flip, self.upside_down, self.jitter)
        flip, upside_down, jitter = (random.random(3) < chances).tolist()
        colour = _random_colour(random, self.max_jitter)
        return Crop(
            window=(0, 0, *size), size=scaled, flip=flip, upside_down=upside_down,
            colour=colour if jitter else None,
        )  # fmt: skip


def _random_colour(random: np.random.Generator, most: float) -> ColourChange:
    changes = random.uniform(1 - most, 1 + most, 3).tolist()
    names = ("brightness", "contrast", "saturation")
    return ColourChange(**dict(zip(names, changes, strict=True)))


def build_crops(options: dict[str, Any] | None) -> Crops:
    """Build the distribution of crops from its options; None gives scale 1 and no changes."""
    options = {"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0} if options is None else options
    check_options(Crops, options, what="augment")
    return Crops(**options)


def build_flips(options: dict[str, Any] | None) -> Flips:
    """Build the distribution of flips from its options; None gives no changes."""
    options = {"flip": 0.0, "upside_down": 0.0} if options is None else options
    check_options(Flips, options, what="augment")
    return Flips(**options)
