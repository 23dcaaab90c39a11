"""Parts of Faster R-CNN's second stage that differ from torchvision's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.ops.poolers import LevelMapper, MultiScaleRoIAlign

from kd.nn.detectors.context import BoxContext
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


def said_of(
    heads: Any,
    context: BoxContext | None,
    maps: Mapping[str, Tensor],
    boxes: list[Tensor],
    extents: Tensor | None,
) -> dict[str, Tensor]:
    """What the second stage says of each image's boxes, end to end.

    Args:
        heads: torchvision's.
        context: What reads their surroundings.
        maps: Of the pyramid, by name.
        boxes: (R, 4) of each image.
        extents: Width and height of each picture, (N, 2), for the context head.

    Returns:
        `object_logits` (R, C+1), with a context head both experts', and `object_deltas`
        (R, 4 (C+1)).
    """
    # The pool knows its scales; torchvision has use for sizes only to guess them.
    regions = heads.box_roi_pool(dict(maps), boxes, [])
    logits, deltas = heads.box_predictor(heads.box_head(regions))
    said = {"object_logits": logits, "object_deltas": deltas}
    if context is None or extents is None:
        return said
    counts = [len(own) for own in boxes]
    image_of = torch.arange(len(boxes)).repeat_interleave(torch.tensor(counts))
    image_of = image_of.to(extents.device, non_blocking=True)
    around = context(list(maps.values()), torch.cat(boxes), image_of, extents)
    return {**said, "object_logits": context.joined(logits, around)}


def region_losses(
    said: Mapping[str, Tensor], labels: Sequence[Tensor], offsets: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Of the sampled regions, as torchvision has them: labels 0 for the background."""
    logits, deltas = said["object_logits"], said["object_deltas"]
    classes, boxes = fastrcnn_loss(logits, deltas, list(labels), list(offsets))
    return {"loss.classes": classes, "loss.boxes": boxes}


def regions_found(
    heads: Any,
    said: Mapping[str, Tensor],
    proposals: list[Tensor],
    sizes: list[tuple[int, int]],
) -> list[dict[str, Tensor]]:
    """Boxes, scores and labels of each image, the best first, as torchvision's own would be."""
    logits, deltas = said["object_logits"], said["object_deltas"]
    found = heads.postprocess_detections(logits, deltas, proposals, sizes)
    kinds = ("boxes", "scores", "labels")
    return [dict(zip(kinds, one, strict=True)) for one in zip(*found, strict=True)]
