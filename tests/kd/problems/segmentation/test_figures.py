"""Tables and figures of label maps hold the numbers of their confusions."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from kd.metrics.records import Records
from kd.problems.segmentation.evaluation import SegmentationEvaluation, SegmentationResults
from kd.problems.segmentation.metric import per_class
from kd.report.style import figure_image

NAMES = ("sky", "road", "car", "tree", "bin")
# Of two images; trees are said but never there, bins neither.
CONFUSION = np.array(
    [
        [[60, 3, 1, 0, 0], [2, 20, 0, 2, 0], [0, 1, 1, 0, 0], [0] * 5, [0] * 5],
        [[20, 0, 0, 0, 0], [0, 20, 0, 0, 0], [2, 0, 0, 0, 0], [0] * 5, [0] * 5],
    ]
)
RECORDS: Records = {
    "image_ids": np.arange(2), "confusion": CONFUSION, "names": np.array(NAMES),
}  # fmt: skip


def evaluated(*runs: str) -> SegmentationEvaluation:
    return SegmentationEvaluation(
        SegmentationResults(), "title", {}, {name: RECORDS for name in runs}
    )


def test_classes_come_with_their_pixels_iou_and_what_is_said_instead() -> None:
    rows = per_class(RECORDS)
    assert [row.label for row in rows] == [0, 1, 2, 3]
    sky, _, car, tree = rows
    assert (sky.fraction, sky.iou, sky.accuracy) == pytest.approx((84 / 132, 80 / 88, 80 / 84))
    assert [label for label, _ in sky.instead] == [1, 2]
    assert [fraction for _, fraction in sky.instead] == pytest.approx([3 / 84, 1 / 84])
    assert (car.fraction, car.iou) == pytest.approx((4 / 132, 1 / 5))
    assert tree.fraction == 0 and np.isnan(tree.accuracy) and tree.instead == ()
    table = evaluated("plain").class_table()
    first, last = table.groups[0][0], table.groups[0][-1]
    assert first[:3] == ("sky", "63.64", "90.9") and first[3].startswith("[")
    assert first[4:] == ("95.2", "road 4 %, car 1 %")
    assert last[:3] == ("tree", "0.00", "0.0") and last[4:] == ("", "")
    both = evaluated("a", "b").class_table()
    assert both.header == ("class", "pixels (%)", "a", "b")
    assert [row[0] for row in both.groups[0]] == ["sky", "road", "car"]
    assert both.groups[0][0][2:] == ("90.9", "90.9")


def test_bars_are_the_ious_above_the_fractions() -> None:
    rows = per_class(RECORDS)
    figure = evaluated("plain", "distilled").iou_figure()
    above, below = figure.axes
    heights, fractions = (
        [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
        for axes in (above, below)
    )
    assert heights == pytest.approx([100 * row.iou for row in rows[:3]] * 2)
    assert fractions == pytest.approx([100 * row.fraction for row in rows[:3]])
    assert below.get_yscale() == "log"
    figure_image(figure)
    figure_image(evaluated(*map(str, range(14))).iou_figure())


def test_the_confusions_are_fractions_of_each_row_and_rows_say_their_pixels() -> None:
    figure = evaluated("plain").confusion_figure()
    (axes,) = figure.axes
    image = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(image.sum(axis=1), 1)
    assert image[0, 0] == pytest.approx(80 / 84)
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["sky (64 %)", "road (33 %)", "car (3 %)"]
    assert axes.get_xticklabels()[-1].get_text() == "tree"
    figure_image(figure)
