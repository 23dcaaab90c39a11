"""Hints: regression of the student's features onto the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import check_mask, check_pair, wide_dtype


def hint(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean squared error between features.

    Romero et al., 2015, https://arxiv.org/abs/1412.6550, take half the squared norm; here it is the
    mean over all elements, so that the term's weight does not depend on the size of the map.

    Args:
        student: Adapted features, (N, ...).
        teacher: Features of the same shape.
        valid: For maps (N, C, H, W), the cells to include, bool (N, H, W); None = all.

    Returns:
        Scalar; 0 with a zero gradient if N is 0 or no cell is valid.
    """
    check_pair("hint", student, teacher, dimensions=student.ndim if valid is None else 4)
    dtype = wide_dtype(student, teacher)
    if valid is not None:
        check_mask("hint", "valid", valid, student, like="student")
        gap = (student.to(dtype) - teacher.to(dtype)).masked_fill(~valid[:, None], 0.0)
        return gap.square().sum() / (valid.sum() * student.shape[1]).clamp(min=1)
    total = F.mse_loss(student.to(dtype), teacher.to(dtype), reduction="sum")
    return total / max(student.numel(), 1)
