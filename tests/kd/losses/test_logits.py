"""kl_logits and pixel_wise; the temperature of all that have one."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import channel_wise, decoupled, kl_logits, pixel_wise


def slow_kl(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """Sum over classes of q (log q - log p), row by row, times the square of the temperature."""
    total = 0.0
    for row_s, row_t in zip(student.tolist(), teacher.tolist(), strict=True):
        exp_s = [math.exp(value / temperature) for value in row_s]
        exp_t = [math.exp(value / temperature) for value in row_t]
        for one_s, one_t in zip(exp_s, exp_t, strict=True):
            p, q = one_s / sum(exp_s), one_t / sum(exp_t)
            total += q * (math.log(q) - math.log(p))
    return total / len(student) * temperature**2


def test_kl_logits_of_a_certain_teacher_is_the_cross_entropy_by_hand() -> None:
    student = torch.tensor([[math.log(0.25), math.log(0.75)]])
    teacher = torch.tensor([[math.log(0.5), math.log(0.5)]])
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_logits(student, teacher, temperature=1.0).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_logits_agrees_with_a_slow_loop(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
    value = kl_logits(student, teacher, temperature=temperature).item()
    assert value == pytest.approx(slow_kl(student, teacher, temperature), rel=1e-9)


def test_kl_logits_is_zero_at_equality_and_invariant_to_shifts() -> None:
    student, teacher = torch.randn(2, 5, 7).unbind()
    assert kl_logits(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    shifted = kl_logits(student + 3, teacher - torch.randn(5, 1))
    torch.testing.assert_close(shifted, kl_logits(student, teacher))


def test_kl_logits_is_the_mean_over_objects_in_any_order() -> None:
    student, teacher = torch.randn(2, 6, 4).unbind()
    order = torch.randperm(6)
    whole = kl_logits(student, teacher)
    torch.testing.assert_close(kl_logits(student[order], teacher[order]), whole)
    halves = (kl_logits(student[:3], teacher[:3]) + kl_logits(student[3:], teacher[3:])) / 2
    torch.testing.assert_close(halves, whole)


def test_kl_logits_survives_large_logits() -> None:
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    loss = kl_logits(student, torch.tensor([[-1e4, 1e4]]), temperature=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(2e4)
    assert student.grad is not None and student.grad.isfinite().all()


def test_logit_losses_reject_bad_input() -> None:
    with pytest.raises(UserError, match=r"student \(2, 3\) and teacher \(2, 4\)"):
        kl_logits(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(UserError, match="expected 4 dimensions"):
        pixel_wise(torch.zeros(2, 3), torch.zeros(2, 3))
    maps = torch.zeros(1, 2, 3, 3)
    with pytest.raises(UserError, match=r"valid must be \(1, 3, 3\), got \(3, 3\)"):
        pixel_wise(maps, maps, valid=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(UserError, match="valid must be bool, got float32"):
        pixel_wise(maps, maps, valid=torch.ones(1, 3, 3))
    with pytest.raises(UserError, match="got student on cpu, valid on meta"):
        pixel_wise(maps, maps, valid=torch.ones(1, 3, 3, dtype=torch.bool, device="meta"))


def test_pixel_wise_agrees_with_a_slow_loop_over_pixels() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4, dtype=torch.float64).unbind()
    rows_s, rows_t = (one.permute(0, 2, 3, 1).reshape(-1, 5) for one in (student, teacher))
    value = pixel_wise(student, teacher, temperature=3.0).item()
    assert value == pytest.approx(slow_kl(rows_s, rows_t, 3.0), rel=1e-9)


def test_pixel_wise_counts_only_valid_pixels() -> None:
    student, teacher = torch.randn(2, 2, 5, 4, 4).unbind()
    valid = torch.zeros(2, 4, 4, dtype=torch.bool)
    valid[:, :2] = True
    spoiled = student.clone()
    spoiled[:, :, 2:] = float("nan")
    value = pixel_wise(spoiled, teacher, valid=valid)
    torch.testing.assert_close(value, pixel_wise(student[:, :, :2], teacher[:, :, :2]))


def test_pixel_wise_without_a_valid_pixel_is_zero_with_zero_gradient() -> None:
    student = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = pixel_wise(
        student, torch.randn(1, 3, 2, 2), valid=torch.zeros(1, 2, 2, dtype=torch.bool)
    )
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad is not None and not student.grad.any()


def test_pixel_wise_has_the_gradients_that_autograd_finds_in_its_formula() -> None:
    student, teacher = torch.randn(2, 3, 4, 2, 3, dtype=torch.float64).unbind()
    valid = torch.rand(3, 2, 3) < 0.6
    found = []
    for own in (True, False):
        leaves = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
        if own:
            loss = pixel_wise(*leaves, temperature=2.0, valid=valid)
        else:
            p, q = ((leaf / 2.0).log_softmax(dim=1) for leaf in leaves)
            loss = 4.0 * (q.exp() * (q - p)).sum(dim=1)[valid].mean()
        (3.0 * loss).backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[0], found[1])


def test_pixel_wise_of_two_pixels_by_hand() -> None:
    student = torch.tensor([[0.25, 0.5], [0.75, 0.5]]).log().view(1, 2, 1, 2)
    teacher = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log().view(1, 2, 1, 2)
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # the second pixel agrees
    assert pixel_wise(student, teacher).item() == pytest.approx(first / 2, rel=1e-6)
    only = torch.tensor([[[True, False]]])
    assert pixel_wise(student, teacher, valid=only).item() == pytest.approx(first, rel=1e-6)


def test_pixel_wise_is_zero_at_equality_and_invariant_to_shifts_and_orders() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4).unbind()
    value = pixel_wise(student, teacher)
    assert pixel_wise(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(pixel_wise(student + torch.randn(2, 1, 3, 4), teacher), value)
    torch.testing.assert_close(pixel_wise(student.flip(3), teacher.flip(3)), value)
    torch.testing.assert_close(pixel_wise(student.flip(1), teacher.flip(1)), value)


def test_pixel_weights_scale_loss_and_gradient() -> None:
    student, teacher = torch.randn(2, 2, 4, 2, 3, dtype=torch.float64).unbind()
    valid = torch.tensor([True, True, False]).expand(2, 2, 3)
    weights = 3 * torch.rand(2, 2, 3, dtype=torch.float64)
    found = []
    for own in (True, False):
        leaves = [student.clone().requires_grad_(), teacher.clone().requires_grad_()]
        if own:
            loss = pixel_wise(*leaves, temperature=2.0, valid=valid, weights=weights)
        else:
            p, q = ((leaf / 2.0).log_softmax(dim=1) for leaf in leaves)
            each = 4.0 * (q.exp() * (q - p)).sum(dim=1) * weights
            loss = each[valid].sum() / 8  # the valid pixels, not their weights
        loss.backward()
        found.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(found[0], found[1])
    ones = torch.ones(2, 2, 3)
    unweighted = pixel_wise(student, teacher, valid=valid)
    torch.testing.assert_close(pixel_wise(student, teacher, valid=valid, weights=ones), unweighted)
    with pytest.raises(
        UserError, match=r"pixel_wise: weights must be \(2, 2, 3\), got \(2, 3, 2\)"
    ):
        pixel_wise(student, teacher, weights=ones.mT)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    ("loss", "shape"),
    [
        (kl_logits, (2, 3)),
        (pixel_wise, (1, 2, 3, 3)),
        (channel_wise, (1, 2, 3, 3)),
        (functools.partial(decoupled, labels=torch.tensor([0, 1])), (2, 3)),
    ],
)
def test_invalid_temperatures_are_rejected(
    loss: Callable[..., Tensor], shape: tuple[int, ...], temperature: float
) -> None:
    message = f"temperature must be above 0 and finite, got {temperature}"
    with pytest.raises(UserError, match=message):
        loss(torch.zeros(shape), torch.zeros(shape), temperature=temperature)
