"""CenterNet's training targets and losses (Zhou et al., 2019, https://arxiv.org/abs/1904.07850)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import wide_dtype

CHUNK = 1 << 24  # Gaussian values computed at a time: 64 MiB of float32
OVERLAP = 0.7  # minimum IoU of a box with the box whose corners are shifted by the radius


class CenterTargets(NamedTuple):
    """Training targets for N images, C classes and M objects.

    Attributes:
        heatmap: (N, C, h, w) float32, 1 at peaks (object centres), falling to 0 around them.
            Objects of one class whose centres are in the same cell share a peak.
        loss_mask: (N, C, h, w) bool, False at cells excluded from the heat map's loss; None if no
            cell is excluded.
        cell: (M,) int64, index y * w + x of the cell that contains the object's centre.
        image_of: (M,) int64, index of the object's image.
        size: (M, 2) float32, width and height in cells.
        offset: (M, 2) float32 in [0, 1), x and y of the centre relative to the cell's upper left
            corner.
        valid: (M,) bool, False for objects without a peak, which are excluded from all losses.
    """

    heatmap: Tensor
    loss_mask: Tensor | None
    cell: Tensor
    image_of: Tensor
    size: Tensor
    offset: Tensor
    valid: Tensor


def gaussian_radius(widths: Tensor, heights: Tensor) -> Tensor:
    """Compute the largest shift of a box's corners that keeps the IoU at least `OVERLAP`.

    `widths` (M,), `heights` (M,) and the radius (M,) have the same unit. The radius is the smallest
    of three cases: both corners are shifted outwards, both inwards, or one in each direction (Law
    and Deng, 2018, https://arxiv.org/abs/1808.01244). Each case solves a quadratic equation for its
    smaller root. The published code solves two cases wrongly and takes the larger root. Its radii
    are about three times as large: 2.73 instead of 0.82 for a 10 x 10 box.
    """
    around, area = widths + heights, widths * heights
    # One corner inwards, one outwards: the intersection is (w - r)(h - r), and the union is twice
    # the area minus the intersection.
    shifted = _smaller_root(1.0, around, area * (1 - OVERLAP) / (1 + OVERLAP))
    # Both inwards: (w - 2r)(h - 2r) is `OVERLAP` times the area.
    inside = _smaller_root(4.0, 2 * around, area * (1 - OVERLAP))
    # Both outwards: the area is `OVERLAP` times (w + 2r)(h + 2r).
    spread = (4 * OVERLAP**2 * around**2 + 16 * OVERLAP * (1 - OVERLAP) * area).sqrt()
    outside = (spread - 2 * OVERLAP * around) / (8 * OVERLAP)
    return torch.minimum(torch.minimum(shifted, inside), outside)


def _smaller_root(square: float, linear: Tensor, constant: Tensor) -> Tensor:
    """Smaller root r of `square r^2 - linear r + constant = 0`."""
    spread = (linear.square() - 4 * square * constant).clamp(min=0.0).sqrt()
    return (linear - spread) / (2 * square)


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
) -> CenterTargets:
    """Build the training targets of a batch, with one Gaussian peak per object.

    Where Gaussians of one class overlap, the heat map is their maximum. An object has no peak if
    its centre is outside the grid, its box has no area or is not finite, or its label is -1.
    `kd.nn.detectors.contract` checks the inputs.

    Args:
        boxes: (M, 4), xyxy pixels.
        labels: (M,) int64, 0..C-1. Only ignored boxes may have -1, an unknown class.
        image_of: (M,) int64, 0..N-1, index of the box's image.
        n: Number of images, N.
        num_classes: Number of classes, C.
        grid: Height and width in cells.
        stride: Pixels per cell.
        ignored: (M,) bool, True for regions that may contain more objects, such as crowds. They
            have no peak. Cells centred in such a region are excluded from the loss of its class (of
            all classes if its label is -1), except at peaks of other objects.
    """
    cells, shape = boxes.to(torch.float32) / stride, (n, num_classes, *grid)
    centres, sides = (cells[:, 2:] + cells[:, :2]) / 2, cells[:, 2:] - cells[:, :2]
    valid = (centres >= 0).all(dim=1) & (centres[:, 0] < grid[1]) & (centres[:, 1] < grid[0])
    valid &= ((sides > 0) & sides.isfinite()).all(dim=1) & (labels >= 0)
    if ignored is not None:
        valid &= ~ignored
    centres, sides = (part.where(valid[:, None], 0.0) for part in (centres, sides))
    corner, row = centres.floor(), image_of * num_classes + labels.clamp(min=0)
    radius = gaussian_radius(*sides.ceil().unbind(dim=1)).floor()
    rows, columns = (_gaussian(corner[:, axis], radius, shape[3 - axis]) for axis in (1, 0))
    heatmap = _max_products(rows * valid[:, None], columns, row, n * num_classes).view(shape)
    loss_mask = None
    if ignored is not None:
        row = row.where(labels >= 0, n * num_classes + image_of)
        loss_mask = ~_covered(cells, ignored, row, shape) | (heatmap == 1)
    cell = (corner[:, 1] * grid[1] + corner[:, 0]).long()
    return CenterTargets(heatmap, loss_mask, cell, image_of, sides, centres - corner, valid)


def _gaussian(centre: Tensor, radius: Tensor, length: int) -> Tensor:
    """Gaussians along one dimension of the grid, (M, length), 0 at distances above the radius."""
    away = torch.arange(length, device=centre.device) - centre[:, None]
    deviation = (2 * radius[:, None] + 1) / 6
    value = torch.exp(-away.square() / (2 * deviation.square()))
    return value.masked_fill(away.abs() > radius[:, None], 0.0)


def _max_products(rows: Tensor, columns: Tensor, row: Tensor, count: int) -> Tensor:
    """Compute maps (count, h, w), each the maximum of several outer products.

    The outer product of `rows[m]` (h,) and `columns[m]` (w,), both non-negative, belongs to the map
    `row[m]`.
    """
    maps = rows.new_zeros(count, rows.shape[1], columns.shape[1])
    step = max(1, CHUNK // maps.shape[1:].numel())
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        product = rows[part, :, None] * columns[part, None]
        maps.scatter_reduce_(0, row[part, None, None].expand_as(product), product, "amax")
    return maps


def _covered(boxes: Tensor, ignored: Tensor, row: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Mark the cells (N, C, h, w) whose centres lie in boxes with `ignored` (M,).

    `boxes` (M, 4) is xyxy in cells. `row` (M,) int64 is `image * C + class` of a box, or `N * C +
    image` for a box that covers all classes. `shape` is (N, C, h, w).
    """
    n, num_classes, height, width = shape

    def inside(low: Tensor, high: Tensor, length: int) -> Tensor:
        centre = torch.arange(length, device=low.device) + 0.5
        return ((centre >= low[:, None]) & (centre < high[:, None])).to(boxes.dtype)

    covered = _max_products(
        inside(boxes[:, 1], boxes[:, 3], height) * ignored[:, None],
        inside(boxes[:, 0], boxes[:, 2], width),
        row,
        n * num_classes + n,
    ).bool()
    own, whole = covered[: n * num_classes], covered[n * num_classes :]
    return own.view(shape) | whole[:, None]


def centernet_losses(output: Mapping[str, Tensor], targets: CenterTargets) -> dict[str, Tensor]:
    """Compute CenterNet's unweighted losses by name: `heatmap`, `size` and `offset`.

    `heatmap` is a focal loss (alpha 2, beta 4), summed over all cells and divided by the number of
    peaks, or by 1 without peaks. For probability p and target y it is `-(1 - p)^2 log p` at a peak
    and `-(1 - y)^4 p^2 log(1 - p)` elsewhere.

    `size` and `offset` are absolute errors in cells, averaged over objects and over the two
    coordinates; without objects they are 0 with a zero gradient. The authors' code averages over
    the coordinates too, while the paper sums over them. The published weights are 1, 0.1 and 1.

    Args:
        output: `heatmap` (N, C, h, w), logits; `size` and `offset` (N, 2, h, w).
        targets: Targets on the same grid.
    """
    return {
        "heatmap": _focal(output["heatmap"], targets),
        "size": _l1_at_peaks(output["size"], targets.size, targets),
        "offset": _l1_at_peaks(output["offset"], targets.offset, targets),
    }


def _focal(logits: Tensor, targets: CenterTargets) -> Tensor:
    logits = logits.to(wide_dtype(logits))
    if targets.loss_mask is not None:
        # The gradient at excluded cells must be 0 even where logits are not finite.
        logits = logits.masked_fill(~targets.loss_mask, 0.0)
    peak = targets.heatmap == 1
    # Logit of the error, which is 1 - p at a peak and p elsewhere; its softplus is -log(1 - error).
    away = torch.where(peak, -logits, logits)
    weight = torch.where(peak, 1.0, (1 - targets.heatmap) ** 4)
    if targets.loss_mask is not None:
        weight = weight.masked_fill(~targets.loss_mask, 0.0)
    total = (weight * away.sigmoid().square() * F.softplus(away)).sum()
    return total / peak.sum().clamp(min=1)


def _l1_at_peaks(maps: Tensor, truth: Tensor, targets: CenterTargets) -> Tensor:
    found = maps.flatten(2)[targets.image_of, :, targets.cell].to(wide_dtype(maps))  # (M, 2)
    # Fill before `abs`, because the derivative of `abs` at NaN is not finite.
    gap = (found - truth).masked_fill(~targets.valid[:, None], 0.0)
    return gap.abs().sum() / (2 * targets.valid.sum()).clamp(min=1)
