"""A feature pyramid on any trunk, or a single map, with anchors.

Level L has a stride of 2**L pixels, as in the literature, e.g. P2 has a stride of 4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import (
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from kd.errors import UserError, at_least
from kd.nn.detectors.contract import Level
from kd.nn.trunk import FreezableOptions
from kd.nn.trunk_base import Trunk


class Pyramid(nn.Module):
    """A trunk with torchvision's feature pyramid on the trunk's last maps.

    The modules are named as in torchvision, so that its weight files can be loaded.

    Attributes:
        out_channels: Channels of every map.
        strides: Pixels per cell of each map, finest first.
        own: Number of maps that come from the trunk, named "0", "1", ...; up to two coarser maps
            follow.
    """

    def __init__(self, trunk: Trunk, own: int, extra: int, channels: int) -> None:
        super().__init__()
        self.body, self.own, self.out_channels = trunk, own, channels
        block = None
        if extra:
            block = LastLevelMaxPool() if extra == 1 else LastLevelP6P7(channels, channels)
        self.fpn = FeaturePyramidNetwork(list(trunk.level_channels[-own:]), channels, block)
        coarsest = trunk.level_strides[-1]
        self.strides = (
            *trunk.level_strides[-own:],
            *(coarsest << number for number in range(1, extra + 1)),
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (N, 3, H, W) to maps (N, channels, H/stride, W/stride), by name."""
        maps = self.body.forward_levels(images)[-self.own :]
        named = OrderedDict((str(number), one) for number, one in enumerate(maps))
        merged: dict[str, Tensor] = self.fpn(named)
        return merged


class FixedAnchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors at fixed strides, in float32.

    torchvision infers strides from image and map sizes, which is wrong unless the sides are
    multiples of the stride, and uses the map's dtype, although bfloat16 cannot resolve single
    pixels.
    """

    def __init__(
        self, sizes: Sequence[Sequence[int]], ratios: Sequence[float], strides: Sequence[int]
    ) -> None:
        super().__init__(tuple(tuple(one) for one in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Compute the anchors (P, 4) of all levels, as one shared tensor for each image."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [one.shape[-2:] for one in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(side, side) for side in self.strides]))
        return [anchors] * len(image_list.image_sizes)

    def levels(self) -> tuple[Level, ...]:
        """Return stride and anchor sides of each level; torchvision rounds sides to even pixels."""
        return tuple(
            Level(stride, tuple((x2 - x1, y2 - y1) for x1, y1, x2, y2 in cell.tolist()), 0.0)
            for stride, cell in zip(self.strides, self.cell_anchors, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class PyramidOptions(FreezableOptions):
    """Options of all detectors on a pyramid.

    Attributes:
        levels: Consecutive levels of the pyramid, finest first; `[4]` is a single map of stride 16.
            One or two levels may be coarser than all maps of the trunk. One such level is
            sub-sampled from the last map, as in torchvision's Faster R-CNN; two are computed by
            strided convolutions, as in its RetinaNet.
        channels: Channels of every map of the pyramid.
        least_score: Detections of a lower score are dropped.
        overlap: IoU above which the worse of two detections of a class is suppressed.
        top: Number of detections per image, K.
    """

    trunk: str = "resnet50"
    levels: Sequence[int] = (2, 3, 4, 5)
    channels: int = 256
    least_score: float = 0.05
    overlap: float = 0.5
    top: int = 100


def build_pyramid(
    what: str, num_classes: int, options: PyramidOptions, **least: tuple[float, float]
) -> Pyramid:
    """Build the pyramid of a detector, without the trunk's steps beyond the coarsest level.

    `what` is the detector's name in error messages. `least` holds further options to check, each
    with its smallest allowed value, see `at_least`.
    """
    levels = options.levels
    at_least(
        what, num_classes=(num_classes, 1), channels=(options.channels, 1), top=(options.top, 1),
        **least,
    )  # fmt: skip
    if not levels or list(levels) != list(range(levels[0], levels[0] + len(levels))):
        raise UserError(f"{what}: levels must be consecutive, got {list(levels)}")
    trunk = options.build()
    strides = [1 << max(level, 0) for level in levels]
    own = [stride for stride in strides if stride in trunk.level_strides]
    extra = len(strides) - len(own)
    if own != strides[: len(own)] or not own or extra > 2:
        known = ", ".join(str(stride.bit_length() - 1) for stride in trunk.level_strides)
        raise UserError(
            f"{what}: {options.trunk} cannot give levels {list(levels)}: it has levels {known}, "
            "and one or two more can be added after the last"
        )
    if trunk.level_strides[-1] > own[-1]:
        trunk.cut(trunk.last_step(own[-1]))
    options.freeze(trunk)
    return Pyramid(trunk, len(own), extra, options.channels)


def anchors_of(
    what: str, strides: Sequence[int], *, scales: Sequence[float], ratios: Sequence[float]
) -> FixedAnchors:
    """Build anchors whose sides are proportional to the strides of the levels.

    Args:
        what: Name of the detector, the prefix of error messages.
        strides: Strides of the levels.
        scales: Sides of the square anchors, in strides; sides are rounded down to pixels.
        ratios: Height divided by width of the anchors, which does not change their area.
    """
    for name, values in (("scales", scales), ("ratios", ratios)):
        if not values or min(values) <= 0:
            raise UserError(f"{what}: {name} must be above 0 each, got {list(values)}")
    sizes = [[int(scale * stride) for scale in scales] for stride in strides]
    anchors = FixedAnchors(sizes, ratios, strides)
    if any(0.0 in side for level in anchors.levels() for side in level.sides):
        raise UserError(
            f"{what}: at a stride of {min(strides)}, scales {list(scales)} and ratios "
            f"{list(ratios)} give anchors that round to no area; make the scales larger"
        )
    return anchors
