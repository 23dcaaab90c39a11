"""What a detector makes of the surroundings of a box: a second expert on its class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd.errors import UserError
from kd.nn.detectors.contract import wide
from kd.nn.regions import GEOMETRY, box_geometry, rings_within

_LEAST = 1e-2  # places; of less than that there is nothing to read


def box_sums(features: Tensor, boxes: Tensor, image_of: Tensor) -> Tensor:
    """Sums of a map over boxes, a place counting by the share of it that a box covers.

    From a table of sums up to each place: between places such a table is bilinear, so that this is
    exact. A box costs 16 look-ups, whatever its size.

    Args:
        features: (N, D, h, w).
        boxes: (K, 4) xyxy, in places; within the map.
        image_of: The image of each box, (K,).

    Returns:
        (K, D), float32 at least.
    """
    depth, height, width = features.shape[1:]
    table = F.pad(wide(features).cumsum(dim=2).cumsum(dim=3), (1, 0, 1, 0))  # (N, D, h+1, w+1)
    rows = table.permute(0, 2, 3, 1).reshape(-1, depth)
    x, share_x = _ends(boxes[:, 0], boxes[:, 2], width)  # (K, 4) both
    y, share_y = _ends(boxes[:, 1], boxes[:, 3], height)
    places = (image_of[:, None, None] * (height + 1) + y[:, :, None]) * (width + 1) + x[:, None, :]
    shares = (share_y[:, :, None] * share_x[:, None, :]).to(rows.dtype)
    return F.embedding_bag(
        places.flatten(1), rows, per_sample_weights=shares.flatten(1), mode="sum"
    )


def _ends(low: Tensor, high: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The four entries of a line's table that the sum from low to high is made of, with weights."""
    low, high = low.clamp(0, count), high.clamp(0, count)
    first, last = (end.floor().clamp(max=count - 1) for end in (low, high))
    entries = torch.stack([first, first + 1, last, last + 1], dim=1).long()
    low, high = low - first, high - last
    return entries, torch.stack([low - 1, -low, 1 - high, high], dim=1)


class Around(nn.Module):
    """Means of a pyramid's maps over a ring around each box and over the scene without it.

    Nothing at a place that a box covers is read for it. What a place around it was computed from
    may still reach into the box, as far as the trunk's convolutions look.

    Args:
        channels: Of every map.
        strides: Pixels per place of each map.
        margin: Thickness of the ring, as a share of the box's width and height.

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
        """Read what is around each box.

        Args:
            maps: (N, D, h, w) each; those beyond its strides are not read.
            boxes: (K, 4) xyxy pixels.
            image_of: The image of each box, (K,).
            extents: Width and height of each picture inside its padding, (N, 2).

        Returns:
            (K, width), float32 at least; 0 where there is nothing around.
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
        known = box_geometry(boxes / ends.clamp(min=1.0), (1, 1))
        return torch.cat([*read, known.to(read[0].dtype)], dim=1)


class BoxContext(nn.Module):
    """Class logits from what is around boxes, and how they join those from what is in them.

    The two are experts whose opinions multiply. Let l be the logits of a region, background first,
    and q what the surroundings say of an object here. Where the surroundings tell nothing of
    *whether* there is an object, and given the class look and surroundings are independent,

        p(y | region, scene) ~ p(y | region) * (q_y / prior_y)^a    for a class y
        p(background | region, scene) ~ p(background | region)

    that is, `l_y + a (log q_y - log prior_y)`, and the background's logit as it is. Classes compete
    by the evidence for each, and so does the background: what does not fit where it is seen is an
    object with less certainty, what fits with more. That is what `kd.rescore` does with the scores
    of a finished detector; `a` is learned here.

    Args:
        around: What is read.
        log_prior: Logarithms of the classes' shares, (C,).
        hidden: Width of the layer in between.
        strength: a to begin with.
    """

    log_prior: Tensor

    def __init__(self, around: Around, log_prior: Tensor, *, hidden: int, strength: float) -> None:
        super().__init__()
        self.around = around
        last = nn.Linear(hidden, len(log_prior))
        # It starts out as the prior: surroundings that say nothing change nothing.
        nn.init.normal_(last.weight, std=1e-3)
        with torch.no_grad():
            last.bias.copy_(log_prior)
        # Norms of a row, not of a batch: proposals and true boxes are asked about in turn.
        self.layers = nn.Sequential(
            nn.LayerNorm(around.width), nn.Linear(around.width, hidden), nn.ReLU(), last
        )
        self.register_buffer("log_prior", log_prior)
        self.strength = nn.Parameter(torch.tensor(float(strength)))

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Arguments as of `Around` to logits (K, C), in float32 whatever autocast says."""
        return wide(self.layers(self.around(maps, boxes, image_of, extents)))

    def joined(self, logits: Tensor, context: Tensor) -> Tensor:
        """Both experts' logits, background first, (K, 1 + C), from (K, 1 + C) and (K, C)."""
        moved = F.log_softmax(context, dim=1) - self.log_prior
        return logits + F.pad(self.strength * moved, (1, 0))


def box_context(
    what: str,
    *,
    channels: int,
    strides: Sequence[int],
    num_classes: int,
    prior: Sequence[float] | None,
    hidden: int,
    margin: float,
    strength: float,
) -> BoxContext:
    """A context head for a detector.

    Args:
        what: Whose it is, for messages.
        channels: Of the maps.
        strides: Of the maps.
        num_classes: C.
        prior: Share of each class among the objects; equal ones where not given.
        hidden: Width of its layer.
        margin: Thickness of the ring, as a share of the box's sides.
        strength: Weight of its evidence to begin with.

    Raises:
        UserError: An option out of range.
    """
    if hidden < 1 or margin <= 0:
        raise UserError(
            f"{what}: context_hidden must be 1 or more and context_margin above 0, got {hidden} "
            f"and {margin}"
        )
    shares = torch.as_tensor([1.0] * num_classes if prior is None else list(prior))
    if shares.shape != (num_classes,) or not bool((shares > 0).all()):
        raise UserError(f"{what}: prior must hold {num_classes} shares above 0, got {prior}")
    around = Around(channels, strides, margin=margin)
    log_prior = (shares.float() / shares.sum()).log()
    return BoxContext(around, log_prior, hidden=hidden, strength=strength)
