"""Parts of Faster R-CNN's second stage that differ from torchvision's own."""

from __future__ import annotations

from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from kd.nn.detectors.contract import wide
from kd.nn.detectors.pyramid import Pyramid

CANONICAL_LEVEL = 4  # the level of a region of `canonical` pixels


class WidePredictor(FastRCNNPredictor):  # type: ignore[misc]
    """torchvision's last layers, their numbers in float32 whatever autocast says."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features of regions (R, D) to class logits (R, K) and box deltas (R, 4 K)."""
        logits, deltas = super().forward(x)
        return wide(logits), wide(deltas)


def region_pool(pyramid: Pyramid, size: int, canonical: float) -> MultiScaleRoIAlign:
    """Pools from the trunk's own levels, and is told their scales.

    torchvision guesses them from the first batch's pictures without padding: of wide pictures in
    square frames it would take half of what they are, for good.
    """
    pool = MultiScaleRoIAlign([str(level) for level in range(pyramid.own)], size, sampling_ratio=2)
    strides = pyramid.strides[: pyramid.own]
    pool.scales = [1 / stride for stride in strides]
    first, last = (strides[place].bit_length() - 1 for place in (0, -1))
    pool.map_levels = LevelMapper(first, last, canonical, CANONICAL_LEVEL)
    return pool
