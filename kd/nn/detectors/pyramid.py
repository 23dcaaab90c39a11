"""A feature pyramid on any torchvision trunk, or a single map of it, and the anchors on it.

Level L has a stride of 2**L pixels, as papers number them: P2 has one of 4.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

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
from kd.nn.freeze import freeze_parts
from kd.nn.trunk import build_trunk
from kd.nn.trunk_base import Trunk


class Pyramid(nn.Module):
    """A trunk and torchvision's feature pyramid on its last maps, with torchvision's names.

    Attributes:
        out_channels: Of every map.
        strides: Pixels per place of each map, finest first.
        own: How many of the maps come from the trunk; their names are "0" and so on.
    """

    def __init__(self, trunk: Trunk, own: int, extra: int, channels: int) -> None:
        super().__init__()
        self.body, self.own, self.out_channels = trunk, own, channels
        blocks = {0: None, 1: LastLevelMaxPool, 2: lambda: LastLevelP6P7(channels, channels)}
        block = blocks[extra]
        self.fpn = FeaturePyramidNetwork(
            list(trunk.level_channels[-own:]), channels, block() if block is not None else None
        )
        coarsest = trunk.level_strides[-1]
        self.strides = (
            *trunk.level_strides[-own:],
            *(coarsest << number for number in range(1, extra + 1)),
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (N, 3, H, W) to maps (N, channels, H/stride, W/stride) by name, finest first."""
        maps = self.body.forward_levels(images)[-self.own :]
        named = OrderedDict((str(number), one) for number, one in enumerate(maps))
        merged: dict[str, Tensor] = self.fpn(named)
        return merged


class FixedAnchors(AnchorGenerator):  # type: ignore[misc]
    """torchvision's anchors at the strides that they are told, in float32.

    torchvision divides the picture by the map, which is the stride only of sides that it divides,
    and takes the map's type, in which bfloat16 has no pixels.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[int]],
        ratios: Sequence[float],
        strides: Sequence[int],
    ) -> None:
        super().__init__(tuple(tuple(one) for one in sizes), (tuple(ratios),) * len(sizes))
        self.strides = tuple(strides)

    def forward(self, image_list: ImageList, feature_maps: Sequence[Tensor]) -> list[Tensor]:
        """Anchors (P, 4) of each image, level after level; the same tensor for all images."""
        self.set_cell_anchors(torch.float32, feature_maps[0].device)
        grids = [one.shape[-2:] for one in feature_maps]
        anchors = torch.cat(self.grid_anchors(grids, [(side, side) for side in self.strides]))
        return [anchors] * len(image_list.image_sizes)

    def levels(self) -> tuple[Level, ...]:
        """The levels with their anchors' sides, which torchvision rounds to even pixels."""
        return tuple(
            Level(stride, tuple((x2 - x1, y2 - y1) for x1, y1, x2, y2 in cell.tolist()), 0.0)
            for stride, cell in zip(self.strides, self.cell_anchors, strict=True)
        )


def build_pyramid(
    what: str,
    *,
    trunk: str,
    weights: str | None,
    width: float,
    until: str | None,
    frozen: str | None,
    batch_norm_frozen: bool,
    levels: Sequence[int],
    channels: int,
) -> Pyramid:
    """A pyramid of some levels; what of the trunk is coarser than they are is cut off.

    Args:
        what: Whose it is, for messages.
        trunk: Name of the torchvision classifier.
        weights: Of the trunk: "imagenet", a file, or random ones.
        width: Share of the trunk's channels.
        until: Path of the trunk's last step that is kept.
        frozen: "all", or the path of the last step of the trunk that does not learn.
        batch_norm_frozen: Keep all the trunk's batch norms at their stored statistics.
        levels: One after the other, finest first. One or two may be coarser than the trunk: one is
            taken from the last by leaving out every other place, two are made by convolutions, as
            torchvision's Faster R-CNN and RetinaNet have it.
        channels: Of every map.

    Raises:
        UserError: Levels that the trunk does not have, an option out of range, or a trunk that
            cannot be built.
    """
    at_least(what, channels=(channels, 1))
    if not levels or list(levels) != list(range(levels[0], levels[0] + len(levels))):
        raise UserError(f"{what}: levels must be one after the other, got {list(levels)}")
    seen = build_trunk(trunk, weights=weights, width=width, until=until)
    strides = [1 << max(level, 0) for level in levels]
    own = [stride for stride in strides if stride in seen.level_strides]
    extra = len(strides) - len(own)
    if own != strides[: len(own)] or not own or extra > 2:
        had = ", ".join(str(stride.bit_length() - 1) for stride in seen.level_strides)
        raise UserError(
            f"{what}: levels {list(levels)} cannot be had of {trunk}: it has {had}, and one or two "
            "more can be added after the last"
        )
    if seen.level_strides[-1] > own[-1]:
        seen.cut(seen.last_step(own[-1]))
    freeze_parts(seen, frozen, batch_norm_frozen)
    return Pyramid(seen, len(own), extra, channels)


def anchors_of(
    what: str, strides: Sequence[int], *, scales: Sequence[float], ratios: Sequence[float]
) -> FixedAnchors:
    """Anchors whose sides follow the strides.

    Args:
        what: Whose they are, for messages.
        strides: Of the levels.
        scales: Sides of the square ones, in strides; rounded down to pixels.
        ratios: Height by width.

    Raises:
        UserError: Nothing, or something that is not above 0, or anchors without an area.
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
