"""What CenterNet's maps should be, drawn on the device from the objects of a batch.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850. An object is the cell that the middle of its
box is in. Around it the class's map falls off as a Gaussian: places near the middle would give a
box that still overlaps the object, and are blamed less. Its deviation is (2r + 1) / 6, with r the
radius of `gaussian_radius` for the box's sides in cells, rounded up as the authors' code has it;
r itself is rounded down, and further away than r, across or down, the map stays 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import labels_fit, name_of, one_device

CHUNK = 1 << 24  # cells of objects' Gaussians held at a time: 64 MiB of float32
OVERLAP = 0.7

# Widths and heights in cells, (M,) each, to radii (M,).
Radius = Callable[[Tensor, Tensor], Tensor]


class CenterTargets(NamedTuple):
    """What the maps should be: N pictures, C classes, M objects.

    Attributes:
        heatmap: (N, C, h, w) float32, 1 at the peaks, in 0..1 around them.
        counted: (N, C, h, w) bool, False where a place that is no peak is not blamed; None where
            every place counts.
        cell: (M,) int64, y * w + x of each object's middle.
        image_of: (M,) int64, the picture of each object.
        size: (M, 2) float32, width and height in cells.
        offset: (M, 2) float32, how far right of and below the cell's corner the middle is, in
            cells, [0, 1).
        valid: (M,) bool, objects that have a peak; the others take no part.
    """

    heatmap: Tensor
    counted: Tensor | None
    cell: Tensor
    image_of: Tensor
    size: Tensor
    offset: Tensor
    valid: Tensor

    @property
    def peaks(self) -> Tensor:
        """How many cells are peaks, a scalar: objects of one class in one cell share theirs."""
        return (self.heatmap == 1).sum()


def gaussian_radius(
    widths: Tensor, heights: Tensor, *, overlap: float = OVERLAP, published: bool = False
) -> Tensor:
    """How far each corner of a box may move so that the IoU with it stays at `overlap`.

    The least of three cases: both corners move outwards, both inwards, or one each way (Law and
    Deng, 2018, https://arxiv.org/abs/1808.01244). Each is the smaller root of a quadratic; the
    published code solves two of them wrongly and takes the larger root: its radii are about three
    times as long, 2.73 for 0.82 at a box of 10 x 10.

    Args:
        widths: Of the boxes, (M,), in any unit.
        heights: The same.
        overlap: IoU, in (0, 1).
        published: As the authors' code has it, for comparison with their numbers.

    Returns:
        (M,), in the unit of the sides; not rounded.

    Raises:
        UserError: `overlap` is out of range.
    """
    if not 0 < overlap < 1:
        raise UserError(f"gaussian_radius: overlap must be in (0, 1), got {overlap}")
    around, area = widths + heights, widths * heights
    # One corner moves along, one away: (w - r)(h - r) is shared, twice the area less that covered.
    shifted = _root(around, area * (1 - overlap) / (1 + overlap), 1.0, published)
    # Both move inwards: (w - 2r)(h - 2r) is overlap times the area.
    inside = _root(2 * around, area * (1 - overlap), 4.0, published)
    # Both move outwards: the area is overlap times (w + 2r)(h + 2r).
    spread = (4 * overlap**2 * around**2 + 16 * overlap * (1 - overlap) * area).sqrt()
    outside = (spread - 2 * overlap * around) / (2 if published else 8 * overlap)
    return torch.minimum(torch.minimum(shifted, inside), outside)


def _root(linear: Tensor, constant: Tensor, square: float, published: bool) -> Tensor:
    """The smaller root of `square r^2 - linear r + constant`; the published one is neither."""
    spread = (linear.square() - 4 * square * constant).clamp(min=0.0).sqrt()
    return (linear + spread) / 2 if published else (linear - spread) / (2 * square)


def center_targets(
    boxes: Tensor,
    labels: Tensor,
    image_of: Tensor,
    n: int,
    num_classes: int,
    grid: tuple[int, int],
    stride: float,
    *,
    ignored: Tensor | None = None,
    radius: Radius = gaussian_radius,
) -> CenterTargets:
    """Targets for a batch; where Gaussians of a class overlap, the larger value counts.

    An object is left out if its middle lies outside the grid, or its box has no area; and on an
    accelerator, where looking would make each step wait, if its box is not finite or its label -1.

    Args:
        boxes: (M, 4), xyxy pixels.
        labels: (M,) int64, 0..C-1; -1, a class that is not known, only where it is ignored.
        image_of: (M,) int64, 0..N-1.
        n: N.
        num_classes: C.
        grid: Height and width in cells.
        stride: Pixels a cell.
        ignored: (M,) bool, regions that may hold more objects, such as crowds: they have no peak,
            and their class, any class where that is -1, is not blamed in the cells whose middles
            they cover. The peaks of other objects there count all the same.
        radius: `partial(gaussian_radius, published=True)` for that of the authors' code.

    Raises:
        UserError: Shapes, types or devices that do not fit; and of tensors on the CPU, labels or
            images out of range, boxes that are not finite or have their corners swapped.
    """
    _check_objects(boxes, labels, image_of, ignored, n, num_classes)
    cells, shape = boxes.to(torch.float32) / stride, (n, num_classes, *grid)
    valid = _on_grid(cells, grid) & (labels >= 0)
    valid = valid if ignored is None else valid & ~ignored
    middles, sides = (cells[:, 2:] + cells[:, :2]) / 2, cells[:, 2:] - cells[:, :2]
    middles, sides = (part.where(valid[:, None], 0.0) for part in (middles, sides))
    corner, row = middles.floor(), image_of * num_classes + labels.clamp(min=0)
    heatmap = _bells(corner, radius(*sides.ceil().unbind(dim=1)).floor(), valid, row, shape)
    counted = None
    if ignored is not None:
        row = row.where(labels >= 0, n * num_classes + image_of)
        counted = ~_covered(cells, ignored, row, shape) | (heatmap == 1)
    cell = (corner[:, 1] * grid[1] + corner[:, 0]).long()
    return CenterTargets(heatmap, counted, cell, image_of, sides, middles - corner, valid)


def _on_grid(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes (M, 4), in cells, with an area and a middle on the grid; bool (M,), False at NaN."""
    sides, middles = cells[:, 2:] - cells[:, :2], (cells[:, 2:] + cells[:, :2]) / 2
    inside = (middles >= 0).all(dim=1) & (middles[:, 0] < grid[1]) & (middles[:, 1] < grid[0])
    return inside & ((sides > 0) & sides.isfinite()).all(dim=1)


def _bells(
    corner: Tensor, radius: Tensor, valid: Tensor, row: Tensor, shape: tuple[int, ...]
) -> Tensor:
    """Gaussians around cells (M, 2), across first, the largest at each place of `shape`."""
    rows, columns = (_bell(corner[:, axis], radius, shape[3 - axis]) for axis in (1, 0))
    return _largest(rows * valid[:, None], columns, row, shape[0] * shape[1]).view(shape)


def _bell(middle: Tensor, radius: Tensor, length: int) -> Tensor:
    """Gaussians along one side of the grid, (M, length), 0 further than the radius away."""
    away = torch.arange(length, device=middle.device) - middle[:, None]
    deviation = (2 * radius[:, None] + 1) / 6
    value = torch.exp(-away.square() / (2 * deviation.square()))
    return value.masked_fill(away.abs() > radius[:, None], 0.0)


def _largest(rows: Tensor, columns: Tensor, row: Tensor, count: int) -> Tensor:
    """`count` maps (h, w), each the largest of the products that belong to it, 0 without any.

    Args:
        rows: (M, h), 0 or above.
        columns: (M, w), 0 or above.
        row: (M,) int64, the map of each.
        count: Of maps.
    """
    maps = rows.new_zeros(count, rows.shape[1], columns.shape[1])
    step = max(1, CHUNK // maps.shape[1:].numel())
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        product = rows[part, :, None] * columns[part, None]
        maps.scatter_reduce_(0, row[part, None, None].expand_as(product), product, "amax")
    return maps


def _covered(boxes: Tensor, ignored: Tensor, row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Places in ignored boxes (M, 4), in cells, bool of `shape`; all classes in rows from N * C."""
    n, num_classes, height, width = shape

    def inside(low: Tensor, high: Tensor, length: int) -> Tensor:
        middle = torch.arange(length, device=low.device) + 0.5
        return ((middle >= low[:, None]) & (middle < high[:, None])).to(boxes.dtype)

    covered = _largest(
        inside(boxes[:, 1], boxes[:, 3], height) * ignored[:, None],
        inside(boxes[:, 0], boxes[:, 2], width),
        row,
        n * num_classes + n,
    ).bool()
    own, whole = covered[: n * num_classes], covered[n * num_classes :]
    return own.view(shape) | whole[:, None]


def _check_objects(
    boxes: Tensor,
    labels: Tensor,
    image_of: Tensor,
    ignored: Tensor | None,
    n: int,
    num_classes: int,
) -> None:
    what = "center_targets"
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise UserError(f"{what}: boxes must be (M, 4), got {tuple(boxes.shape)}")
    labels_fit(what, labels, boxes, beside="boxes")
    if image_of.shape != labels.shape or image_of.dtype != torch.int64:
        raise UserError(
            f"{what}: image_of must be int64 ({len(boxes)},), got {name_of(image_of.dtype)} "
            f"{tuple(image_of.shape)}"
        )
    if ignored is not None and (ignored.shape != labels.shape or ignored.dtype != torch.bool):
        raise UserError(
            f"{what}: ignored must be bool ({len(boxes)},), got {name_of(ignored.dtype)} "
            f"{tuple(ignored.shape)}"
        )
    parts = {"boxes": boxes, "image_of": image_of}
    one_device(what, **(parts if ignored is None else {**parts, "ignored": ignored}))
    if not boxes.is_cpu or torch.compiler.is_compiling() or not len(boxes):
        return
    sound = (boxes[:, 2:] >= boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1)
    known = (labels >= 0) if ignored is None else (labels >= 0) | (ignored & (labels == -1))
    for good, said in (
        (sound, "boxes must be finite, with x1 <= x2 and y1 <= y2"),
        ((image_of >= 0) & (image_of < n), f"image_of must be in 0..{n - 1}"),
        (known & (labels < num_classes), f"labels must be in 0..{num_classes - 1}, -1 if ignored"),
    ):
        if not good.all():
            row = int((~good).nonzero()[0])
            raise UserError(
                f"{what}: {said}; object {row} is {boxes[row].tolist()}, label "
                f"{int(labels[row])}, of image {int(image_of[row])}"
            )
