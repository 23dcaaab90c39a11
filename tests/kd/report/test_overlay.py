"""Label maps over images: fixed colours, the classes that occur, pale where nobody knows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from kd.report.overlay import class_colour, overlay_figure, painted
from kd.report.style import figure_image
from kd.utils.images import VOID

NAMES = ("background", "road", "car", "tree")


def test_every_class_has_a_colour_of_its_own() -> None:
    assert len({class_colour(number) for number in range(254)}) == 254
    first = np.array([to_rgb(class_colour(number)) for number in range(32)])
    apart = np.abs(first[:, None] - first[None]).sum(axis=2) + np.eye(32)
    assert apart.min() > 0.15


def test_a_class_is_tinted_the_background_grey_and_void_pale() -> None:
    image = torch.full((3, 1, 4), 100, dtype=torch.uint8)
    image[2] = 160
    drawn = painted(image, torch.tensor([[0, 1, 2, VOID]]), NAMES) / 255
    assert drawn[0, 0] == pytest.approx([120 / 255] * 3)
    for number in (1, 2):
        expected = 0.75 * np.array(to_rgb(class_colour(number))) + 0.25 * 120 / 255
        assert drawn[0, number] == pytest.approx(expected, abs=0.003)
    assert np.ptp(drawn[0, 3]) == 0 and drawn[0, 3, 0] > 0.7


@pytest.mark.parametrize(("height", "width"), [(24, 32), (360, 480), (40, 20)])
def test_panels_stand_side_by_side_above_the_classes_that_occur(height: int, width: int) -> None:
    image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
    truth = torch.zeros(height, width, dtype=torch.uint8)
    truth[:4], truth[4:8] = 2, VOID
    said = torch.zeros(height, width, dtype=torch.int64)
    maps = {"truth": truth, "plain": said, "distilled": truth.clamp(max=3), "teacher": said}
    figure = overlay_figure(image, maps, NAMES)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["image", "truth", "plain", "distilled", "teacher"]
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes}) == 1
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["car", "tree", "not scored"]
    image = figure_image(figure)
    assert (image != 255).any()


def test_many_answers_take_two_rows_and_the_background_alone_no_legend() -> None:
    image = torch.zeros(3, 16, 16, dtype=torch.uint8)
    maps = {name: torch.zeros(16, 16, dtype=torch.uint8) for name in "abcdefg"}
    figure = overlay_figure(image, maps, NAMES)
    assert len({round(axes.get_position().y0, 3) for axes in figure.axes}) == 2
    assert not figure.legends
    figure_image(figure)
