"""Tables and figures of detectors: average precision by class and by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from kd.metrics.coco_ap import AREAS
from kd.metrics.records import Records
from kd.metrics.registry import METRICS
from kd.problems.detection.scores import COCO, SIZES, BoxRow, interval, objects_of, value
from kd.report.class_bars import NAMED_CLASSES, metric_by_class
from kd.report.style import INK, colours, legend_above, letters_on, new_figure
from kd.report.tables import OVER_IMAGES, RESAMPLED, Table

_LETTERS, _GAP = 7.5, 2  # points: font size of a number, and its distance from the error bar below
_ROOM, _ABOVE = 1.05, 1.12  # room above an error bar, and above one with a number on it
_AP = METRICS["AP"]


def box_class_table(rows: Sequence[BoxRow], records: Records, names: Sequence[str]) -> Table:
    """Objects and COCO's metrics of each class with an object.

    Args:
        rows: From `per_class`.
        records: The records of the rows, for intervals.
        names: C names.
    """
    lines = []
    for row in rows:
        cells = [names[row.label], str(row.objects)]
        cells += [_AP.text(row.numbers.get(name)) for name in COCO]
        bounds = _AP.bounds(interval(records, f"AP/{row.label}"))
        lines.append((*cells[:3], bounds, *cells[3:]))
    ap, *others = COCO
    header = ("class", "objects", ap, "95 % interval", *others)
    notes = ("in percent; empty if a class has no object of a size", RESAMPLED)
    return Table("By class", header, (tuple(lines),), notes)


def box_classes_side_by_side(runs: Mapping[str, Sequence[BoxRow]], names: Sequence[str]) -> Table:
    """AP of each class with an object, a column per run; arguments as of `class_ap_figure`."""
    columns = [{row.label: row.numbers for row in rows} for rows in runs.values()]
    lines = []
    for row in next(iter(runs.values())):
        cells = (_AP.text(column[row.label]["AP"]) for column in columns)
        lines.append((names[row.label], str(row.objects), *cells))
    return Table("AP (%) by class", ("class", "objects", *runs), (tuple(lines),))


def size_table(runs: Mapping[str, Records]) -> Table:
    """AP and number of small, medium and large objects; `runs`: name -> records."""
    first = next(iter(runs.values()))
    lines = []
    for metric, size in SIZES.items():
        cells = [_size_title(size).replace("\n", ", "), str(int(objects_of(first, size).sum()))]
        for records in runs.values():
            bounds = _AP.bounds(interval(records, metric))
            cells.append(f"{_AP.text(value(records, metric))} {bounds}".strip())
        lines.append(tuple(cells))
    header = ("size of the object", "objects", *runs)
    return Table("AP (%) by size", header, (tuple(lines),), (OVER_IMAGES,))


def class_ap_figure(runs: Mapping[str, Sequence[BoxRow]], names: Sequence[str]) -> Figure:
    """AP of each class, and AP50 as a line, above its number of objects, most frequent first.

    Args:
        runs: Name -> rows from `per_class` of the same images.
        names: C names.
    """
    first = next(iter(runs.values()))
    drawn = first[:NAMED_CLASSES]
    found = {name: {row.label: row.numbers for row in rows} for name, rows in runs.items()}
    heights, lines = (
        {name: [100 * numbers[row.label][metric] for row in drawn]
         for name, numbers in found.items()}
        for metric in ("AP", "AP50")
    )  # fmt: skip
    objects = [row.objects for row in drawn]
    labels = [names[row.label] for row in drawn]
    figure, above, below = metric_by_class(heights, labels, objects, (0.7, 1.5 * objects[0]))
    place, width = np.arange(len(drawn)), 0.84 / len(runs)
    for number, half in enumerate(lines.values()):
        middle = place + (number - (len(runs) - 1) / 2) * width
        label = "AP50" if number == len(runs) - 1 else "_"  # hidden from the legend
        above.hlines(half, middle - 0.45 * width, middle + 0.45 * width, colors=INK,
                     linewidth=1.2, label=label)  # fmt: skip
    above.set(ylabel="AP (%)", ylim=(0, 101))
    legend_above(above)
    left_out = "" if len(drawn) == len(first) else f"the {len(drawn)} most frequent of {len(first)}"
    below.set(ylabel="objects", xlabel=left_out)
    return figure


def size_figure(runs: Mapping[str, Records]) -> Figure:
    """AP of all, small, medium and large objects with 95 % intervals; `runs`: name -> records."""
    figure, axes = new_figure(5.6, 3.8)
    first = next(iter(runs.values()))
    sizes = {"AP": "all", **SIZES}
    drawn = [metric for metric in sizes if value(first, metric) is not None]
    place, width, top = np.arange(len(drawn)), 0.8 / len(runs), 0.0
    for row, ((name, run), colour) in enumerate(zip(runs.items(), colours(len(runs)), strict=True)):
        known = [interval(run, metric) for metric in drawn]
        found = [one for one in known if one is not None]
        heights = [100 * one.mean for one in found]
        reach = [[100 * (i.mean - i.low) for i in found], [100 * (i.high - i.mean) for i in found]]
        offset = (row - (len(runs) - 1) / 2) * width
        bars = axes.bar(
            place + offset, heights, width * 0.92, color=colour, alpha=0.85, label=name,
            yerr=np.maximum(np.nan_to_num(reach), 0.0),
            error_kw={"elinewidth": 0.8, "ecolor": INK},
        )  # fmt: skip
        for bar, height, above in zip(bars, heights, np.nan_to_num(reach[1]), strict=True):
            middle, inside = bar.get_x() + bar.get_width() / 2, height >= 10
            end = height + max(float(above), 0.0)  # of the error bar
            axes.annotate(
                f"{height:.1f}", (middle, height / 2 if inside else end),
                xytext=(0, 0 if inside else _GAP), textcoords="offset points", ha="center",
                va="center" if inside else "bottom", fontsize=_LETTERS,
                color=letters_on(colour) if inside else INK,
            )  # fmt: skip
            top = max(top, end * (_ROOM if inside else _ABOVE))
    labels = [
        f"{_size_title(sizes[metric])}\n{int(objects_of(first, sizes[metric]).sum())} objects"
        for metric in drawn
    ]
    axes.set_xticks(place, labels)
    axes.set(ylabel="AP (%)")
    axes.set_ylim(0, max(10.0, top))
    legend_above(axes)
    return figure


def _size_title(size: str) -> str:
    """A range of areas in words, as sides of squares."""
    if size == "all":
        return "all"
    low, high = (round(bound**0.5) for bound in AREAS[size])
    if size == "small":
        return f"small\nbelow {high} px"
    return f"large\nover {low} px" if size == "large" else f"medium\n{low} to {high} px"
