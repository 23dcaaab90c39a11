"""Tables and figures of detectors: average precision class by class and by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from kd.metrics.coco_ap import AREAS
from kd.metrics.records import Records
from kd.metrics.registry import METRICS
from kd.problems.detection.scores import COCO, SIZES, BoxRow, interval, objects_of, value
from kd.report.style import GREY, INK, colours, legend_above, letters_on, new_figure, new_stack
from kd.report.tables import OVER_IMAGES, RESAMPLED, Table

_LETTERS, _GAP = 7.5, 2  # points: of a number, and between it and the error bar below it
_ROOM, _ABOVE = 1.05, 1.12  # axes end so much above an error bar; and above one with a number on it
_NAMES_AT_MOST = 60  # more groups of bars cannot be read
_AP = METRICS["AP"]


def box_class_table(rows: Sequence[BoxRow], records: Records, names: Sequence[str]) -> Table:
    """Every class with an object: objects and COCO's numbers.

    Args:
        rows: From `box_scores.per_class`.
        records: Those they are of, for intervals.
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
    notes = ("in percent; nothing where a class has no object of a size",
             RESAMPLED)  # fmt: skip
    return Table("By class", header, (tuple(lines),), notes)


def box_classes_side_by_side(runs: Mapping[str, Sequence[BoxRow]], names: Sequence[str]) -> Table:
    """AP of every class with an object, a column for each run.

    Args:
        runs: Name -> rows, from `box_scores.per_class` of the same images.
        names: C names.
    """
    columns = [{row.label: row.numbers for row in rows} for rows in runs.values()]
    lines = [
        (
            names[row.label],
            str(row.objects),
            *(_AP.text(column[row.label]["AP"]) for column in columns),
        )
        for row in next(iter(runs.values()))
    ]
    return Table("AP (%) by class", ("class", "objects", *runs), (tuple(lines),))


def size_table(runs: Mapping[str, Records]) -> Table:
    """AP of small, medium and large objects, with how many there are.

    Args:
        runs: Name -> predictions on the same images.
    """
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
    """AP of each class above its number of objects, the most frequent first; AP50 as a line.

    Args:
        runs: Name -> rows, from `box_scores.per_class` of the same images.
        names: C names.
    """
    first = next(iter(runs.values()))
    shown = first[:_NAMES_AT_MOST]
    place, width = np.arange(len(shown)), 0.84 / len(runs)
    inches = min(max(4.5, (0.16 + 0.1 * len(runs)) * len(shown) + 1.2), 16.0)
    figure, (above, below) = new_stack(inches, 4.6, (3.0, 1.0))
    for number, (name, rows) in enumerate(runs.items()):
        known = {row.label: row.numbers for row in rows}
        heights, half = (
            [100 * known[row.label][metric] for row in shown] for metric in ("AP", "AP50")
        )
        middle = place + (number - (len(runs) - 1) / 2) * width
        above.bar(middle, heights, width * 0.94, color=colours(len(runs))[number], label=name)
        label = "AP50" if number == len(runs) - 1 else "_"  # hidden from the legend
        above.hlines(half, middle - 0.45 * width, middle + 0.45 * width, colors=INK,
                     linewidth=1.2, label=label)  # fmt: skip
    above.set(ylabel="AP (%)", ylim=(0, 101), xlim=(-0.7, len(shown) - 0.3))
    legend_above(above)
    below.bar(place, [row.objects for row in shown], width=0.8, color=GREY)
    if shown[0].objects > 20 * shown[-1].objects:
        below.set_yscale("log")
        below.set_ylim(0.7, 1.5 * shown[0].objects)
        ticks = [10**power for power in range(len(str(shown[0].objects)))]
        below.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
        below.minorticks_off()
    left_out = "" if len(shown) == len(first) else f"the {len(shown)} most frequent of {len(first)}"
    below.set(ylabel="objects", xlabel=left_out)
    below.set_xticks(place, [names[row.label] for row in shown], rotation=90, fontsize=7.5)
    below.tick_params(axis="x", length=0, colors=INK)
    return figure


def size_figure(runs: Mapping[str, Records]) -> Figure:
    """AP of all, small, medium and large objects with their 95 % intervals.

    Args:
        runs: Name -> predictions on the same images.
    """
    figure, axes = new_figure(5.6, 3.8)
    first = next(iter(runs.values()))
    sizes = {"AP": "all", **SIZES}
    shown = [metric for metric in sizes if value(first, metric) is not None]
    place, width, top = np.arange(len(shown)), 0.8 / len(runs), 0.0
    for row, ((name, run), colour) in enumerate(zip(runs.items(), colours(len(runs)), strict=True)):
        known = [interval(run, metric) for metric in shown]
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
        for metric in shown
    ]
    axes.set_xticks(place, labels)
    axes.set(ylabel="AP (%)")
    axes.set_ylim(0, max(10.0, top))
    legend_above(axes)
    return figure


def _size_title(size: str) -> str:
    """A range of areas as axes and tables call it: the sides of squares."""
    if size == "all":
        return "all"
    low, high = (round(bound**0.5) for bound in AREAS[size])
    if size == "small":
        return f"small\nbelow {high} px"
    return f"large\nover {low} px" if size == "large" else f"medium\n{low} to {high} px"
