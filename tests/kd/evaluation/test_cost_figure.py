"""The figure of accuracy against cost holds every network, named once a panel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from PIL import Image

from kd.errors import UserError
from kd.evaluation.cost_figure import CostPoint, cost_figure
from kd.report.style import save_figure

# Parameters, multiply-adds, milliseconds, mIoU plain and distilled: as crowded as results are.
STUDENTS = {
    "ESPNet-C": (0.35e6, 3.47e9, 4.1, 0.511, 0.576),
    "ESPNet": (0.366e6, 4.67e9, 5.3, 0.614, 0.638),
    "PSPNet ResNet-18 (0.5)": (3.25e6, 27e9, 9.0, 0.612, 0.627),
    "PSPNet ResNet-18": (12.9e6, 106e9, 21.0, 0.676, 0.727),
    "PSPNet MobileNetV2": (8.3e6, 86e9, 22.0, 0.659, 0.731),
    "LR-ASPP MobileNetV3": (3.2e6, 4.18e9, 4.8, 0.60, 0.62),
    "DeepLab v3 MobileNetV3": (11.0e6, 20.8e9, 7.8, 0.655, 0.668),
}
TEACHER = CostPoint("PSPNet ResNet-101", 70.3e6, 509e9, 95.0, 0.784, "teacher")


def networks() -> list[CostPoint]:
    """Each student plain and distilled, and a teacher."""
    points = [TEACHER]
    for name, (parameters, multiply_adds, latency, plain, distilled) in STUDENTS.items():
        first = CostPoint(name, parameters, multiply_adds, latency, plain, "plain")
        points += [first, replace(first, mean_iou=distilled, kind="distilled")]
    return points


def places(axes: Axes) -> list[tuple[float, float]]:
    """Where markers stand."""
    found = [np.asarray(marker.get_xydata())[0] for marker in axes.lines]
    return sorted((float(x), float(y)) for x, y in found)


def names(axes: Axes) -> dict[str, Bbox]:
    """What is written and its box in pixels, without lines to the markers."""
    written = [text for text in axes.texts if text.get_text()]
    assert len({text.get_text() for text in written}) == len(written)
    return {text.get_text(): Text.get_window_extent(text) for text in written}


def drawn(points: Sequence[CostPoint]) -> Figure:
    """The figure, drawn once so that all places are final."""
    figure = cost_figure(points)
    figure.draw_without_rendering()
    return figure


def test_every_network_is_in_every_panel_at_its_cost_and_in_percent() -> None:
    points = networks()
    figure = drawn(points)
    assert len(figure.axes) == 3
    for axes, cost in zip(figure.axes, ("parameters", "multiply_adds", "latency"), strict=True):
        assert axes.get_xscale() == "log"
        expected = sorted((getattr(point, cost), 100 * point.mean_iou) for point in points)
        assert places(axes) == expected
        assert names(axes).keys() == {point.name for point in points}
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "distilled", "teacher"]


def test_arrows_lead_from_plain_students_to_distilled_ones() -> None:
    for axes in drawn(networks()).axes:
        arrows = [t for t in axes.texts if isinstance(t, Annotation) and not t.get_text()]
        ends = {(arrow.xyann[1], arrow.xy[1]) for arrow in arrows}
        assert ends == {(100 * plain, 100 * better) for *_, plain, better in STUDENTS.values()}


def test_names_neither_overlap_nor_leave_their_panel() -> None:
    for axes in drawn(networks()).axes:
        boxes = names(axes)
        for (one, first), (other, second) in combinations(boxes.items(), 2):
            assert not first.overlaps(second), (one, other)
        frame = axes.get_window_extent()
        for name, box in boxes.items():
            assert frame.x0 <= box.x0 and box.x1 <= frame.x1, name
            assert frame.y0 <= box.y0 and box.y1 <= frame.y1, name


def test_a_crowd_is_named_too() -> None:
    one = networks()[1]
    crowd = [replace(one, name=f"network {place}", latency=4 + 0.01 * place) for place in range(9)]
    for axes in drawn(crowd).axes:
        assert len(names(axes)) == 9
        shapes = {(marker.get_color(), marker.get_marker()) for marker in axes.lines}
        assert len(shapes) == 9


def test_one_network_alone_has_no_arrow_and_its_own_legend(tmp_path: Path) -> None:
    figure = drawn([TEACHER])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["teacher"]
    assert all(len(axes.texts) == 1 for axes in figure.axes)
    save_figure(figure, tmp_path / "cost.png")
    with Image.open(tmp_path / "cost.png") as image:
        assert image.format == "PNG" and image.width > 2 * image.height


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="no networks to draw"):
        cost_figure([])
    with pytest.raises(UserError, match="ResNet-101: latency must be above 0, got 0"):
        cost_figure([replace(TEACHER, latency=0)])
    with pytest.raises(UserError, match="ResNet-101: parameters must be above 0, got nan"):
        cost_figure([replace(TEACHER, parameters=float("nan"))])
    with pytest.raises(UserError, match=r"mean_iou must be in 0\.\.1, got 78\.4"):
        cost_figure([replace(TEACHER, mean_iou=78.4)])
    with pytest.raises(UserError, match="kind must be plain, distilled, teacher, got student"):
        cost_figure([replace(TEACHER, kind="student")])  # type: ignore[arg-type]
