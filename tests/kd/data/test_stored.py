"""Stored maps move as their picture does; only the largest classes may be kept."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.data.stored import expand, keep_largest, move_maps
from kd.data.transforms import Augment, Plan, pad

SIZE, FRAME = (48, 64), 64


def plans() -> st.SearchStrategy[Plan]:
    """What `Augment` draws, every move likely."""
    augment = Augment(flip=0.5, shift=0.7, rotate=0.7, crop=0.7, rgb_shift=0, shuffle=0, grey=0,
                      blur=0, jitter=0)  # fmt: skip
    return st.integers(0, 10_000).map(lambda seed: augment.draw(np.random.default_rng(seed), SIZE))


@given(plans(), st.floats(0, 64), st.floats(0, 48))
@settings(max_examples=60, deadline=None)
def test_sources_undo_what_happens_to_boxes(plan: Plan, x: float, y: float) -> None:
    point = torch.tensor([[x, y, x, y]], dtype=torch.float64)
    moved = plan.boxes(point, SIZE)[0].double()
    back = plan.sources(SIZE) @ np.array([*((moved[:2] + moved[2:]) / 2).tolist(), 1.0])
    # torchvision turns about the middle and rounds corners of turned boxes to float32.
    assert back == pytest.approx([x, y], abs=0.02)


@given(plans(), st.floats(0, 64), st.floats(0, 48))
@settings(max_examples=40, deadline=None)
def test_a_plan_of_the_mirrored_picture_leads_to_the_same_place(
    plan: Plan, x: float, y: float
) -> None:
    flipped = dataclasses.replace(plan, flip=True)
    from_plain = flipped.sources(SIZE) @ np.array([x, y, 1.0])
    mirrored = flipped.of_mirrored(SIZE)
    assert not mirrored.flip
    from_mirrored = mirrored.sources(SIZE) @ np.array([x, y, 1.0])
    assert [SIZE[1] - from_plain[0], from_plain[1]] == pytest.approx(from_mirrored.tolist())


def smooth(size: tuple[int, int]) -> Tensor:
    """A picture without fine detail: resampling twice is as good as once."""
    down, right = torch.meshgrid(
        torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij"
    )
    return torch.stack([right, down, 0.5 + 0.5 * torch.sin(5 * right) * torch.cos(4 * down)])


@given(plans())
@settings(max_examples=30, deadline=None)
def test_a_map_as_fine_as_the_picture_moves_with_it(plan: Plan) -> None:
    picture = (smooth(SIZE) * 255).round().to(torch.uint8)
    expected = pad(plan.image(picture), FRAME).float()
    moved = move_maps(pad(picture, FRAME)[None].float(), plan, SIZE, FRAME)[0]
    # What comes in from outside is 0 in the picture and the edge in the map: look inside.
    inside = pad(plan.image(torch.full_like(picture, 255)), FRAME)[0] == 255
    inside &= -torch.nn.functional.max_pool2d(-inside[None].float(), 5, 1, 2)[0] > 0
    assert inside.sum() > 200
    away = (moved - expected).abs()[:, inside]
    assert away.median() <= 1.5 and away.quantile(0.95) <= 5


def test_a_flip_of_a_whole_frame_is_exact() -> None:
    maps = torch.randn(2, 3, 8, 8).half()
    moved = move_maps(maps, Plan(size=(64, 64), flip=True), (64, 64), 64)
    assert moved.dtype == torch.float16
    torch.testing.assert_close(moved, maps.flip(3), rtol=1e-3, atol=1e-3)


def test_a_flip_mirrors_the_picture_and_not_its_padding() -> None:
    # The picture is the left half of the frame: four of eight columns.
    maps = torch.arange(8.0).expand(1, 1, 8, 8).clone()
    moved = move_maps(maps, Plan(size=(64, 32), flip=True), (64, 32), 64)
    assert moved[0, 0, 0, :4].tolist() == pytest.approx([3, 2, 1, 0])


def test_a_plan_without_geometry_is_still() -> None:
    assert Plan(size=(4, 4), blur=2.0).still
    assert not any(
        plan.still
        for plan in (
            Plan(size=(4, 4), flip=True),
            Plan(size=(4, 4), shift=(0, 1)),
            Plan(size=(4, 4), angle=0.1),
            Plan(size=(4, 4), crop=(0, 0, 4, 4)),
        )
    )


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3, 4)])
def test_the_largest_are_kept_and_the_rest_share_what_is_left(shape: tuple[int, ...]) -> None:
    logits = 3 * torch.randn(shape)
    log_probs = logits.log_softmax(dim=1)
    values, indices = keep_largest(logits, 3)
    assert indices.dtype == torch.uint8 and values.shape[1] == 3
    whole = expand(values, indices, 7)
    torch.testing.assert_close(whole.exp().sum(dim=1), torch.ones(shape[0], *shape[2:]))
    torch.testing.assert_close(whole.gather(1, indices.long()), values)
    lowest = log_probs.topk(4, dim=1, largest=False).values
    expected = lowest.exp().mean(dim=1).log()
    others = whole.topk(4, dim=1, largest=False).values
    expected = expected.unsqueeze(1).expand_as(others)
    torch.testing.assert_close(others, expected, rtol=1e-3, atol=1e-3)  # a rest is a difference


def test_one_class_kept_of_two_says_all() -> None:
    log_probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    torch.testing.assert_close(expand(*keep_largest(log_probs, 1), 2), log_probs)


def test_many_classes_have_wide_indices() -> None:
    _, indices = keep_largest(torch.randn(2, 300), 4)
    assert indices.dtype == torch.int16
