"""Cutting out and pasting: inside the object its own pixels, outside of its reach the scene's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from kd.context.pasting.cutout import (
    FINE,
    REACH,
    Look,
    cover_of,
    cut_out,
    inside_of,
    lit,
    look_of,
    paste,
    softened,
)

LOOK = Look(np.full(3, 100, np.float32), np.full(3, 30, np.float32), edge=0.5, grain=2.0)
SHAPE = (60, 80)


def picture(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


def disc(x: float = 30.0, y: float = 25.0, radius: float = 10.0) -> np.ndarray[
    tuple[int, ...], np.dtype[np.float32]
]:  # fmt: skip
    rows, columns = np.mgrid[: SHAPE[0] * FINE, : SHAPE[1] * FINE]
    far = np.hypot((columns + 0.5) / FINE - x, (rows + 0.5) / FINE - y)
    return cover_of(far < radius)


def test_cover_is_the_share_of_each_pixel_inside_the_outline() -> None:
    fine = np.zeros((8, 8), np.bool_)
    fine[:4, :2] = True  # the left half of the first pixel
    fine[4:, 4:] = True
    assert cover_of(fine).tolist() == [[0.5, 0.0], [0.0, 1.0]]
    assert disc().sum() == pytest.approx(np.pi * 100, rel=0.01)


@pytest.mark.parametrize("edge", [0.0, 0.3, 0.7, 5.0])
@pytest.mark.parametrize("shift", [(0, 0), (25, 12), (-10, -8)])
def test_inside_are_the_objects_pixels_and_beyond_its_reach_the_scenes(
    edge: float, shift: tuple[int, int]
) -> None:
    source, scene, cover = picture(1), picture(2), disc()
    look = Look(LOOK.mean, LOOK.spread, edge, LOOK.grain)
    result = paste(scene, look, cut_out(source, cover, look), shift, harmony=0.0)
    moved = np.roll(cover, shift[::-1], axis=(0, 1))
    away = ndimage.distance_transform_edt(moved == 0)
    outside = away > REACH * np.sqrt(2)
    assert np.array_equal(result[outside], scene[outside])
    deep = ndimage.distance_transform_edt(moved == 1) > REACH * np.sqrt(2)
    assert deep.sum() > 50
    assert np.array_equal(result[deep], np.roll(source, shift[::-1], axis=(0, 1))[deep])
    assert not np.array_equal(result, scene)


def test_the_scene_itself_is_left_as_it_is() -> None:
    scene = picture(2)
    before = scene.copy()
    paste(scene, LOOK, cut_out(picture(1), disc(), LOOK), (3, 3))
    assert np.array_equal(scene, before)


def test_no_fringe_of_the_old_background_travels_along() -> None:
    """A green object in front of pure red, pasted on blue: no pixel may have any red."""
    source = np.zeros((*SHAPE, 3), np.uint8)
    source[..., 0] = 255
    cover = disc()
    source[cover > 0] = (cover[cover > 0][:, None] * (0, 200, 0)
                         + (1 - cover[cover > 0][:, None]) * (255, 0, 0))  # fmt: skip
    scene = np.zeros_like(source)
    scene[..., 2] = 180
    result = paste(scene, LOOK, cut_out(source, cover, LOOK), (10, 5), harmony=0.0)
    assert result[..., 0].max() == 0
    assert result[..., 1].max() == 200


def test_an_object_thinner_than_its_rim_is_still_pasted() -> None:
    cover = np.zeros(SHAPE, np.float32)
    cover[20:40, 30] = 0.6  # no pixel is wholly covered
    assert inside_of(cover, rim=2).sum() == 20
    scene = np.zeros((*SHAPE, 3), np.uint8)
    result = paste(scene, LOOK, cut_out(np.full_like(scene, 200), cover, LOOK), (0, 0), harmony=0)
    assert 60 < result.max() <= 120


@given(edge=st.floats(0, 10), radius=st.floats(1, 12))
def test_a_softened_outline_keeps_its_place_and_its_bounds(edge: float, radius: float) -> None:
    cover = disc(radius=radius)
    soft = softened(cover, edge)
    assert soft.min() >= 0 and soft.max() <= 1 + 1e-6
    assert not soft[ndimage.distance_transform_edt(cover == 0) > REACH * np.sqrt(2)].any()
    assert soft.sum() == pytest.approx(cover.sum(), rel=0.1)


def test_a_sharp_scene_leaves_the_drawn_outline_and_a_soft_one_softens_it() -> None:
    cover = disc()
    assert np.array_equal(softened(cover, 0.2), np.where(cover < 0.02, 0, cover))
    steps = [np.abs(np.diff(softened(cover, edge), axis=1)).max() for edge in (0.3, 0.6, 1.0)]
    assert steps[0] > steps[1] > steps[2]


def test_light_moves_part_of_the_way_and_no_further_than_it_may() -> None:
    colours = np.array([[[100.0, 110.0, 130.0]]], np.float32)
    brighter = Look(np.array([120, 100, 100], np.float32), LOOK.spread, 0.5, 2.0)
    assert lit(colours, LOOK, brighter, 0.5).tolist() == [[[110.0, 110.0, 130.0]]]
    assert lit(colours, LOOK, brighter, 0.0) == pytest.approx(colours)
    wild = Look(np.full(3, 255, np.float32), np.full(3, 3000, np.float32), 0.5, 2.0)
    assert lit(colours, LOOK, wild, 1.0) == pytest.approx(
        np.array([[[125.0, 136.5, 159.5]]])  # gain at most 1.15, shift at most 25
    )


def test_looks_are_measured() -> None:
    random = np.random.default_rng(0)
    cover = disc()
    flat = 60 + 120 * np.repeat(cover[:, :, None], 3, axis=2)
    for noise in (3.0, 6.0):
        noisy = np.clip(flat + random.normal(0, noise, flat.shape), 0, 255).astype(np.uint8)
        assert look_of(noisy).grain == pytest.approx(noise, rel=0.2)
    for blur in (0.8, 1.5):
        soft = ndimage.gaussian_filter(flat, (blur, blur, 0)).astype(np.uint8)
        assert look_of(soft).edge == pytest.approx(blur, rel=0.2)


def test_grain_is_added_only_where_the_scene_has_more_of_it() -> None:
    scene = np.full((*SHAPE, 3), 90, np.uint8)
    cutout = cut_out(np.full_like(scene, 90), disc(), LOOK)
    rough = Look(LOOK.mean, LOOK.spread, LOOK.edge, np.hypot(2.0, 3.0))
    for look, spread in ((LOOK, 0.0), (rough, 3.0)):
        random = np.random.default_rng(0)
        result = paste(scene, look, cutout, (0, 0), harmony=0.0, random=random).astype(float)
        assert result[disc() == 1].std() == pytest.approx(spread, abs=0.3)
