"""Figures of runs beside each other: curves, accuracy by bins, calibration, paired differences.

Every function returns a new `Figure`; `kd.report.style` writes it or makes a tensor of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd.errors import UserError
from kd.metrics import classification as scores
from kd.metrics.bootstrap import Interval
from kd.metrics.records import Array, Records
from kd.report.style import (
    GREY,
    INK,
    PALE,
    clean,
    colours,
    legend_above,
    letters_on,
    new_figure,
    reference_style,
)
from kd.report.tables import Comparison, Table, interval_of, label_of, scale_of


def top_n_figure(
    curves: Mapping[str, Array], references: Mapping[str, Array] | None = None
) -> Figure:
    """Top-n accuracy for n = 1..C against random, the ideal and what else is known.

    Args:
        curves: Name -> (C,) accuracy in 0..1.
        references: The same of what is no run: the class prior, the exact posterior.
    """
    figure, axes = new_figure(5.6, 4.0)
    num_classes = len(next(iter(curves.values())))
    n = np.arange(1, num_classes + 1)
    axes.plot(n, n / num_classes, color=PALE, label="random")
    axes.plot(n, np.ones(num_classes), color=PALE, linestyle=":", label="ideal")
    for name, curve in (references or {}).items():
        axes.plot(n, curve, **reference_style(name), label=_with_top1(name, curve))
    for (name, curve), colour in zip(curves.items(), colours(len(curves)), strict=True):
        axes.plot(n, curve, color=colour, linewidth=2, label=_with_top1(name, curve))
    axes.set(xlim=(1, max(num_classes, 2)), ylim=(0, 1.02))
    axes.set(xlabel="n", ylabel="true class among the first n")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def share_hidden_figure(
    runs: Mapping[str, Records], references: Mapping[str, Records] | None = None
) -> Figure:
    """Top-1 by how much of the picture is hidden, with the number of objects below.

    Args:
        runs: Name -> predictions.
        references: The same of what runs are held against.
    """
    figure = _binned_figure("share", runs, references or {})
    figure.axes[0].set_xlabel("share of the picture that is hidden")
    return figure


def visible_figure(
    runs: Mapping[str, Records], references: Mapping[str, Records] | None = None
) -> Figure:
    """Top-1 by how many other objects the picture holds; arguments as `share_hidden_figure`."""
    figure = _binned_figure("visible", runs, references or {})
    figure.axes[0].set_xlabel("other objects in the picture")
    return figure


def _binned_figure(
    kind: str, runs: Mapping[str, Records], references: Mapping[str, Records]
) -> Figure:
    """Bars of runs with their 95 % intervals, a line across each bin for each reference."""
    figure, axes = new_figure(5.6, 3.8)
    first = next(iter(runs.values()))
    bins = [b for b in scores.BINS[kind] if scores.value(first, f"{kind}/{b}_top1") is not None]
    place, width = np.arange(len(bins)), 0.8 / len(runs)
    for row, ((name, run), colour) in enumerate(zip(runs.items(), colours(len(runs)), strict=True)):
        found = [_top1(run, f"{kind}/{b}_top1") for b in bins]
        heights = [100 * one.mean for one in found]
        reach = [[100 * (i.mean - i.low) for i in found], [100 * (i.high - i.mean) for i in found]]
        offset = (row - (len(runs) - 1) / 2) * width
        bars = axes.bar(
            place + offset, heights, width * 0.92, color=colour, alpha=0.85, label=name,
            yerr=np.nan_to_num(reach), error_kw={"elinewidth": 0.8, "ecolor": INK},
        )  # fmt: skip
        for bar, height, above in zip(bars, heights, reach[1], strict=True):
            middle, inside = bar.get_x() + bar.get_width() / 2, height >= 10
            axes.text(
                middle, height / 2 if inside else height + np.nan_to_num(above) + 1.5,
                f"{height:.0f}", ha="center", va="center" if inside else "bottom", fontsize=7.5,
                color=letters_on(colour) if inside else INK,
            )  # fmt: skip
    for name, run in references.items():
        heights = [100 * (scores.value(run, f"{kind}/{b}_top1") or 0.0) for b in bins]
        style = reference_style(name)
        axes.hlines(
            heights, place - 0.46, place + 0.46, colors=style["color"],
            linestyles=style["linestyle"], label=name, zorder=3,
        )  # fmt: skip
    axes.set_xticks(place, [_bin_label(first, kind, name) for name in bins])
    axes.set(ylabel="top-1 (%)")
    axes.set_ylim(0, max(10.0, axes.get_ylim()[1]))  # numbers above low bars are inside
    legend_above(axes)
    return figure


def reliability_figure(runs: Mapping[str, Records]) -> Figure:
    """Accuracy against confidence, one point a bin; on the diagonal a run means what it says.

    Args:
        runs: Name -> predictions.
    """
    figure, axes = new_figure(4.4, 4.2)
    axes.plot([0, 1], [0, 1], color=PALE, zorder=0)
    for (name, run), colour in zip(runs.items(), colours(len(runs)), strict=True):
        points = scores.reliability(run["log_probs"], run["labels"])
        error = scores.calibration_error(run["log_probs"], run["labels"])
        label = f"{name} (error {error:.3f})"
        axes.plot(points.confidence, points.accuracy, color=colour, linewidth=1.2, label=label)
        # An area tells how many objects stand behind a point.
        sizes = 4 + 120 * points.objects / points.objects.sum()
        axes.scatter(points.confidence, points.accuracy, s=sizes, color=colour, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    axes.legend(loc="upper left", frameon=False)
    return figure


def comparison_figure(table: Table, *, metrics: Sequence[str] | None = None) -> Figure:
    """Variants side by side for each metric: means, seeds as dots, paired differences above.

    Args:
        table: From `distill_table` or `runs_table`.
        metrics: By default the accuracies of the table, or all of one that has none.

    Raises:
        UserError: The table has none of these metrics.
    """
    known = list(dict.fromkeys(entry.metric for entry in table.comparisons))
    chosen = [m for m in known if metrics is None or m in metrics]
    if metrics is None:
        chosen = [m for m in chosen if scale_of(m) == 100] or chosen
    variants = list(dict.fromkeys(entry.variant for entry in table.comparisons))
    if not chosen:
        raise UserError(f"no metric to draw; the table has {', '.join(known) or 'nothing'}")
    found = {(entry.metric, entry.variant): entry for entry in table.comparisons}
    figure = Figure(figsize=(1.2 + max(1.6, 0.85 * len(variants)) * len(chosen), 3.6))
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained")
    panels = figure.subplots(1, len(chosen), squeeze=False)[0]
    shades = [GREY, *colours(len(variants) - 1)]
    for axes, metric in zip(panels, chosen, strict=True):
        _comparison_panel(axes, [found[metric, variant] for variant in variants], shades)
    handles = [panels[0].patches[place] for place in range(len(variants))]
    figure.legend(handles, variants, loc="outside upper center", ncols=len(variants), frameon=False)
    return figure


def _comparison_panel(axes: Axes, line: Sequence[Comparison], shades: Sequence[str]) -> None:
    """Bars of one metric from zero, so that their lengths can be compared."""
    clean(axes)
    metric = line[0].metric
    scale = scale_of(metric)
    peak = max(0.0, *(max(entry.values) for entry in line)) * scale
    # Below zero is what is worse than chance, as information gain can be.
    depth = min(0.0, *(min(entry.values) for entry in line)) * scale
    for place, (entry, colour) in enumerate(zip(line, shades, strict=True)):
        axes.bar(place, scale * entry.mean, width=0.72, color=colour, alpha=0.85)
        if len(entry.values) > 1:
            dots = np.linspace(-0.18, 0.18, len(entry.values)) + place
            values = scale * np.asarray(entry.values)
            axes.plot(dots, values, "o", color="black", markersize=2.5, alpha=0.7)
        if entry.difference is None:
            continue
        mean, low, high = (scale * bound for bound in entry.difference)
        digits = 1 if scale == 100 else 3
        text = f"{mean:+z.{digits}f}"
        if np.isfinite(low):
            text += f"\n[{low:+z.{digits}f}, {high:+z.{digits}f}]"
        weight = "bold" if entry.difference.clear_of_zero else "normal"
        top = scale * max(0.0, *entry.values) + 0.03 * (peak - depth)
        axes.text(place, top, text, ha="center", va="bottom", fontsize=6.5, weight=weight)
    high = peak + 0.25 * (peak - depth) or 1.0
    axes.set(ylim=(1.05 * depth, high), xlim=(-0.6, len(line) - 0.4), xticks=[])
    axes.set_xlabel(label_of(metric))


def _with_top1(name: str, curve: Array) -> str:
    return f"{name} (top-1 {100 * float(curve[0]):.1f} %)"


def _top1(records: Records, name: str) -> Interval:
    return interval_of(name, records) or Interval(0.0, np.nan, np.nan)


def _bin_label(records: Records, kind: str, name: str) -> str:
    found = scores.measure(records, f"{kind}/{name}_top1")
    objects = f"{0 if found is None else len(found.values)} objects"
    return f"{scores.bin_title(kind, name)}\n{objects}"
