"""Compare a student detector's outputs for given boxes with those of a teacher."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import check_pair


def box_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 distance between the box regressions of a student and a teacher.

    The distance is summed over a box's coordinates and averaged over the M boxes. If M is 0, it is
    0 with a zero gradient. Girshick, 2015, https://arxiv.org/abs/1504.08083, uses smooth L1 as a
    detection loss; an ablation of Wang et al., 2019, https://arxiv.org/abs/1906.03609, uses it for
    distillation.

    Args:
        student: Regressed coordinates, (M, 4) or more generally (M, D).
        teacher: Regressed coordinates of the same boxes, in the same shape.
    """
    check_pair("box_distance", student, teacher, dimensions=2)
    return F.smooth_l1_loss(student, teacher.to(student), reduction="sum") / max(len(student), 1)


def own_class_deltas(rows: Tensor, labels: Tensor) -> Tensor:
    """Select each box's regression for the class of the box: (M, 4 (C + 1)) to (M, 4).

    `rows` has four values per class, background first. `labels` (M,) int64 is the class, 0..C-1.
    """
    index = (labels + 1)[:, None, None].expand(-1, 1, 4)
    by_class: Tensor = rows.view(len(rows), rows.shape[1] // 4, 4)
    return by_class.gather(1, index)[:, 0]


def known_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Set the rows in which the teacher is NaN to 0, so that they have no loss or gradient.

    Both inputs are (M, C). The rows are not removed, because counting them would synchronise with
    the accelerator. The third result is the factor that turns a mean over all M rows into a mean
    over the remaining rows.
    """
    unknown = teacher.isnan().any(dim=1)
    factor = len(unknown) / (~unknown).sum().clamp(min=1)
    mask = unknown[:, None]
    return student.masked_fill(mask, 0.0), teacher.masked_fill(mask, 0.0), factor
