"""Pooling over objects and around them."""

from __future__ import annotations

import pytest
import torch

from kd.nn.regions import (
    box_geometry,
    coverage,
    crop_regions,
    expand_boxes,
    mask_boxes,
    masked_pool,
    roi_features,
)


def test_coverage_by_hand() -> None:
    # Places of 10 pixels; the box covers half of the first column's width and all of the second's.
    fractions = coverage(torch.tensor([[5.0, 0.0, 20.0, 5.0]]), (2, 3), 10)
    expected = torch.tensor([[[0.25, 0.5, 0.0], [0.0, 0.0, 0.0]]])
    torch.testing.assert_close(fractions, expected)


def test_coverage_agrees_with_counted_pixels() -> None:
    boxes = torch.tensor([[3, 1, 29, 30], [0, 0, 32, 24], [-5, 10, 4, 99], [7, 7, 7, 7]]).float()
    grid, stride = (3, 4), 8
    fractions = coverage(boxes, grid, stride)
    for box, fraction in zip(boxes.tolist(), fractions, strict=True):
        pixels = torch.zeros(24, 32)
        x1, y1, x2, y2 = (max(int(side), 0) for side in box)
        pixels[y1:y2, x1:x2] = 1
        counted = pixels.view(3, 8, 4, 8).mean(dim=(1, 3))
        torch.testing.assert_close(fraction, counted)


def test_masked_pool_agrees_with_a_loop() -> None:
    features = torch.randn(3, 5, 4, 6).to(memory_format=torch.channels_last)
    weights, image_of = torch.rand(7, 4, 6), torch.tensor([0, 0, 0, 2, 2, 1, 0])
    pooled = masked_pool(features, weights, image_of)
    for row, weight, image in zip(pooled, weights, image_of.tolist(), strict=True):
        expected = (features[image] * weight).sum(dim=(1, 2)) / weight.sum()
        torch.testing.assert_close(row, expected)


def test_masked_pool_gives_zero_for_no_weight_and_nothing_for_no_object() -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    pooled = masked_pool(features, torch.zeros(1, 4, 4), torch.tensor([1]))
    assert pooled.eq(0).all()
    none = masked_pool(features, torch.zeros(0, 4, 4), torch.zeros(0, dtype=torch.int64))
    assert none.shape == (0, 3)
    (pooled.sum() + none.sum()).backward()
    assert features.grad is not None and not features.grad.any()


def test_masked_pool_has_the_right_gradients() -> None:
    features = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, 2, 2, dtype=torch.float64, requires_grad=True)
    image_of = torch.tensor([0, 1, 1])
    assert torch.autograd.gradcheck(lambda f, w: masked_pool(f, w, image_of), (features, weights))


def test_pooling_keeps_the_features_type() -> None:
    features = torch.randn(1, 3, 8, 8)
    rois = torch.tensor([[0.0, 3.0, 5.0, 40.0, 60.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        regions = roi_features(features.bfloat16(), rois, 8, output_size=2)
        pooled = masked_pool(features.bfloat16(), torch.rand(1, 8, 8), torch.tensor([0]))
    assert regions.dtype == pooled.dtype == torch.bfloat16
    exact = roi_features(features, rois, 8, output_size=2)
    torch.testing.assert_close(regions.float(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("output_size", [1, 2, 3])
def test_roi_features_of_a_ramp_are_the_centres_of_the_parts(output_size: int) -> None:
    ramp = ((torch.arange(16) + 0.5) * 4).expand(1, 1, 16, 16)  # x in pixels
    rois = torch.tensor([[0.0, 12.0, 12.0, 48.0, 48.0]])
    regions = roi_features(ramp, rois, 4, output_size=output_size)
    assert regions.shape == (1, 1, output_size, output_size)
    side = 36 / output_size
    expected = 12 + side * (torch.arange(output_size) + 0.5)
    torch.testing.assert_close(regions[0, 0, 0], expected)


def test_no_objects_give_no_regions() -> None:
    features = torch.randn(2, 3, 4, 4, requires_grad=True)
    regions = roi_features(features, torch.zeros(0, 5), 8, output_size=2)
    assert regions.shape == (0, 3, 2, 2)
    regions.sum().backward()


def test_a_crop_of_the_same_size_is_the_image_itself() -> None:
    images = torch.randn(2, 3, 16, 16)
    crops = crop_regions(images, torch.tensor([[1.0, 4.0, 2.0, 12.0, 10.0]]), 8)
    torch.testing.assert_close(crops[0], images[1, :, 2:10, 4:12])


def test_a_margin_widens_a_crop_and_what_lies_outside_is_dark() -> None:
    images = torch.ones(1, 1, 16, 16)
    crops = crop_regions(images, torch.tensor([[0.0, 0.0, 0.0, 8.0, 8.0]]), 16, margin=0.5)
    assert crops[0, 0, 8:, 8:].eq(1).all() and crops[0, 0, :2, :2].eq(0).all()
    grown = expand_boxes(torch.tensor([[0.0, 0.0, 8.0, 4.0]]), 0.5)
    assert grown.tolist() == [[-4.0, -2.0, 12.0, 6.0]]


def test_box_geometry_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 50.0, 50.0], [7.0, 7.0, 7.0, 7.0]])
    numbers = box_geometry(boxes / 100)
    torch.testing.assert_close(numbers[0, :7], torch.tensor([0.25, 0.25, 0.5, 0.5, 0.5, 0.5, 0.0]))
    assert numbers.shape == (2, 8) and numbers[1].eq(0).all()


def test_mask_boxes_are_the_smallest_ones() -> None:
    mask = torch.zeros(3, 10, 12)
    mask[0, 2:5, 3:9] = 1
    mask[1, 9, 11] = 1
    mask[1, 0, 4] = 0.5
    assert mask_boxes(mask).tolist() == [[3, 2, 9, 5], [4, 0, 12, 10], [0, 0, 0, 0]]
