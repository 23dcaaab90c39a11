"""Feature losses: hints, and imitation in the cells of a mask, such as cells near objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from kd.errors import UserError
from kd.losses._checks import check_mask, check_pair, dtype_name, wide_dtype

CHUNK = 1 << 22  # number of intersections computed at a time: 16 MiB of float32
# Relative margin by which an IoU must exceed the limit. IoUs equal to the limit are common (all
# anchors of twice a box's side that contain the box have an IoU of 1/4) and must not pass by
# rounding.
TIE = 1e-5


def hint(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean squared error between the features of student and teacher.

    Romero et al., 2015, https://arxiv.org/abs/1412.6550, use half the squared norm of the
    difference. The mean over all elements is used here, so that the loss does not depend on the
    size of the map. It is 0 with a zero gradient if N is 0 or no cell is valid.

    Args:
        student: Adapted features, (N, ...).
        teacher: Features of the same shape.
        valid: For features (N, C, H, W), the cells to include, bool (N, H, W); None = all.
    """
    check_pair("hint", student, teacher, dimensions=student.ndim if valid is None else 4)
    dtype = wide_dtype(student, teacher)
    if valid is not None:
        check_mask("hint", "valid", valid, student, like="student")
        gap = (student.to(dtype) - teacher.to(dtype)).masked_fill(~valid[:, None], 0.0)
        return gap.square().sum() / (valid.sum() * student.shape[1]).clamp(min=1)
    total = F.mse_loss(student.to(dtype), teacher.to(dtype), reduction="sum")
    return total / max(student.numel(), 1)


def imitation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Half the squared error between features, summed over channels and averaged over a mask.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609: the sum of `(teacher - student)^2` is
    divided by twice the number of mask cells in the batch. For detectors the mask contains cells
    near objects; for context teachers it is a ring around the hidden object. The loss is 0 with a
    zero gradient if the mask is empty.

    Args:
        student: Adapted features, (N, C, H, W).
        teacher: Features, (N, C, H, W).
        mask: Cells to include, bool (N, H, W), or non-negative cell weights, float (N, H, W). At
            excluded cells the features need not be finite.
    """
    check_pair("imitation", student, teacher, dimensions=4)
    check_mask("imitation", "mask", mask, student, like="student", weights=True)
    dtype = wide_dtype(student, teacher)
    outside = ~(mask > 0)
    if torch.compiler.is_compiling():  # because the compiler can fuse the plain formula
        gap = student.to(dtype) - teacher
        squares: Tensor = gap.masked_fill(outside[:, None], 0.0).square().sum(dim=1)
    else:
        squares = _Distances.apply(student, teacher, outside, dtype)
    if mask.dtype != torch.bool:
        squares = squares * mask.to(dtype)
    places = mask.sum(dtype=dtype)
    return squares.sum() / (2 * places.where(places > 0, 1.0))


class _Distances(torch.autograd.Function):
    """Squared feature distance in each cell, (N, H, W), 0 in cells outside the mask.

    The backward pass recomputes the difference of the features, which plain autograd would store.
    Plain autograd would also need an extra pass to clear non-finite values outside the mask, where
    the gradient would be 0 times NaN.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, outside: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, outside)
        ctx.dtype = dtype
        gap = student.to(dtype) - teacher
        return gap.square_().sum(dim=1).masked_fill_(outside, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """Return twice the difference for the student, and the negative of that for the teacher."""
        student, teacher, outside = ctx.saved_tensors
        gap = student.to(ctx.dtype) - teacher
        gap.mul_(2 * upstream[:, None]).masked_fill_(outside[:, None], 0.0)
        need_student, need_teacher = ctx.needs_input_grad[:2]
        student_grad = gap.to(student.dtype) if need_student else None
        teacher_grad = (-gap).to(teacher.dtype) if need_teacher else None
        return student_grad, teacher_grad, None, None


def anchor_grid(
    height: int,
    width: int,
    *,
    stride: float,
    sides: Sequence[tuple[float, float]],
    offset: float = 0.5,
    device: torch.device | None = None,
) -> Tensor:
    """Compute the K anchors of each cell of a grid: (H, W, K, 4), xyxy pixels.

    Args:
        height: Number of rows, H.
        width: Number of columns, W.
        stride: Pixels between neighbouring cells.
        sides: Width and height of each anchor, pixels.
        offset: Position of the anchors' centre in the cell, in strides; 0 for torchvision's
            detectors, whose anchors are centred at the cells' upper left corners.
        device: Device of the result.
    """
    x, y = ((torch.arange(count, device=device) + offset) * stride for count in (width, height))
    centres = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]  # (H, W, 1, 2)
    half = torch.tensor(sides, device=device, dtype=centres.dtype).view(-1, 2) / 2
    return torch.cat([centres - half, centres + half], dim=-1)


