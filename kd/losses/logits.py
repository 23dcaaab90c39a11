"""KL divergences between softmaxes of teacher and student, over classes or over map cells."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kd.losses._checks import check_labels, check_mask, check_pair, check_positive, wide_dtype


def kl_logits(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL(teacher || student) of softened class distributions, times the squared temperature.

    Hinton et al., 2015, https://arxiv.org/abs/1503.02531. The factor makes the magnitude of the
    gradient nearly independent of the temperature. The loss is the mean over N; it is 0 with a zero
    gradient if N is 0.

    Args:
        student: Logits, (N, C).
        teacher: Logits or log-probabilities, (N, C).
        temperature: Divides both sets of logits; above 1 softens the distributions.
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
    """KL(teacher || student) of the class distributions at each pixel, times temperature squared.

    Liu et al., 2019, https://arxiv.org/abs/1903.04197. The paper gives the divergence in the other
    direction, but the authors' code uses KL(teacher || student). The loss is the sum over valid
    pixels divided by their number, whatever the weights. It is 0 with a zero gradient if no pixel
    is valid.

    Args:
        student: Logits, (N, C, H, W).
        teacher: Logits, (N, C, H, W).
        temperature: Divides both sets of logits.
        valid: Pixels to include, bool (N, H, W); None = all.
        weights: Non-negative pixel weights, (N, H, W); None = 1.
    """
    check_pair("pixel_wise", student, teacher, dimensions=4)
    check_positive("pixel_wise", "temperature", temperature)
    if valid is not None:
        check_mask("pixel_wise", "valid", valid, student, like="student")
    if weights is not None:
        check_mask("pixel_wise", "weights", weights, student, like="student", weights=True)
    # The compiler can fuse the plain formula.
    if torch.compiler.is_compiling():
        if valid is not None:  # so that the gradient of void pixels is not 0 times NaN
            void = ~valid[:, None]
            student, teacher = (one.masked_fill(void, 0.0) for one in (student, teacher))
        total = _sum(student, teacher, temperature, valid, weights)
    else:
        total = _PixelWise.apply(student, teacher, temperature, valid, weights)
    if valid is None:
        return total / max(student[:, 0].numel(), 1) * temperature**2
    return total / valid.sum().clamp(min=1) * temperature**2


class _PixelWise(torch.autograd.Function):
    """Sum of the divergences of all pixels; the backward pass recomputes the softmaxes.

    Both passes process one image at a time. Plain autograd would store five maps of the logits'
    size.
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
        """Return the gradients.

        At temperature T, with the student's distribution p and the teacher's distribution q, a
        pixel's gradient is `(p - q) / T` for the student and `q (log q - log p - KL) / T` for the
        teacher.
        """
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
    """Set the gradient of void pixels to 0, even where it is not finite."""
    return gradient if void is None else gradient.masked_fill_(void, 0.0)


