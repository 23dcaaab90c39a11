"""Logit distillation taken apart: how sure of the target, and how the rest is ordered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.losses._checks import comparable, labels_fit, positive, wide_type


def decoupled(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation over the rows whose label is known.

    Zhao et al., 2022, https://arxiv.org/abs/2203.08679: `T^2 (alpha TCKD + beta NCKD)`. TCKD is
    KL(teacher || student) of the labelled class against all others together, NCKD that of the
    distribution over the others alone. With alpha 1 and beta the teacher's share of the others, row
    by row, the sum is the ordinary `kl_logits`.

    Args:
        student: Logits, (N, C).
        teacher: Logits or log-probabilities, (N, C).
        labels: Class of each row, int64 (N,); -1 where it is withheld.
        alpha: Weight of TCKD.
        beta: Weight of NCKD.
        temperature: Divides both sets of logits.

    Returns:
        Scalar, the mean over the labelled rows; 0 with a zero gradient where there are none, or
        fewer than two classes.

    Raises:
        UserError: Shapes or devices that do not fit, integers for logits, labels that are not
            int64, or a temperature that is not above 0.
    """
    comparable("decoupled", student, teacher, dimensions=2)
    positive("decoupled", "temperature", temperature)
    labels_fit("decoupled", labels, student, beside="student")
    wide = wide_type(student, teacher)
    known = labels >= 0
    # What has no label must not count, nor have a gradient, even where it is not finite.
    student, teacher = (
        one.to(wide).masked_fill(~known[:, None], 0.0) for one in (student, teacher)
    )
    if student.numel() == 0 or student.shape[1] < 2:
        return (student.sum() + teacher.sum()) * 0.0
    log_p, log_q = (
        _parts(logits / temperature, labels.clamp(min=0)) for logits in (student, teacher)
    )
    target, others = (_kl(q, p) for q, p in zip(log_q, log_p, strict=True))
    rows = (alpha * target + beta * others).masked_fill(~known, 0.0)
    return rows.sum() / known.sum().clamp(min=1) * temperature**2


def _parts(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of label and not label, (N, 2), and of the others among them, (N, C-1)."""
    place = torch.arange(logits.shape[1] - 1, device=logits.device)
    rest = logits.gather(1, place + (place >= labels[:, None]).long())
    own = logits.gather(1, labels[:, None])
    both = torch.cat([own, rest.logsumexp(dim=1, keepdim=True)], dim=1)
    return F.log_softmax(both, dim=1), F.log_softmax(rest, dim=1)


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)
