"""A head that predicts the class of an object from the surroundings of its box."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.nn.regions import GEOMETRY, box_geometry, rings_within
from kd.nn.trunk_base import wide

_LEAST = 1e-2  # smallest area in cells over which surroundings are averaged


def box_sums(features: Tensor, boxes: Tensor, image_of: Tensor) -> Tensor:
    """Sum a feature map over each box, with cells weighted by the fraction that the box covers.

    The sums are exact. They are computed from a summed-area table, with 16 look-ups per box.

    Args:
        features: (N, D, h, w).
        boxes: (K, 4) xyxy in cells, within the map.
        image_of: Index of the image that contains each box, (K,).

    Returns:
        (K, D), in float32, or float64 if the features are.
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
    """Compute indices (K, 4) and weights (K, 4) that integrate from `low` to `high`.

    The weighted sum of the entries of a cumulative sum that begins with 0 is the integral.
    """
    low, high = low.clamp(0, count), high.clamp(0, count)
    first, last = (end.floor().clamp(max=count - 1) for end in (low, high))
    entries = torch.stack([first, first + 1, last, last + 1], dim=1).long()
    low, high = low - first, high - last
    return entries, torch.stack([low - 1, -low, 1 - high, high], dim=1)


class Around(nn.Module):
    """Average the maps of a pyramid over a ring around each box and over the image without the box.

    Cells inside the box are excluded, but the receptive field of other cells may reach into the
    box.

    Args:
        channels: Channels of every map.
        strides: Pixels per cell of each map to average.
        margin: Thickness of the ring, as a fraction of the box's width and height.

    Attributes:
        width: Length of the output vector of a box.
    """

    def __init__(self, channels: int, strides: Sequence[int], *, margin: float) -> None:
        super().__init__()
        self.strides, self.margin = tuple(strides), margin
        self.width = 2 * channels * len(self.strides) + GEOMETRY

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Compute the means over the surroundings of each box, and the box's position and size.

        Args:
            maps: Feature maps (N, D, h, w), finest first. Maps beyond the number of strides are not
                used.
            boxes: (K, 4) xyxy pixels.
            image_of: Index of the image that contains each box, (K,).
            extents: Width and height of each image without padding, (N, 2).

        Returns:
            (K, width), in float32, or float64 if the features are. Means over an empty area are 0.
        """
        ends = extents[image_of].to(boxes.dtype).repeat(1, 2)  # (K, 4)
        boxes, ring = rings_within(boxes.detach(), ends[:, 2:], self.margin)
        scene = torch.cat([torch.zeros_like(ends[:, 2:]), ends[:, 2:]], dim=1)
        regions = torch.cat([boxes, ring, scene])
        read = []
        for features, stride in zip(maps[: len(self.strides)], self.strides, strict=True):
            sums = box_sums(features, regions / stride, image_of.repeat(3))
            areas = (regions[:, 2:] - regions[:, :2]).prod(dim=1, keepdim=True) / stride**2
            (inner, *outer), (hole, *whole) = (one.unflatten(0, (3, -1)) for one in (sums, areas))
            for total, area in zip(outer, whole, strict=True):
                left = area - hole
                mean = (total - inner) / left.clamp(min=_LEAST)
                read.append(mean.masked_fill(left < _LEAST, 0.0))
        known = box_geometry(boxes / ends.clamp(min=1.0))
        return torch.cat([*read, known.to(read[0].dtype)], dim=1)


class BoxContext(nn.Module):
    """Predict classes from the surroundings of boxes, and combine them with a detector's logits.

    Let l be the detector's logits for a region, and q the class distribution predicted from the
    surroundings. The combined logit of class y is `l_y + a (log q_y - log prior_y)`, and the
    background logit does not change. An object that fits its surroundings thus gets a higher score.
    This follows from Bayes' rule if the surroundings and the appearance are independent given the
    class, and the surroundings do not indicate whether there is an object. `kd.rescore` applies the
    same rule to a trained detector; here `a` is learned.

    Args:
        channels: Channels of every map of the pyramid.
        strides: Pixels per cell of each map.
        log_prior: Logarithms of the class frequencies, (C,).
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
        # Layer norm, because proposals and ground-truth boxes come in separate batches, whose batch
        # statistics would differ.
        self.layers = nn.Sequential(
            nn.LayerNorm(around.width), nn.Linear(around.width, hidden), nn.ReLU(), last
        )
        self.register_buffer("log_prior", log_prior)
        self.strength = nn.Parameter(torch.tensor(float(strength)))

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Compute float32 class logits (K, C) of boxes; same arguments as `Around.forward`."""
        return wide(self.layers(self.around(maps, boxes, image_of, extents)))

    def joined(self, logits: Tensor, context: Tensor) -> Tensor:
        """Combine region logits (K, 1 + C), background first, with context logits (K, C)."""
        moved = F.log_softmax(context, dim=1) - self.log_prior
        return logits + F.pad(self.strength * moved, (1, 0))
