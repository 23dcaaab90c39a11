"""Divergences between the class distributions of teacher and student."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.losses._checks import check_mask, check_pair, check_positive, wide_dtype


def kl_logits(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL(teacher || student) of softened class distributions, times the squared temperature.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531. The factor makes the size of the gradient
    independent of the temperature.

    Args:
        student: Logits, (N, C).
        teacher: Logits or log-probabilities, (N, C).
        temperature: Divides both sets of logits; above 1 softens.

    Returns:
        Scalar, the mean over N; 0 with a zero gradient where N is 0.
    """
    check_pair("kl_logits", student, teacher, dimensions=2)
    check_positive("kl_logits", "temperature", temperature)
    divergence = _divergence(student, teacher, temperature)
    return divergence.sum() / max(len(divergence), 1) * temperature**2


def pixel_wise(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) of the class distributions at each pixel.

    Liu et al., 2019, https://arxiv.org/abs/1903.04197. The paper prints the divergence in the other
    direction; its authors trained with this one.

    Args:
        student: Logits, (N, C, H, W).
        teacher: Logits, (N, C, H, W).
        temperature: Divides both sets of logits.
        valid: Pixels to include, bool (N, H, W); None = all.
        weights: Weight of each pixel, (N, H, W), not negative; None = 1.

    Returns:
        Scalar, the sum divided by the number of (valid) pixels, whatever their weights; 0 with a
        zero gradient where there are none.
    """
    check_pair("pixel_wise", student, teacher, dimensions=4)
    check_positive("pixel_wise", "temperature", temperature)
    if valid is not None:
        check_mask("pixel_wise", "valid", valid, student, like="student")
    if weights is not None:
        check_mask("pixel_wise", "weights", weights, student, like="student", weights=True)
    # The compiler fuses the plain formula.
    if torch.compiler.is_compiling():
        if valid is not None:  # zeros, so that void pixels have no gradient of 0 times NaN
            void = ~valid[:, None]
            student, teacher = (one.masked_fill(void, 0.0) for one in (student, teacher))
        total = _sum(student, teacher, temperature, valid, weights)
    else:
        total = _PixelWise.apply(student, teacher, temperature, valid, weights)
    if valid is None:
        return total / max(student[:, 0].numel(), 1) * temperature**2
    return total / valid.sum().clamp(min=1) * temperature**2


class _PixelWise(torch.autograd.Function):
    """Sum over pixels, image by image, recomputed in the backward pass.

    Autograd would store five maps as large as the logits between the two passes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        valid: Tensor | None,
        weights: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(student, teacher, valid, weights)
        ctx.temperature = temperature
        total = student.new_zeros((), dtype=wide_dtype(student, teacher))
        for i in range(len(student)):
            masks = (None if one is None else one[i : i + 1] for one in (valid, weights))
            total = total + _sum(student[i : i + 1], teacher[i : i + 1], temperature, *masks)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """For the student `(p - q) / T`, for the teacher `q (log q - log p - KL) / T`."""
        student, teacher, valid, weights = ctx.saved_tensors
        need_student, need_teacher = ctx.needs_input_grad[:2]
        student_grad = torch.empty_like(student) if need_student else None
        teacher_grad = torch.empty_like(teacher) if need_teacher else None
        scale = upstream / ctx.temperature
        dtype = wide_dtype(student, teacher)
        for i in range(len(student)):
            log_p = _log_softmax(student[i], 0, ctx.temperature, dtype)
            log_q = _log_softmax(teacher[i], 0, ctx.temperature, dtype)
            void = None if valid is None else ~valid[i]
            q = log_q.exp()
            slope = scale if weights is None else scale * weights[i]
            if teacher_grad is not None:
                gap = log_q.sub_(log_p)
                gap = gap - (q * gap).sum(dim=0)
                teacher_grad[i] = _zero_void(gap.mul_(q).mul_(slope), void)
            if student_grad is not None:
                student_grad[i] = _zero_void(log_p.exp_().sub_(q).mul_(slope), void)
        return student_grad, teacher_grad, None, None, None


def _zero_void(gradient: Tensor, void: Tensor | None) -> Tensor:
    """Zero the gradient of void pixels, even where it is not finite."""
    return gradient if void is None else gradient.masked_fill_(void, 0.0)


def _sum(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    valid: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Sum of the weighted divergences of all valid pixels."""
    divergence = _divergence(student, teacher, temperature)
    if weights is not None:
        divergence = divergence * weights
    return (divergence if valid is None else divergence.masked_fill(~valid, 0.0)).sum()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) over dimension 1, which is reduced."""
    dtype = wide_dtype(student, teacher)
    log_p = _log_softmax(student, 1, temperature, dtype)
    log_q = _log_softmax(teacher, 1, temperature, dtype)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


def _log_softmax(logits: Tensor, dim: int, temperature: float, dtype: torch.dtype) -> Tensor:
    if temperature != 1.0:
        logits = logits.to(dtype) / temperature
    return F.log_softmax(logits, dim=dim, dtype=dtype)
