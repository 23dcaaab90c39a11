"""Distillation losses of a detector's outputs for the same boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import check_pair


def box_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 distance between box regressions, summed over each row.

    Girshick, 2015, https://arxiv.org/abs/1504.08083, uses it to compare a detector with the ground
    truth; here it compares a student with a teacher, as in an ablation of Wang et al., 2019,
    https://arxiv.org/abs/1906.03609.

    Args:
        student: (M, 4) or any other (M, D).
        teacher: The same shape.

    Returns:
        Scalar, the mean over M; 0 with a zero gradient where M is 0.
    """
    check_pair("box_distance", student, teacher, dimensions=2)
    return F.smooth_l1_loss(student, teacher.to(student), reduction="sum") / max(len(student), 1)


def own_class_deltas(rows: Tensor, labels: Tensor) -> Tensor:
    """Select each box's regression for its own class, (M, 4); the others are untrained.

    Args:
        rows: (M, 4 (C + 1)), four numbers per class, background first.
        labels: 0..C-1, (M,) int64.
    """
    index = (labels + 1)[:, None, None].expand(-1, 1, 4)
    by_class: Tensor = rows.view(len(rows), rows.shape[1] // 4, 4)
    return by_class.gather(1, index)[:, 0]


def known_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exclude rows without teacher output from a mean: zero them, and rescale the mean.

    Zeros on both sides add nothing to loss or gradient. Dropping the rows would synchronise with
    the accelerator, since their number would have to be read.

    Args:
        student: Logits, (M, C).
        teacher: Logits or log-probabilities, (M, C); NaN in rows without output.

    Returns:
        Student, teacher, and the factor that turns a mean over M rows into one over the others.
    """
    unknown = teacher.isnan().any(dim=1)
    factor = len(unknown) / (~unknown).sum().clamp(min=1)
    mask = unknown[:, None]
    return student.masked_fill(mask, 0.0), teacher.masked_fill(mask, 0.0), factor
