"""Affinities between places of a feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.errors import UserError
from kd.losses._checks import floating, one_device, positive, wide_type


def pair_wise(
    student: Tensor, teacher: Tensor, *, kernel: int | tuple[int, int] = 2, pool: str = "max"
) -> Tensor:
    """Squared difference of the cosine affinities between all pairs of nodes.

    Liu et al., 2019, https://arxiv.org/abs/1903.04197: `sum_ij (a_ij^s - a_ij^t)^2 / (h*w)^2`. The
    paper pools by averages, its authors' code by maxima; both are here.

    With unit columns S and T, one per node, the sum is `|S^T S - T^T T|^2`, which equals
    `|S S^T|^2 - 2 |S T^T|^2 + |T T^T|^2`: products of channels by channels. The cheaper of the two
    forms is taken, by shape.

    Args:
        student: Features, (N, Cs, H, W).
        teacher: Features, (N, Ct, H, W); the channels may differ from the student's.
        kernel: Pooling window and stride, in places, or (height, width); 1 pools nothing. The last
            window may hang over the edge.
        pool: "max" or "average".

    Returns:
        Scalar, the mean over N; 0 with a zero gradient where N is 0.

    Raises:
        UserError: Grids, batches or devices that differ, integers, an unknown pooling, a kernel
            below 1.
    """
    _check(student, teacher, kernel, pool)
    # Half precision would drown the small differences, and the cancellation of the channel form.
    wide = wide_type(student, teacher)
    with torch.autocast(student.device.type, enabled=False):
        nodes_student = _nodes(student.to(wide), kernel, pool)  # (N, Cs, h*w)
        nodes_teacher = _nodes(teacher.to(wide), kernel, pool)  # (N, Ct, h*w)
        count = nodes_student.shape[2]
        channels = nodes_student.shape[1], nodes_teacher.shape[1]
        across = channels[0] ** 2 + channels[0] * channels[1] + channels[1] ** 2
        if across < count * sum(channels):
            total = _by_channels(nodes_student, nodes_teacher)
        else:
            total = _by_nodes(nodes_student, nodes_teacher)
        return total / (count**2 * max(len(student), 1))


def _nodes(features: Tensor, kernel: int | tuple[int, int], pool: str) -> Tensor:
    """Pooled and normalised, one unit column per node: (N, C, h*w)."""
    window = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
    if window == (1, 1):
        pooled = features
    elif pool == "max":
        # A maximum overlooks -inf, which must show: the second term is 0, or NaN.
        pooled = F.max_pool2d(features, window, window, ceil_mode=True)
        pooled = pooled + 0.0 * features.detach().sum()
    else:
        pooled = F.avg_pool2d(features, window, window, ceil_mode=True)
    return F.normalize(pooled.flatten(2), dim=1)


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
