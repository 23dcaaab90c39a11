"""Images of gaze: panels in order, densities on one scale, tables and curves of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.metrics.records import Array
from kd.problems.saliency.evaluation import (
    SaliencyEvaluation,
    SaliencyResults,
    density_figure,
    heated,
)
from kd.problems.saliency.metric import ROWS
from kd.report.style import figure_image

HEIGHT, WIDTH = 30, 40


def test_panels_are_stimulus_fixations_and_each_map() -> None:
    image = torch.full((3, HEIGHT, WIDTH), 120, dtype=torch.uint8)
    density = torch.zeros(HEIGHT, WIDTH)
    density[10, 12] = 1
    points = np.array([[12.5, 10.5], [3.0, 4.0]])
    maps = {"truth": density, "plain": density / 2, "distilled": density, "teacher": density}
    figure = density_figure(image, points, maps)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["stimulus", "2 fixations", "truth", "plain", "distilled", "teacher"]
    (dots,) = figure.axes[1].lines
    np.testing.assert_array_equal(np.asarray(dots.get_xydata()), points)
    assert figure.axes[1].get_xlim() == (0, WIDTH) and figure.axes[1].get_ylim() == (HEIGHT, 0)
    assert figure_image(figure, dpi=60).shape[0] == 3


def test_a_flat_map_is_dark_on_the_scale_of_the_truth() -> None:
    image = torch.full((3, HEIGHT, WIDTH), 120, dtype=torch.uint8)
    peaked = torch.zeros(HEIGHT, WIDTH)
    peaked[10, 12] = 0.5
    flat = torch.full((HEIGHT, WIDTH), 1 / (HEIGHT * WIDTH))
    bright = heated(image, peaked, top=0.5)
    assert bright.shape == (HEIGHT, WIDTH, 3) and bright.dtype == np.uint8
    assert bright[10, 12].sum() > 2 * bright[0, 0].sum()
    assert heated(image, flat, top=0.5).max() < bright[10, 12].max() / 2


def evaluated(
    records: dict[str, Array], references: dict[str, dict[str, Array]]
) -> SaliencyEvaluation:
    return SaliencyEvaluation(SaliencyResults(), "title", {}, {"model": records}, references)


@pytest.fixture
def records() -> dict[str, Array]:
    random = np.random.default_rng(0)
    found: dict[str, Array] = {name: random.random(12) for name in ROWS}
    found["KLD"] = np.arange(12) / 10
    found["KLD"][4] = np.nan
    return {**found, "image_ids": np.arange(12) + 100, "fixation_counts": np.full(12, 7)}


def test_the_least_and_the_best_foretold_images_are_listed(records: dict[str, Array]) -> None:
    table = evaluated(records, {}).class_table(most=3)
    least, best = ([row[0] for row in group] for group in table.groups)
    assert least == ["111", "110", "109"] and best == ["102", "101", "100"]
    assert table.header[:3] == ("image", "fixations", "KLD")
    few = evaluated({n: part[:2] for n, part in records.items()}, {}).class_table(most=3)
    assert len(few.groups) == 1 and len(few.groups[0]) == 2


def test_numbers_of_single_images_are_drawn_in_rising_order(records: dict[str, Array]) -> None:
    figure = evaluated(records, {"centre prior": records}).image_figure("KLD")
    model, prior = figure.axes[0].lines
    heights = np.asarray(model.get_ydata())
    assert len(heights) == 11 and (np.diff(heights) > 0).all()
    assert model.get_color() != prior.get_color() and prior.get_linestyle() == "--"
