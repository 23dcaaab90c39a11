"""Hiding objects and drawing dense targets, on the device the batch lies on.

One rounding rule everywhere: pixel (row r, column c) belongs to a shape if the shape holds its
centre, (c + 0.5, r + 0.5); a box includes its left and upper edge, not its right and lower one.
A shape too small to hold any centre gets the pixel at its middle, so that something is hidden.
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

_TINY_SHARE = 1e-6


def normalise(images: Tensor) -> Tensor:
    """Scale pixels to 0..1 and apply ImageNet's mean and standard deviation.

    Args:
        images: (N, 3, H, W) uint8, RGB.

    Returns:
        (N, 3, H, W) float32.
    """
    shift, scale = _shift_and_scale(images.device)
    return images.float().sub_(shift).mul_(scale)


@functools.cache
def _shift_and_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept for good, for a copy to a GPU waits for all that it still has to do."""
    mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)
    return mean * 255, 1 / (std * 255)


def hide_fraction(progress: float, *, start: float, until: float) -> float:
    """Partial masking's schedule: the share of a region to hide, growing linearly to all of it.

    Args:
        progress: Share of training done, 0..1.
        start: Share hidden at progress 0.
        until: Progress from which on everything is hidden.

    Returns:
        Share of the region's area, 0..1.
    """
    if progress >= until:
        return 1.0
    return start + (1.0 - start) * progress / until


def hidden_regions(
    boxes: Tensor,
    size: tuple[int, int],
    *,
    shape: str = "box",
    share: Tensor | None = None,
) -> Tensor:
    """Draw the region to hide for each box.

    Every shape covers its whole box, so that no part of the object stays visible: `square` has
    the box's longer side and its centre; `ellipse` is the smallest ellipse around the box, whose
    axes are sqrt(2) times the box's sides. What leaves the frame is cut off.

    Args:
        boxes: (K, 4) xyxy pixels.
        size: Height and width of the frame.
        shape: `box`, `square` or `ellipse`; exact segments come as masks (`shrink_masks`).
        share: (K,) share of the region's area to hide, kept at its centre; None hides all.

    Returns:
        (K, H, W) bool, at least one pixel in each.

    Raises:
        UserError: The shape is unknown.
    """
    if shape not in SHAPES or shape == "segment":
        raise UserError(f"shape {shape!r} cannot be drawn from a box; use box, square or ellipse")
    own_sides = boxes[:, 2:] - boxes[:, :2]
    sides = own_sides
    if shape == "square":
        sides = sides.amax(dim=1, keepdim=True).expand_as(sides)
    if share is not None:
        sides = sides * share.clamp(0, 1).sqrt()[:, None]
    grow = (sides - own_sides) / 2  # exactly 0 where nothing changes, so edges stay on their side
    drawn = _draw_boxes(torch.cat([boxes[:, :2] - grow, boxes[:, 2:] + grow], dim=1), size)
    if shape == "ellipse":
        centre = (boxes[:, :2] + boxes[:, 2:]) / 2
        drawn |= _draw_ellipses(centre, sides * math.sqrt(0.5), size)
    return drawn


def shrink_masks(masks: Tensor, boxes: Tensor, share: Tensor) -> Tensor:
    """Scale masks about their boxes' centres so that a share of their area remains.

    Args:
        masks: (K, H, W) bool.
        boxes: (K, 4) xyxy pixels.
        share: (K,) share of the area to keep, 1 changes nothing.

    Returns:
        (K, H, W) bool.
    """
    scale = share.clamp(_TINY_SHARE, 1).rsqrt()[:, None]
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
    """The regions to hide in a loader's batch, each reduced to its `hide_fraction`.

    Args:
        batch: As in docs/batch.md, on any device.
        shape: `box`, `square`, `ellipse`, or `segment` where the batch has `segments`.

    Returns:
        (K, H, W) bool, one for each entry of `hidden`.

    Raises:
        UserError: The shape is unknown.
    """
    boxes, share = batch["boxes"][batch["hidden"]], batch["hide_fraction"]
    if shape == "segment":
        return shrink_masks(batch["segments"], boxes, share)
    height, width = batch["images"].shape[-2:]
    return hidden_regions(boxes, (height, width), shape=shape, share=share)


def hide(images: Tensor, image_of: Tensor, regions: Tensor) -> Tensor:
    """Make a context teacher's input: one copy of an image for each object to hide.

    Args:
        images: (N, 3, H, W) normalised.
        image_of: (K,) int64, which image each region is hidden in.
        regions: (K, H, W) bool.

    Returns:
        (K, 4, H, W) of the images' type: RGB, 0 in the region (after normalisation, so neither
        black nor padding), and a channel that is 1 in the region.
    """
    seen = images[image_of].mul_(~regions[:, None])
    return torch.cat([seen, regions[:, None].to(images.dtype)], dim=1)


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
    """Draw every object's box on its class's map; boxes that overlap give several classes.

    Args:
        boxes: (M, 4) xyxy pixels.
        labels: (M,) int64; an object with label -1 is not drawn.
        image_of: (M,) int64.
        num_images: N.
        num_classes: C.
        size: Height and width.
        out: A result of an earlier call to write over. On a CPU, getting fresh memory for maps
            costs several times the drawing.

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
    return out.index_put_(where, drawn, accumulate=True)  # adding bools is a logical or


def valid_pixels(sizes: Tensor, size: tuple[int, int]) -> Tensor:
    """Where the image is, as opposed to the padding below and right of it.

    Args:
        sizes: (N, 2) int64, the images' heights and widths.
        size: Height and width of the frame.

    Returns:
        (N, H, W) bool.
    """
    rows = torch.arange(size[0], device=sizes.device) < sizes[:, :1]
    columns = torch.arange(size[1], device=sizes.device) < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def _centres(length: int, like: Tensor) -> Tensor:
    return torch.arange(length, device=like.device, dtype=like.dtype) + 0.5


def _within(places: Tensor, length: int) -> Tensor:
    return (places >= 0) & (places < length)


def _draw_boxes(boxes: Tensor, size: tuple[int, int], drawn: Tensor | None = None) -> Tensor:
    rows = _between(boxes[:, 1:2], boxes[:, 3:4], size[0])
    if drawn is not None:
        rows &= drawn[:, None]
    columns = _between(boxes[:, 0:1], boxes[:, 2:3], size[1])
    # as bytes: on a CPU that is vectorised, eight times as fast as for bools
    crossed = rows.view(torch.uint8)[:, :, None] & columns.view(torch.uint8)[:, None, :]
    return crossed.view(torch.bool)


def _between(low: Tensor, high: Tensor, length: int) -> Tensor:
    centres = _centres(length, low)
    inside = (centres >= low) & (centres < high)  # (K, length)
    middle = ((low + high) / 2).floor().clamp(0, length - 1)
    return inside | (~inside.any(dim=1, keepdim=True) & (centres == middle + 0.5))


def _draw_ellipses(centre: Tensor, axes: Tensor, size: tuple[int, int]) -> Tensor:
    axes = axes.clamp(min=_TINY_SHARE)
    across = ((_centres(size[1], axes) - centre[:, :1]) / axes[:, :1]).square()
    down = ((_centres(size[0], axes) - centre[:, 1:]) / axes[:, 1:]).square()
    return down[:, :, None] + across[:, None, :] <= 1
