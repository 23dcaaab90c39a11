"""Compare a detector's outputs for given boxes between student and teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import check_pair


def box_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 distance between box regressions, summed over the coordinates of each box.

    Girshick, 2015, https://arxiv.org/abs/1504.08083, uses this distance to compare a detector with
    the ground truth. Here it compares a student with a teacher, as in an ablation of Wang et al.,
    2019, https://arxiv.org/abs/1906.03609.

    Args:
        student: Regressed coordinates of M boxes, (M, 4) or more generally (M, D).
        teacher: Regressed coordinates of the same boxes, in the same shape.

    Returns:
        Scalar, the mean over M; 0 with a zero gradient if M is 0.
    """
    check_pair("box_distance", student, teacher, dimensions=2)
    return F.smooth_l1_loss(student, teacher.to(student), reduction="sum") / max(len(student), 1)


def own_class_deltas(rows: Tensor, labels: Tensor) -> Tensor:
    """Select for each box the regression for the box's class.

    The regressions for the other classes are not trained.

    Args:
        rows: Regressions of M boxes, (M, 4 (C + 1)): four values per class, background first.
        labels: Class of each box, 0..C-1, (M,) int64.

    Returns:
        (M, 4).
    """
    index = (labels + 1)[:, None, None].expand(-1, 1, 4)
    by_class: Tensor = rows.view(len(rows), rows.shape[1] // 4, 4)
    return by_class.gather(1, index)[:, 0]


def known_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exclude the rows for which the teacher has no output from a mean.

    In these rows both tensors are set to 0, so that the rows add nothing to loss or gradient.
    Removing the rows would synchronise with the accelerator, since their number would have to be
    read.

    Args:
        student: Logits, (M, C).
        teacher: Logits or log-probabilities, (M, C); NaN in rows without output.

    Returns:
        The student's and the teacher's tensor with these rows set to 0, and the factor by which a
        mean over all M rows must be multiplied to get the mean over the remaining rows.
    """
    unknown = teacher.isnan().any(dim=1)
    factor = len(unknown) / (~unknown).sum().clamp(min=1)
    mask = unknown[:, None]
    return student.masked_fill(mask, 0.0), teacher.masked_fill(mask, 0.0), factor
