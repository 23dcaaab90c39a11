"""Fixations and the densities drawn from them: values by hand, and everything that can be wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd.errors import UserError
from kd.formats.fixations import (
    UNKNOWN,
    Fixations,
    GazeSplit,
    gaussian_density,
    normalised,
    read_density,
)

SIZE = (30, 40)


@dataclass(frozen=True)
class Told:
    """The same fixations on every image."""

    points: list[list[float]]

    def __call__(self, number: int, size: tuple[int, int]) -> Fixations:
        points = np.array(self.points, np.float64).reshape(-1, 2)
        return Fixations(points, np.full(len(points), UNKNOWN))


def split(points: list[list[float]], maps: tuple[Path, ...] = ()) -> GazeSplit:
    return GazeSplit("gaze", (Path("a.jpg"),), Told(points), 3.0, maps)


def test_a_density_is_a_gaussian_around_each_fixation() -> None:
    points = np.array([[12.5, 9.5], [30.5, 20.5]])
    density = gaussian_density(points, SIZE, SIZE, 3.0)
    slow = torch.zeros(SIZE, dtype=torch.float64)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            for x, y in points:
                away = (column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2
                slow[row, column] += math.exp(-away / (2 * 3.0**2))
    torch.testing.assert_close(density[0], (slow / slow.sum()).float())
    assert density.shape == (1, *SIZE)
    assert int(density.argmax()) in (9 * 40 + 12, 20 * 40 + 30)


def test_a_density_on_a_coarser_grid_is_the_same() -> None:
    points = np.array([[12.0, 9.0], [30.0, 20.0], [30.0, 22.0]])
    fine = gaussian_density(points, SIZE, SIZE, 3.0)[0]
    coarse = gaussian_density(points, SIZE, (15, 20), 3.0)[0]
    pooled = fine.view(15, 2, 20, 2).sum(dim=(1, 3))
    assert float((pooled - coarse).abs().sum()) < 0.03
    assert float(coarse.sum()) == pytest.approx(1)


def test_a_gaussian_that_falls_between_places_is_rejected() -> None:
    with pytest.raises(UserError, match=r"a degree of 0\.05 pixels is too small.* data\.degree"):
        gaussian_density(np.array([[8.0, 8.0]]), (64, 64), (8, 8), 0.05)


def test_tiny_densities_still_sum_to_one() -> None:
    assert float(normalised(torch.full((1, 4, 5), 1e-30)).sum()) == pytest.approx(1)


def test_fixations_outside_of_the_frame_are_left_out() -> None:
    found = split([[5, 5], [39.9, 29.9], [40.0, 5], [-0.1, 5]]).fixations(0, SIZE)
    assert found.points.tolist() == [[5, 5], [39.9, 29.9]]
    assert len(found.observers) == 2


def test_a_stimulus_without_fixations_is_rejected() -> None:
    with pytest.raises(UserError, match=r"a\.jpg: no fixations on this image"):
        split([]).fixations(0, SIZE)
    with pytest.raises(UserError, match=r"a\.jpg: no fixations on this image"):
        split([]).density(0, SIZE, (15, 20))


def test_fixations_on_an_image_of_another_size_are_rejected() -> None:
    with pytest.raises(UserError, match=r"a\.jpg: 2 of 3 fixations lie outside .* 40 x 30"):
        split([[5, 5], [70, 20], [60, 50]]).density(0, SIZE, SIZE)


def test_a_published_map_is_used_unchanged(tmp_path: Path) -> None:
    values = np.zeros(SIZE, np.uint8)
    values[10, 20], values[20, 30] = 50, 150
    Image.fromarray(values).save(tmp_path / "map.png")
    density = split([[1, 1]], (tmp_path / "map.png",)).density(0, SIZE, SIZE)[0]
    assert density[10, 20] == 0.25 and density[20, 30] == 0.75
    half = split([[1, 1]], (tmp_path / "map.png",)).density(0, SIZE, (15, 20))[0]
    assert float(half.sum()) == pytest.approx(1) and half[5, 10] > 0 and half.min() >= 0


def test_wrong_density_maps_are_rejected(tmp_path: Path) -> None:
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(tmp_path / "zeros.png")
    Image.fromarray(np.ones((8, 9), np.uint8)).save(tmp_path / "small.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    wrong = {
        "zeros.png": "all zeros",
        "small.png": "the density map is 9 x 8, but its image is 40 x 30 pixels",
        "broken.png": "cannot be read",
        "missing.png": "is missing",
    }
    for name, message in wrong.items():
        with pytest.raises(UserError, match=rf"{name}: .*{message}"):
            read_density(tmp_path / name, expected=SIZE)
