"""Figures of predicted object classes: top-n curves, bins, calibration, classes, confusions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kd.metrics import classification as scores
from kd.metrics.bootstrap import Interval
from kd.metrics.confusion import ClassRow, Confusion, confusion_matrix
from kd.metrics.records import Array, Records
from kd.report.class_bars import interval_bars, metric_by_class
from kd.report.style import (
    GREY,
    INK,
    ORANGE,
    PALE,
    RED,
    SKY,
    colours,
    legend_above,
    new_figure,
    reference_style,
)

BINNED_BY = {"fraction": "fraction of the image hidden", "visible": "other objects in the image"}
_NAMES_AT_MOST = 90  # class names below an axis, because more cannot be read
_DARK = 0.6  # cells with a larger fraction are dark and get white text


def top_n_figure(
    runs: Mapping[str, Records], references: Mapping[str, Records] | None = None
) -> Figure:
    """Draw top-n accuracy against n for runs, references, random guesses and a perfect model."""
    figure, axes = new_figure(5.6, 4.0)
    num_classes = next(iter(runs.values()))["log_probs"].shape[1]
    n = np.arange(1, num_classes + 1)
    axes.plot(n, n / num_classes, color=PALE, label="random")
    axes.plot(n, np.ones(num_classes), color=PALE, linestyle=":", label="ideal")
    styles = [{"color": colour, "linewidth": 2} for colour in colours(len(runs))]
    drawn = [(name, one, reference_style(name)) for name, one in (references or {}).items()]
    drawn += [(*run, style) for run, style in zip(runs.items(), styles, strict=True)]
    for name, records, style in drawn:
        curve = scores.curve(records)
        axes.plot(n, curve, **style, label=f"{name} (top-1 {100 * float(curve[0]):.1f} %)")
    axes.set(xlim=(1, max(num_classes, 2)), ylim=(0, 1.02))
    axes.set(xlabel="n", ylabel="true class among the first n")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def bins_figure(
    kind: str, runs: Mapping[str, Records], references: Mapping[str, Records] | None = None
) -> Figure:
    """Draw top-1 by bin: bars with 95 % intervals for runs, lines for reference predictions.

    `kind` is a key of `kd.metrics.classification.BINS`; all records must have the same objects.
    """
    figure, axes = new_figure(5.6, 3.8)
    first = next(iter(runs.values()))
    found = {b: scores.measure(first, f"{kind}/{b}_top1") for b in scores.BINS[kind]}
    counts = {b: np.count_nonzero(~np.isnan(one)) for b, one in found.items() if one is not None}
    nothing = Interval(0.0, np.nan, np.nan)
    heights = {
        name: [scores.interval(run, f"{kind}/{b}_top1") or nothing for b in counts]
        for name, run in runs.items()
    }
    labels = [f"{scores.bin_title(kind, b)}\n{count} objects" for b, count in counts.items()]
    interval_bars(axes, heights, labels, digits=0)
    place = np.arange(len(counts))
    top = axes.get_ylim()[1]
    for name, run in (references or {}).items():
        lines = [100 * (scores.value(run, f"{kind}/{b}_top1") or 0.0) for b in counts]
        top = max(top, 1.05 * max(lines, default=0.0))
        style = reference_style(name)
        axes.hlines(
            lines, place - 0.46, place + 0.46, colors=style["color"],
            linestyles=style["linestyle"], label=name, zorder=3,
        )  # fmt: skip
    axes.set(ylabel="top-1 (%)", xlabel=BINNED_BY[kind], ylim=(0, top))
    legend_above(axes)
    return figure


def reliability_figure(runs: Mapping[str, Records]) -> Figure:
    """Draw accuracy against confidence, one point per bin; the diagonal is perfect calibration."""
    figure, axes = new_figure(4.4, 4.2)
    axes.plot([0, 1], [0, 1], color=PALE, zorder=0)
    for (name, run), colour in zip(runs.items(), colours(len(runs)), strict=True):
        points = scores.reliability(run["log_probs"], run["labels"])
        error = scores.calibration_error(run["log_probs"], run["labels"])
        label = f"{name} (error {error:.3f})"
        axes.plot(points.confidence, points.accuracy, color=colour, linewidth=1.2, label=label)
        # The area of a point grows with the number of objects in the bin.
        sizes = 4 + 120 * points.objects / points.objects.sum()
        axes.scatter(points.confidence, points.accuracy, s=sizes, color=colour, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")
    axes.legend(loc="upper left", frameon=False)
    return figure


def class_fraction_figure(train_counts: Array, val_counts: Array, names: Sequence[str]) -> Figure:
    """Draw each class's fraction of the train and val objects from object counts (C,)."""
    num_classes = len(names)
    figure, axes = new_figure(max(5.6, 0.14 * num_classes + 1.5), 3.8)
    order = np.argsort(-np.asarray(train_counts), kind="stable")
    place = np.arange(num_classes)
    train, val = (np.asarray(c)[order] / max(np.sum(c), 1) for c in (train_counts, val_counts))
    axes.bar(place, 100 * train, width=0.8, color=SKY, label="train")
    axes.plot(place, 100 * val, "o", color=RED, markersize=3.5, label="val")
    peak = max(train.max(), val.max(), 0.01)
    if train.min() < 0.01:  # fractions may range from 30 % to 0.1 %
        axes.set_yscale("symlog", linthresh=1.0)
        axes.set_yticks(ticks := [0, 0.5, 1, 2, 5, 10, 20, 50], [f"{tick:g}" for tick in ticks])
    axes.set(ylabel="fraction of objects (%)", xlim=(-0.7, num_classes - 0.3), ylim=(0, 130 * peak))
    if num_classes <= _NAMES_AT_MOST:
        axes.set_xticks(place, [names[c] for c in order], rotation=90, fontsize=7)
    else:
        axes.set_xlabel("classes, the most frequent first")
    axes.legend(loc="upper right", frameon=False)
    return figure


