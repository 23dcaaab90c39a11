"""Decoupled distillation: separate terms for the target class and the other classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import check_labels, check_pair, check_positive, wide_dtype


def decoupled(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation over the labelled rows.

    Zhao et al., 2022, https://arxiv.org/abs/2203.08679: `T^2 (alpha TCKD + beta NCKD)`. TCKD is
    KL(teacher || student) between the labelled class and all others taken together, NCKD the one
    among the other classes only. With alpha 1, and with beta in each row the teacher's probability
    of the other classes, the sum is `kl_logits`.

    Args:
        student: Logits, (N, C).
        teacher: Logits or log-probabilities, (N, C).
        labels: Class of each row, int64 (N,); -1 if unlabelled.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: Divides both sets of logits.

    Returns:
        Scalar, the mean over the labelled rows; 0 with a zero gradient without any, or with fewer
        than two classes.
    """
    check_pair("decoupled", student, teacher, dimensions=2)
    check_positive("decoupled", "temperature", temperature)
    check_labels("decoupled", labels, student, like="student")
    dtype = wide_dtype(student, teacher)
    known = labels >= 0
    # Unlabelled rows must not count or have a gradient, even where they are not finite.
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
    """Log-probabilities of the label and of the rest, (N, 2), and within the rest, (N, C-1)."""
    index = torch.arange(logits.shape[1] - 1, device=logits.device)
    rest = logits.gather(1, index + (index >= labels[:, None]).long())
    own = logits.gather(1, labels[:, None])
    both = torch.cat([own, rest.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(rest, dim=1)
