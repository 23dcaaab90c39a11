"""Pool feature maps over objects and over their surroundings.

Boxes are xyxy in pixels of the image. Cell (row, column) of a feature map covers the pixels from
`column * stride` to `(column + 1) * stride`, and likewise for rows. A weight map has, for each
cell, the fraction of the cell's area that lies in the pooled region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from kd.errors import UserError
from kd.nn.trunk_base import wide
from kd.transforms.hide import IMAGENET_MEAN, IMAGENET_STD

GEOMETRY = 8  # length of `box_geometry`


def roi_features(features: Tensor, rois: Tensor, stride: int, *, output_size: int = 1) -> Tensor:
    """Pool features inside boxes by RoIAlign (He et al., 2017, https://arxiv.org/abs/1703.06870).

    Args:
        features: (N, C, h, w).
        rois: (M, 5) as (image, x1, y1, x2, y2), pixels.
        stride: Pixels per cell.
        output_size: Side of the grid that each box is divided into.

    Returns:
        (M, C, output_size, output_size), in the dtype of the features.
    """
    maps = wide(features)
    pooled: Tensor = roi_align(
        maps, rois.to(maps.dtype), output_size, spatial_scale=1 / stride, aligned=True
    )
    return pooled.to(features.dtype)


def crop_regions(images: Tensor, rois: Tensor, size: int, *, margin: float = 0.0) -> Tensor:
    """Crop a square around each box and resample the crop to (M, C, size, size).

    The square has the centre of the box and the length of the box's longer side, plus the margin.
    Outside the image a crop is 0.

    Args:
        images: (N, C, H, W).
        rois: (M, 5) as (image, x1, y1, x2, y2), pixels.
        size: Height and width of the resampled crops, pixels.
        margin: Width added on all four sides, as a fraction of the box's longer side.
    """
    centre = (rois[:, 1:3] + rois[:, 3:]) / 2
    longest = (rois[:, 3:] - rois[:, 1:3]).amax(dim=1, keepdim=True)
    reach = longest * (0.5 + margin)
    widened = torch.cat([rois[:, :1], centre - reach, centre + reach], dim=1)
    return roi_features(images, widened, 1, output_size=size)


def masked_pool(features: Tensor, weights: Tensor, image_of: Tensor) -> Tensor:
    """Compute weighted means (K, C) of feature maps; a mean is 0 if all of its weights are 0.

    The means are computed by an embedding bag over cells, which neither copies an image's features
    for each object nor synchronises with an accelerator. On a CPU this is 2 to 8 times as fast as
    gathering the features.

    Args:
        features: (N, C, h, w).
        weights: Weight of each cell, 0 or above, (K, h, w).
        image_of: Index into `features` of the image that each weight map belongs to, (K,).
    """
    _, channels, height, width = features.shape
    cells = wide(features).permute(0, 2, 3, 1).reshape(-1, channels)  # (N*h*w, C)
    flat = weights.to(cells.dtype).flatten(1)
    indices = image_of[:, None] * (height * width) + torch.arange(
        height * width, device=image_of.device
    )
    total = F.embedding_bag(indices, cells, per_sample_weights=flat, mode="sum")
    mass = flat.sum(dim=1, keepdim=True)
    return (total / mass.where(mass > 0, torch.ones_like(mass))).to(features.dtype)


def coverage(boxes: Tensor, grid: tuple[int, int], stride: int) -> Tensor:
    """Compute the fraction (K, h, w) of each cell of a `grid` (h, w) that boxes (K, 4) cover."""
    x1, y1, x2, y2 = (boxes.float() / stride).unbind(dim=1)
    across = _overlaps(x1, x2, grid[1])  # (K, w)
    down = _overlaps(y1, y2, grid[0])  # (K, h)
    return down[:, :, None] * across[:, None, :]


def expand_boxes(boxes: Tensor, margin: float) -> Tensor:
    """Expand boxes (K, 4) on all sides by a fraction of width and height, without clipping."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    grow_x, grow_y = (x2 - x1) * margin, (y2 - y1) * margin
    return torch.stack([x1 - grow_x, y1 - grow_y, x2 + grow_x, y2 + grow_y], dim=1)


def rings_within(
    boxes: Tensor, ends: Tensor, margin: float, *, least: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Clip boxes to their images, and compute the outer edges of rings around them.

    Args:
        boxes: (K, 4) xyxy pixels.
        ends: Width and height of the image that contains each box, (K, 2).
        margin: Thickness of the ring, as a fraction of the clipped box's width and height.
        least: Smallest thickness of the ring, pixels.

    Returns:
        The clipped boxes (K, 4), and boxes (K, 4) that contain box and ring, clipped too.
    """
    corner = ends.repeat(1, 2)
    boxes = torch.minimum(boxes, corner).clamp(min=0.0)
    by = ((boxes[:, 2:] - boxes[:, :2]) * margin).clamp(min=least)
    rings = torch.cat([boxes[:, :2] - by, boxes[:, 2:] + by], dim=1)
    return boxes, torch.minimum(rings, corner).clamp(min=0.0)


def box_geometry(boxes: Tensor) -> Tensor:
    """Encode the position and size of boxes as features with magnitudes of about 1.

    Args:
        boxes: (K, 4) xyxy as fractions of the frame's width and height.

    Returns:
        (K, 8): x and y of the centre, width, height and y of the lower edge, as fractions of the
        frame; r, the square root of box area / frame area; the logarithm of the aspect ratio; and
        log(r) / 2. All features of an empty box are 0.
    """
    x1, y1, x2, y2 = boxes.float().unbind(dim=1)
    across, down = (x2 - x1).clamp(min=0.0), (y2 - y1).clamp(min=0.0)
    root = (across * down).sqrt()
    tiny = 1e-3
    aspect, size = ((across + tiny) / (down + tiny)).log(), (root + tiny).log() / 2
    numbers = [(x1 + x2) / 2, (y1 + y2) / 2, across, down, y2, root, aspect, size]
    return torch.stack(numbers, dim=1) * (root > 0)[:, None]


def mask_boxes(mask: Tensor) -> Tensor:
    """Compute boxes (K, 4) float32 around the pixels above 0 in masks (K, H, W); 0 if empty."""
    x1, x2 = _extent((mask > 0).any(dim=1))
    y1, y2 = _extent((mask > 0).any(dim=2))
    return torch.stack([x1, y1, x2, y2], dim=1).float()


def _overlaps(low: Tensor, high: Tensor, count: int) -> Tensor:
    """Length (K, count) of the overlap of intervals [low, high] with the unit cells 0..count-1."""
    cells = torch.arange(count, device=low.device, dtype=low.dtype)
    overlap = torch.minimum(high[:, None], cells + 1) - torch.maximum(low[:, None], cells)
    return overlap.clamp(0.0, 1.0)


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First True index along dimension 1 of (K, L) and one past the last; 0 and 0 if none is."""
    length = occupied.shape[1]
    some = occupied.any(dim=1)
    first = occupied.to(torch.uint8).argmax(dim=1)
    last = length - occupied.flip(1).to(torch.uint8).argmax(dim=1)
    return first * some, last * some


# RGB of a black pixel after ImageNet normalisation.
BLACK = tuple(-mean / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))


class Surroundings(nn.Module):
    """Describe the surroundings of a box by pooled features and the box's position and size.

    Args:
        channels: Channels of each map.
        strides: Pixels per cell of each map.
        margins: Thickness of each ring around the box, as a fraction of the box's width and height.
        min_ring: Smallest thickness of a ring, pixels.
        scene: Whether to pool the whole image outside the box.
        inside: Whether to pool the inside of the box, too. In the input of a context teacher this
            is the hidden region.
        geometry: Whether to append the box's position and size, see `box_geometry`.

    Attributes:
        width: Length of the output vector of a box.
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
        # Features differ in scale by orders of magnitude, between trunks and between channels.
        self.norm = nn.BatchNorm1d(pooled, affine=False)
        # Each block is scaled to unit power, so that a map of 1280 channels does not dominate one
        # of 96, and the same learning rate and weight decay fit any trunk.
        counts = [c for c in channels for _ in range(len(self.margins) + scene + inside)]
        self.register_buffer("scale", torch.tensor([c**-0.5 for c in counts for _ in range(c)]))
        self.width = pooled + (GEOMETRY if geometry else 0)

    def forward(
        self, maps: Sequence[Tensor], boxes: Tensor, image_of: Tensor, extents: Tensor
    ) -> Tensor:
        """Compute the description (K, width) of each box's surroundings.

        Args:
            maps: One feature map (N, C, h, w) per stride.
            boxes: (K, 4) xyxy pixels.
            image_of: Index of the image that contains each box, (K,).
            extents: Width and height of each image without padding, (N, 2).
        """
        ends = extents[image_of].to(boxes.dtype)  # (K, 2)
        frame = torch.cat([torch.zeros_like(ends), ends], dim=1)
        rings = [
            rings_within(boxes, ends, margin, least=self.min_ring)[1] for margin in self.margins
        ]
        boxes = rings_within(boxes, ends, 0.0)[0]
        pooled = []
        for features, stride in zip(maps, self.strides, strict=True):
            grid = (features.shape[2], features.shape[3])
            box = coverage(boxes, grid, stride)
            whole = coverage(frame, grid, stride)
            weights = [(coverage(ring, grid, stride) - box).clamp(min=0.0) for ring in rings]
            weights += [(whole - box).clamp(min=0.0)] if self.scene else []
            weights += [box] if self.inside else []
            # If a box covers the whole image, nothing surrounds it and all weights are 0. The tiny
            # weight makes such a box use the mean over the image; elsewhere it is lost in rounding.
            bags = torch.cat([weight + 1e-12 * whole for weight in weights])
            rows = masked_pool(features, bags, image_of.repeat(len(weights)))
            by_bag = rows.unflatten(0, (len(weights), -1))
            pooled.append(by_bag.transpose(0, 1).flatten(1))
        read = standardised(self.norm, torch.cat(pooled, dim=1)) * self.scale
        if self.geometry:
            scaled = boxes / ends.repeat(1, 2)
            read = torch.cat([read, box_geometry(scaled) / math.sqrt(GEOMETRY)], dim=1)
        return read


def image_extents(images: Tensor, padding: Sequence[float] = BLACK) -> Tensor:
    """Find the width and height (N, 2) of images (N, 3, H, W) without their padding.

    Images are padded at the right and at the bottom. `padding` is the RGB value of padded pixels,
    by default that of a black pixel.
    """
    colour = images.new_tensor(padding).view(1, 3, 1, 1)
    drawn = ((images - colour).abs() > 1e-3).any(dim=1)  # (N, H, W)
    columns, rows = drawn.any(dim=1), drawn.any(dim=2)
    last = [side.shape[1] - side.flip(1).to(torch.uint8).argmax(dim=1) for side in (columns, rows)]
    return torch.stack(last, dim=1)


def standardised(norm: nn.BatchNorm1d, rows: Tensor) -> Tensor:
    """Normalise rows (K, C) by a batch norm without weights and clamp the result to -8..8.

    The standard deviation of a single row is not defined. Such a row is normalised by the running
    statistics even in training, and does not update them. The result has the dtype of the running
    statistics, also under autocast.
    """
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    rows = rows.to(mean.dtype)
    if norm.training and len(rows) < 2:
        rows = nn.functional.batch_norm(rows, mean, variance, eps=norm.eps)
    else:
        rows = norm(rows)
    return rows.clamp(-8.0, 8.0)


def log_prior(what: str, num_classes: int, prior: Sequence[float] | Tensor | None) -> Tensor:
    """Normalise class probabilities and return their logs (C,); `prior` None means uniform."""
    given = torch.as_tensor([1.0] * num_classes if prior is None else prior, dtype=torch.float32)
    if given.shape != (num_classes,) or not bool((given > 0).all()):
        raise UserError(
            f"{what}: prior must hold {num_classes} probabilities above 0, got "
            f"{given.numel()}, the smallest of them {min(given.flatten().tolist(), default=None)}"
        )
    return (given / given.sum()).log()