def per_class_figure(
    rows: Sequence[ClassRow],
    names: Sequence[str],
    references: Mapping[str, Sequence[ClassRow]] | None = None,
) -> Figure:
    """Draw top-1 and top-5 accuracy and object count of each class, most frequent first.

    `rows` are results of `per_class`. References are drawn as lines across the bars.
    """
    drawn = rows[:_NAMES_AT_MOST]
    labels, support = [names[row.label] for row in drawn], [row.support for row in drawn]
    heights = {"top-1": [100 * row.top1 for row in drawn]}
    figure, above, below = metric_by_class(heights, labels, support, (0.7, 1.5 * support[0]))
    place = np.arange(len(drawn))
    top5 = [100 * row.top5 for row in drawn]
    # Top-5 is drawn in pale blue behind top-1, which is never higher.
    above.bar(place, top5, width=0.84 * 0.94, color="#bfe1f5", label="top-5", zorder=0.5)
    for name, others in (references or {}).items():
        top1 = {row.label: 100 * row.top1 for row in others}
        lines = [top1[row.label] for row in drawn]
        colour = reference_style(name)["color"]
        above.hlines(lines, place - 0.4, place + 0.4, colors=colour, linewidth=1.6,
                     label=f"{name}, top-1")  # fmt: skip
    above.set(ylabel="right (%)", ylim=(0, 100))
    legend_above(above)
    left_out = f"the {len(drawn)} most frequent of {len(rows)}"
    below.set(ylabel="val objects", xlabel="" if len(rows) == len(drawn) else left_out)
    return figure


