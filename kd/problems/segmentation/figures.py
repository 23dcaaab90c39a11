"""Tables and figures of label maps, class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from kd.metrics.records import Array, Records
from kd.metrics.registry import METRICS
from kd.problems.objects.figures import matrix_figure
from kd.problems.segmentation.records import IOU, ClassRow, interval
from kd.report.style import GREY, INK, colours, legend_above, new_stack
from kd.report.tables import RESAMPLED, Table

_NAMES_AT_MOST = 60  # more groups of bars cannot be read


def map_class_table(rows: Sequence[ClassRow], records: Records, names: Sequence[str]) -> Table:
    """Every class that is there or said: pixels, IoU, accuracy, and what is said instead.

    Args:
        rows: From `map_scores.per_class`.
        records: Those they are of, for intervals.
        names: C names.
    """
    lines = []
    for row in rows:
        metric = f"{IOU}{row.label}"
        lines.append(
            (
                names[row.label],
                _percent(row.share, 2),
                _percent(row.iou),
                METRICS["mIoU"].bounds(interval(records, metric)),
                _percent(row.accuracy),
                ", ".join(f"{names[c]} {100 * share:.0f} %" for c, share in row.instead),
            )
        )
    header = ("class", "pixels (%)", "IoU (%)", "95 % interval", "accuracy (%)", "says instead")
    notes = ("pixels: share of those that are scored", RESAMPLED)
    return Table("By class", header, (tuple(lines),), notes)


def map_classes_side_by_side(runs: Mapping[str, Sequence[ClassRow]], names: Sequence[str]) -> Table:
    """IoU of every class that is there, a column for each run.

    Args:
        runs: Name -> rows, from `map_scores.per_class` of the same images.
        names: C names.
    """
    columns = [{row.label: row.iou for row in rows} for rows in runs.values()]
    lines = [
        (
            names[row.label],
            _percent(row.share, 2),
            *(_percent(column.get(row.label, float("nan"))) for column in columns),
        )
        for row in next(iter(runs.values()))
        if row.share > 0
    ]
    header = ("class", "pixels (%)", *runs)
    return Table("IoU (%) by class", header, (tuple(lines),))


def iou_figure(runs: Mapping[str, Sequence[ClassRow]], names: Sequence[str]) -> Figure:
    """IoU of each class that is there above its share of the pixels, the most frequent first.

    Args:
        runs: Name -> rows, from `map_scores.per_class` of the same images.
        names: C names.
    """
    shown = [row for row in next(iter(runs.values())) if row.share > 0][:_NAMES_AT_MOST]
    place, width = np.arange(len(shown)), 0.84 / len(runs)
    inches = min(max(4.5, (0.16 + 0.1 * len(runs)) * len(shown) + 1.2), 16.0)
    figure, (above, below) = new_stack(inches, 4.6, (3.0, 1.0))
    for number, (name, rows) in enumerate(runs.items()):
        iou = {row.label: row.iou for row in rows}
        heights = [100 * iou.get(row.label, 0.0) for row in shown]
        offset = (number - (len(runs) - 1) / 2) * width
        above.bar(place + offset, heights, width * 0.94, color=colours(len(runs))[number],
                  label=name)  # fmt: skip
    above.set(ylabel="IoU (%)", ylim=(0, 100), xlim=(-0.7, len(shown) - 0.3))
    legend_above(above)
    shares = [100 * row.share for row in shown]
    below.bar(place, shares, width=0.8, color=GREY)
    if shares[0] > 20 * shares[-1]:
        below.set_yscale("log")
        low = 10.0 ** np.floor(np.log10(shares[-1]))
        below.set_ylim(low, 150)
        ticks = [tick for tick in (0.001, 0.01, 0.1, 1, 10, 100) if tick >= low]
        below.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        below.minorticks_off()
    below.set_ylabel("pixels (%)")
    below.set_xticks(place, [names[row.label] for row in shown], rotation=90, fontsize=7.5)
    below.tick_params(axis="x", length=0, colors=INK)
    return figure


def pixel_confusion_figure(matrix: Array, names: Sequence[str]) -> Figure:
    """What is said of the pixels of the most frequent classes, in percent of each row.

    Args:
        matrix: (C, C) pixels, by true class (rows) and answer (columns).
        names: C names.
    """
    shares = 100 * matrix.sum(axis=1) / matrix.sum()
    rows = [f"{name} ({share:.2g} %)" for name, share in zip(names, shares, strict=True)]
    figure = matrix_figure(matrix, names, rows, most=30)
    figure.axes[0].set_ylabel("true class (share of the pixels)")
    return figure


def _percent(number: float, digits: int = 1) -> str:
    """Nothing for NaN."""
    return "" if number != number else f"{100 * number:.{digits}f}"
