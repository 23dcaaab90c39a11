"""without_void: void places hidden from the critic."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses.holistic import Adversary, Critic, critic_loss, without_void


def small() -> Adversary:
    return Adversary(3, widths=(4, 4))


def maps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher and images; the second of them has no valid place."""
    student, teacher = torch.randn(2, 2, 3, 8, 8).unbind()
    valid = torch.rand(2, 8, 8) < 0.6
    valid[1] = False
    return student, teacher, torch.randn(2, 3, 16, 16), valid


def judged(critic: Critic, student: Tensor, teacher: Tensor, images: Tensor) -> list[Tensor]:
    """The critic's loss at fixed points of the lines, and the gradient of its weights."""
    own = copy.deepcopy(critic)
    point = torch.Generator().manual_seed(0)
    loss = critic_loss(own, student, teacher, images, generator=point)
    return [loss.detach(), *torch.autograd.grad(loss, list(own.parameters()))]


def test_void_places_hold_the_teachers_numbers_by_hand() -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 2, 1, 2)
    teacher = torch.tensor([[5.0, 6.0], [7.0, 8.0]]).view(1, 2, 1, 2)
    valid = torch.tensor([[[True, False]]])
    expected = torch.tensor([[1.0, 6.0], [3.0, 8.0]]).view(1, 2, 1, 2)
    assert torch.equal(without_void(student, teacher, valid), expected)


def test_with_every_place_valid_the_maps_are_the_students() -> None:
    student, teacher, _, valid = maps()
    assert torch.equal(without_void(student, teacher, torch.ones_like(valid)), student)


@pytest.mark.parametrize("number", [1e30, math.inf, math.nan])
def test_student_logits_at_void_places_change_neither_loss(number: float) -> None:
    student, teacher, images, valid = maps()
    adversary = small()
    found = []
    for one in (student, student.masked_fill(~valid[:, None], number)):
        leaf = one.clone().requires_grad_()
        seen = without_void(leaf, teacher, valid)
        loss = adversary(seen, teacher, images)
        (gradient,) = torch.autograd.grad(loss, leaf)
        found.append([loss.detach(), gradient, *judged(adversary.critic, seen, teacher, images)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    outside = ~valid[:, None].expand_as(student)
    assert not found[1][1][outside].any() and found[1][1][0].any()


def test_the_critic_finds_no_difference_in_an_image_without_a_valid_place() -> None:
    student, teacher, images, valid = maps()
    seen = without_void(student, teacher, valid)[1:]
    adversary = small()
    found = judged(adversary.critic, seen, teacher[1:], images[1:])
    expected = judged(adversary.critic, teacher[1:], teacher[1:], images[1:])
    torch.testing.assert_close(found, expected)


def test_teacher_gets_no_gradient_and_keeps_its_precision() -> None:
    student, teacher, _, valid = maps()
    low = student.bfloat16().requires_grad_()
    seen = without_void(low, teacher.requires_grad_(), valid)
    seen.square().sum().backward()
    assert teacher.grad is None
    assert low.grad is not None and low.grad.dtype == torch.bfloat16
    assert seen.dtype == torch.float32
    assert torch.equal(seen[1], teacher[1])


def test_void_places_have_the_right_gradient() -> None:
    student, teacher, _, valid = maps()
    leaf = student.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: without_void(s, teacher.double(), valid), [leaf])


def test_mismatched_masks_and_maps_are_rejected() -> None:
    student, teacher, _, valid = maps()
    with pytest.raises(UserError, match=r"holistic: valid must be \(2, 8, 8\), got \(1, 8, 8\)"):
        without_void(student, teacher, valid[:1])
    with pytest.raises(UserError, match="holistic: valid must be bool, got float32"):
        without_void(student, teacher, valid.float())
    with pytest.raises(UserError, match=r"holistic: .*got student on cpu, valid on meta"):
        without_void(student, teacher, valid.to("meta"))
    with pytest.raises(UserError, match=r"\(2, 3, 8, 8\) and teacher \(2, 2, 8, 8\)"):
        without_void(student, teacher[:, :2], valid)
