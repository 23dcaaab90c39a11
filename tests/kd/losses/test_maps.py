"""channel_wise and hint: losses between maps of one shape."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kd.errors import UserError
from kd.losses import channel_wise, hint

LOSSES = [channel_wise, hint]
Loss = Callable[[Tensor, Tensor], Tensor]


def test_channel_wise_of_two_places_by_hand() -> None:
    # Student: even at T = 2. Teacher: softmax (0, 2 ln 3) / 2 = (1/4, 3/4).
    student = torch.zeros(1, 1, 1, 2)
    teacher = torch.tensor([0.0, 2 * math.log(3)]).view(1, 1, 1, 2)
    expected = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert channel_wise(student, teacher, temperature=2.0).item() == pytest.approx(
        expected, rel=1e-6
    )


def test_channel_wise_agrees_with_a_loop_over_channels() -> None:
    student, teacher = torch.randn(2, 3, 4, 5, 6, dtype=torch.float64).unbind()
    total = 0.0
    for image in range(3):
        for channel in range(4):
            q = (teacher[image, channel].flatten() / 4).softmax(dim=0)
            p = (student[image, channel].flatten() / 4).softmax(dim=0)
            total += sum((q[i] * (q[i] / p[i]).log()).item() for i in range(30))
    expected = 16 * total / 12
    assert channel_wise(student, teacher).item() == pytest.approx(expected, rel=1e-9)


def test_channel_wise_is_invariant_to_a_channels_constant_and_to_the_order_of_places() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, 4).unbind()
    value = channel_wise(student, teacher)
    torch.testing.assert_close(channel_wise(student + torch.randn(2, 3, 1, 1), teacher), value)
    torch.testing.assert_close(channel_wise(student.flip(2), teacher.flip(2)), value)


def test_channel_wise_of_valid_places_by_hand() -> None:
    # As above, beside a void place; the second image, void throughout, does not count.
    student, teacher = torch.zeros(2, 1, 1, 3), torch.full((2, 1, 1, 3), 9.0)
    teacher[0, 0, 0] = torch.tensor([0.0, 9.0, 2 * math.log(3)])
    valid = torch.tensor([[[True, False, True]], [[False, False, False]]])
    expected = 4 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    value = channel_wise(student, teacher, temperature=2.0, valid=valid)
    assert value.item() == pytest.approx(expected, rel=1e-6)


def test_channel_wise_of_valid_places_agrees_with_a_loop_over_them() -> None:
    student, teacher = torch.randn(2, 4, 3, 5, 6, dtype=torch.float64).unbind()
    valid = torch.rand(4, 5, 6) < 0.6
    valid[2] = False
    total, images = 0.0, 0
    for image in range(4):
        places = valid[image].nonzero().tolist()
        images += bool(places)
        for channel in range(3):
            heights = [
                [math.exp(maps[image, channel, y, x].item() / 4) for y, x in places]
                for maps in (student, teacher)
            ]
            for one_s, one_t in zip(*heights, strict=True):
                p, q = one_s / sum(heights[0]), one_t / sum(heights[1])
                total += q * (math.log(q) - math.log(p))
    assert images == 3
    value = channel_wise(student, teacher, valid=valid).item()
    assert value == pytest.approx(16 * total / (3 * images), rel=1e-9)


def test_hint_by_hand() -> None:
    student, teacher = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])
    assert hint(student, teacher).item() == pytest.approx((4 + 9) / 2)


def test_hint_agrees_with_a_loop_over_numbers() -> None:
    student, teacher = torch.randn(2, 2, 3, 4, dtype=torch.float64).unbind()
    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    expected = sum((ours - theirs) ** 2 for ours, theirs in pairs) / 24
    assert hint(student, teacher).item() == pytest.approx(expected, rel=1e-12)


def test_hint_agrees_with_torch_and_is_invariant_to_a_common_shift() -> None:
    student, teacher, shift = torch.randn(3, 2, 3, 4, 4).unbind()
    expected = torch.nn.functional.mse_loss(student, teacher)
    torch.testing.assert_close(hint(student, teacher), expected)
    torch.testing.assert_close(hint(student + shift, teacher + shift), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_maps_have_zero_loss(loss: Loss) -> None:
    maps = torch.randn(2, 3, 4, 4)
    assert loss(maps, maps).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_maps_of_different_shape_are_rejected(loss: Loss) -> None:
    with pytest.raises(UserError, match=r"\(1, 2, 3, 3\) and teacher \(1, 2, 3, 4\)"):
        loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
