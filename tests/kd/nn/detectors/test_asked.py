"""Boxes near the true ones: near, far enough, and the same for all who are asked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import box_iou

from kd.errors import UserError
from kd.nn.detectors.contract import REACH, STRETCH, moved_boxes
from kd.nn.networks import DETECTORS

FRAME = (480, 640)


def boxes_of(count: int) -> Tensor:
    drawn = torch.Generator().manual_seed(0)
    low = 50 + 300 * torch.rand(count, 2, generator=drawn)
    return torch.cat([low, low + 4 + 100 * torch.rand(count, 2, generator=drawn)], dim=1)


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    return torch.stack([box_iou(one[None], other[None])[0, 0]
                        for one, other in zip(boxes, others, strict=True)])  # fmt: skip


def test_boxes_move_as_far_as_proposals_are_off() -> None:
    boxes = boxes_of(500)
    found = overlaps(boxes, moved_boxes(boxes, FRAME))
    assert found.min() > 0.52 and found.mean() == pytest.approx(0.72, abs=0.02)
    assert found.max() < 0.99


def test_moves_are_spread_evenly_and_follow_from_nothing_but_the_box() -> None:
    boxes = boxes_of(4000)
    moved = moved_boxes(boxes, FRAME)
    sides, after = boxes[:, 2:] - boxes[:, :2], moved[:, 2:] - moved[:, :2]
    shift = (moved[:, :2] + moved[:, 2:] - boxes[:, :2] - boxes[:, 2:]) / 2 / sides
    stretch = (after / sides).log() / torch.tensor(STRETCH).log()
    ways = torch.cat([shift / REACH, stretch], dim=1)
    assert ways.abs().max() <= 1.001
    torch.testing.assert_close(ways.mean(dim=0), torch.zeros(4), atol=0.05, rtol=0)
    torch.testing.assert_close(ways.std(dim=0), torch.full((4,), 3**-0.5), atol=0.03, rtol=0)
    seen = torch.corrcoef(torch.cat([ways, boxes], dim=1).T)[:4]
    seen[:, :4].fill_diagonal_(0.0)
    assert seen.abs().max() < 0.07
    # Row by row, whatever stands beside; and a box two pixels on is another one.
    assert torch.equal(moved_boxes(boxes[[7, 3]], FRAME), moved[[7, 3]])
    onward = moved_boxes(boxes + 2.0, FRAME) - 2.0
    assert (onward - moved).abs().amax(dim=1).median() > 1.0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.tuples(st.floats(0, 40), st.floats(0, 40), st.floats(0.25, 24), st.floats(0.25, 24)))
def test_in_the_frame_s_corner_a_box_stays_within_and_near(at: tuple[float, ...]) -> None:
    x, y, width, height = at
    box = torch.tensor([[x, y, x + width, y + height]]).clamp(max=41.0)
    moved = moved_boxes(box, (41, 41))
    assert (moved >= 0).all() and (moved <= 41).all()
    assert overlaps(box, moved)[0] > 0.5 - 1e-3


def test_no_box_moves_none_and_types_and_gradients_are_kept() -> None:
    assert moved_boxes(torch.empty(0, 4), FRAME).shape == (0, 4)
    boxes = boxes_of(3).double().requires_grad_()
    moved = moved_boxes(boxes, FRAME)
    assert moved.dtype == torch.float64 and not moved.requires_grad
    torch.testing.assert_close(moved.float(), moved_boxes(boxes.float(), FRAME))


def test_asked_boxes_stand_beside_the_true_ones() -> None:
    image, one = torch.zeros(1, 3, 32, 32), torch.tensor([0])
    boxes = torch.tensor([[1.0, 1.0, 9.0, 9.0]])
    model = DETECTORS["fcos"].load()(3, trunk="shufflenet_v2_x0_5", channels=64).eval()
    with pytest.raises(
        UserError, match=r"one box for each of boxes, \(M, 4\), got \(2, 4\) and boxes \(1, 4\)"
    ):
        model(image, boxes=boxes, image_of=one, near_boxes=boxes.repeat(2, 1))
    with pytest.raises(
        UserError, match=r"one box for each of boxes, \(M, 4\), got \(1, 4\) and no boxes"
    ):
        model(image, near_boxes=boxes)
