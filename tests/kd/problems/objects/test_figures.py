"""Figures of classes draw the numbers they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd.metrics.confusion import Confusion, per_class
from kd.metrics.records import Records
from kd.problems.objects.figures import (
    beyond_prior_figure,
    class_fraction_figure,
    confusion_figure,
    per_class_figure,
)
from kd.report.style import figure_image

NAMES = ["cup", "fork", "person"]


def said(labels: list[int], answers: list[int], classes: int = 3) -> Records:
    probs = np.where(np.eye(classes)[answers] > 0, 0.7, 0.3 / (classes - 1))
    count = len(labels)
    return {
        "object_ids": np.arange(count),
        "image_ids": np.arange(count),
        "labels": np.array(labels),
        "area_fractions": np.full(count, 0.01),
        "log_probs": np.log(probs),
        "prior": np.full(classes, 1 / classes),
    }


def drawn(figure: Figure) -> None:
    """Nothing warns, and the image holds more than white."""
    assert (figure_image(figure) != 255).any()


def heights(axes: Axes) -> list[float]:
    patches: list[Any] = list(axes.patches)
    return [patch.get_height() for patch in patches]


def test_class_fractions_fall_and_keep_their_names() -> None:
    figure = class_fraction_figure(np.array([1, 8, 1]), np.array([0, 1, 1]), ["cat", "dog", "cow"])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dog", "cat", "cow"]
    heights = [bar.get_height() for bar in axes.patches]  # type: ignore[attr-defined]
    assert heights == pytest.approx([80, 10, 10])
    assert axes.get_yscale() == "linear"
    drawn(figure)
    many = class_fraction_figure(np.ones(200), np.zeros(200), [str(c) for c in range(200)])
    assert many.axes[0].get_yscale() == "symlog"  # below one percent
    drawn(many)


def test_a_class_has_a_bar_of_top5_behind_top1_above_its_objects() -> None:
    records = said([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0, 0])
    exact = per_class(said([0, 0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 1, 1, 2]))
    figure = per_class_figure(per_class(records), NAMES, {"exact posterior": exact})
    above, below = figure.axes
    assert heights(above) == pytest.approx([75, 50, 0, 100, 100, 100])
    assert heights(below) == [4, 2, 1]
    assert [label.get_text() for label in below.get_xticklabels()] == NAMES
    lines: Any = above.collections[0]
    assert [segment[0][1] for segment in lines.get_segments()] == [100, 100, 100]
    assert below.get_yscale() == "linear"
    drawn(figure)


def test_supports_far_apart_are_drawn_by_their_logarithm_and_too_many_classes_left_out() -> None:
    labels = [0] * 400 + list(range(1, 120))
    figure = per_class_figure(per_class(said(labels, labels, 120)), [str(c) for c in range(120)])
    below = figure.axes[1]
    assert below.get_yscale() == "log"
    assert [label.get_text() for label in below.get_yticklabels()] == ["1", "10", "100"]
    assert below.get_xlabel() == "the 90 most frequent of 120"
    assert len(heights(below)) == 90
    drawn(figure)


def test_the_confusion_figure_has_shares_of_each_row_and_a_column_for_the_rest() -> None:
    records = said([0, 0, 0, 0, 1, 1, 2], [0, 0, 1, 2, 1, 0, 2])
    figure = confusion_figure(records, NAMES, most=2, more=0)
    axes = figure.axes[0]
    image = axes.images[0].get_array()
    np.testing.assert_allclose(np.asarray(image), [[0.5, 0.25, 0.25], [0.5, 0.5, 0.0]])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cup", "fork", "any other"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cup (4)", "fork (2)"]
    assert [t.get_text() for t in axes.texts] == ["50", "25", "25", "50", "50"]
    drawn(figure)
    further = confusion_figure(records, NAMES, most=2).axes[0]
    assert [t.get_text() for t in further.get_xticklabels()] == NAMES
    whole = confusion_figure(records, NAMES).axes[0]
    assert np.asarray(whole.images[0].get_array()).shape == (3, 3)


def test_confusions_are_drawn_beside_what_the_prior_would_say() -> None:
    pairs = [Confusion(1, 0, 6, 0.6, 0.2), Confusion(2, 0, 3, 0.3, 0.2)]
    figure = beyond_prior_figure(pairs, NAMES)
    axes = figure.axes[0]
    bars: list[Any] = list(axes.patches)
    assert [bar.get_width() for bar in bars] == pytest.approx([60, 30])
    marks: Any = axes.collections[0]
    assert [segment[0][0] for segment in marks.get_segments()] == pytest.approx([20, 20])
    assert [t.get_text() for t in axes.get_yticklabels()] == [
        "fork predicted as cup",
        "person predicted as cup",
    ]
    assert axes.texts[0].get_text() == "6 objects, 3.0 times the prior"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first is at the top
    drawn(figure)
    none = beyond_prior_figure([], NAMES)
    assert "no confusion" in none.axes[0].texts[0].get_text()
    drawn(none)
