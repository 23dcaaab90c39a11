"""Pooling of feature maps over objects and over what lies around them.

Boxes are xyxy in pixels of the image that the features came from; place (row, column) of a grid
covers the pixels `column * stride .. (column + 1) * stride`. A weight map gives each place the
share of its area that counts: exact for boxes, whose coverage is a share in x times one in y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from kd.transforms.hide import IMAGENET_MEAN, IMAGENET_STD

GEOMETRY = 8  # numbers of `box_geometry`


def roi_features(features: Tensor, rois: Tensor, stride: int, *, output_size: int = 1) -> Tensor:
    """Averages of a feature map over boxes, by bilinear sampling.

    RoIAlign: He et al., 2017, https://arxiv.org/abs/1703.06870.

    Args:
        features: (N, C, h, w).
        rois: (M, 5) as (image, x1, y1, x2, y2), pixels.
        stride: Pixels per place.
        output_size: Side of the grid that each box is divided into.

    Returns:
        (M, C, output_size, output_size), in the features' type.
    """
    # In full precision: bfloat16 cannot tell pixel 257 from 258.
    wide = features if features.dtype == torch.float64 else features.float()
    pooled: Tensor = roi_align(
        wide, rois.to(wide.dtype), output_size, spatial_scale=1 / stride, aligned=True
    )
    return pooled.to(features.dtype)


def crop_regions(images: Tensor, rois: Tensor, size: int, *, margin: float = 0.0) -> Tensor:
    """The boxes of images, widened to squares and by a margin, resampled to one size.

    Shapes keep their proportions: the square's side is the longer one of the box.

    Args:
        images: (N, C, H, W).
        rois: (M, 5) as (image, x1, y1, x2, y2), pixels.
        size: Side of a crop, pixels.
        margin: Share of the square's side added on each side.

    Returns:
        (M, C, size, size); what lies outside the image is 0.
    """
    centre = (rois[:, 1:3] + rois[:, 3:]) / 2
    longest = (rois[:, 3:] - rois[:, 1:3]).amax(dim=1, keepdim=True)
    reach = longest * (0.5 + margin)
    widened = torch.cat([rois[:, :1], centre - reach, centre + reach], dim=1)
    return roi_features(images, widened, 1, output_size=size)


def masked_pool(features: Tensor, weights: Tensor, image_of: Tensor) -> Tensor:
    """Weighted means of feature maps, several weight maps to an image.

    A weighted bag of places: no object gets a copy of its image's features, and the number of
    objects of an image does not matter (a padded batched product would have to read it back from
    the device). Two to eight times as fast as gathering the features, on a CPU.

    Args:
        features: (N, C, h, w).
        weights: 0 or above, (K, h, w).
        image_of: Index of the image of each weight map, (K,).

    Returns:
        (K, C); 0 where all weights of a map are 0.
    """
    _, channels, height, width = features.shape
    wide = features if features.dtype == torch.float64 else features.float()
    places = wide.permute(0, 2, 3, 1).reshape(-1, channels)  # (N*h*w, C)
    flat = weights.to(wide.dtype).flatten(1)
    indices = image_of[:, None] * (height * width) + torch.arange(
        height * width, device=image_of.device
    )
    total = F.embedding_bag(indices, places, per_sample_weights=flat, mode="sum")
    mass = flat.sum(dim=1, keepdim=True)
    return (total / mass.where(mass > 0, torch.ones_like(mass))).to(features.dtype)


def coverage(boxes: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """The share of each place's area that a box covers.

    Args:
        boxes: (K, 4) xyxy pixels.
        grid: Height and width of the feature map.
        stride: Pixels per place.

    Returns:
        (K, h, w) in 0..1.
    """
    x1, y1, x2, y2 = (boxes.float() / stride).unbind(dim=1)
    across = _shares(x1, x2, grid[1])  # (K, w)
    down = _shares(y1, y2, grid[0])  # (K, h)
    return down[:, :, None] * across[:, None, :]


def expand_boxes(boxes: Tensor, margin: float) -> Tensor:
    """Boxes (K, 4) grown on each side by a share of their width and height; may leave the image."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    grow_x, grow_y = (x2 - x1) * margin, (y2 - y1) * margin
    return torch.stack([x1 - grow_x, y1 - grow_y, x2 + grow_x, y2 + grow_y], dim=1)


def rings_within(
    boxes: Tensor, ends: Tensor, margin: float, *, least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Boxes and the outer edges of rings around them, both cut to their pictures.

    Args:
        boxes: (K, 4) xyxy pixels.
        ends: Width and height of each one's picture, (K, 2).
        margin: Thickness of a ring, as a share of the width and height of the box in the picture.
        least: Smallest thickness, pixels.

    Returns:
        (K, 4) both.
    """
    corner = ends.repeat(1, 2)
    boxes = torch.minimum(boxes, corner).clamp(min=0.0)
    by = ((boxes[:, 2:] - boxes[:, :2]) * margin).clamp(min=least)
    rings = torch.cat([boxes[:, :2] - by, boxes[:, 2:] + by], dim=1)
    return boxes, torch.minimum(rings, corner).clamp(min=0.0)


def box_geometry(boxes: Tensor, sizes: Tensor | tuple[int, int]) -> Tensor:
    """Where a box lies and how large it is, each number of order 1.

    Args:
        boxes: (K, 4) xyxy pixels.
        sizes: Height and width of the frame: one for all, or (K, 2).

    Returns:
        (K, 8): centre x and y, width, height, lower edge, square root of the area's share, and the
        logarithms of aspect ratio and of that root; 0 for an empty box.
    """
    boxes = boxes.float()
    if isinstance(sizes, Tensor):
        height, width = sizes.to(boxes).unbind(dim=1)
    else:
        height, width = boxes.new_tensor(sizes[0]), boxes.new_tensor(sizes[1])
    x1, x2 = boxes[:, 0] / width, boxes[:, 2] / width
    y1, y2 = boxes[:, 1] / height, boxes[:, 3] / height
    across, down = (x2 - x1).clamp(min=0.0), (y2 - y1).clamp(min=0.0)
    root = (across * down).sqrt()
    tiny = 1e-3
    aspect = ((across * width + tiny) / (down * height + tiny)).log()
    numbers = [
        (x1 + x2) / 2,
        (y1 + y2) / 2,
        across,
        down,
        y2,
        root,
        aspect,
        (root + tiny).log() / 2,
    ]
    return torch.stack(numbers, dim=1) * (root > 0)[:, None]


def mask_boxes(mask: Tensor) -> Tensor:
    """The smallest boxes around masks, xyxy pixels; zeros for an empty mask.

    Args:
        mask: Above 0 where it counts, (K, H, W).

    Returns:
        (K, 4) float32.
    """
    x1, x2 = _extent((mask > 0).any(dim=1))
    y1, y2 = _extent((mask > 0).any(dim=2))
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def _shares(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Overlap of [low, high] with each of the unit cells 0..count-1: (K, count)."""
    cells = torch.arange(count, device=low.device, dtype=low.dtype)
    overlap = torch.minimum(high[:, None], cells + 1) - torch.maximum(low[:, None], cells)
    return overlap.clamp(0.0, 1.0)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First occupied index and one past the last, along dimension 1 of (K, L); 0, 0 if none."""
    length = occupied.shape[1]
    some = occupied.any(dim=1)
    first = occupied.to(torch.uint8).argmax(dim=1)
    last = length - occupied.flip(1).to(torch.uint8).argmax(dim=1)
    return first * some, last * some


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


def image_extents(images: Tensor, padding: Sequence[float] = BLACK) -> Tensor:
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
