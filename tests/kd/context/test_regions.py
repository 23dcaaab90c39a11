"""Regions: read from text and files, drawn at random, slid over an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline
from PIL import Image

from kd.context.regions import (
    Shape,
    parse_box,
    parse_polygon,
    parse_scale,
    polygon_mask,
    random_boxes,
    read_mask,
    windows,
)
from kd.errors import UserError
from kd.transforms.hide import hidden_regions

SIZE = (30, 40)


def test_a_box_is_cut_at_the_images_border() -> None:
    region = parse_box("10,-5,60.5,20")("a.jpg", SIZE)
    assert region.box == (10.0, 0.0, 40.0, 20.0)
    assert region.name == "box 10,-5,60.5,20"
    assert region.mask is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2,3", "expected x1,y1,x2,y2 in pixels, got 3 numbers"),
        ("5,2,5,9", "must lie left of and above"),
        ("1,9,5,2", "must lie left of and above"),
        ("1,2,x,4", "expected numbers with commas"),
        ("1,2,inf,4", "expected numbers with commas"),
        ("", "expected numbers with commas"),
    ],
)
def test_a_box_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_box(text)


@pytest.mark.parametrize("shape", [parse_box("40,0,50,10"), parse_polygon("41,1,50,1,45,9")])
def test_a_region_outside_of_the_image_is_named_with_its_size(shape: Shape) -> None:
    with pytest.raises(UserError, match=r"a\.jpg: .* outside of the image, which is 40 x 30"):
        shape("a.jpg", SIZE)


@pytest.mark.parametrize("text", ["1,2,3,4", "1,2,3,4,5"])
def test_a_polygon_has_three_corners_of_two_numbers(text: str) -> None:
    with pytest.raises(UserError, match="three corners or more; got"):
        parse_polygon(text)


def test_a_polygon_of_a_boxs_corners_hides_the_boxs_pixels() -> None:
    box = [3.4, 2.5, 17.5, 12.0]
    x1, y1, x2, y2 = box
    corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]])
    wanted = hidden_regions(torch.tensor([box]), SIZE)[0].numpy()
    assert np.array_equal(polygon_mask(corners, SIZE), wanted)
    assert np.array_equal(polygon_mask(corners[::-1], SIZE), wanted)  # either way round


def test_a_polygons_pixels_are_those_whose_centres_it_holds() -> None:
    random = np.random.default_rng(3)
    centres = np.stack(np.meshgrid(np.arange(40) + 0.5, np.arange(30) + 0.5), axis=2)
    for _ in range(5):
        angles = np.sort(random.uniform(0, 2 * np.pi, 7))
        reach = random.uniform(4, 25, 7)  # leaves the image too
        corners = np.stack([20 + reach * np.cos(angles), 15 + reach * np.sin(angles)], axis=1)
        wanted = Outline(corners).contains_points(centres.reshape(-1, 2)).reshape(SIZE)
        assert np.array_equal(polygon_mask(corners, SIZE), wanted)


def test_a_polygons_box_is_around_its_pixels() -> None:
    region = parse_polygon("5,5,15,5,10,20")("a.jpg", SIZE)
    assert region.mask is not None and region.mask.shape == SIZE
    assert region.box == (5.0, 5.0, 15.0, 19.0)  # the tip holds no centre


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_mask_of_any_kind_hides_where_it_is_not_0(mode: str, tmp_path: Path) -> None:
    wanted = np.zeros(SIZE, np.bool_)
    wanted[4:9, 10:20] = True
    if mode == "I;16":
        picture = Image.fromarray(wanted.astype(np.uint16))  # 1 of 65535
    elif mode == "P":  # the palette's first colour is white, its second black
        picture = Image.fromarray((~wanted).astype(np.uint8), mode="P")
        picture.putpalette([255, 255, 255, 0, 0, 0])
    else:
        picture = Image.fromarray(wanted.astype(np.uint8) * 255).convert(mode)
    picture.save(tmp_path / "m.png")
    region = read_mask(tmp_path / "m.png")("a.jpg", SIZE)
    assert region.mask is not None and np.array_equal(region.mask, wanted)
    assert (region.box, region.name) == ((10.0, 4.0, 20.0, 9.0), "m.png")


def test_masks_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    Image.new("L", (40, 30)).save(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (
        ("empty.png", "empty.png: the mask is empty"),
        ("text.png", "text.png: cannot read this mask"),
        ("gone.png", "gone.png: mask not found"),
    ):
        with pytest.raises(UserError, match=message):
            read_mask(tmp_path / name)
    Image.new("L", (40, 30), 1).save(tmp_path / "whole.png")
    with pytest.raises(UserError, match=r"whole\.png: is 40 x 30 pixels, but a\.jpg is 30 x 40"):
        read_mask(tmp_path / "whole.png")("a.jpg", (40, 30))


def test_random_boxes_keep_to_their_range_and_to_the_image() -> None:
    size = (300, 400)
    regions = random_boxes(2000, size, (0.01, 0.3), np.random.default_rng(0))
    boxes = np.array([region.box for region in regions])
    sides = boxes[:, 2:] - boxes[:, :2]
    fractions, aspects = sides.prod(axis=1) / (300 * 400), sides[:, 0] / sides[:, 1]
    assert (boxes >= 0).all() and (boxes[:, [2, 3]] <= [400, 300]).all()
    assert 0.009 < fractions.min() < 0.015 and 0.25 < fractions.max() < 0.31
    assert 0.45 < aspects.min() < 0.6 and 1.7 < aspects.max() < 2.2
    assert np.median(fractions) == pytest.approx((0.01 * 0.3) ** 0.5, rel=0.1)
    again = random_boxes(2000, size, (0.01, 0.3), np.random.default_rng(0))
    assert [region.box for region in again] == [region.box for region in regions]
    (tiny,) = random_boxes(1, (1, 1), (0.01, 0.3), np.random.default_rng(0))
    assert tiny.box == (0.0, 0.0, 1.0, 1.0)


def test_windows_touch_all_borders_and_move_by_no_more_than_the_stride() -> None:
    slid = windows((100, 200), (0.25, 0.3), 0.5)  # 50 x 30, at most 25 and 15 apart
    assert slid.grid == (6, 7)
    boxes = slid.boxes.view(6, 7, 4)
    assert torch.equal(slid.boxes[:, 2:] - slid.boxes[:, :2], torch.tensor([[50.0, 30.0]] * 42))
    assert boxes[0, 0].tolist() == [0, 0, 50, 30]
    assert boxes[-1, -1].tolist() == [150, 70, 200, 100]
    assert boxes[0, :, 0].diff().tolist() == [25.0] * 6
    assert boxes[:, 0, 1].diff().tolist() == [14.0] * 5


def test_a_window_as_large_as_the_image_has_one_place() -> None:
    slid = windows((10, 20), (1.0, 1.0), 0.5)
    assert slid.grid == (1, 1)
    assert slid.boxes.tolist() == [[0, 0, 20, 10]]
    assert windows((1, 5), (0.2, 0.2), 1.0).grid == (1, 5)  # no window is thinner than a pixel


@pytest.mark.parametrize("stride", [0.0, -1.0, 1.5, float("nan")])
def test_a_stride_out_of_range_is_refused(stride: float) -> None:
    with pytest.raises(UserError, match="above 0 and at most 1"):
        windows((10, 10), (0.5, 0.5), stride)


def test_scales_are_read_and_checked() -> None:
    assert parse_scale("0.2X.5") == (0.2, 0.5)
    for text in ("0.2", "0x0.5", "1.2x0.5", "axb", "0.1x0.2x0.3", "nanx1"):
        with pytest.raises(UserError, match="fractions of the image's width and height"):
            parse_scale(text)
