"""Features regressed onto the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import comparable, mask_fits, wide_type


def hint(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean squared distance between features.

    Romero et al., 2015, https://arxiv.org/abs/1412.6550, whose half of the squared norm is taken
    here as a mean over all numbers, so that its weight does not depend on the size of the map.

    Args:
        student: Adapted features, (N, ...).
        teacher: Features of the same shape.
        valid: Of maps (N, C, H, W) the places that take part, bool (N, H, W); all where not given.

    Returns:
        Scalar; 0 with a zero gradient where N is 0, or no place is valid.

    Raises:
        UserError: Shapes or devices that differ, integers, or a mask that is not bool.
    """
    comparable("hint", student, teacher, dimensions=student.ndim if valid is None else 4)
    wide = wide_type(student, teacher)
    if valid is not None:
        mask_fits("hint", "valid", valid, student, beside="student")
        gap = (student.to(wide) - teacher.to(wide)).masked_fill(~valid[:, None], 0.0)
        return gap.square().sum() / (valid.sum() * student.shape[1]).clamp(min=1)
    total = F.mse_loss(student.to(wide), teacher.to(wide), reduction="sum")
    return total / max(student.numel(), 1)