def imitation_mask(boxes: Sequence[Tensor], anchors: Tensor, *, psi: float = 0.5) -> Tensor:
    """Select the cells with an anchor that overlaps an object nearly as well as the best anchor.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609: a box selects a cell if an anchor of the
    cell has an IoU with the box strictly above `psi` times the box's largest IoU with any anchor,
    including anchors outside the image. The mask is the union over boxes. With psi = 0 it contains
    all cells with an anchor that overlaps a box; with psi = 1 it is empty. Coordinates are
    continuous: a box from 0 to 16 is 16 wide.

    For a feature pyramid, call this function once per level with the level's anchors and only the
    boxes assigned to the level; on other levels they would select background.

    Args:
        boxes: Boxes of each image, (G, 4), xyxy pixels; G may be 0. Boxes may extend beyond the
            image. A box without area, or that overlaps no anchor, selects no cells.
        anchors: (H, W, K, 4), xyxy pixels, as a grid: x depends on column and anchor only, y on row
            and anchor only, and each of the K anchors has the same size in all cells.
        psi: Fraction of the largest IoU, 0..1.

    Returns:
        Bool, (N, H, W); all False for an image without boxes.

    Raises:
        UserError: Shapes do not match, or psi is out of range. On the CPU also if anchors are not a
            grid, or boxes are not finite or have swapped corners. This is not checked under
            `torch.compile` or on an accelerator, where reading values would synchronise. There,
            invalid boxes select no cells, and invalid anchors give a wrong mask.
    """
    _check_mask(boxes, anchors, psi)
    # An intersection is a width, which depends on the column, times a height, which depends on the
    # row. For anchors of one size the IoU grows with it, so that the largest width and height give
    # the largest IoU. What remains is one product and one comparison per cell and anchor.
    dtype = wide_dtype(anchors)
    if anchors.numel() == 0 or not any(len(own) for own in boxes):
        return anchors.new_zeros(len(boxes), *anchors.shape[:2], dtype=torch.bool)
    # The boxes added by padding have no area and select no cells.
    padded = pad_sequence([own.to(anchors.device, dtype) for own in boxes], batch_first=True)
    columns, rows = anchors[0, :, :, 0::2].to(dtype), anchors[:, 0, :, 1::2].to(dtype)
    overlap_x = _overlaps(padded[..., 0], padded[..., 2], columns)  # (N, G, K, W)
    overlap_y = _overlaps(padded[..., 1], padded[..., 3], rows)  # (N, G, K, H)
    sizes = (columns[0, :, 1] - columns[0, :, 0]) * (rows[0, :, 1] - rows[0, :, 0])  # (K,)
    # (N, G, K), the area of the box plus the area of the anchor.
    areas = (padded[..., 2:] - padded[..., :2]).prod(dim=-1, keepdim=True) + sizes
    largest = overlap_x.amax(dim=-1) * overlap_y.amax(dim=-1)
    union = areas - largest
    best = (largest / union.where(union > 0, 1.0)).amax(dim=2, keepdim=True)  # (N, G, 1)
    limit = psi * best * (1 + TIE)  # intersection at which the IoU equals the limit
    return _any_above(overlap_x, overlap_y, limit * areas / (1 + limit))


