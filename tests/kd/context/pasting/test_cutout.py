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
    ImageStats,
    coverage,
    cut_out,
    harmonise,
    interior,
    measure_image,
    paste,
    soften,
)

STATS = ImageStats(np.full(3, 100, np.float32), np.full(3, 30, np.float32), edge=0.5, grain=2.0)
SHAPE = (60, 80)


def image(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)


def disc(x: float = 30.0, y: float = 25.0, radius: float = 10.0) -> np.ndarray[
    tuple[int, ...], np.dtype[np.float32]
]:  # fmt: skip
    rows, columns = np.mgrid[: SHAPE[0] * FINE, : SHAPE[1] * FINE]
    far = np.hypot((columns + 0.5) / FINE - x, (rows + 0.5) / FINE - y)
    return coverage(far < radius)


def test_coverage_is_the_fraction_of_each_pixel_inside_the_outline() -> None:
    fine = np.zeros((8, 8), np.bool_)
    fine[:4, :2] = True  # the left half of the first pixel
    fine[4:, 4:] = True
    assert coverage(fine).tolist() == [[0.5, 0.0], [0.0, 1.0]]
    assert disc().sum() == pytest.approx(np.pi * 100, rel=0.01)


@pytest.mark.parametrize("edge", [0.0, 0.3, 0.7, 5.0])
@pytest.mark.parametrize("shift", [(0, 0), (25, 12), (-10, -8)])
def test_interior_pixels_are_the_objects_and_distant_ones_the_scenes(
    edge: float, shift: tuple[int, int]
) -> None:
    source, scene, cover = image(1), image(2), disc()
    stats = ImageStats(STATS.mean, STATS.spread, edge, STATS.grain)
    result = paste(scene, stats, cut_out(source, cover, stats), shift, harmony=0.0)
    moved = np.roll(cover, shift[::-1], axis=(0, 1))
    away = ndimage.distance_transform_edt(moved == 0)
    outside = away > REACH * np.sqrt(2)
    assert np.array_equal(result[outside], scene[outside])
    deep = ndimage.distance_transform_edt(moved == 1) > REACH * np.sqrt(2)
    assert deep.sum() > 50
    assert np.array_equal(result[deep], np.roll(source, shift[::-1], axis=(0, 1))[deep])
    assert not np.array_equal(result, scene)


def test_paste_does_not_modify_the_scene() -> None:
    scene = image(2)
    before = scene.copy()
    paste(scene, STATS, cut_out(image(1), disc(), STATS), (3, 3))
    assert np.array_equal(scene, before)


def test_no_fringe_of_the_old_background_is_pasted() -> None:
    """A green object in front of pure red, pasted on blue: no pixel may have any red."""
    source = np.zeros((*SHAPE, 3), np.uint8)
    source[..., 0] = 255
    cover = disc()
    source[cover > 0] = (cover[cover > 0][:, None] * (0, 200, 0)
                         + (1 - cover[cover > 0][:, None]) * (255, 0, 0))  # fmt: skip
    scene = np.zeros_like(source)
    scene[..., 2] = 180
    result = paste(scene, STATS, cut_out(source, cover, STATS), (10, 5), harmony=0.0)
    assert result[..., 0].max() == 0
    assert result[..., 1].max() == 200


def test_an_object_thinner_than_its_rim_is_still_pasted() -> None:
    cover = np.zeros(SHAPE, np.float32)
    cover[20:40, 30] = 0.6  # no pixel is fully covered
    assert interior(cover, rim=2).sum() == 20
    scene = np.zeros((*SHAPE, 3), np.uint8)
    result = paste(scene, STATS, cut_out(np.full_like(scene, 200), cover, STATS), (0, 0), harmony=0)
    assert 60 < result.max() <= 120


@given(edge=st.floats(0, 10), radius=st.floats(1, 12))
def test_soften_keeps_position_and_bounds(edge: float, radius: float) -> None:
    cover = disc(radius=radius)
    soft = soften(cover, edge)
    assert soft.min() >= 0 and soft.max() <= 1 + 1e-6
    assert not soft[ndimage.distance_transform_edt(cover == 0) > REACH * np.sqrt(2)].any()
    assert soft.sum() == pytest.approx(cover.sum(), rel=0.1)


def test_the_outline_is_softened_in_a_soft_scene_only() -> None:
    cover = disc()
    assert np.array_equal(soften(cover, 0.2), np.where(cover < 0.02, 0, cover))
    steps = [np.abs(np.diff(soften(cover, edge), axis=1)).max() for edge in (0.3, 0.6, 1.0)]
    assert steps[0] > steps[1] > steps[2]


def test_harmonise_moves_light_part_of_the_way_within_bounds() -> None:
    colours = np.array([[[100.0, 110.0, 130.0]]], np.float32)
    brighter = ImageStats(np.array([120, 100, 100], np.float32), STATS.spread, 0.5, 2.0)
    assert harmonise(colours, STATS, brighter, 0.5).tolist() == [[[110.0, 110.0, 130.0]]]
    assert harmonise(colours, STATS, brighter, 0.0) == pytest.approx(colours)
    wild = ImageStats(np.full(3, 255, np.float32), np.full(3, 3000, np.float32), 0.5, 2.0)
    assert harmonise(colours, STATS, wild, 1.0) == pytest.approx(
        np.array([[[125.0, 136.5, 159.5]]])  # gain at most 1.15, shift at most 25
    )


def test_measured_edge_width_and_grain() -> None:
    random = np.random.default_rng(0)
    cover = disc()
    flat = 60 + 120 * np.repeat(cover[:, :, None], 3, axis=2)
    for noise in (3.0, 6.0):
        noisy = np.clip(flat + random.normal(0, noise, flat.shape), 0, 255).astype(np.uint8)
        assert measure_image(noisy).grain == pytest.approx(noise, rel=0.2)
    for blur in (0.8, 1.5):
        soft = ndimage.gaussian_filter(flat, (blur, blur, 0)).astype(np.uint8)
        assert measure_image(soft).edge == pytest.approx(blur, rel=0.2)


def test_grain_is_added_only_if_the_scene_has_more() -> None:
    scene = np.full((*SHAPE, 3), 90, np.uint8)
    cutout = cut_out(np.full_like(scene, 90), disc(), STATS)
    rough = ImageStats(STATS.mean, STATS.spread, STATS.edge, np.hypot(2.0, 3.0))
    for stats, spread in ((STATS, 0.0), (rough, 3.0)):
        random = np.random.default_rng(0)
        result = paste(scene, stats, cutout, (0, 0), harmony=0.0, random=random).astype(float)
        assert result[disc() == 1].std() == pytest.approx(spread, abs=0.3)
