"""Divergences between the class distributions of teacher and student."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.losses._checks import comparable, mask_fits, positive, wide_type


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
        UserError: Shapes or devices that differ, integers, or a temperature that is not above 0.
    """
    comparable("kl_logits", student, teacher, dimensions=2)
    positive("kl_logits", "temperature", temperature)
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

    Liu et al., 2019, https://arxiv.org/abs/1903.04197. The paper prints the divergence the other
    way round; this direction is the one that its authors trained with.

    Args:
        student: Logits, (N, C, H, W).
        teacher: Logits, (N, C, H, W).
        temperature: Divides both sets of logits.
        valid: Pixels that take part, bool (N, H, W); all of them where not given.
        weights: What each pixel counts, (N, H, W), 0 or more; 1 where not given.

    Returns:
        Scalar, the mean over N, H and W, or over the valid pixels, whatever their weights; 0 with
        a zero gradient where there are none.

    Raises:
        UserError: Shapes or devices that differ, integers, a mask that is not bool, or a
            temperature that is not above 0.
    """
    comparable("pixel_wise", student, teacher, dimensions=4)
    positive("pixel_wise", "temperature", temperature)
    if valid is not None:
        mask_fits("pixel_wise", "valid", valid, student, beside="student")
    if weights is not None:
        mask_fits("pixel_wise", "weights", weights, student, beside="student", weights=True)
    # The compiler fuses the formula by itself.
    if torch.compiler.is_compiling():
        total = _chosen(_Maps(student, teacher, temperature, valid, weights))
    else:
        total = _PixelWise.apply(student, teacher, temperature, valid, weights)
    if valid is None:
        return total / max(student[:, 0].numel(), 1) * temperature**2
    return total / valid.sum().clamp(min=1) * temperature**2


class _Maps(NamedTuple):
    """What is compared; the types are those of `pixel_wise`."""

    student: Tensor
    teacher: Tensor
    temperature: float
    valid: Tensor | None
    weights: Tensor | None

    def image(self, number: int) -> _Maps:
        """Those of one image, (1, ...)."""
        part = slice(number, number + 1)
        valid, weights = (None if one is None else one[part] for one in self[3:])
        return _Maps(self.student[part], self.teacher[part], self.temperature, valid, weights)


class _PixelWise(torch.autograd.Function):
    """The sum over pixels, image by image; the backward pass computes each image again.

    Left to autograd, the two passes hold five maps as large as the logits between them.
    """

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> Tensor:
        """Sum of the divergences of the valid pixels; autograd takes the fields of `_Maps`."""
        maps = _Maps(*fields)
        ctx.save_for_backward(maps.student, maps.teacher, maps.valid, maps.weights)
        ctx.temperature = maps.temperature
        total = maps.student.new_zeros((), dtype=wide_type(maps.student, maps.teacher))
        for i in range(len(maps.student)):
            total = total + _summed(maps.image(i))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        """For the student `(p - q) / T`, for the teacher `q (log q - log p - KL) / T`."""
        student, teacher, valid, weights = ctx.saved_tensors
        wants_student, wants_teacher = ctx.needs_input_grad[:2]
        for_student = torch.empty_like(student) if wants_student else None
        for_teacher = torch.empty_like(teacher) if wants_teacher else None
        scale = upstream / ctx.temperature
        wide = wide_type(student, teacher)
        for i in range(len(student)):
            log_p = _log_softmax(student[i], 0, ctx.temperature, wide)
            log_q = _log_softmax(teacher[i], 0, ctx.temperature, wide)
            unseen = None if valid is None else ~valid[i]
            q = log_q.exp()
            slope = scale if weights is None else scale * weights[i]
            if for_teacher is not None:
                gap = log_q.sub_(log_p)
                gap = gap - (q * gap).sum(dim=0)
                for_teacher[i] = _kept(gap.mul_(q).mul_(slope), unseen)
            if for_student is not None:
                for_student[i] = _kept(log_p.exp_().sub_(q).mul_(slope), unseen)
        return for_student, for_teacher, None, None, None


def _kept(gradient: Tensor, unseen: Tensor | None) -> Tensor:
    """Set to 0 what takes no part, were it not even finite."""
    return gradient if unseen is None else gradient.masked_fill_(unseen, 0.0)


def _chosen(maps: _Maps) -> Tensor:
    """The sum as autograd may have it: what takes no part is gone before the softmax."""
    if maps.valid is not None:
        unseen = ~maps.valid[:, None]
        student, teacher = (one.masked_fill(unseen, 0.0) for one in (maps.student, maps.teacher))
        maps = maps._replace(student=student, teacher=teacher)
    return _summed(maps)


def _summed(maps: _Maps) -> Tensor:
    divergence = _divergence(maps.student, maps.teacher, maps.temperature)
    if maps.weights is not None:
        divergence = divergence * maps.weights
    return (divergence if maps.valid is None else divergence.masked_fill(~maps.valid, 0.0)).sum()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) over dimension 1, which is gone from the result."""
    wide = wide_type(student, teacher)
    log_p = _log_softmax(student, 1, temperature, wide)
    log_q = _log_softmax(teacher, 1, temperature, wide)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


def _log_softmax(logits: Tensor, dim: int, temperature: float, wide: torch.dtype) -> Tensor:
    if temperature != 1.0:
        logits = logits.to(wide) / temperature
    return F.log_softmax(logits, dim=dim, dtype=wide)
