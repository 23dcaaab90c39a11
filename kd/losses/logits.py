"""Divergences between the class distributions of teacher and student."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import mask_shape, positive, same_shape, wide_type


def kl_logits(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL(teacher || student) of softened class distributions.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531. The square of the temperature keeps the
    gradient's size independent of it.

    Args:
        student: Logits, (N, C).
        teacher: Logits or log-probabilities, (N, C).
        temperature: Divides both sets of logits; above 1 softens.

    Returns:
        Scalar, the mean over N; 0 with a zero gradient where N is 0.

    Raises:
        UserError: Shapes that differ, or a temperature that is not above 0.
    """
    same_shape("kl_logits", student, teacher, dimensions=2)
    positive("kl_logits", "temperature", temperature)
    divergence = _divergence(student, teacher, temperature)
    return divergence.sum() / max(len(divergence), 1) * temperature**2


def pixel_wise(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of the class distributions at each pixel.

    Liu et al., 2019, https://arxiv.org/abs/1903.04197. The paper prints the divergence the other
    way round; this direction is the one that its authors trained with.

    Args:
        student: Logits, (N, C, H, W).
        teacher: Logits, (N, C, H, W).
        temperature: Divides both sets of logits.
        valid: Pixels that take part, bool (N, H, W); all of them where not given.

    Returns:
        Scalar, the mean over N, H and W, or over the valid pixels; 0 with a zero gradient where
        there are none.

    Raises:
        UserError: Shapes that differ, or a temperature that is not above 0.
    """
    same_shape("pixel_wise", student, teacher, dimensions=4)
    positive("pixel_wise", "temperature", temperature)
    divergence = _divergence(student, teacher, temperature)  # (N, H, W)
    if valid is None:
        return divergence.sum() / max(divergence.numel(), 1) * temperature**2
    mask_shape("pixel_wise", "valid", valid, tuple(divergence.shape))
    total = divergence.masked_fill(~valid, 0.0).sum()
    return total / valid.sum().clamp(min=1) * temperature**2


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) over dimension 1, which is gone from the result."""
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    log_p = F.log_softmax(student, dim=1, dtype=wide_type(student))
    log_q = F.log_softmax(teacher, dim=1, dtype=wide_type(teacher))
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)
