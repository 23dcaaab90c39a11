"""Hide objects and draw dense targets, on the device of the batch.

A pixel belongs to a shape if its centre (column + 0.5, row + 0.5) lies inside; for boxes, left and
upper edges are inside, right and lower edges outside. If a shape contains no pixel centre, the
pixel at the shape's centre is used.
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
    """Scale images (N, 3, H, W) uint8 to 0..1 and normalise by ImageNet's mean and deviation."""
    shift, scale = _mean_and_scale(images.device)
    return images.float().sub_(shift).mul_(scale)


@functools.cache  # because copying to a GPU in each step would synchronise with it
def _mean_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    return mean * 255, 1 / (std * 255)


def hide_fraction(progress: float, *, start: float, until: float) -> float:
    """Fraction of each region to hide: grows linearly from `start` to 1 at progress `until`."""
    if progress >= until:
        return 1.0
    return start + (1.0 - start) * progress / until


def hidden_regions(
    boxes: Tensor, size: tuple[int, int], *, shape: str = "box", fraction: Tensor | None = None
) -> Tensor:
    """Draw the region to hide for each of K boxes, (K, 4) xyxy pixels: (K, *size) bool.

    Every region covers the whole box and at least one pixel, and is clipped to the frame. Its
    `shape` is `box`, `square` (with the centre and the longer side of the box) or `ellipse` (the
    smallest one around the box). If given, `fraction` (K,) reduces the regions to this fraction of
    their area, about the box centre. For segmentation masks, see `shrink_masks`.
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
    """Shrink masks (K, H, W) about the centres of boxes (K, 4) to a fraction (K,) of their area."""
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
    """Draw the regions to hide in a batch (docs/batch.md), one per hidden object: (K, H, W) bool.

    Each region is shrunk to the fraction of its area in `batch["hide_fraction"]`.
    """
    boxes, fraction = batch["boxes"][batch["hidden"]], batch["hide_fraction"]
    if shape == "segment":
        return shrink_masks(batch["segments"], boxes, fraction)
    height, width = batch["images"].shape[-2:]
    return hidden_regions(boxes, (height, width), shape=shape, fraction=fraction)


def hide(images: Tensor, image_of: Tensor, regions: Tensor) -> Tensor:
    """Build a context teacher's input: a copy of the image for each hidden object, (K, 4, H, W).

    The first three channels are RGB, set to 0 (the mean colour) in the region. The fourth is 1 in
    the region and 0 elsewhere.

    Args:
        images: Normalised images, (N, 3, H, W).
        image_of: (K,) int64, index of the image that contains each region.
        regions: Regions to hide, (K, H, W) bool.
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
    """Draw each object's box on the map of its class: (N, C, H, W) bool; classes may overlap.

    `boxes` are (M, 4) xyxy pixels. `labels` (M,) are int64; objects with label -1 are not drawn.
    `image_of` (M,) int64 is the index of each object's image. `out`, the result of an earlier call,
    is overwritten if given, which saves a slow allocation on the CPU.
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
    """Mask of image pixels (not padding), (N, H, W), for image `sizes` (N, 2) and frame `size`."""
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