def confusion_figure(
    records: Records, names: Sequence[str], *, most: int = 20, more: int = 6
) -> Figure:
    """Draw the confusion matrix of the most frequent classes; same options as `matrix_figure`."""
    matrix = confusion_matrix(records)
    rows = [f"{name} ({n})" for name, n in zip(names, matrix.sum(axis=1), strict=True)]
    figure = matrix_figure(matrix, names, rows, most=most, more=more)
    figure.axes[0].set_ylabel("hidden (val objects)")
    return figure


def matrix_figure(
    matrix: Array, names: Sequence[str], rows: Sequence[str], *, most: int = 20, more: int = 6
) -> Figure:
    """Draw a confusion matrix in percent of each row; rows are true, columns predicted classes.

    Shows the `most` frequent classes, then up to `more` columns of other frequently predicted
    classes, then "any other". `names` label the columns, `rows` the rows.
    """
    support = matrix.sum(axis=1)
    order = np.argsort(-support, kind="stable")[: min(most, int((support > 0).sum()))]
    elsewhere = matrix[order].sum(axis=0)
    elsewhere[order] = 0
    further = np.argsort(-elsewhere, kind="stable")[: min(more, int((elsewhere > 0).sum()))]
    columns = np.concatenate([order, further])
    inside = matrix[np.ix_(order, columns)]
    others = support[order] - inside.sum(axis=1)
    table = np.column_stack([inside, others]) if others.any() else inside
    fractions = table / support[order][:, None]
    side = 0.36 * len(order)
    size = (side + 0.36 * len(further) + 2.6, side + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if table.shape[1] > len(order):
        axes.axvline(len(order) - 0.5, color="white", linewidth=4)
    for row, column in zip(*np.nonzero(fractions >= 0.005), strict=True):
        fraction = fractions[row, column]
        axes.text(column, row, f"{100 * fraction:.0f}", ha="center", va="center", fontsize=6.5,
                  color="white" if fraction > _DARK else INK)  # fmt: skip
    predicted = [*(names[c] for c in columns), "any other"][: table.shape[1]]
    axes.set_xticks(np.arange(len(predicted)), predicted, rotation=90, fontsize=7.5)
    axes.set_yticks(np.arange(len(order)), [rows[c] for c in order], fontsize=7.5)
    axes.set_xlabel("predicted (% of the row)")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    return figure


def beyond_prior_figure(
    pairs: Sequence[Confusion], names: Sequence[str], *, most: int = 15
) -> Figure:
    """Draw the first `most` confusions beside the frequency expected from the class prior."""
    drawn = list(pairs)[:most]
    figure, axes = new_figure(6.0, 1.1 + 0.24 * max(len(drawn), 4))
    place = np.arange(len(drawn))
    axes.barh(
        place, [100 * pair.fraction for pair in drawn], height=0.7, color=ORANGE, label="predicted"
    )
    expected = [100 * pair.expected for pair in drawn]
    axes.vlines(expected, place - 0.42, place + 0.42, colors="black", linewidth=1.6,
                label="drawn from the class prior")  # fmt: skip
    for row, pair in enumerate(drawn):
        text = f"{pair.count} objects, {pair.lift:.1f} times the prior"
        axes.text(100 * max(pair.fraction, pair.expected) + 0.5, row, text, va="center", fontsize=7,
                  color=INK)  # fmt: skip
    labels = [f"{names[pair.true]} predicted as {names[pair.predicted]}" for pair in drawn]
    axes.set_yticks(place, labels, fontsize=8)
    widest = max((max(pair.fraction, pair.expected) for pair in drawn), default=0.5)
    axes.set(xlim=(0, 155 * widest), ylim=(max(len(drawn), 1) - 0.4, -0.6))
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(100, 155 * widest)])
    axes.set_xlabel("fraction of the class's objects (%)")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axes.tick_params(axis="y", length=0)
    if drawn:
        legend_above(axes)
    else:
        axes.text(0.5, 0.5, "no confusion is more frequent than under the prior",
                  transform=axes.transAxes, ha="center", color=GREY)  # fmt: skip
    return figure
