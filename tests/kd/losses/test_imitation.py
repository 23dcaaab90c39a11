"""Masked imitation of features."""

from __future__ import annotations

import pytest
import torch

from kd.errors import UserError
from kd.losses.imitation import imitation


def test_imitation_by_hand() -> None:
    student = torch.zeros(1, 2, 1, 3)
    teacher = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]]).view(1, 2, 1, 3)
    mask = torch.tensor([[[True, True, False]]])
    # (1 + 9 + 4 + 16) over twice the two places.
    assert imitation(student, teacher, mask).item() == pytest.approx(7.5)


def test_imitation_agrees_with_a_slow_loop() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64).unbind()
    mask = torch.rand(3, 5, 6) > 0.6
    total, places = 0.0, 0
    for image in range(3):
        for row in range(5):
            for column in range(6):
                if mask[image, row, column]:
                    places += 1
                    for channel in range(4):
                        where = image, channel, row, column
                        total += (teacher[where] - student[where]).item() ** 2
    value = imitation(student, teacher, mask).item()
    assert value == pytest.approx(total / (2 * places), rel=1e-9)


def test_imitation_is_zero_at_equality_and_ignores_the_order_of_images() -> None:
    student, teacher = torch.randn(2, 4, 3, 5, 5).unbind()
    mask = torch.rand(4, 5, 5) > 0.5
    assert imitation(teacher, teacher, mask).item() == 0.0
    order = torch.randperm(4)
    torch.testing.assert_close(
        imitation(student[order], teacher[order], mask[order]), imitation(student, teacher, mask)
    )


def test_weights_of_one_equal_a_mask_and_scaling_weights_changes_nothing() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    mask = torch.rand(2, 4, 4) > 0.5
    by_mask = imitation(student, teacher, mask)
    torch.testing.assert_close(imitation(student, teacher, mask.float()), by_mask)
    torch.testing.assert_close(imitation(student, teacher, mask * 0.01), by_mask)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_imitation_of_an_empty_mask_is_zero_with_zero_gradient(kind: torch.dtype) -> None:
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = imitation(student, torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=kind))
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()


def test_imitation_rejects_bad_input() -> None:
    with pytest.raises(UserError, match=r"student \(1, 2, 4, 4\) and teacher \(1, 3, 4, 4\)"):
        imitation(torch.zeros(1, 2, 4, 4), torch.zeros(1, 3, 4, 4), torch.ones(1, 4, 4))
    with pytest.raises(UserError, match=r"mask must be \(1, 4, 4\), got \(4, 4\)"):
        imitation(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.ones(4, 4))
    with pytest.raises(UserError, match="mask must be bool or floating point, got int64"):
        imitation(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), torch.ones(1, 4, 4).long())
    with pytest.raises(UserError, match="got student on cpu, mask on meta"):
        maps = torch.zeros(1, 2, 4, 4)
        imitation(maps, maps, torch.ones(1, 4, 4, device="meta"))


def test_many_weights_in_half_precision_are_counted_exactly() -> None:
    # 4,096 + 1 is 4,096 in float16, and 256 + 1 is 256 in bfloat16.
    student, teacher = torch.zeros(1, 1, 70, 70), torch.ones(1, 1, 70, 70)
    for dtype in (torch.bfloat16, torch.float16):
        mask = torch.ones(1, 70, 70, dtype=dtype)
        assert imitation(student, teacher, mask).item() == pytest.approx(0.5, rel=1e-6)


def test_half_precision_does_not_overflow_in_the_square() -> None:
    student, teacher = torch.zeros(2, 1, 1, 2, 2, dtype=torch.float16).unbind()
    teacher = teacher + 1000.0
    mask = torch.ones(1, 2, 2, dtype=torch.bool)
    assert imitation(student, teacher, mask).item() == pytest.approx(5e5)
