"""decoupled: by hand and against sums of the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import decoupled, kl_logits


def slow(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float) -> float:
    """The paper's two divergences at temperature 4, row by row."""
    total, known = 0.0, 0
    for s, t, label in zip(student, teacher, labels.tolist(), strict=True):
        if label < 0:
            continue
        known += 1
        p, q = (s / 4).softmax(dim=0), (t / 4).softmax(dim=0)
        target = q[label] * (q[label] / p[label]).log()
        target = target + (1 - q[label]) * ((1 - q[label]) / (1 - p[label])).log()
        others = sum(
            q[c] / (1 - q[label]) * (q[c] / (1 - q[label]) / (p[c] / (1 - p[label]))).log()
            for c in range(len(p))
            if c != label
        )
        total += float(alpha * target + beta * others)
    return 16 * total / known


def test_decoupled_by_hand() -> None:
    # Label 0. Student (1/2, 1/4, 1/4), teacher (1/2, 3/8, 1/8): the target alike, the rest not.
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.5, 0.375, 0.125]]).log()
    labels = torch.tensor([0])
    among = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    value = decoupled(student, teacher, labels, temperature=1.0, alpha=3.0, beta=2.0)
    assert value.item() == pytest.approx(2 * among, rel=1e-5)
    # Of the last class, the target differs: 1/8 against 1/4.
    target = 0.125 * math.log(0.5) + 0.875 * math.log(0.875 / 0.75)
    value = decoupled(student, teacher, torch.tensor([2]), temperature=1.0, alpha=1.0, beta=0.0)
    assert value.item() == pytest.approx(target, rel=1e-5)


def test_decoupled_agrees_with_the_papers_sums() -> None:
    student, teacher = torch.randn(2, 6, 5, dtype=torch.float64).unbind()
    labels = torch.tensor([0, 4, 2, -1, 1, -1])
    value = decoupled(student, teacher, labels, alpha=0.7, beta=3.0).item()
    assert value == pytest.approx(slow(student, teacher, labels, 0.7, 3.0), rel=1e-9)


def test_with_beta_from_the_teacher_it_equals_kl_logits() -> None:
    student, teacher = torch.randn(2, 1, 7, dtype=torch.float64).unbind()
    fraction = 1 - (teacher / 4).softmax(dim=1)[0, 3].item()
    value = decoupled(student, teacher, torch.tensor([3]), alpha=1.0, beta=fraction)
    assert value.item() == pytest.approx(kl_logits(student, teacher).item(), rel=1e-9)


def test_decoupled_is_zero_at_equality_and_invariant_to_shifts() -> None:
    student, teacher = torch.randn(2, 4, 5).unbind()
    labels = torch.tensor([0, 1, 4, 2])
    assert decoupled(teacher, teacher, labels).item() == pytest.approx(0.0, abs=1e-6)
    shifted = decoupled(student + torch.randn(4, 1), teacher, labels)
    torch.testing.assert_close(shifted, decoupled(student, teacher, labels))


def test_without_labels_it_is_zero_with_a_zero_gradient() -> None:
    student = torch.randn(3, 4, requires_grad=True)
    loss = decoupled(student, torch.randn(3, 4), torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()


def test_decoupled_survives_large_logits() -> None:
    large = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = decoupled(large, torch.tensor([[-1e4, 1e4, 0.0]]), torch.tensor([0]))
    loss.backward()
    assert loss.isfinite() and large.grad is not None and large.grad.isfinite().all()


def test_decoupled_rejects_bad_input() -> None:
    rows = torch.zeros(2, 3)
    with pytest.raises(UserError, match=r"labels must be \(2,\), got \(3,\)"):
        decoupled(rows, rows, torch.zeros(3, dtype=torch.long))
    with pytest.raises(UserError, match="differ in shape"):
        decoupled(rows, torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(UserError, match="labels must be int64, got int32"):
        decoupled(rows, rows, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(UserError, match="got student on cpu, labels on meta"):
        decoupled(rows, rows, torch.zeros(2, dtype=torch.long, device="meta"))
