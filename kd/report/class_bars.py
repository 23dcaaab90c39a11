"""Bar charts of class probabilities, metrics by class, and metrics with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from kd.metrics.bootstrap import Interval
from kd.report.style import BLUE, GREY, INK, ORANGE, PALE, colours, letters_on, new_stack

NAMED_CLASSES = 60  # more groups of bars cannot be labelled


def bars(
    axes: Axes,
    belief: NDArray[Any],
    names: Sequence[str],
    top: int,
    *,
    truth: str | None = None,
    usual: NDArray[Any] | None = None,
    digits: int = 0,
) -> None:
    """Draw the `top` most likely classes as bars, the true class in colour.

    `belief` (C,) are predicted probabilities and `names` the C class names. Without `truth`, all
    bars are coloured. The class prior `usual` (C,) is marked on the bars. `digits` is the number of
    decimal places of the percentages.
    """
    order = np.argsort(-belief, kind="stable")[:top]
    place = np.arange(len(order))
    shades = [BLUE if truth in (None, names[c]) else PALE for c in order]
    axes.barh(place, 100 * belief[order], height=0.68, color=shades)
    ends = 100 * belief[order]
    if usual is not None:
        marks = 100 * usual[order]
        axes.vlines(marks, place - 0.42, place + 0.42, color=ORANGE, linewidth=1.6)
        room = 0.25 * max(
            ends.max(), 1e-9
        )  # width of a number, which is written beyond a mark in its way
        ends = np.where((marks > ends) & (marks < ends + room), marks, ends)
    for end, row in zip(ends, place, strict=True):
        text = f"{100 * belief[order[row]]:.{digits}f} %"
        axes.annotate(text, (end, row), (2, 0), textcoords="offset points", va="center",
                      fontsize=8, color=GREY)  # fmt: skip
    axes.set_yticks(place, [names[c] for c in order], fontsize=8)
    axes.set(ylim=(len(order) + 0.1, -0.6), xticks=[])
    if truth is not None and (true := names.index(truth)) not in order:
        rank = 1 + int((belief > belief[true]).sum())
        text = f"{truth}: place {rank}, {100 * belief[true]:.1f} %"
        axes.text(0.02, 0.0, text, transform=axes.transAxes, fontsize=8, color=BLUE)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(GREY)
    axes.spines["left"].set_bounds(-0.5, len(order) - 0.5)
    axes.tick_params(length=0)


def metric_by_class(
    runs: Mapping[str, Sequence[float]], names: Sequence[str], support: Sequence[float],
    limits: tuple[float, float],
) -> tuple[Figure, Axes, Axes]:  # fmt: skip
    """Draw a metric for each class, with a bar per run, above a panel of class frequencies.

    `runs` maps a run's name to its metric for each class in percent. `support` has the class
    frequencies in descending order; their scale has the given `limits`, and is logarithmic if they
    differ by more than a factor of 20. Returns the figure and its upper and lower axes.
    """
    place, width = np.arange(len(support)), 0.84 / len(runs)
    inches = min(max(4.5, (0.16 + 0.1 * len(runs)) * len(support) + 1.2), 16.0)
    figure, (above, below) = new_stack(inches, 4.6, (3.0, 1.0))
    for number, ((name, heights), shade) in enumerate(
        zip(runs.items(), colours(len(runs)), strict=True)
    ):
        offset = (number - (len(runs) - 1) / 2) * width
        above.bar(place + offset, heights, width * 0.94, color=shade, label=name)
    above.set(xlim=(-0.7, len(support) - 0.3))
    below.bar(place, support, width=0.8, color=GREY)
    if support[0] > 20 * support[-1]:
        below.set_yscale("log")
        below.set_ylim(*limits)
        ticks = [10.0**power for power in range(-9, 10) if limits[0] <= 10.0**power <= limits[1]]
        below.set_yticks(ticks, [f"{tick:,.0f}" if tick >= 1 else f"{tick:g}" for tick in ticks])
        below.minorticks_off()
    below.set_xticks(place, names, rotation=90, fontsize=7.5)
    below.tick_params(axis="x", length=0, colors=INK)
    return figure, above, below


def interval_bars(
    axes: Axes, runs: Mapping[str, Sequence[Interval]], labels: Sequence[str], *, digits: int
) -> None:
    """Draw groups of bars with 95 % intervals, and numbers in percent with `digits` decimals.

    `runs` maps a run's name to its fraction in each group; `labels` are the titles of the groups.
    """
    place, width, top = np.arange(len(labels)), 0.8 / len(runs), 0.0
    for row, ((name, found), colour) in enumerate(
        zip(runs.items(), colours(len(runs)), strict=True)
    ):
        heights = [100 * one.mean for one in found]
        reach = [[100 * (i.mean - i.low) for i in found], [100 * (i.high - i.mean) for i in found]]
        errors = np.maximum(np.nan_to_num(reach), 0.0)
        drawn = axes.bar(
            place + (row - (len(runs) - 1) / 2) * width, heights, width * 0.92, color=colour,
            alpha=0.85, label=name, yerr=errors, error_kw={"elinewidth": 0.8, "ecolor": INK},
        )  # fmt: skip
        for bar, height, end in zip(drawn, heights, heights + errors[1], strict=True):
            middle, inside = bar.get_x() + bar.get_width() / 2, height >= 10
            axes.annotate(
                f"{height:.{digits}f}", (middle, height / 2 if inside else end),
                xytext=(0, 0 if inside else 2), textcoords="offset points", ha="center",
                va="center" if inside else "bottom", fontsize=7.5,
                color=letters_on(colour) if inside else INK,
            )  # fmt: skip
            top = max(top, end * (1.05 if inside else 1.12))  # room for a number above
    axes.set_xticks(place, labels)
    axes.set_ylim(0, max(10.0, top))
