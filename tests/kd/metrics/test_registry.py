"""Metrics show as they declare, and those of the user are checked by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kd.errors import UserError
from kd.metrics.bootstrap import Interval
from kd.metrics.records import Records
from kd.metrics.registry import METRICS, Metric, direction_note, load_metrics, metric_named
from kd.problems.segmentation.evaluation import SegmentationResults
from kd.report.comparison import comparison_figure
from kd.report.tables import distill_table, runs_table

CONFUSIONS = np.array([[[8, 2], [1, 9]], [[6, 4], [3, 7]], [[9, 1], [0, 10]]])
LARGEST = Metric("largest", "pixels of the largest error", unit="px", higher_is_better=False,
                 digits=0, per_item=lambda records: largest(records))  # fmt: skip


def largest(records: Records) -> np.ndarray:
    """The most pixels of one class that are taken for one other, (N,); none counts in image 9."""
    errors = records["confusion"] * (1 - np.eye(2))
    return np.where(records["image_ids"] == 9, np.nan, errors.max(axis=(1, 2)))


def records_of(shift: int = 0) -> Records:
    confusion = CONFUSIONS + shift * np.array([[-1, 1], [0, 0]])
    return {"image_ids": np.array([3, 5, 9]), "confusion": confusion}


def test_a_metric_that_nobody_declares_is_a_plain_number() -> None:
    metric = metric_named("depth_error")
    assert (metric.label, metric.text(0.25)) == ("depth_error", "0.250")


def test_a_declared_metric_is_written_in_its_unit() -> None:
    assert LARGEST.label == "largest (px)" and LARGEST.text(2.4) == "2"
    interval = Interval(-1.2, -2.0, -0.6)
    assert LARGEST.change(interval) == "-1 [-2, -1]*"
    assert METRICS["top1"].change(Interval(0.012, -0.01, 0.03)) == "+1.2 [-1.0, +3.0] "
    assert METRICS["nll"].bounds(Interval(1.0, 0.5, 1.5)) == "[0.500, 1.500]"
    assert METRICS["nll"].bounds(Interval(1.0, np.nan, np.nan)) == METRICS["ece"].text(None) == ""


@pytest.mark.parametrize(
    "name", ["top7", "iou/car", "AP/3", "AP_small/tie", "fraction/tiny_top1", "KITTI11_easy",
             "confusable_AP75", "visible/0_top1"],
)  # fmt: skip
def test_names_with_a_number_or_a_class_are_percentages(name: str) -> None:
    assert metric_named(name).label == f"{name} (%)"


def test_metrics_of_which_less_is_better_are_named() -> None:
    names = ("top1", "nll", "KLD", "IG")
    assert direction_note(map(metric_named, names)) == ["lower is better: nll, KLD"]
    assert direction_note([METRICS["mIoU"]]) == []


def test_a_metric_of_ones_own_is_in_every_table_and_figure() -> None:
    results = SegmentationResults({"largest": LARGEST})
    one, other = records_of(), records_of(1)
    assert results.value(one, "largest") == 3.0  # of 2 and 4; image 9 does not count
    gap = results.difference(other, one, "largest")
    assert gap.mean == 1.0 and gap.low == gap.high == 1.0
    bounds = results.interval(one, "largest")
    assert bounds is not None and (bounds.low, bounds.high) == (2.0, 4.0)
    table = runs_table(results, {"a": one, "b": other})
    assert table.groups[0][-1] == ("largest (px)", "3", "4", "+1 [+1, +1]*")
    assert "lower is better: largest" in table.notes
    figure = comparison_figure(runs_table(results, {"a": one, "b": other}, metrics=["largest"]))
    assert figure.axes[0].get_xlabel() == "largest (px)"
    assert [text.get_text() for text in figure.axes[0].texts] == ["+1\n[+1, +1]"]
    variants = {"plain": [one, one], "distilled": [other, other]}
    assert distill_table(results, variants, [0, 1]).groups[0][-1][0] == "largest (px)"
    dataset: Any = SimpleNamespace(class_names=("sky", "road"))
    evaluation = results.evaluation("t", {"a": one}, {}, lambda: dataset)
    assert evaluation.summary_tables()[0].groups[0][-1] == ("largest (px)", "3", "[2, 4]")
    assert evaluation.numbers()["runs"]["a"]["largest"] == 3.0


def test_values_of_another_length_are_refused() -> None:
    results = SegmentationResults({"odd": Metric("odd", per_item=lambda records: np.ones(2))})
    with pytest.raises(
        UserError, match=r"metric 'odd': per_item returned shape \(2,\) for 3 images"
    ):
        results.value(records_of(), "odd")


def test_wrong_names_are_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_metrics.py").write_text(
        "from kd.metrics.registry import Metric\n"
        "GOOD = Metric('good', per_item=lambda records: records['image_ids'])\n"
        "TAKEN = Metric('top1', per_item=GOOD.per_item)\n"
        "EMPTY = Metric('empty')\nNUMBER = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert list(load_metrics(["odd_metrics:GOOD"])) == ["good"]
    wrong = {
        "another metric is called 'top1'": ["odd_metrics:TAKEN"],
        "another metric is called 'good'": ["odd_metrics:GOOD", "odd_metrics:GOOD"],
        "expected a Metric with per_item, got Metric": ["odd_metrics:EMPTY"],
        "expected a Metric with per_item, got 3": ["odd_metrics:NUMBER"],
        "odd_metrics:NONE": ["odd_metrics:NONE"],
        "unknown metric 'tpo1'; did you mean 'top1'": ["tpo1"],
    }
    for message, paths in wrong.items():
        with pytest.raises(UserError, match=message):
            load_metrics(paths)


def test_the_registry_needs_no_torch() -> None:
    code = "import sys, kd.metrics.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
