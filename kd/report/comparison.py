"""Figure that compares variants: bars, metric by metric."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kd.errors import UserError
from kd.report.style import GREY, clean, colours
from kd.report.tables import Comparison, Table


def comparison_figure(table: Table) -> Figure:
    """Draw a panel for each metric in percent, or for each metric if none is in percent.

    `table` is from `distill_table` or `runs_table`. Bars are means of the variants, dots are seeds;
    differences are written above.
    """
    known = {entry.metric.name: entry.metric for entry in table.comparisons}
    chosen = [name for name in known if known[name].unit == "%"] or list(known)
    variants = list(dict.fromkeys(entry.variant for entry in table.comparisons))
    if not chosen:
        raise UserError("no metric to draw")
    found = {(entry.metric.name, entry.variant): entry for entry in table.comparisons}
    width = 1.2 + max(1.6, 0.85 * len(variants)) * len(chosen)
    figure = Figure(figsize=(width, 3.6), layout="constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    shades = [GREY, *colours(len(variants) - 1)]
    for axes, name in zip(panels, chosen, strict=True):
        _comparison_panel(axes, [found[name, variant] for variant in variants], shades)
    handles = [panels[0].patches[place] for place in range(len(variants))]
    figure.legend(handles, variants, loc="outside upper center", ncols=len(variants), frameon=False)
    return figure


def _comparison_panel(axes: Axes, line: Sequence[Comparison], shades: Sequence[str]) -> None:
    """Draw the bars of one metric, starting at zero so that their lengths can be compared."""
    clean(axes)
    metric = line[0].metric
    scale = metric.scale
    peak = max(0.0, *(max(entry.values) for entry in line)) * scale
    # Some metrics, such as information gain, are negative where predictions are below chance.
    depth = min(0.0, *(min(entry.values) for entry in line)) * scale
    for place, (entry, colour) in enumerate(zip(line, shades, strict=True)):
        axes.bar(place, scale * entry.mean, width=0.72, color=colour, alpha=0.85)
        if len(entry.values) > 1:
            dots = np.linspace(-0.18, 0.18, len(entry.values)) + place
            values = scale * np.asarray(entry.values)
            axes.plot(dots, values, "o", color="black", markersize=2.5, alpha=0.7)
        if entry.difference is None:
            continue
        mean, low, high = (metric.text(bound, "+z") for bound in entry.difference)
        text = f"{mean}\n[{low}, {high}]" if np.isfinite(entry.difference.low) else mean
        weight = "bold" if entry.difference.clear_of_zero else "normal"
        top = scale * max(0.0, *entry.values) + 0.03 * (peak - depth)
        axes.text(place, top, text, ha="center", va="bottom", fontsize=6.5, weight=weight)
    above = peak + 0.25 * (peak - depth) or 1.0
    axes.set(ylim=(1.05 * depth, above), xlim=(-0.6, len(line) - 0.4), xticks=[])
    axes.set_xlabel(metric.label)
