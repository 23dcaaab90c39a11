"""Hide objects and draw dense targets, on the device of the batch.

A pixel (row r, column c) belongs to a shape if the pixel's centre (c + 0.5, r + 0.5) lies in the
shape. A box includes its left and upper edges and excludes its right and lower edges. If a shape
contains no pixel centre, the pixel at the centre of the shape is used, so that something is hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from kd.errors import UserError

Shape = Literal["box", "square", "ellipse", "segment"]
SHAPES: tuple[str, ...] = get_args(Shape)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TINY = 1e-6


def normalise(images: Tensor) -> Tensor:
    """Scale images (N, 3, H, W) uint8 to 0..1, and normalise by ImageNet's mean and deviation."""
    shift, scale = _mean_and_scale(images.device)
    return images.float().sub_(shift).mul_(scale)


@functools.cache  # because copying to a GPU in each step would synchronise with it
def _mean_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    return mean * 255, 1 / (std * 255)


def hide_fraction(progress: float, *, start: float, until: float) -> float:
    """Compute the fraction of each region to hide at a given progress of the training.

    The fraction grows linearly from `start` at progress 0 to 1 at progress `until`, and stays 1.
    """
    if progress >= until:
        return 1.0
    return start + (1.0 - start) * progress / until


def hidden_regions(
    boxes: Tensor, size: tuple[int, int], *, shape: str = "box", fraction: Tensor | None = None
) -> Tensor:
    """Draw the region to hide for each box, with at least one pixel per region.

    Every shape covers the whole box, so that no part of the object stays visible. A `square` has
    the centre and the longer side of the box. An `ellipse` is the smallest one around the box; its
    axes are sqrt(2) times the sides of the box. Regions are clipped to the frame. For segments,
    which are given as masks, see `shrink_masks`.

    Args:
        boxes: (K, 4) xyxy pixels.
        size: Height and width of the frame, H and W.
        shape: `box`, `square` or `ellipse`.
        fraction: Fraction of the region's area to hide, around the centre of the box, (K,); None to
            hide the whole region.

    Returns:
        (K, H, W) bool.
    """
    if shape not in SHAPES or shape == "segment":
        raise UserError(
            f"shape {shape!r} cannot be drawn from a box; expected box, square or ellipse"
        )
    own_sides = boxes[:, 2:] - boxes[:, :2]
    sides = own_sides
    if shape == "square":
        sides = sides.amax(dim=1, keepdim=True).expand_as(sides)
    if fraction is not None:
        sides = sides * fraction.clamp(0, 1).sqrt()[:, None]
    grow = (sides - own_sides) / 2  # exactly 0 if nothing changes, so that edges are not rounded
    drawn = _draw_boxes(torch.cat([boxes[:, :2] - grow, boxes[:, 2:] + grow], dim=1), size)
    if shape == "ellipse":
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        drawn |= _draw_ellipses(centre, sides * math.sqrt(0.5), size)
    return drawn


def shrink_masks(masks: Tensor, boxes: Tensor, fraction: Tensor) -> Tensor:
    """Shrink masks (K, H, W) to a fraction (K,) of their area about centres of boxes (K, 4)."""
    scale = fraction.clamp(_TINY, 1).rsqrt()[:, None]
    height, width = masks.shape[-2:]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    columns = centre[:, :1] + (_centres(width, boxes) - centre[:, :1]) * scale  # (K, W)
    rows = centre[:, 1:] + (_centres(height, boxes) - centre[:, 1:]) * scale  # (K, H)
    inside = _within(rows, height)[:, :, None] & _within(columns, width)[:, None, :]
    row_index = rows.floor().clamp(0, height - 1).long()[:, :, None]
    column_index = columns.floor().clamp(0, width - 1).long()[:, None, :]
    objects = torch.arange(len(masks), device=masks.device)[:, None, None]
    return masks[objects, row_index, column_index] & inside


