"""Tables and figures of label maps by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from kd.metrics.records import Array, Records
from kd.metrics.registry import METRICS
from kd.problems.objects.figures import matrix_figure
from kd.problems.segmentation.records import IOU, ClassRow, interval
from kd.report.class_bars import NAMED_CLASSES, metric_by_class
from kd.report.style import legend_above
from kd.report.tables import RESAMPLED, Table


def map_class_table(rows: Sequence[ClassRow], records: Records, names: Sequence[str]) -> Table:
    """Pixels, IoU, accuracy and most frequent confusions of each class.

    Args:
        rows: From `per_class`.
        records: The records of the rows, for intervals.
        names: C names.
    """
    lines = [
        (
            names[row.label],
            _percent(row.fraction, 2),
            _percent(row.iou),
            METRICS["mIoU"].bounds(interval(records, f"{IOU}{row.label}")),
            _percent(row.accuracy),
            ", ".join(f"{names[c]} {100 * part:.0f} %" for c, part in row.instead),
        )
        for row in rows
    ]
    header = ("class", "pixels (%)", "IoU (%)", "95 % interval", "accuracy (%)",
              "predicted instead")  # fmt: skip
    notes = ("pixels: fraction of those that are scored", RESAMPLED)
    return Table("By class", header, (tuple(lines),), notes)


def map_classes_side_by_side(runs: Mapping[str, Sequence[ClassRow]], names: Sequence[str]) -> Table:
    """IoU of each class with a pixel, a column per run; arguments as of `iou_figure`."""
    columns = [{row.label: row.iou for row in rows} for rows in runs.values()]
    lines = []
    for row in _with_pixels(runs):
        ious = (_percent(column.get(row.label, float("nan"))) for column in columns)
        lines.append((names[row.label], _percent(row.fraction, 2), *ious))
    return Table("IoU (%) by class", ("class", "pixels (%)", *runs), (tuple(lines),))


def iou_figure(runs: Mapping[str, Sequence[ClassRow]], names: Sequence[str]) -> Figure:
    """IoU of each class above its fraction of the pixels, the most frequent classes first.

    Args:
        runs: Name -> rows from `per_class` of the same images.
        names: C names.
    """
    drawn = _with_pixels(runs)[:NAMED_CLASSES]
    ious = {name: {row.label: row.iou for row in rows} for name, rows in runs.items()}
    heights = {name: [100 * iou.get(row.label, 0.0) for row in drawn] for name, iou in ious.items()}
    pixels = [100 * row.fraction for row in drawn]
    limits = (float(10.0 ** np.floor(np.log10(pixels[-1]))), 150.0)
    labels = [names[row.label] for row in drawn]
    figure, above, below = metric_by_class(heights, labels, pixels, limits)
    above.set(ylabel="IoU (%)", ylim=(0, 100))
    below.set_ylabel("pixels (%)")
    legend_above(above)
    return figure


def pixel_confusion_figure(matrix: Array, names: Sequence[str]) -> Figure:
    """Confusion matrix of the most frequent classes, in percent of each row.

    Args:
        matrix: (C, C) pixels, by true class (rows) and predicted class (columns).
        names: C names.
    """
    percent = 100 * matrix.sum(axis=1) / matrix.sum()
    rows = [f"{name} ({part:.2g} %)" for name, part in zip(names, percent, strict=True)]
    figure = matrix_figure(matrix, names, rows, most=30)
    figure.axes[0].set_ylabel("true class (fraction of the pixels)")
    return figure


def _with_pixels(runs: Mapping[str, Sequence[ClassRow]]) -> list[ClassRow]:
    return [row for row in next(iter(runs.values())) if row.fraction > 0]


def _percent(number: float, digits: int = 1) -> str:
    return "" if np.isnan(number) else f"{100 * number:.{digits}f}"
