"""Affinities between places of a feature map."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import floating, mask_fits, one_device, positive, wide_type

# A shorter node has no direction: to turn it takes next to nothing, so that its gradient, which
# grows as one over its length, would drown all others. In float32, whose squares reach 1e-38, its
# length is still exact.
SHORTEST = 1e-6


def pair_wise(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: int | tuple[int, int] = 2,
    pool: str = "max",
    valid: Tensor | None = None,
) -> Tensor:
    """Squared difference of the cosine affinities between all pairs of nodes.

    Liu et al., 2019, https://arxiv.org/abs/1903.04197: `sum_ij (a_ij^s - a_ij^t)^2 / (h*w)^2`. The
    paper pools by averages, its authors' code by maxima; both are here.

    With unit columns S and T, one per node, the sum is `|S^T S - T^T T|^2`, which equals
    `|S S^T|^2 - 2 |S T^T|^2 + |T T^T|^2`: products of channels by channels. The cheaper of the two
    forms is taken, by shape.

    A node that is 0, or shorter than `SHORTEST`, has no direction: its affinity to all is 0, itself
    included, and so is its gradient.

    Args:
        student: Features, (N, Cs, H, W).
        teacher: Features, (N, Ct, H, W); the channels may differ from the student's.
        kernel: Pooling window and stride, in places, or (height, width); 1 pools nothing. The last
            window may hang over the edge.
        pool: "max" or "average".
        valid: Places that take part, bool (N, H, W); all of them where not given. A node is pooled
            from its valid places; one without any does not count, in `h*w` either.

    Returns:
        Scalar, the mean over N, or over the images with a valid place; 0 with a zero gradient where
        there are none.

    Raises:
        UserError: Grids, batches or devices that differ, integers, an unknown pooling, a kernel
            below 1, or a mask that is not bool.
    """
    _check(student, teacher, kernel, pool)
    if valid is not None:
        mask_fits("pair_wise", "valid", valid, student, beside="student")
    # Half precision would drown the small differences, and the cancellation of the channel form.
    wide = wide_type(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        nodes = [_nodes(side.to(wide), kernel, pool, valid) for side in (student, teacher)]
        if valid is not None:
            return _summed(*nodes) / valid.flatten(1).any(dim=1).sum().clamp(min=1)
        return _summed(*nodes) / (nodes[0].shape[2] ** 2 * max(len(student), 1))


def _nodes(
    features: Tensor, kernel: int | tuple[int, int], pool: str, valid: Tensor | None
) -> Tensor:
    """Pooled and normalised, one unit column per node: (N, C, h*w).

    With a mask, nodes that do not count are columns of zeros, which have the affinity 0 on both
    sides. The columns of an image with n others are divided by the root of n: that divides its sum
    by n^2, in either form.
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
    """Columns (N, C, h*w) at length 1; those too short for a direction are 0, their gradient too.

    A column that is not finite gives NaN, which shows.
    """
    lengths: Tensor = torch.linalg.vector_norm(columns, dim=1, keepdim=True)
    return columns / lengths.masked_fill(lengths <= SHORTEST, math.inf)


def _pooled(
    features: Tensor, window: tuple[int, int], pool: str, void: Tensor | None = None
) -> Tensor:
    """What each window holds: (N, C, h, w). Void places hold 0 already."""
    if window == (1, 1):
        return features
    if pool == "average":
        # Zeros shorten an average but do not turn it, and a node is a direction.
        # Nothing is padded; but told that it counts, torch.compile's backward pass divides windows
        # over the edge by their full size: https://github.com/pytorch/pytorch/issues/198119.
        return F.avg_pool2d(features, window, window, ceil_mode=True, count_include_pad=False)
    seen = features if void is None else features.masked_fill(void, -math.inf)
    # A maximum overlooks -inf, which must show: the second term is 0, or NaN.
    largest = F.max_pool2d(seen, window, window, ceil_mode=True)
    return largest + 0.0 * features.detach().sum()


def _summed(student: Tensor, teacher: Tensor) -> Tensor:
    """Of all images, by the form that takes fewer products."""
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
    """The same number from (C, C) products; never forms a matrix of nodes by nodes."""
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
            "in batch or grid; a 'resize' adapter brings the student to the teacher's grid"
        )
    floating("pair_wise", student=student, teacher=teacher)
    one_device("pair_wise", student=student, teacher=teacher)
    if pool not in ("max", "average"):
        raise UserError(f"pair_wise: pool must be 'max' or 'average', got {pool!r}")
    sides = tuple(kernel) if isinstance(kernel, Sequence) else (kernel, kernel)
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UserError(f"pair_wise: kernel must be a whole number or two, got {kernel}")
    for side in sides:
        positive("pair_wise", "kernel", side)