def regions_of(batch: Mapping[str, Tensor], *, shape: str = "box") -> Tensor:
    """Draw the regions to hide in a batch (see docs/batch.md).

    Each region is reduced to the fraction of its area in `batch["hide_fraction"]`.

    Returns:
        (K, H, W) bool, one for each entry of `batch["hidden"]`.
    """
    boxes, fraction = batch["boxes"][batch["hidden"]], batch["hide_fraction"]
    if shape == "segment":
        return shrink_masks(batch["segments"], boxes, fraction)
    height, width = batch["images"].shape[-2:]
    return hidden_regions(boxes, (height, width), shape=shape, fraction=fraction)


def hide(images: Tensor, image_of: Tensor, regions: Tensor) -> Tensor:
    """Build the input of a context teacher: one copy of the image for each object to hide.

    Args:
        images: Normalised images, (N, 3, H, W).
        image_of: (K,) int64, index of the image that contains each region.
        regions: Regions to hide, (K, H, W) bool.

    Returns:
        (K, 4, H, W) in the dtype of the images: RGB, which is 0 in the region (the mean colour, not
        black), and a channel that is 1 in the region and 0 elsewhere.
    """
    visible = images[image_of].mul_(~regions[:, None])
    return torch.cat([visible, regions[:, None].to(images.dtype)], dim=1)


def class_maps(
    boxes: Tensor,
    labels: Tensor,
    image_of: Tensor,
    num_images: int,
    num_classes: int,
    size: tuple[int, int],
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Draw each object's box on the map of its class; a pixel may have several classes.

    Args:
        boxes: (M, 4) xyxy pixels.
        labels: (M,) int64; objects with label -1 are not drawn.
        image_of: (M,) int64, index of the image that contains each object.
        num_images: Number of images, N.
        num_classes: Number of classes, C.
        size: Height and width of the maps, H and W.
        out: Result of an earlier call to overwrite, because on a CPU allocating takes several times
            as long as drawing.

    Returns:
        (N, C, H, W) bool.
    """
    shape = (num_images, num_classes, *size)
    if out is None:
        out = torch.zeros(shape, dtype=torch.bool, device=boxes.device)
    elif out.shape != shape:
        raise ValueError(f"out has shape {tuple(out.shape)}, expected {shape}")
    else:
        out.zero_()
    drawn = _draw_boxes(boxes, size, labels >= 0)
    where = (image_of, labels.clamp(min=0))
    return out.index_put_(where, drawn, accumulate=True)  # for bool, accumulation is a logical or


def valid_pixels(sizes: Tensor, size: tuple[int, int]) -> Tensor:
    """Mask (N, H, W) of the pixels that are image and not padding.

    Args:
        sizes: Height and width of each image, (N, 2).
        size: Height and width of the mask, H and W.
    """
    rows = torch.arange(size[0], device=sizes.device) < sizes[:, :1]
    columns = torch.arange(size[1], device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def _centres(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype) + 0.5


def _within(places: Tensor, length: int) -> Tensor:
    return (places >= 0) & (places < length)


def _draw_boxes(boxes: Tensor, size: tuple[int, int], drawn: Tensor | None = None) -> Tensor:
    rows = _interval(boxes[:, 1:2], boxes[:, 3:4], size[0])
    if drawn is not None:
        rows &= drawn[:, None]
    columns = _interval(boxes[:, 0:1], boxes[:, 2:3], size[1])
    # uint8 is vectorised on CPUs, eight times as fast as bool
    crossed = rows.view(torch.uint8)[:, :, None] & columns.view(torch.uint8)[:, None, :]
    return crossed.view(torch.bool)


def _interval(low: Tensor, high: Tensor, length: int) -> Tensor:
    centres = _centres(length, low)
    inside = (centres >= low) & (centres < high)  # (K, length)
    middle = ((low + high) / 2).floor().clamp(0, length - 1)
    return inside | (~inside.any(dim=1, keepdim=True) & (centres == middle + 0.5))


def _draw_ellipses(centre: Tensor, axes: Tensor, size: tuple[int, int]) -> Tensor:
    axes = axes.clamp(min=_TINY)
    across = ((_centres(size[1], axes) - centre[:, :1]) / axes[:, :1]).square()
    down = ((_centres(size[0], axes) - centre[:, 1:]) / axes[:, 1:]).square()
    return down[:, :, None] + across[:, None, :] <= 1
