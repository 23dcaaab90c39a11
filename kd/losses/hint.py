"""Features regressed onto the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import comparable, wide_type


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance between features.

    Romero et al., 2015, https://arxiv.org/abs/1412.6550, whose half of the squared norm is taken
    here as a mean over all numbers, so that its weight does not depend on the size of the map.

    Args:
        student: Adapted features, (N, ...).
        teacher: Features of the same shape.

    Returns:
        Scalar; 0 with a zero gradient where N is 0.

    Raises:
        UserError: Shapes or devices that differ, or integers.
    """
    comparable("hint", student, teacher, dimensions=student.ndim)
    wide = wide_type(student, teacher)
    total = F.mse_loss(student.to(wide), teacher.to(wide), reduction="sum")
    return total / max(student.numel(), 1)
