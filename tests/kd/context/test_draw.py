"""Figures of imagined regions and places: what is drawn, where, with what marks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle

from kd.context.draw import heat_figure, regions_figure
from kd.context.regions import box_region, polygon_region
from kd.report.style import figure_image
from kd.transforms.hide import IMAGENET_MEAN

NAMES = ["cup", "ball", "fork", "spoon"]
PHOTO = torch.randint(0, 255, (3, 60, 80), dtype=torch.uint8)
BELIEF = torch.tensor([0.2, 0.5, 0.1, 0.2])


def test_each_region_has_a_row_with_what_the_teacher_saw() -> None:
    regions = [
        box_region((10.0, 0.0, 50.0, 30.0), "a", (60, 80)),
        polygon_region([(0.0, 0.0), (30.0, 0.0), (0.0, 60.0)], "a", (60, 80)),
    ]
    hidden = torch.zeros(30, 40, dtype=torch.bool)
    hidden[:15, 5:25] = True
    seen = [(torch.zeros(3, 30, 40, dtype=torch.uint8), hidden)] * 2
    usual = np.array([0.4, 0.3, 0.2, 0.1])
    told = [[("fork", [40.0, 40.0, 60.0, 50.0])], []]
    figure = regions_figure(
        PHOTO, regions, seen, [BELIEF, BELIEF], NAMES, objects=told, prior=usual, top=3
    )
    assert len(figure.axes) == 6
    where, covered, bars = figure.axes[:3]
    assert where.get_title() == "box 10,0,50,30"
    shown = np.asarray(covered.images[0].get_array())
    assert shown[hidden.numpy()].tolist() == [[round(255 * m) for m in IMAGENET_MEAN]] * 300
    assert not shown[~hidden.numpy()].any()
    assert [text.get_text() for text in covered.texts] == ["fork"]
    assert not figure.axes[4].texts
    labels = [label.get_text() for label in bars.get_yticklabels()]
    assert labels == ["ball", "cup", "spoon"]  # equal ones in the order of the classes
    assert [text.get_text() for text in bars.texts] == ["50.0 %", "20.0 %", "20.0 %"]
    (marks,) = (one for one in bars.collections if isinstance(one, LineCollection))
    assert [float(line[0, 0]) for line in marks.get_segments()] == pytest.approx([30, 40, 10])
    assert figure_image(figure).float().std() > 5


def test_a_heat_map_lies_over_the_whole_photograph() -> None:
    values = torch.linspace(0, 0.3, 24).view(4, 6)
    figure = heat_figure(
        PHOTO, values, "cup", peak=(70.0, 50.0), sides=[(16.0, 12.0), (32.0, 24.0)], prior=0.1
    )
    hot = figure.axes[1]
    overlay = hot.images[1]
    assert list(overlay.get_extent()) == [0, 80, 60, 0]
    assert list(overlay.get_clim()) == pytest.approx([0, 30])
    assert hot.get_title() == "cup: 30.0 % at its likeliest place"
    cross = hot.lines[0]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (70.0, 50.0)  # type: ignore[index]
    outlines = [patch.get_bbox().bounds for patch in hot.patches if isinstance(patch, Rectangle)]
    assert outlines == [(62, 44, 16, 12), (54, 38, 32, 24)]
    assert hot.get_xlim() == (0, 80) and hot.get_ylim() == (60, 0)
    assert figure_image(figure).float().std() > 5


def test_a_class_expected_nowhere_looks_like_it() -> None:
    figure = heat_figure(PHOTO, torch.full((4, 6), 1e-5), "cup", peak=(1, 1), sides=[(8, 8)])
    assert figure.axes[1].images[1].get_clim() == (0, 1.0)
    figure_image(figure)
