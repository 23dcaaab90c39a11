"""Tables and figures of detectors hold the numbers of their records."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from kd.metrics.coco_ap import Boxes
from kd.metrics.records import Records
from kd.problems.detection.evaluation import DetectionEvaluation, DetectionResults
from kd.problems.detection.scores import BoxRow, box_records, per_class, value
from kd.report.style import figure_image

NAMES = ("cup", "mug", "jar")


def records_of(fraction: float) -> Records:
    """Eight images, a small cup and a large mug on each; a fraction of both is found."""
    image = np.repeat(np.arange(8), 2)
    xywh = np.tile(np.array([[5.0, 5.0, 20.0, 20.0], [50.0, 50.0, 120.0, 120.0]]), (8, 1))
    sides = Boxes(image, np.tile([0, 1], 8), xywh, xywh[:, 2] * xywh[:, 3], np.zeros(16, np.bool_))
    kept = np.arange(16) < 16 * fraction
    kept[0] = False
    found = Boxes(image[kept], sides.label[kept], xywh[kept], sides.areas[kept], sides.crowd[kept])
    return box_records(sides, found, np.linspace(0.9, 0.2, kept.sum()), image_ids=np.arange(8),
                       names=NAMES, category_ids=np.arange(3))  # fmt: skip


def evaluated(runs: dict[str, Records]) -> DetectionEvaluation:
    return DetectionEvaluation(DetectionResults(), "title", {}, runs)


def test_classes_and_sizes_come_with_their_numbers() -> None:
    records = records_of(0.5)
    table = evaluated({"run": records}).class_table()
    cup, mug = table.groups[0]
    assert table.header == ("class", "objects", "AP", "95 % interval", "AP50", "AP75", "AP_small",
                            "AP_medium", "AP_large")  # fmt: skip
    assert cup[:3] == ("cup", "8", f"{100 * 38 / 101:.1f}") and cup[3].startswith("[")
    assert cup[6:] == (cup[2], "", "")  # all are small
    assert mug[2] == f"{100 * 51 / 101:.1f}" and mug[6:] == ("", "", mug[2])
    several = evaluated({"a": records, "b": records_of(1.0)})
    sizes = several.size_table()
    there = {"small, below 32 px": "8", "medium, 32 to 96 px": "0", "large, over 96 px": "8"}
    assert {row[0]: row[1] for row in sizes.groups[0]} == there
    assert sizes.groups[0][0][2].startswith(f"{cup[2]} [") and sizes.groups[0][1][2] == ""
    both = several.class_table()
    assert both.groups[0][1] == ("mug", "8", mug[2], "100.0")


def test_bars_are_the_aps_above_the_objects() -> None:
    runs = {"plain": records_of(0.5), "distilled": records_of(1.0)}
    figure = evaluated(runs).class_figure()
    above, below = figure.axes
    heights = [bar.get_height() for bar in above.patches if isinstance(bar, Rectangle)]
    expected = [100 * row.numbers["AP"] for run in runs.values() for row in per_class(run)]
    assert heights == pytest.approx(expected)
    objects = [bar.get_height() for bar in below.patches if isinstance(bar, Rectangle)]
    assert objects == [8, 8]
    legend = above.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "distilled", "AP50"]
    assert figure_image(figure, dpi=50).shape[0] == 3


def test_more_classes_than_can_be_named_are_left_out_with_a_word() -> None:
    rows = [BoxRow(c, 100 - c, {"AP": 0.5, "AP50": 0.6}) for c in range(70)]
    evaluation = evaluated({"run": {"names": np.arange(70)}})
    vars(evaluation)["classes"] = {"run": rows}  # instead of the records'
    figure = evaluation.class_figure()
    assert figure.axes[1].get_xlabel() == "the 60 most frequent of 70"


def test_sizes_without_objects_have_no_bar() -> None:
    runs = {"plain": records_of(0.5), "distilled": records_of(1.0)}
    (axes,) = evaluated(runs).size_figure().axes
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["all\n16 objects", "small\nbelow 32 px\n8 objects",
                      "large\nover 96 px\n8 objects"]  # fmt: skip
    heights = [bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)]
    known = [value(run, name) or 0 for run in runs.values() for name in ("AP", "AP_small",
                                                                         "AP_large")]  # fmt: skip
    assert heights == pytest.approx([100 * number for number in known])


@pytest.mark.parametrize("hits", [1, 2])
@pytest.mark.parametrize("count", [1, 4])
def test_numbers_of_low_bars_stay_in_the_axes_above_their_intervals(hits: int, count: int) -> None:
    """A few of 24 objects found: an AP of a few per cent whose interval goes far above 10."""
    image, place = np.arange(24), np.tile([[5.0, 5.0, 20.0, 20.0]], (24, 1))
    there = Boxes(image, image * 0, place, place[:, 2] * place[:, 3], np.zeros(24, np.bool_))
    found = Boxes(image[:hits], there.label[:hits], place[:hits], there.areas[:hits],
                  there.crowd[:hits])  # fmt: skip
    run = box_records(there, found, np.full(hits, 0.9), image_ids=image, names=NAMES,
                      category_ids=np.arange(3))  # fmt: skip
    figure = evaluated({f"a run of some name {n}": run for n in range(count)}).size_figure()
    figure_image(figure)
    (axes,) = figure.axes
    shown = axes.get_window_extent()
    lines = [line for part in axes.collections for line in part.get_paths()]  # error bars
    highest = max(np.asarray(line.vertices)[:, 1].max() for line in lines)
    assert 100 * hits / 24 < 10 < highest and len(axes.texts) == 2 * count
    for text in axes.texts:
        extent = text.get_window_extent()
        assert extent.y1 <= shown.y1
        assert extent.y0 >= axes.transData.transform((0, highest))[1]
