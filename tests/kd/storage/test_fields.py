"""Stored maps move as their image does; only the largest classes may be kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kd.storage.fields import CachedField, expand, resample, top_k_log_probs
from kd.storage.store import Store
from kd.transforms.augment import Augment, Plan, pad
from kd.transforms.crops import Crop, Crops

SIZE, FRAME = (48, 64), 64


def move_maps(maps: torch.Tensor, plan: Plan, size: tuple[int, int], frame: int) -> torch.Tensor:
    """Maps over the square frame of an image, moved as the plan moves the image."""
    before, grid = (max(size), max(size)), (maps.shape[2], maps.shape[3])
    return resample(maps, plan.sources(size), before, (frame, frame), grid)


def plans() -> st.SearchStrategy[Plan]:
    """What `Augment` draws, every move likely."""
    augment = Augment(flip=0.5, shift=0.7, rotate=0.7, crop=0.7, rgb_shift=0, shuffle=0, grey=0,
                      blur=0, jitter=0)  # fmt: skip
    return st.integers(0, 10_000).map(lambda seed: augment.draw(np.random.default_rng(seed), SIZE))


@given(plans(), st.floats(0, 64), st.floats(0, 48))
@settings(max_examples=60, deadline=None)
def test_sources_invert_the_augmentation_of_boxes(plan: Plan, x: float, y: float) -> None:
    point = torch.tensor([[x, y, x, y]], dtype=torch.float64)
    moved = plan.boxes(point, SIZE)[0].double()
    back = plan.sources(SIZE) @ np.array([*((moved[:2] + moved[2:]) / 2).tolist(), 1.0])
    # torchvision turns about the middle and rounds corners of turned boxes to float32.
    assert back == pytest.approx([x, y], abs=0.02)


@given(plans(), st.floats(0, 64), st.floats(0, 48))
@settings(max_examples=40, deadline=None)
def test_a_plan_for_the_mirrored_image_maps_to_the_same_place(
    plan: Plan, x: float, y: float
) -> None:
    flipped = dataclasses.replace(plan, flip=True)
    from_plain = flipped.sources(SIZE) @ np.array([x, y, 1.0])
    mirrored = flipped.of_mirrored(SIZE)
    assert not mirrored.flip
    from_mirrored = mirrored.sources(SIZE) @ np.array([x, y, 1.0])
    assert [SIZE[1] - from_plain[0], from_plain[1]] == pytest.approx(from_mirrored.tolist())


def smooth(size: tuple[int, int]) -> Tensor:
    """An image without fine detail: resampling twice is as good as once."""
    down, right = torch.meshgrid(
        torch.linspace(0, 1, size[0]), torch.linspace(0, 1, size[1]), indexing="ij"
    )
    return torch.stack([right, down, 0.5 + 0.5 * torch.sin(5 * right) * torch.cos(4 * down)])


@given(plans())
@settings(max_examples=30, deadline=None)
def test_a_full_resolution_map_moves_with_the_image(plan: Plan) -> None:
    picture = (smooth(SIZE) * 255).round().to(torch.uint8)
    expected = pad(plan.image(picture), FRAME).float()
    moved = move_maps(pad(picture, FRAME)[None].float(), plan, SIZE, FRAME)[0]
    # What comes in from outside is 0 in the image and the edge in the map: look inside.
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


def test_a_flip_does_not_mirror_padding() -> None:
    # The image is the left half of the frame: four of eight columns.
    maps = torch.arange(8.0).expand(1, 1, 8, 8).clone()
    moved = move_maps(maps, Plan(size=(64, 32), flip=True), (64, 32), 64)
    assert moved[0, 0, 0, :4].tolist() == pytest.approx([3, 2, 1, 0])


def test_a_plan_without_geometry_is_the_identity() -> None:
    assert Plan(size=(4, 4), blur=2.0).is_identity
    assert not any(
        plan.is_identity
        for plan in (
            Plan(size=(4, 4), flip=True),
            Plan(size=(4, 4), shift=(0, 1)),
            Plan(size=(4, 4), angle=0.1),
            Plan(size=(4, 4), crop=(0, 0, 4, 4)),
        )
    )


@pytest.mark.parametrize("shape", [(5, 7), (2, 7, 3, 4)])
def test_top_k_is_stored_and_the_rest_is_uniform(shape: tuple[int, ...]) -> None:
    logits = 3 * torch.randn(shape)
    log_probs = logits.log_softmax(dim=1)
    values, indices = top_k_log_probs(logits, 3)
    assert indices.dtype == torch.uint8 and values.shape[1] == 3
    whole = expand(values, indices, 7)
    torch.testing.assert_close(whole.exp().sum(dim=1), torch.ones(shape[0], *shape[2:]))
    torch.testing.assert_close(whole.gather(1, indices.long()), values)
    lowest = log_probs.topk(4, dim=1, largest=False).values
    expected = lowest.exp().mean(dim=1).log()
    others = whole.topk(4, dim=1, largest=False).values
    expected = expected.unsqueeze(1).expand_as(others)
    torch.testing.assert_close(others, expected, rtol=1e-3, atol=1e-3)  # a rest is a difference


def test_top_1_of_two_classes_is_lossless() -> None:
    log_probs = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()
    torch.testing.assert_close(expand(*top_k_log_probs(log_probs, 1), 2), log_probs)


def test_many_classes_have_wide_indices() -> None:
    _, indices = top_k_log_probs(torch.randn(2, 300), 4)
    assert indices.dtype == torch.int16


class Kept:
    """A store of one record an image, in memory."""

    def __init__(self, **values: Tensor) -> None:
        self.values = {name: tensor.numpy() for name, tensor in values.items()}
        self.fields = self.values

    def read(self, ids: NDArray[np.int64], names: Sequence[str]) -> dict[str, NDArray[Any]]:
        return {name: self.values[name][ids] for name in names}


def field_of(stride: int = 8, **values: Tensor) -> CachedField:
    return CachedField(cast(Store, Kept(**values)), "logits", stride=stride)


def places_of(grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(1, 2, h, w): where the middle of each place of a grid over an image is, x and y."""
    down = (torch.arange(grid[0]) + 0.5) * (size[0] / grid[0])
    right = (torch.arange(grid[1]) + 0.5) * (size[1] / grid[1])
    return torch.stack(torch.meshgrid(right, down, indexing="xy"))[None].float()


