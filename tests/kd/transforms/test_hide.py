"""Hidden regions and dense targets: rounding, shapes, schedule, and slow loops to compare with."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd.errors import UserError
from kd.transforms.hide import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    class_maps,
    hidden_regions,
    hide,
    hide_fraction,
    normalise,
    regions_of,
    shrink_masks,
    valid_pixels,
)

SIZE = (12, 16)
coordinate = st.floats(0, 16, width=32)
boxes_strategy = st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), max_size=5)


def as_boxes(corners: list[tuple[float, float, float, float]]) -> Tensor:
    """Sort corners so that they are boxes, (K, 4)."""
    boxes = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    return torch.cat(
        [torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])], 1
    )


def slow_region(box: list[float], size: tuple[int, int]) -> Tensor:
    """The rule of the module, pixel by pixel, each axis by itself."""
    inside = []
    for low, high, length in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        line = [low <= place + 0.5 < high for place in range(length)]
        if not any(line):
            middle = torch.tensor(low).add(high).div(2).floor()
            line[int(middle.clamp(0, length - 1))] = True
        inside.append(line)
    return torch.tensor([[row and column for column in inside[1]] for row in inside[0]])


def test_a_pixel_is_hidden_if_the_box_holds_its_centre() -> None:
    boxes = torch.tensor([[1.5, 2.0, 3.5, 3.51], [1.51, 2.0, 3.49, 4.0]])
    regions = hidden_regions(boxes, (6, 6))
    assert regions[0].nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]
    assert regions[1].nonzero().tolist() == [[2, 2], [3, 2]]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(boxes_strategy)
def test_box_regions_agree_with_a_slow_loop(
    corners: list[tuple[float, float, float, float]],
) -> None:
    boxes = as_boxes(corners)
    regions = hidden_regions(boxes, SIZE)
    assert regions.shape == (len(boxes), *SIZE)
    for box, region in zip(boxes.tolist(), regions, strict=True):
        assert torch.equal(region, slow_region(box, SIZE))
    assert torch.equal(regions, hidden_regions(boxes, SIZE, fraction=torch.ones(len(boxes))))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(boxes_strategy, st.sampled_from(["box", "square", "ellipse"]))
def test_every_shape_covers_its_box(
    corners: list[tuple[float, float, float, float]], shape: str
) -> None:
    boxes = as_boxes(corners)
    box = hidden_regions(boxes, SIZE)
    assert (hidden_regions(boxes, SIZE, shape=shape) >= box).all()


def test_a_square_has_the_longer_side_and_is_cut_at_the_frame() -> None:
    region = hidden_regions(torch.tensor([[4.0, 0.0, 10.0, 2.0]]), (12, 16), shape="square")[0]
    rows, columns = region.nonzero().unbind(1)
    assert [int(rows.min()), int(rows.max())] == [0, 3]
    assert [int(columns.min()), int(columns.max())] == [4, 9]
    assert region.sum() == 24


def test_an_ellipse_has_half_pi_times_the_area_of_its_box() -> None:
    region = hidden_regions(torch.tensor([[60.0, 80.0, 140.0, 120.0]]), (200, 200), shape="ellipse")
    assert int(region.sum()) == pytest.approx(80 * 40 * math.pi / 2, rel=0.01)


@pytest.mark.parametrize("shape", ["box", "square", "ellipse"])
def test_a_fraction_hides_that_fraction_around_the_same_centre(shape: str) -> None:
    boxes = torch.tensor([[40.0, 60.0, 120.0, 120.0]]).expand(2, 4)
    whole, part = hidden_regions(boxes, (200, 200), shape=shape, fraction=torch.tensor([1.0, 0.25]))
    assert int(part.sum()) == pytest.approx(int(whole.sum()) / 4, rel=0.02)
    assert (whole >= part).all()
    assert torch.equal(whole, hidden_regions(boxes[:1], (200, 200), shape=shape)[0])
    middle, same_middle = (region.nonzero().float().mean(dim=0) for region in (whole, part))
    torch.testing.assert_close(middle, same_middle, atol=0.6, rtol=0)


def test_shrinking_a_mask_gives_the_fraction_and_keeps_its_shape() -> None:
    mask = torch.zeros(1, 100, 100, dtype=torch.bool)
    mask[0, 20:60, 30:70] = torch.tril(torch.ones(40, 40, dtype=torch.bool))
    box = torch.tensor([[30.0, 20.0, 70.0, 60.0]])
    assert torch.equal(shrink_masks(mask, box, torch.ones(1)), mask)
    half = shrink_masks(mask, box, torch.tensor([0.5]))
    assert int(half.sum()) == pytest.approx(int(mask.sum()) / 2, rel=0.05)
    assert (hidden_regions(box, (100, 100), fraction=torch.tensor([0.5])) >= half).all()


def test_segments_cannot_be_drawn_from_boxes() -> None:
    with pytest.raises(UserError, match="box, square or ellipse"):
        hidden_regions(torch.zeros(1, 4), SIZE, shape="segment")


def test_hiding_zeroes_the_region_only_and_marks_it() -> None:
    images = torch.randn(2, 3, *SIZE) + 5
    boxes = torch.tensor([[2.0, 3.0, 7.0, 9.0], [0.0, 0.0, 4.0, 4.0], [8.0, 2.0, 16.0, 12.0]])
    image_of = torch.tensor([0, 1, 1])
    regions = hidden_regions(boxes, SIZE)
    inputs = hide(images, image_of, regions)
    assert inputs.shape == (3, 4, *SIZE)
    for number, region in enumerate(regions):
        assert (inputs[number, :3, region] == 0).all()
        assert torch.equal(inputs[number, :3, ~region], images[image_of[number]][:, ~region])
        assert torch.equal(inputs[number, 3], region.float())


def test_no_hidden_objects_give_an_empty_batch() -> None:
    none = torch.zeros(0, dtype=torch.long)
    regions = hidden_regions(torch.zeros(0, 4), SIZE)
    assert hide(torch.zeros(2, 3, *SIZE), none, regions).shape == (0, 4, *SIZE)
    assert not class_maps(torch.zeros(0, 4), none, none, 2, 3, SIZE).any()
    assert shrink_masks(regions, torch.zeros(0, 4), torch.zeros(0)).shape == (0, *SIZE)


def test_normalise_gives_zero_mean_colours_zero() -> None:
    image = torch.tensor(IMAGENET_MEAN).mul(255).round().to(torch.uint8).view(1, 3, 1, 1)
    values = normalise(torch.cat([image, torch.zeros_like(image)]))
    assert values.dtype == torch.float32
    assert values[0].abs().max() < 0.01
    expected = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(values[1].flatten(), expected)


def test_the_schedule_is_linear_and_then_hides_all() -> None:
    assert hide_fraction(0.0, start=0.2, until=0.5) == pytest.approx(0.2)
    assert hide_fraction(0.25, start=0.2, until=0.5) == pytest.approx(0.6)
    assert hide_fraction(0.5, start=0.2, until=0.5) == 1.0
    assert hide_fraction(0.9, start=0.2, until=0.5) == 1.0
    assert hide_fraction(0.0, start=0.2, until=0.0) == 1.0


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_class_maps_agree_with_a_slow_loop(data: st.DataObject) -> None:
    boxes = as_boxes(data.draw(boxes_strategy))
    labels = torch.tensor(
        data.draw(st.lists(st.integers(-1, 2), min_size=len(boxes), max_size=len(boxes))),
        dtype=torch.long,
    )
    owners = sorted(
        data.draw(st.lists(st.integers(0, 1), min_size=len(boxes), max_size=len(boxes)))
    )
    image_of = torch.tensor(owners, dtype=torch.long)
    expected = torch.zeros(2, 3, *SIZE, dtype=torch.bool)
    for box, label, image in zip(boxes.tolist(), labels.tolist(), owners, strict=True):
        if label >= 0:
            expected[image, label] |= slow_region(box, SIZE)
    maps = class_maps(boxes, labels, image_of, 2, 3, SIZE)
    assert torch.equal(maps, expected)
    used = torch.ones_like(maps)
    assert class_maps(boxes, labels, image_of, 2, 3, SIZE, out=used) is used
    assert torch.equal(used, expected)


def test_class_maps_reject_an_output_of_another_shape() -> None:
    none = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="expected"):
        class_maps(torch.zeros(0, 4), none, none, 2, 3, SIZE, out=torch.zeros(1, dtype=torch.bool))


def test_valid_pixels_are_those_of_the_image() -> None:
    valid = valid_pixels(torch.tensor([[3, 5], [4, 2]]), (4, 5))
    assert valid.shape == (2, 4, 5)
    assert valid[0].nonzero().max(0).values.tolist() == [2, 4]
    assert valid.flatten(1).sum(1).tolist() == [15, 8]


def test_hidden_regions_follow_shape_and_fraction() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [4.0, 2.0, 12.0, 10.0]])
    batch = {
        "images": torch.zeros(1, 3, *SIZE, dtype=torch.uint8),
        "boxes": boxes,
        "hidden": torch.tensor([1]),
        "hide_fraction": torch.tensor([0.25]),
        "segments": hidden_regions(boxes[1:], SIZE),
    }
    quarter = torch.tensor([[6.0, 4.0, 10.0, 8.0]])
    assert torch.equal(regions_of(batch), hidden_regions(quarter, SIZE))
    assert torch.equal(regions_of(batch, shape="segment"), hidden_regions(quarter, SIZE))
    assert int(regions_of(batch, shape="ellipse").sum()) > 16


@pytest.mark.gpu
def test_class_maps_on_a_gpu_are_the_same() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    corners = torch.rand(40, 2, 2, generator=torch.Generator().manual_seed(1)).mul(64)
    boxes = corners.sort(dim=1).values.reshape(40, 4)
    labels = torch.randint(-1, 5, (40,), generator=torch.Generator().manual_seed(2))
    image_of = torch.arange(4).repeat_interleave(10)
    drawn = class_maps(boxes.cuda(), labels.cuda(), image_of.cuda(), 4, 5, (64, 64))
    assert torch.equal(drawn.cpu(), class_maps(boxes, labels, image_of, 4, 5, (64, 64)))
    assert torch.equal(
        hidden_regions(boxes.cuda(), (64, 64)).cpu(), hidden_regions(boxes, (64, 64))
    )
