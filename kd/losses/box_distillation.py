"""Distillation losses of a detector's outputs for the same boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import check_pair


def box_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 distance between box regressions, summed over each row.

    Girshick, 2015, https://arxiv.org/abs/1504.08083, where it compares a detector with the ground
    truth; here with a teacher (Wang et al., 2019, https://arxiv.org/abs/1906.03609, the ablation's
    distilled outputs).

    Args:
        student: (M, 4) or any other (M, D).
        teacher: The same shape.

    Returns:
        Scalar, the mean over M; 0 with a zero gradient where M is 0.
    """
    check_pair("box_distance", student, teacher, dimensions=2)
    return F.smooth_l1_loss(student, teacher.to(student), reduction="sum") / max(len(student), 1)


def own_class_deltas(rows: Tensor, labels: Tensor) -> Tensor:
    """Select each box's regression for its own class, (M, 4); those for others are untrained.

    Args:
        rows: (M, 4 (C + 1)), four numbers per class, background first.
        labels: 0..C-1, (M,) int64.
    """
    index = (labels + 1)[:, None, None].expand(-1, 1, 4)
    by_class: Tensor = rows.view(len(rows), rows.shape[1] // 4, 4)
    return by_class.gather(1, index)[:, 0]


def known_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero the rows that the teacher does not know, and rescale a mean over all rows.

    Dropping them would synchronise with the accelerator to learn their number. Zeros on both sides
    add nothing to loss or gradient.

    Args:
        student: Logits, (M, C).
        teacher: Logits or log-probabilities, (M, C); NaN where unknown.

    Returns:
        Student, teacher, and the factor that turns a mean over M rows into one over known rows.
    """
    unknown = teacher.isnan().any(dim=1)
    factor = len(unknown) / (~unknown).sum().clamp(min=1)
    mask = unknown[:, None]
    return student.masked_fill(mask, 0.0), teacher.masked_fill(mask, 0.0), factor
