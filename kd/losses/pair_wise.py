"""Pair-wise distillation: affinities between the cells of a feature map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import check_device, check_floating, check_mask, check_positive, wide_dtype

# Nodes not longer than this count as zero: their gradient grows as 1 / length and would dominate
# all others. The square of this length is still exact in float32, which reaches 1e-38.
SHORTEST = 1e-6


def pair_wise(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: int | tuple[int, int] = 2,
    pool: str = "max",
    valid: Tensor | None = None,
) -> Tensor:
    """Squared error of the cosine affinities between all pairs of nodes.

    Liu et al., 2019, https://arxiv.org/abs/1903.04197: `sum_ij (a_ij^s - a_ij^t)^2 / (h*w)^2`. The
    paper pools by averages, its authors' code by maxima; both are available.

    With unit columns S and T, one per node, the sum is `|S^T S - T^T T|^2`, which equals `|S S^T|^2
    - 2 |S T^T|^2 + |T T^T|^2`: products of channels by channels. The cheaper form is chosen by
    shape.

    A node no longer than `SHORTEST` has no direction: all its affinities, including that to itself,
    and its gradient are 0.

    Args:
        student: Features, (N, Cs, H, W).
        teacher: Features, (N, Ct, H, W); Ct may differ from Cs.
        kernel: Pooling window and stride in cells, one number or (height, width); 1 = no pooling.
            The last window may extend beyond the edge.
        pool: "max" or "average".
        valid: Cells to include, bool (N, H, W); None = all. A node is pooled from the valid cells
            of its window; nodes without valid cells do not count, also not in `h*w`.

    Returns:
        Scalar, the mean over N, or over the images with a valid cell; 0 with a zero gradient if
        there are none.
    """
    _check(student, teacher, kernel, pool)
    if valid is not None:
        check_mask("pair_wise", "valid", valid, student, like="student")
    # Half precision is too coarse for the small differences and the channel form's cancellation.
    dtype = wide_dtype(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        nodes = [_nodes(side.to(dtype), kernel, pool, valid) for side in (student, teacher)]
        if valid is not None:
            return _summed(*nodes) / valid.flatten(1).any(dim=1).sum().clamp(min=1)
        return _summed(*nodes) / (nodes[0].shape[2] ** 2 * max(len(student), 1))


def _nodes(
    features: Tensor, kernel: int | tuple[int, int], pool: str, valid: Tensor | None
) -> Tensor:
    """Pooled and normalised features, one unit column per node: (N, C, h*w).

    With a mask, nodes without a valid cell are zero columns, which have affinity 0 on both sides.
    An image's n other columns are divided by sqrt(n), which divides its sum by n^2 in either form.
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
    """Scale columns (N, C, h*w) to length 1; too short columns become 0, and NaN stays NaN."""
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    return columns / lengths.masked_fill(lengths <= SHORTEST, math.inf)


def _pooled(
    features: Tensor, window: tuple[int, int], pool: str, void: Tensor | None = None
) -> Tensor:
    """Pool each window: (N, C, h, w). Void cells must be 0 already."""
    if window == (1, 1):
        return features
    if pool == "average":
        # Zeros shorten an average but do not change its direction, which is all that counts.
        # Nothing is padded, but with count_include_pad=True torch.compile's backward pass divides
        # windows over the edge by their full size: https://github.com/pytorch/pytorch/issues/198119.
        return F.avg_pool2d(features, window, window, ceil_mode=True, count_include_pad=False)
    candidates = features if void is None else features.masked_fill(void, -math.inf)
    # A maximum ignores -inf; the second term is NaN then, so that such features are noticed.
    largest = F.max_pool2d(candidates, window, window, ceil_mode=True)
    return largest + 0.0 * features.detach().sum()


def _summed(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over all images, by the form with fewer products."""
    channels = student.shape[1], teacher.shape[1]
    across = channels[0] ** 2 + channels[0] * channels[1] + channels[1] ** 2
    if across < student.shape[2] * sum(channels):
        return _by_channels(student, teacher)
    return _by_nodes(student, teacher)


def _by_nodes(student: Tensor, teacher: Tensor) -> Tensor:
    """The definition: two (h*w, h*w) affinity matrices."""
    affinity_student = student.transpose(1, 2) @ student
    affinity_teacher = teacher.transpose(1, 2) @ teacher
    return (affinity_student - affinity_teacher).square().sum()


def _by_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """The same number from (C, C) products instead of affinity matrices."""
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
        raise UserError(f"pair_wise: kernel must be an integer or two, got {kernel}")
    for side in sides:
        check_positive("pair_wise", "kernel", side)