@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_a_crop_samples_the_map_at_its_source(seed: int, stride: int) -> None:
    size, frame = (45, 62), (40, 56)
    crop = Crops().draw(np.random.default_rng(seed), size, frame)
    # Bilinear reading is exact for a map that says where it is; the image's sides are no
    # multiples of a place's.
    maps = torch.cat([torch.zeros(1, 2, 15, 20), places_of((15, 20), size)])
    found = field_of(stride, values=maps).cropped(1, crop, size, frame)
    assert found.shape == (1, 2, 40 // stride, 56 // stride)
    x, y = places_of((40 // stride, 56 // stride), frame)[0].flatten(1).double()
    expected = crop.sources() @ torch.stack([x, y, torch.ones_like(x)]).numpy()
    for row, side, places in ((0, 62, 20), (1, 45, 15)):
        half = 0.5 * side / places  # beyond the middle of the last place its value is repeated
        near = found[0, row].flatten().tolist()
        assert near == pytest.approx(expected[row].clip(half, side - half).tolist(), abs=1e-3)


def test_a_flipped_crop_samples_the_map_of_the_mirrored_image() -> None:
    size, frame = (32, 48), (16, 24)
    plain, mirrored = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    crop = Crop(window=(8, 16, 16, 24), size=frame, flip=True)
    both = field_of(values=plain, mirrored_values=mirrored)
    found = both.cropped(1, crop, size, frame)
    # Columns 2..4 of the image are its 1..3 in the mirror.
    torch.testing.assert_close(found, mirrored[1:, :, 1:3, 1:4])
    alone = field_of(values=plain).cropped(1, crop, size, frame)
    torch.testing.assert_close(alone, plain[1:, :, 1:3, 2:5].flip(3))
    still = Crop(window=crop.window, size=frame)
    torch.testing.assert_close(both.cropped(1, still, size, frame), plain[1:, :, 1:3, 2:5])


def test_a_coarser_grid_averages_the_map() -> None:
    size, frame = (64, 96), (32, 48)
    stripes = torch.arange(48).remainder(2).float().expand(1, 1, 32, 48)  # a place every 2 pixels
    maps = torch.cat([torch.zeros_like(stripes), stripes])
    whole = Crop(window=(0, 0, *size), size=frame)
    found = field_of(stride=8, values=maps).cropped(1, whole, size, frame)
    assert found.shape == (1, 1, 4, 6)
    torch.testing.assert_close(found[..., 1:-1], torch.full((1, 1, 4, 4), 0.5), atol=0.07, rtol=0)
