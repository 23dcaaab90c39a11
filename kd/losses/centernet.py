"""CenterNet's losses: where objects are, how large, and where in their cells.

Zhou et al., 2019, https://arxiv.org/abs/1904.07850.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import floating, labels_fit, name_of, one_device, wide_type

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


# What the published total multiplies the three losses by.
WEIGHTS = {"heatmap": 1.0, "size": 0.1, "offset": 1.0}


def centernet_losses(output: Mapping[str, Tensor], targets: CenterTargets) -> dict[str, Tensor]:
    """The three losses, unweighted; `WEIGHTS` are the published weights.

    `heatmap`: a focal loss (alpha 2, beta 4), the sum over all places divided by the number of
    peaks. With p the probability and y the target it is `-(1 - p)^2 log p` at a peak and
    `-(1 - y)^4 p^2 log(1 - p)` elsewhere; taken from the logits, so that no probability has to be
    kept off 0 and 1. A batch without an object is divided by 1: all of it is background.

    `size`, `offset`: the mean distance of the two numbers from their targets over the objects, in
    cells, 0 with a zero gradient where there is none. As the authors' code has it: the paper adds
    the two numbers up, which is twice that.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w).
        targets: Of the same grid.

    Raises:
        UserError: Shapes, types or devices that do not fit.
    """
    _check_maps(output, targets)
    return {
        "heatmap": _focal(output["heatmap"], targets),
        "size": _at_peaks(output["size"], targets.size, targets),
        "offset": _at_peaks(output["offset"], targets.offset, targets),
    }


def _focal(logits: Tensor, targets: CenterTargets) -> Tensor:
    logits = logits.to(wide_type(logits))
    if targets.counted is not None:
        # Their gradient must be 0 even where they are not finite.
        logits = logits.masked_fill(~targets.counted, 0.0)
    peak = targets.heatmap == 1
    # Away from what is right: 1 - p at a peak, p elsewhere; -log(1 - that) is its softplus.
    wrong = torch.where(peak, -logits, logits)
    blame = torch.where(peak, 1.0, (1 - targets.heatmap) ** 4)
    if targets.counted is not None:
        blame = blame.masked_fill(~targets.counted, 0.0)
    total = (blame * wrong.sigmoid().square() * F.softplus(wrong)).sum()
    return total / peak.sum().clamp(min=1)


def _at_peaks(maps: Tensor, truth: Tensor, targets: CenterTargets) -> Tensor:
    found = maps.flatten(2)[targets.image_of, :, targets.cell].to(wide_type(maps))  # (M, 2)
    # Filled before the distance is taken: the derivative of that is no number at NaN.
    gap = (found - truth).masked_fill(~targets.valid[:, None], 0.0)
    return gap.abs().sum() / (2 * targets.valid.sum()).clamp(min=1)


def _check_maps(output: Mapping[str, Tensor], targets: CenterTargets) -> None:
    what = "centernet_losses"
    images, _, *grid = targets.heatmap.shape
    expected = {
        "heatmap": tuple(targets.heatmap.shape),
        "size": (images, 2, *grid),
        "offset": (images, 2, *grid),
    }
    for name, shape in expected.items():
        if tuple(output[name].shape) != shape:
            raise UserError(f"{what}: {name} must be {shape}, got {tuple(output[name].shape)}")
    maps = {name: output[name] for name in expected}
    floating(what, **maps)
    one_device(what, **maps, targets=targets.heatmap)
