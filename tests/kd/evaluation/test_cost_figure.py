"""The figure of accuracy against cost holds every network, named in its legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from PIL import Image

from kd.evaluation.cost import Cost, cost_figure
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
TEACHER = Cost(
    "PSPNet ResNet-101", "teacher", 0.784, 70_300_000, 509_000_000_000, 95.0, (713, 713), "cpu"
)


def networks() -> list[Cost]:
    """Each student plain and distilled, and a teacher."""
    points = [TEACHER]
    for name, (parameters, multiply_adds, latency, plain, distilled) in STUDENTS.items():
        first = Cost(
            name, "plain", plain, int(parameters), int(multiply_adds), latency, (713, 713), "cpu"
        )
        points += [first, replace(first, mean_iou=distilled, variant="distilled")]
    return points


def places(axes: Axes) -> list[tuple[float, float]]:
    """Where markers stand."""
    found = [np.asarray(marker.get_xydata())[0] for marker in axes.lines]
    return sorted((float(x), float(y)) for x, y in found)


def legend_of_names(figure: Figure) -> list[str]:
    """Networks in the legend below the panels."""
    return [text.get_text() for text in figure.legends[1].get_texts()]


def drawn(points: Sequence[Cost]) -> Figure:
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
    kinds = [text.get_text() for text in figure.legends[0].get_texts()]
    assert kinds == ["plain", "distilled", "teacher"]
    best_first = sorted(points, key=lambda point: -point.mean_iou)
    assert legend_of_names(figure) == list(dict.fromkeys(point.name for point in best_first))


def test_arrows_lead_from_plain_students_to_distilled_ones() -> None:
    for axes in drawn(networks()).axes:
        arrows = [t for t in axes.texts if isinstance(t, Annotation) and not t.get_text()]
        ends = {(arrow.xyann[1], arrow.xy[1]) for arrow in arrows}
        assert ends == {(100 * plain, 100 * better) for *_, plain, better in STUDENTS.values()}


def test_a_crowd_is_named_too() -> None:
    one = networks()[1]
    crowd = [replace(one, name=f"network {place}", latency=4 + 0.01 * place) for place in range(9)]
    figure = drawn(crowd)
    assert len(legend_of_names(figure)) == 9
    for axes in figure.axes:
        shapes = {(marker.get_color(), marker.get_marker()) for marker in axes.lines}
        assert len(shapes) == 9


def test_one_network_alone_has_no_arrow_and_its_own_legend(tmp_path: Path) -> None:
    figure = drawn([TEACHER])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["teacher"]
    assert all(not axes.texts for axes in figure.axes)
    save_figure(figure, tmp_path / "cost.png")
    with Image.open(tmp_path / "cost.png") as image:
        assert image.format == "PNG" and image.width > 2 * image.height