def _any_above(overlap_x: Tensor, overlap_y: Tensor, least: Tensor) -> Tensor:
    """Mark the cells (N, H, W) where the intersection of any box with any anchor exceeds `least`.

    The intersection is the product of `overlap_x` (N, G, K, W) and `overlap_y` (N, G, K, H).
    `least` (N, G, K) is the limit for each box and anchor.
    """
    images, boxes, anchors_per_cell, width = overlap_x.shape
    height = overlap_y.shape[3]
    found = torch.zeros(images, height, width, dtype=torch.bool, device=least.device)
    step = max(1, CHUNK // (boxes * height * width))
    for first in range(0, images, step):
        part = slice(first, first + step)
        # One anchor at a time, so that the intersections fit into the processor's cache.
        for anchor in range(anchors_per_cell):
            product = overlap_y[part, :, anchor, :, None] * overlap_x[part, :, anchor, None, :]
            found[part] |= (product > least[part, :, anchor, None, None]).any(dim=1)
    return found


def _overlaps(low: Tensor, high: Tensor, spans: Tensor) -> Tensor:
    """Lengths (N, G, K, L) of the intersections of intervals (N, G) with anchor spans (L, K, 2)."""
    spans = spans.transpose(0, 1)  # (K, L, 2)
    first = torch.maximum(low[..., None, None], spans[..., 0])
    last = torch.minimum(high[..., None, None], spans[..., 1])
    return (last - first).clamp(min=0.0)


def _check_mask(boxes: Sequence[Tensor], anchors: Tensor, psi: float) -> None:
    if anchors.ndim != 4 or anchors.shape[-1] != 4:
        raise UserError(f"imitation_mask: anchors must be (H, W, K, 4), got {tuple(anchors.shape)}")
    if not 0 <= psi <= 1:
        raise UserError(f"imitation_mask: psi must be in 0..1, got {psi}")
    for image, own in enumerate(boxes):
        what = f"imitation_mask: boxes of image {image}"
        if own.ndim != 2 or own.shape[1] != 4:
            raise UserError(
                f"{what} must be (G, 4), got {tuple(own.shape)}; use (0, 4) for no boxes"
            )
        if own.dtype == torch.bool or own.is_complex():
            raise UserError(f"{what} must be coordinates, got {dtype_name(own.dtype)}")
    if torch.compiler.is_compiling():  # because tensors have no values while they are traced
        return
    if anchors.is_cpu and not _is_grid(anchors):
        raise UserError(
            "imitation_mask: anchors must be a grid: x must be the same in every row, y the same "
            "in every column, and each of the K anchors must have one size"
        )
    for image, own in enumerate(boxes):
        if not own.is_cpu:
            continue
        valid = (own[:, 2:] >= own[:, :2]).all(dim=1) & own.isfinite().all(dim=1)
        if not valid.all():
            number = int((~valid).nonzero()[0])
            raise UserError(
                f"imitation_mask: boxes of image {image} must be finite, with x1 <= x2 and "
                f"y1 <= y2; box {number} is {own[number].tolist()}"
            )


def _is_grid(anchors: Tensor) -> bool:
    sizes = anchors[..., 2:] - anchors[..., :2]
    return bool(
        (anchors[..., 0::2] == anchors[:1, :, :, 0::2]).all()
        and (anchors[..., 1::2] == anchors[:, :1, :, 1::2]).all()
        # Not equality, because the rounding error of a size depends on the anchor's position.
        and ((sizes - sizes[:1, :1]).abs() <= 1e-4 * (1 + sizes[:1, :1].abs())).all()
        and (sizes >= 0).all()
    )
