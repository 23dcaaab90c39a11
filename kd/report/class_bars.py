"""The likeliest classes as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from kd.report.style import BLUE, GREY, ORANGE, PALE


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
    """Draw the likeliest classes as bars, the true one in colour.

    Args:
        axes: Where to draw.
        belief: (C,) probabilities.
        names: C names.
        top: How many bars.
        truth: The true class; without it all bars are coloured.
        usual: (C,) average fractions of the classes, a mark in each bar.
        digits: Decimal places of a percentage.
    """
    order = np.argsort(-belief, kind="stable")[:top]
    place = np.arange(len(order))
    colours = [BLUE if truth in (None, names[c]) else PALE for c in order]
    axes.barh(place, 100 * belief[order], height=0.68, color=colours)
    ends = 100 * belief[order]
    if usual is not None:
        marks = 100 * usual[order]
        axes.vlines(marks, place - 0.42, place + 0.42, color=ORANGE, linewidth=1.6)
        room = 0.25 * max(ends.max(), 1e-9)  # a number's width: it moves behind a mark in its way
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
