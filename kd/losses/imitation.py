"""Feature imitation where a mask says so."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.losses._checks import mask_shape, same_shape, wide_type


def imitation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Half the squared distance between features, per masked place.

    Wang et al., 2019, https://arxiv.org/abs/1906.03609: the sum over masked places and all channels
    of `(teacher - student)^2`, divided by twice the number of masked places in the whole batch. The
    mask is an imitation mask around objects for detectors, and a ring around an object for what a
    context teacher knows of its surroundings.

    Args:
        student: Adapted features, (N, C, H, W).
        teacher: Features, (N, C, H, W).
        mask: Places that count, bool (N, H, W); or their weights, float (N, H, W), 0 or above.

    Returns:
        Scalar; 0 with a zero gradient where nothing is masked.

    Raises:
        UserError: Shapes that differ.
    """
    same_shape("imitation", student, teacher, dimensions=4)
    mask_shape("imitation", "mask", mask, (student.shape[0], *student.shape[2:]))
    distance = (teacher - student).square().sum(dim=1, dtype=wide_type(student))  # (N, H, W)
    # Chosen, not multiplied: what lies outside the mask must not count even where it is not finite.
    chosen = distance.where(mask > 0, 0.0)
    if mask.dtype != torch.bool:
        chosen = chosen * mask.to(chosen.dtype)
    places = mask.sum(dtype=torch.float32 if mask.dtype == torch.bool else None)
    return chosen.sum() / (2 * places.where(places > 0, 1.0)).to(chosen.dtype)
