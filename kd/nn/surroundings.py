"""What is around an object, read from feature maps of one or more strides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.data.hide import IMAGENET_MEAN, IMAGENET_STD
from kd.nn.regions import GEOMETRY, box_geometry, coverage, masked_pool, rings_within

# What a black pixel is after normalisation.
BLACK = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))


class Surroundings(nn.Module):
    """Pools rings around a box, the scene without it, its inside, and where it is.

    Args:
        channels: Of each map.
        strides: Pixels per place of each map.
        margins: Thickness of each ring, as a share of the box's width and height.
        min_ring: Smallest thickness of a ring, pixels.
        scene: Whether the whole picture outside the box is pooled.
        inside: Whether the box itself is pooled: for a teacher, what the trunk makes of the hole.
        geometry: Whether the box's place and size are given.

    Attributes:
        width: Length of the output.
    """

    scale: Tensor

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        margins: Sequence[float] = (0.5,),
        min_ring: float = 0.0,
        scene: bool = True,
        inside: bool = False,
        geometry: bool = True,
    ) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.strides, self.margins, self.min_ring = tuple(strides), tuple(margins), min_ring
        self.scene, self.inside, self.geometry = scene, inside, geometry
        pooled = sum(channels) * (len(self.margins) + scene + inside)
        # Trunks differ in the scale of their features by orders of magnitude, and within a map a
        # few channels do; each is brought to its own mean and deviation.
        self.norm = nn.BatchNorm1d(pooled, affine=False)
        # Each block of numbers has one unit of power, whatever its length: a map of 1280 channels
        # does not drown one of 96, and one rate and one decay suit any trunk.
        counts = [c for c in channels for _ in range(len(self.margins) + scene + inside)]
        self.register_buffer("scale", torch.tensor([c**-0.5 for c in counts for _ in range(c)]))
        self.width = pooled + (GEOMETRY if geometry else 0)

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Read what is around each box.

        Args:
            maps: (N, C, h, w) each.
            boxes: (K, 4) xyxy pixels.
            image_of: The image of each box, (K,).
            extents: Width and height of each picture inside its padding, (N, 2).

        Returns:
            (K, width).
        """
        ends = extents[image_of].to(boxes.dtype)  # (K, 2)
        picture = torch.cat([torch.zeros_like(ends), ends], dim=1)
        rings = [
            rings_within(boxes, ends, margin, least=self.min_ring)[1] for margin in self.margins
        ]
        boxes = rings_within(boxes, ends, 0.0)[0]
        pooled = []
        for features, stride in zip(maps, self.strides, strict=True):
            grid = (features.shape[2], features.shape[3])
            box = coverage(boxes, grid, stride)
            whole = coverage(picture, grid, stride)
            weights = [(coverage(ring, grid, stride) - box).clamp(min=0.0) for ring in rings]
            weights += [(whole - box).clamp(min=0.0)] if self.scene else []
            weights += [box] if self.inside else []
            # Around a box over the whole picture there is nothing: it falls back to the picture,
            # with a weight that is lost in rounding anywhere else.
            bags = torch.cat([weight + 1e-12 * whole for weight in weights])
            rows = masked_pool(features, bags, image_of.repeat(len(weights)))
            by_bag = rows.unflatten(0, (len(weights), len(boxes)))
            pooled.append(by_bag.transpose(0, 1).flatten(1))
        read = standardised(self.norm, torch.cat(pooled, dim=1)) * self.scale
        if self.geometry:
            read = torch.cat([read, self._geometry(boxes, ends)], dim=1)
        return read

    def _geometry(self, boxes: Tensor, ends: Tensor) -> Tensor:
        scaled = boxes / ends.repeat(1, 2)
        return box_geometry(scaled, (1, 1)) / math.sqrt(GEOMETRY)


def picture_extents(images: Tensor, padding: Sequence[float] = BLACK) -> Tensor:
    """Width and height of each picture inside the padding at its right and lower edge.

    Args:
        images: Normalised, (N, 3, H, W).
        padding: What its pixels are, black unless told otherwise.

    Returns:
        (N, 2), 1 or above.
    """
    black = images.new_tensor(padding).view(1, 3, 1, 1)
    drawn = ((images - black).abs() > 1e-3).any(dim=1)  # (N, H, W)
    columns, rows = drawn.any(dim=1), drawn.any(dim=2)
    last = [side.shape[1] - side.flip(1).to(torch.uint8).argmax(dim=1) for side in (columns, rows)]
    return torch.stack(last, dim=1)


def standardised(norm: nn.BatchNorm1d, rows: Tensor) -> Tensor:
    """Rows at mean 0 and deviation 1, kept within 8 deviations.

    In training by the batch's own statistics, which the running ones follow. Fewer than two rows
    have no deviation: they take the running ones, as in evaluation, and leave them as they are.
    The running statistics are buffers: an averaged copy of the model averages them, and of several
    processes each trains on its own batch's and evaluates on rank 0's.

    Args:
        norm: Without weights of its own.
        rows: (K, C), in any type.

    Returns:
        (K, C) in the statistics' type, whatever autocast made of the rows.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    rows = rows.to(mean.dtype)
    if norm.training and len(rows) < 2:
        rows = nn.functional.batch_norm(rows, mean, variance, eps=norm.eps)
    else:
        rows = norm(rows)
    return rows.clamp(-8.0, 8.0)