def _sum(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    valid: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """Sum the weighted divergences of all valid pixels."""
    divergence = _divergence(student, teacher, temperature)
    if weights is not None:
        divergence = divergence * weights
    return (divergence if valid is None else divergence.masked_fill(~valid, 0.0)).sum()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of distributions over dimension 1, which is removed."""
    dtype = wide_dtype(student, teacher)
    log_p = _log_softmax(student, 1, temperature, dtype)
    log_q = _log_softmax(teacher, 1, temperature, dtype)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


def _log_softmax(logits: Tensor, dim: int, temperature: float, dtype: torch.dtype) -> Tensor:
    if temperature != 1.0:
        logits = logits.to(dtype) / temperature
    return F.log_softmax(logits, dim=dim, dtype=dtype)


def decoupled(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation, averaged over the labelled rows.

    Zhao et al., 2022, https://arxiv.org/abs/2203.08679: `T^2 (alpha TCKD + beta NCKD)` at
    temperature T. TCKD is the KL(teacher || student) of two probabilities: of the labelled class,
    and of all other classes together. NCKD is the KL(teacher || student) of the distributions over
    the other classes. With alpha = 1, and with the teacher's probability of the other classes as
    beta of each row, the loss equals `kl_logits`.

    Args:
        student: Logits, (N, C).
        teacher: Logits or log-probabilities, (N, C).
        labels: Class of each row, int64 (N,); -1 if unlabelled.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: Divides both sets of logits.

    Returns:
        Scalar; 0 with a zero gradient if no row is labelled or if there are fewer than two classes.
    """
    check_pair("decoupled", student, teacher, dimensions=2)
    check_positive("decoupled", "temperature", temperature)
    check_labels("decoupled", labels, student, like="student")
    dtype = wide_dtype(student, teacher)
    known = labels >= 0
    # Unlabelled rows must have neither loss nor gradient, even where they are not finite.
    student, teacher = (
        one.to(dtype).masked_fill(~known[:, None], 0.0) for one in (student, teacher)
    )
    if student.numel() == 0 or student.shape[1] < 2:
        return (student.sum() + teacher.sum()) * 0.0
    log_p, log_q = (
        _parts(logits / temperature, labels.clamp(min=0)) for logits in (student, teacher)
    )
    target, others = ((q.exp() * (q - p)).sum(dim=1) for q, p in zip(log_q, log_p, strict=True))
    rows = (alpha * target + beta * others).masked_fill(~known, 0.0)
    return rows.sum() / known.sum().clamp(min=1) * temperature**2


def _parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Split class distributions into two sets of log-probabilities.

    The first, (N, 2), is of the labelled class and of all other classes together. The second, (N,
    C-1), is of each other class, given that the class is not the labelled one.
    """
    index = torch.arange(logits.shape[1] - 1, device=logits.device)
    rest = logits.gather(1, index + (index >= labels[:, None]).long())
    own = logits.gather(1, labels[:, None])
    both = torch.cat([own, rest.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(rest, dim=1)


def channel_wise(
    student: Tensor, teacher: Tensor, *, temperature: float = 4.0, valid: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) of each channel's softmax over the cells of the map.

    Shu et al., 2021, https://arxiv.org/abs/2011.13256: the sum over images and channels, times `T^2
    / (N * C)` at temperature T. Adding a constant to a channel does not change the loss. With
    `valid` (not in the paper) the softmax is over an image's valid cells, and images without valid
    cells are excluded from the mean. The loss is 0 with a zero gradient if no cell is valid.

    Args:
        student: Logits or features, (N, C, H, W).
        teacher: Logits or features, (N, C, H, W).
        temperature: Divides both maps; above 1 flattens the distributions.
        valid: Cells to include, bool (N, H, W); None = all.
    """
    check_pair("channel_wise", student, teacher, dimensions=4)
    check_positive("channel_wise", "temperature", temperature)
    if valid is None:
        rows = (maps.flatten(2).flatten(0, 1) for maps in (student, teacher))  # (N * C, H * W)
        return kl_logits(*rows, temperature=temperature)
    check_mask("channel_wise", "valid", valid, student, like="student")
    places = valid.flatten(1)[:, None]  # (N, 1, H * W)
    dtype = wide_dtype(student, teacher)
    log_p, log_q = (
        masked_log_softmax(maps, places, temperature, dtype) for maps in (student, teacher)
    )
    total = (log_q.exp() * (log_q - log_p)).sum()
    count = places.any(dim=2).sum() * student.shape[1]
    return total / count.clamp(min=1) * temperature**2


def masked_log_softmax(
    maps: Tensor, places: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """Compute each channel's log-softmax over the valid cells, (N, C, H * W), 0 at other cells.

    `maps` is (N, C, H, W); `places` marks the valid cells, bool (N, 1, H * W).
    """
    logits = maps.flatten(2).to(dtype)
    # A logit of -inf excludes a cell. Images without a valid cell get 0 instead, because a softmax
    # over only -inf is NaN.
    out = torch.where(places.any(dim=2, keepdim=True), -math.inf, 0.0).to(dtype)
    logits = torch.where(places, logits, out) / temperature
    return F.log_softmax(logits, dim=2).masked_fill(~places, 0.0)
