"""Pair-wise distillation of the similarities between the cells of a feature map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import check_device, check_floating, check_mask, check_positive, wide_dtype

# Feature vectors of at most this length are treated as zero, because their gradient grows as
# 1 / length and would dominate all others. Its square does not underflow in float32.
SHORTEST = 1e-6


def pair_wise(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: int | tuple[int, int] = 2,
    pool: str = "max",
    valid: Tensor | None = None,
) -> Tensor:
    """Squared error of the cosine similarities between all pairs of nodes, averaged over N.

    A node is the feature vector of a cell after pooling to h x w cells. Liu et al., 2019,
    https://arxiv.org/abs/1903.04197: the loss is `sum_ij (a_ij^s - a_ij^t)^2 / (h*w)^2`, where
    `a_ij` is the cosine of nodes i and j of student (s) or teacher (t). The paper uses average
    pooling, the authors' code max pooling. A node of length at most `SHORTEST` has no direction:
    its similarities, also with itself, and its gradient are 0.

    Args:
        student: Features, (N, Cs, H, W).
        teacher: Features, (N, Ct, H, W); Ct may differ from Cs.
        kernel: Pooling window and stride in cells, one number or (height, width); 1 = no pooling.
            The last window may extend beyond the edge.
        pool: "max" or "average".
        valid: Cells to include, bool (N, H, W); None = all. A node is pooled from the valid cells
            of its window. Nodes without valid cells are excluded from the sum and from `h*w`.

    Returns:
        Scalar, the mean over the images that have a valid cell; 0 with a zero gradient if none has.
    """
    _check(student, teacher, kernel, pool)
    if valid is not None:
        check_mask("pair_wise", "valid", valid, student, like="student")
    # Half precision is too coarse for differences of similarities and for `_by_channels`.
    dtype = wide_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        nodes = [_nodes(side.to(dtype), kernel, pool, valid) for side in (student, teacher)]
        if valid is not None:
            return _summed(*nodes) / valid.flatten(1).any(dim=1).sum().clamp(min=1)
        return _summed(*nodes) / (nodes[0].shape[2] ** 2 * max(len(student), 1))


def _nodes(
    features: Tensor, kernel: int | tuple[int, int], pool: str, valid: Tensor | None
) -> Tensor:
    """Pool features and scale each node to unit length: (N, C, h*w).

    With `valid`, nodes without a valid cell are 0, so that their similarities are 0. An image's n
    other nodes are divided by sqrt(n), which divides the sum over their pairs by n^2.
    """
    window = (kernel, kernel) if isinstance(kernel, int) else (kernel[0], kernel[1])
    if valid is None:
        return _directions(_pooled(features, window, pool).flatten(2))
    void = ~valid[:, None]  # (N, 1, H, W)
    pooled = _pooled(features.masked_fill(void, 0.0), window, pool, void)
    counts = F.max_pool2d(valid[:, None].to(features), window, window, ceil_mode=True) > 0
    columns = _directions(pooled.masked_fill(~counts, 0.0).flatten(2))
    number = counts.sum(dim=(2, 3)).clamp(min=1).to(features)  # (N, 1)
    return columns * number.rsqrt()[..., None]


def _directions(columns: Tensor) -> Tensor:
    """Scale columns (N, C, h*w) to length 1, or to 0 if their length is at most `SHORTEST`."""
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    return columns / lengths.masked_fill(lengths <= SHORTEST, math.inf)


def _pooled(
    features: Tensor, window: tuple[int, int], pool: str, void: Tensor | None = None
) -> Tensor:
    """Pool each window of the features, (N, C, h, w); void cells must already be 0."""
    if window == (1, 1):
        return features
    if pool == "average":
        # Zeros of void cells shorten an average but keep its direction, and only that is used.
        # Without count_include_pad=False, torch.compile's backward pass divides windows over the
        # edge by their full size: https://github.com/pytorch/pytorch/issues/198119.
        return F.avg_pool2d(features, window, window, ceil_mode=True, count_include_pad=False)
    candidates = features if void is None else features.masked_fill(void, -math.inf)
    # A maximum ignores -inf. If the features contain -inf, the second term is NaN: training stops.
    largest = F.max_pool2d(candidates, window, window, ceil_mode=True)
    return largest + 0.0 * features.detach().sum()


def _summed(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum the squared errors of similarities over all images, by the cheaper of two formulas."""
    channels = student.shape[1], teacher.shape[1]
    across = channels[0] ** 2 + channels[0] * channels[1] + channels[1] ** 2
    if across < student.shape[2] * sum(channels):
        return _by_channels(student, teacher)
    return _by_nodes(student, teacher)


def _by_nodes(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of similarities by definition: `|S^T S - T^T T|^2`, in (h*w, h*w) matrices."""
    affinity_student = student.transpose(1, 2) @ student
    affinity_teacher = teacher.transpose(1, 2) @ teacher
    return (affinity_student - affinity_teacher).square().sum()


def _by_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """The same error as `|S S^T|^2 - 2 |S T^T|^2 + |T T^T|^2`, in (C, C) matrices."""
    own = (student @ student.transpose(1, 2)).square().sum()
    both = (student @ teacher.transpose(1, 2)).square().sum()
    other = (teacher @ teacher.transpose(1, 2)).square().sum()
    return own - 2 * both + other


def _check(student: Tensor, teacher: Tensor, kernel: int | tuple[int, int], pool: str) -> None:
    if student.ndim != 4 or teacher.ndim != 4:
        raise UserError(
            "pair_wise: expected features (N, C, H, W), got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}"
        )
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise UserError(
            f"pair_wise: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ "
            "in batch or grid; use a 'resize' adapter to match the grids"
        )
    check_floating("pair_wise", student=student, teacher=teacher)
    check_device("pair_wise", student=student, teacher=teacher)
    if pool not in ("max", "average"):
        raise UserError(f"pair_wise: pool must be 'max' or 'average', got {pool!r}")
    sides = tuple(kernel) if isinstance(kernel, Sequence) else (kernel, kernel)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UserError(f"pair_wise: kernel must be one integer or two integers, got {kernel}")
    for side in sides:
        check_positive("pair_wise", "kernel", side)
