"""Class logits of a detector from the surroundings of a box, as a second expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.nn.regions import GEOMETRY, box_geometry, rings_within
from kd.nn.trunk_base import wide

_LEAST = 1e-2  # smallest area of surroundings that is read, cells


def box_sums(features: Tensor, boxes: Tensor, image_of: Tensor) -> Tensor:
    """Sums of a map over boxes, each cell weighted by the fraction of it that a box covers.

    Uses a summed-area table, interpolated bilinearly within cells, so the result is exact. A box
    costs 16 look-ups, whatever its size.

    Args:
        features: (N, D, h, w).
        boxes: (K, 4) xyxy in cells, within the map.
        image_of: The image of each box, (K,).

    Returns:
        (K, D), float32 at least.
    """
    depth, height, width = features.shape[1:]
    table = F.pad(wide(features).cumsum(dim=2).cumsum(dim=3), (1, 0, 1, 0))  # (N, D, h+1, w+1)
    rows = table.permute(0, 2, 3, 1).reshape(-1, depth)
    x, weight_x = _ends(boxes[:, 0], boxes[:, 2], width)  # (K, 4) both
    y, weight_y = _ends(boxes[:, 1], boxes[:, 3], height)
    places = (image_of[:, None, None] * (height + 1) + y[:, :, None]) * (width + 1) + x[:, None, :]
    weights = (weight_y[:, :, None] * weight_x[:, None, :]).to(rows.dtype)
    return F.embedding_bag(
        places.flatten(1), rows, per_sample_weights=weights.flatten(1), mode="sum"
    )


def _ends(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The four entries of a cumulative sum, with weights, that give the sum from low to high."""
    low, high = low.clamp(0, count), high.clamp(0, count)
    first, last = (end.floor().clamp(max=count - 1) for end in (low, high))
    entries = torch.stack([first, first + 1, last, last + 1], dim=1).long()
    low, high = low - first, high - last
    return entries, torch.stack([low - 1, -low, 1 - high, high], dim=1)


class Around(nn.Module):
    """Means of a pyramid's maps over a ring around each box and over the scene without the box.

    Cells that a box covers are not read, but the receptive field of cells around it may reach into
    the box.

    Args:
        channels: Channels of every map.
        strides: Pixels per cell of each map.
        margin: Thickness of the ring, as a fraction of the box's width and height.

    Attributes:
        width: Length of the output.
    """

    def __init__(self, channels: int, strides: Sequence[int], *, margin: float) -> None:
        super().__init__()
        self.strides, self.margin = tuple(strides), margin
        self.width = 2 * channels * len(self.strides) + GEOMETRY

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Read the surroundings of each box.

        Args:
            maps: (N, D, h, w) each; those beyond `strides` are not read.
            boxes: (K, 4) xyxy pixels.
            image_of: The image of each box, (K,).
            extents: Width and height of each image without padding, (N, 2).

        Returns:
            (K, width), float32 at least; 0 if nothing surrounds the box.
        """
        ends = extents[image_of].to(boxes.dtype).repeat(1, 2)  # (K, 4)
        boxes, ring = rings_within(boxes.detach(), ends[:, 2:], self.margin)
        scene = torch.cat([torch.zeros_like(ends[:, 2:]), ends[:, 2:]], dim=1)
        regions = torch.cat([boxes, ring, scene])
        read = []
        for features, stride in zip(maps[: len(self.strides)], self.strides, strict=True):
            sums = box_sums(features, regions / stride, image_of.repeat(3))
            areas = (regions[:, 2:] - regions[:, :2]).prod(dim=1, keepdim=True) / stride**2
            (inner, *outer), (hole, *whole) = sums.chunk(3), areas.chunk(3)
            for total, area in zip(outer, whole, strict=True):
                left = area - hole
                mean = (total - inner) / left.clamp(min=_LEAST)
                read.append(mean.masked_fill(left < _LEAST, 0.0))
        known = box_geometry(boxes / ends.clamp(min=1.0))
        return torch.cat([*read, known.to(read[0].dtype)], dim=1)


class BoxContext(nn.Module):
    """Class logits from the surroundings of boxes, combined with those of the boxes themselves.

    Let l be the logits of a region, background first, and q the class distribution given the
    surroundings of an object. If the surroundings are no evidence *whether* there is an object, and
    appearance and surroundings are independent given the class,

        p(y | region, scene) ~ p(y | region) * (q_y / prior_y)^a    for a class y
        p(background | region, scene) ~ p(background | region)

    that is, `l_y + a (log q_y - log prior_y)`, with the background's logit unchanged: an object
    that does not fit its surroundings becomes less certain, one that fits more certain.
    `kd.rescore` does the same with the scores of a trained detector; here `a` is learned.

    Args:
        channels: Channels of every map of the pyramid.
        strides: Pixels per cell of each map.
        log_prior: Logarithms of the classes' frequencies, (C,).
        hidden: Width of the hidden layer.
        margin: Thickness of the ring, as a fraction of the box's width and height.
        strength: Initial value of a.
    """

    log_prior: Tensor

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        log_prior: Tensor,
        *,
        hidden: int,
        margin: float,
        strength: float,
    ) -> None:
        super().__init__()
        self.around = around = Around(channels, strides, margin=margin)
        last = nn.Linear(hidden, len(log_prior))
        # The initial output is the prior, which leaves the detector's logits unchanged.
        nn.init.normal_(last.weight, std=1e-3)
        with torch.no_grad():
            last.bias.copy_(log_prior)
        # Not batch norm: proposals and ground-truth boxes come in separate batches.
        self.layers = nn.Sequential(
            nn.LayerNorm(around.width), nn.Linear(around.width, hidden), nn.ReLU(), last
        )
        self.register_buffer("log_prior", log_prior)
        self.strength = nn.Parameter(torch.tensor(float(strength)))

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Arguments of `Around` to logits (K, C), float32 also under autocast."""
        return wide(self.layers(self.around(maps, boxes, image_of, extents)))

    def joined(self, logits: Tensor, context: Tensor) -> Tensor:
        """Combine region logits (K, 1 + C), background first, with context logits (K, C)."""
        moved = F.log_softmax(context, dim=1) - self.log_prior
        return logits + F.pad(self.strength * moved, (1, 0))
