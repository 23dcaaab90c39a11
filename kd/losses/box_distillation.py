"""Distance between what two detectors say of the same boxes."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import comparable


def box_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 distance between box regressions, added up over each row's numbers.

    Girshick, 2015, https://arxiv.org/abs/1504.08083, which measures a detector against the true
    boxes by it; here against what a teacher says (Wang et al., 2019,
    https://arxiv.org/abs/1906.03609, the ablation's distilled outputs).

    Args:
        student: (M, 4) or any other (M, D).
        teacher: The same shape.

    Returns:
        Scalar, the mean over M; 0 with a zero gradient where M is 0.

    Raises:
        UserError: Shapes or devices that differ, integers.
    """
    comparable("box_distance", student, teacher, dimensions=2)
    return F.smooth_l1_loss(student, teacher.to(student), reduction="sum") / max(len(student), 1)


def own_numbers(rows: Tensor, labels: Tensor) -> Tensor:
    """Of box regressions for every class those for a box's own.

    A detector learns no others of a box: what they say is nobody's knowledge.

    Args:
        rows: (M, 4 (C + 1)), four numbers a class, the background's first.
        labels: 0..C-1, (M,) int64.

    Returns:
        (M, 4).
    """
    place = (labels + 1)[:, None, None].expand(-1, 1, 4)
    each: Tensor = rows.view(len(rows), rows.shape[1] // 4, 4)
    return each.gather(1, place)[:, 0]


def known_rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both sides for a mean over those rows alone that the teacher knows something about.

    To leave rows out would make an accelerator wait for their number. They are 0 on both sides
    instead, which costs nothing and has no gradient.

    Args:
        student: Logits, (M, C).
        teacher: Logits or log-probabilities, (M, C); NaN where it knows nothing.

    Returns:
        Student, teacher, (M, C) both; and what a mean over all M is to be multiplied by.
    """
    unknown = teacher.isnan().any(dim=1)
    share = len(unknown) / (~unknown).sum().clamp(min=1)
    lacking = unknown[:, None]
    return student.masked_fill(lacking, 0.0), teacher.masked_fill(lacking, 0.0), share
